//! `hull kill`: sends a signal.

use hull_sandbox::container::Process;
use hull_sandbox::host::Host;

use crate::Outcome;
use crate::args::Kill;

pub(super) fn run(args: &Kill, host: &Host) -> Outcome {
    let signal = super::parse_signal(&args.signal)?;
    let registry = super::registry(host);
    let runtime = super::runtime()?;
    super::for_each(&args.containers, |reference| {
        let record = super::find_running(&registry, reference)?;
        runtime.block_on(async {
            let agent = super::connect(&registry, &record).await?;
            Process::init(&agent, &record.id).signal(signal, args.all).await?;
            Ok(())
        })
    })
}
