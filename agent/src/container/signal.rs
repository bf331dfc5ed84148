//! Signals a process of a container, or all of them.

use super::{Container, INIT, no_such_process};
use crate::error::{Error, Result};
use crate::reaper::send_signal;

/// Signals have the numbers 1 to 64 on all architectures that the agent is built for.
const LAST_SIGNAL: u32 = 64;

impl Container {
    pub(crate) fn signal(&self, exec_id: &str, number: u32, all: bool) -> Result<()> {
        if number == 0 || number > LAST_SIGNAL {
            return Err(Error::invalid("signal", format!("{number} is no signal")));
        }
        let number = number as i32;
        if !all {
            return self.signal_one(exec_id, number);
        }
        if exec_id != INIT {
            return Err(Error::invalid("exec_id", "must be empty to signal all processes"));
        }
        if number == libc::SIGKILL {
            return self.cgroup.kill();
        }
        for pid in self.cgroup.pids()? {
            // Who is gone by now needs no signal.
            send_signal(pid, number)?;
        }
        Ok(())
    }

    fn signal_one(&self, exec_id: &str, number: i32) -> Result<()> {
        let pid = self.lock().process(&self.id, exec_id)?.pid;
        if self.reaper.kill(pid, number)? { Ok(()) } else { Err(no_such_process(&self.id, exec_id)) }
    }
}
