//! Lists the processes of a container.

use std::collections::HashMap;

use rustix::process::Pid;

use super::{Container, INIT};
use crate::error::Result;

impl Container {
    /// Every process, with the id of the exec that started it; empty for all others.
    pub(crate) fn pids(&self) -> Result<Vec<(Pid, String)>> {
        let pids = self.cgroup.pids()?;
        let state = self.lock();
        let execs: HashMap<Pid, &String> = state
            .processes
            .iter()
            .filter(|(id, process)| *id != INIT && process.exit.borrow().is_none())
            .map(|(id, process)| (process.pid, id))
            .collect();
        Ok(pids.into_iter().map(|pid| (pid, execs.get(&pid).map(|id| (*id).clone()).unwrap_or_default())).collect())
    }
}
