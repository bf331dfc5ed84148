//! Closes a process's standard input.

use super::Container;
use crate::error::Result;

impl Container {
    /// The process reads everything that has arrived, then the end.
    pub(crate) fn close_stdin(&self, exec_id: &str) -> Result<()> {
        self.lock().process(&self.id, exec_id)?.controls.close_stdin();
        Ok(())
    }
}
