//! Changes the size of a process's terminal.

use super::Container;
use crate::error::Result;
use crate::streams::stdio::WindowSize;

impl Container {
    /// A process without a terminal, or one that has hung up, takes any size.
    pub(crate) fn resize(&self, exec_id: &str, size: WindowSize) -> Result<()> {
        self.lock().process(&self.id, exec_id)?.controls.resize(size)
    }
}
