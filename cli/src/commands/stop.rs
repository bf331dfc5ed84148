//! `hull stop`: the stop signal, then after a while the hard way.

use std::time::Duration;

use hull_sandbox::container::Process;
use hull_sandbox::control::{Control, Request};
use hull_sandbox::host::Host;
use hull_sandbox::registry::{Phase, Record, Registry};
use tokio::time::timeout;

use crate::args::Stop;
use crate::{Error, Outcome};

/// How long the guest may take to end its processes after SIGKILL before its VM is ended under it.
const KILL_GRACE: Duration = Duration::from_secs(5);
const SIGKILL: u32 = 9;

pub(super) fn run(args: &Stop, host: &Host) -> Outcome {
    let registry = super::registry(host);
    let runtime = super::runtime()?;
    super::for_each(&args.containers, |reference| {
        let record = registry.find(reference)?;
        if record.phase == Phase::Exited {
            return Ok(());
        }
        runtime.block_on(stop(&registry, &record, Duration::from_secs(args.time)))
    })
}

/// Ends a container and waits until its owner has let go of it.
pub(super) async fn stop(registry: &Registry, record: &Record, patience: Duration) -> Result<(), Error> {
    let (owner_registry, id) = (registry.clone(), record.id.clone());
    let gone = tokio::task::spawn_blocking(move || owner_registry.wait_for_owner(&id));
    let mut gone = std::pin::pin!(gone);
    for (signal, patience) in [(record.stop_signal, patience), (SIGKILL, KILL_GRACE)] {
        if patience.is_zero() {
            continue;
        }
        if let Err(error) = signal_init(registry, record, signal).await {
            tracing::debug!("signal {signal} not sent: {error}");
        }
        if let Ok(gone) = timeout(patience, &mut gone).await {
            return Ok(gone??);
        }
    }
    // Neither program nor guest obeys: the VMM does, and the owner then sees to the rest.
    let control = registry.dir(&record.id).join("control.sock");
    Control::connect(&control)?.call(&Request::Stop { hard: true })?;
    Ok(gone.await??)
}

async fn signal_init(registry: &Registry, record: &Record, signal: u32) -> Result<(), Error> {
    let agent = super::connect(registry, record).await?;
    Ok(Process::init(&agent, &record.id).signal(signal, false).await?)
}
