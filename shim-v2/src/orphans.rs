//! What programs that the daemon starts leave running, such as a logging program that goes to the background: the daemon is a subreaper,
//! so these become its children when their parents end, and it is who must wait for them.

use std::io;
use std::time::Duration;

use hull_sandbox_sys::children::reap_orphans;
use rustix::process::{getpid, set_child_subreaper};
use tokio::signal::unix::{SignalKind, signal};

/// After that, a child of the daemon's own that has ended is looked for again: its exit status is taken by whoever waits for it.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// Has orphans come to this process, and collects them when they end. In a tokio runtime, and before there are children.
pub(crate) fn adopt() -> io::Result<()> {
    // First, so that no end is missed.
    let mut ended = signal(SignalKind::child())?;
    set_child_subreaper(Some(getpid()))?;
    tokio::spawn(async move {
        // Several ends can be told at once, so each time all are looked at.
        while ended.recv().await.is_some() {
            loop {
                match reap_orphans() {
                    Ok(true) => break,
                    Ok(false) => tokio::time::sleep(RETRY_INTERVAL).await,
                    Err(error) => {
                        tracing::warn!("cannot wait for children: {error}");
                        break;
                    }
                }
            }
        }
    });
    Ok(())
}
