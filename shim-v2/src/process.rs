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
use std::sync::{Mutex, PoisonError};
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

#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) container_id: String,
    /// Empty for a container's first.
    pub(crate) exec_id: String,
    pub(crate) stdio: Stdio,
    phase: watch::Sender<Phase>,
    body: Mutex<Body>,
    pumps: Mutex<Option<Pumps>>,
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
            pumps: Mutex::default(),
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
        *self.lock_pumps() = Some(pumps);
    }

    pub(crate) fn close_input(&self) {
        if let Some(pumps) = &*self.lock_pumps() {
            pumps.close_input();
        }
    }

    /// Waits until all output has been carried, and closes the streams.
    pub(crate) async fn finish_streams(&self) {
        let pumps = self.lock_pumps().take();
        if let Some(pumps) = pumps {
            pumps.finish().await;
        }
    }

    fn lock_pumps(&self) -> std::sync::MutexGuard<'_, Option<Pumps>> {
        self.pumps.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
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
}
