//! One process of a pod as containerd sees it.
//!
//! ```text
//! Created ──start──▶ Running ◀──pause, resume──▶ Paused
//!    └───────────────────┴──────── end ────────────┴──▶ Stopped ──delete──▶ gone
//! ```
//!
//! The phase is a watched value, so any number of requests can wait for the end. Whoever changes the phase and tells of it
//! holds `telling` over both, so that no end is told before the start.

use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use hull_protocol::agent::ExitStatus;
use hull_sandbox::container::Process as GuestProcess;
use tokio::sync::watch;

use crate::error::{Error, Result};
use crate::streams::{Pumps, Stdio};

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Exit {
    /// 128 + n where signal n ended it.
    pub(crate) code: u32,
    pub(crate) at: SystemTime,
}

impl Exit {
    /// What is said of processes whose VM is gone: they were killed.
    pub(crate) fn killed() -> Self {
        Self { code: 128 + SIGKILL, at: SystemTime::now() }
    }

    /// Takes the guest's word, within bounds: a code has eight bits, and nothing ends later than now.
    pub(crate) fn of_guest(status: &ExitStatus) -> Self {
        let now = SystemTime::now();
        let at = SystemTime::UNIX_EPOCH.checked_add(Duration::from_nanos(status.exited_at_ns)).unwrap_or(now);
        Self { code: status.code.min(255), at: at.min(now) }
    }
}

pub(crate) const SIGINT: u32 = 2;
pub(crate) const SIGKILL: u32 = 9;
pub(crate) const SIGTERM: u32 = 15;

/// Where a process is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Created,
    Running,
    Paused,
    Stopped(Exit),
}

/// What stands behind a process.
#[derive(Debug)]
pub(crate) enum Body {
    /// Nothing: the pod's own container, whose only work is to be there.
    Nothing,
    /// A process of the guest that exists.
    Guest(GuestProcess),
    /// A process that is to be started, with its `process` object of the OCI specification.
    Planned(Box<oci_spec::runtime::Process>),
}

/// What carries its streams, once they are carried.
#[derive(Debug, Default)]
struct Carrying {
    pumps: Option<Pumps>,
    /// Whether its input is to end: that may be said before it is started.
    is_input_closed: bool,
}

#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) container_id: String,
    /// Empty for a container's first.
    pub(crate) exec_id: String,
    pub(crate) stdio: Stdio,
    phase: watch::Sender<Phase>,
    body: Mutex<Body>,
    carrying: Mutex<Carrying>,
    pub(crate) telling: tokio::sync::Mutex<()>,
    /// Whether it has been told that its container ran out of memory.
    pub(crate) told_oom: AtomicBool,
}

impl Process {
    pub(crate) fn new(container_id: &str, exec_id: &str, stdio: Stdio, body: Body) -> Self {
        Self {
            container_id: container_id.to_owned(),
            exec_id: exec_id.to_owned(),
            stdio,
            phase: watch::Sender::new(Phase::Created),
            body: Mutex::new(body),
            carrying: Mutex::default(),
            telling: tokio::sync::Mutex::default(),
            told_oom: AtomicBool::default(),
        }
    }

    /// Its name in messages.
    pub(crate) fn name(&self) -> String {
        if self.exec_id.is_empty() {
            format!("container {}", self.container_id)
        } else {
            format!("process {} of container {}", self.exec_id, self.container_id)
        }
    }

    pub(crate) fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Moves on; the end is final.
    pub(crate) fn set_phase(&self, next: Phase) {
        self.phase.send_if_modified(|phase| match phase {
            Phase::Stopped(_) => false,
            _ => {
                *phase = next;
                true
            }
        });
    }

    /// Its end, if that has come.
    pub(crate) fn exit(&self) -> Option<Exit> {
        match self.phase() {
            Phase::Stopped(exit) => Some(exit),
            _ => None,
        }
    }

    /// Waits for the end.
    pub(crate) async fn wait(&self) -> Exit {
        let mut phases = self.phase.subscribe();
        loop {
            if let Phase::Stopped(exit) = *phases.borrow_and_update() {
                return exit;
            }
            // The sender lives as long as this process, so this does not fail.
            let _ = phases.changed().await;
        }
    }

    /// The guest's process behind this one.
    ///
    /// # Errors
    ///
    /// Fails where there is none yet, or none at all.
    pub(crate) fn guest(&self) -> Result<GuestProcess> {
        match &*self.body.lock().unwrap_or_else(PoisonError::into_inner) {
            Body::Guest(process) => Ok(process.clone()),
            Body::Planned(_) => Err(Error::State(format!("the {} has not been started", self.name()))),
            Body::Nothing => Err(Error::State(format!("the {} is the pod's own and has no process", self.name()))),
        }
    }

    /// What is to be started; none where there is nothing to plan.
    pub(crate) fn plan(&self) -> Option<Box<oci_spec::runtime::Process>> {
        match &*self.body.lock().unwrap_or_else(PoisonError::into_inner) {
            Body::Planned(process) => Some(process.clone()),
            Body::Guest(_) | Body::Nothing => None,
        }
    }

    /// Whether there is a process in the guest, or will be.
    pub(crate) fn is_virtual(&self) -> bool {
        matches!(*self.body.lock().unwrap_or_else(PoisonError::into_inner), Body::Nothing)
    }

    /// Puts the guest's process behind this one.
    pub(crate) fn set_guest(&self, process: GuestProcess, pumps: Pumps) {
        *self.body.lock().unwrap_or_else(PoisonError::into_inner) = Body::Guest(process);
        self.set_pumps(pumps);
    }

    fn set_pumps(&self, pumps: Pumps) {
        let mut carrying = self.lock_carrying();
        if carrying.is_input_closed {
            pumps.close_input();
        }
        carrying.pumps = Some(pumps);
    }

    /// Ends its input once its clients have closed it too.
    pub(crate) fn close_input(&self) {
        let mut carrying = self.lock_carrying();
        carrying.is_input_closed = true;
        if let Some(pumps) = &carrying.pumps {
            pumps.close_input();
        }
    }

    /// Waits until all output has been carried, and closes the streams.
    pub(crate) async fn finish_streams(&self) {
        let pumps = self.lock_carrying().pumps.take();
        if let Some(pumps) = pumps {
            pumps.finish().await;
        }
    }

    fn lock_carrying(&self) -> MutexGuard<'_, Carrying> {
        self.carrying.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;

    use hull_sandbox::container::Connections;
    use tokio::io::AsyncReadExt as _;

    use super::*;

    #[tokio::test]
    async fn an_end_is_final_and_told_to_all_who_wait() {
        let process = Process::new("c", "", Stdio::default(), Body::Nothing);
        process.set_phase(Phase::Running);
        let exit = Exit { code: 3, at: SystemTime::UNIX_EPOCH };
        let (first, ()) = tokio::join!(process.wait(), async { process.set_phase(Phase::Stopped(exit)) });
        process.set_phase(Phase::Running);
        assert_eq!((first, process.wait().await, process.exit()), (exit, exit, Some(exit)));
    }

    #[test]
    fn a_guests_word_on_an_end_is_taken_within_bounds() {
        let status = ExitStatus { code: 70_000, exited_at_ns: u64::MAX, ..Default::default() };
        let exit = Exit::of_guest(&status);
        assert_eq!(exit.code, 255);
        assert!(exit.at <= SystemTime::now());
    }

    #[tokio::test]
    async fn an_input_that_is_closed_before_the_start_ends_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("in");
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        let stdio = Stdio { stdin: path.display().to_string(), ..Stdio::default() };
        let process = Process::new("c", "e", stdio.clone(), Body::Nothing);
        process.close_input();
        let (stdin, program) = UnixStream::pair().unwrap();
        let connections = Connections { stdin: Some(stdin), ..Connections::default() };
        let ends = stdio.open("n", "c", &Arc::default()).await.unwrap();
        process.set_pumps(Pumps::start(connections, ends, false).unwrap());
        program.set_nonblocking(true).unwrap();
        let mut program = tokio::net::UnixStream::from_std(program).unwrap();
        assert_eq!(program.read_to_end(&mut Vec::new()).await.unwrap(), 0);
    }
}
