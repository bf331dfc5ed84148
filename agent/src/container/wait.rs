//! Waits for the end of a process.

use super::{Container, no_such_process};
use crate::error::Result;
use crate::events::ExitStatus;

impl Container {
    /// Returns once the process has ended, or at once if it has.
    pub(crate) async fn wait(&self, exec_id: &str) -> Result<ExitStatus> {
        let mut exit = self.lock().process(&self.id, exec_id)?.exit.subscribe();
        // Fails where the process has been removed, which it can only be after its end.
        let _ = exit.wait_for(Option::is_some).await;
        let status = *exit.borrow();
        status.ok_or_else(|| no_such_process(&self.id, exec_id))
    }
}
