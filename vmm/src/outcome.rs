//! How the VM ends: decided once, by whoever comes first, and acted on by the main thread.

use std::io;
use std::sync::OnceLock;

use hull_vmm_api::exit::ExitCode;
use vmm_sys_util::eventfd::EventFd;

/// Why a VM ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest powered off.
    PoweredOff,
    /// A control request or `SIGTERM`.
    Stopped,
    /// A control request that wants no more than the end.
    Killed,
    /// The guest asked for a reset.
    Reset,
    /// The guest's kernel panicked.
    Panicked,
    /// A vCPU took a triple fault.
    TripleFault {
        /// Which one.
        cpu: u8,
    },
    /// KVM gave up on a vCPU.
    Kvm {
        /// Which one.
        cpu: u8,
        /// What KVM said.
        what: String,
    },
    /// The VMM itself failed.
    Failed(String),
    /// Whoever started the VMM died.
    Orphaned,
}

impl Outcome {
    /// The process's exit status for it.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::PoweredOff | Self::Stopped | Self::Killed | Self::Orphaned => ExitCode::Stopped,
            Self::Reset => ExitCode::GuestReset,
            Self::Panicked => ExitCode::GuestPanic,
            Self::TripleFault { .. } => ExitCode::GuestTripleFault,
            Self::Kvm { .. } => ExitCode::KvmError,
            Self::Failed(_) => ExitCode::Failed,
        }
    }
}

impl Outcome {
    /// Whether there is time for the devices to write back what the guest gave them.
    #[must_use]
    pub fn is_orderly(&self) -> bool {
        !matches!(self, Self::Killed | Self::Orphaned)
    }
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::PoweredOff => f.write_str("the guest powered off"),
            Self::Stopped | Self::Killed => f.write_str("stopped on request"),
            Self::Reset => f.write_str("the guest asked for a reset; a kernel that panics does so, see its console"),
            Self::Panicked => f.write_str("the guest's kernel panicked, see its console"),
            Self::TripleFault { cpu } => write!(f, "the guest crashed: triple fault on vCPU {cpu}"),
            Self::Kvm { cpu, what } => write!(f, "KVM cannot run vCPU {cpu} any further: {what}"),
            Self::Failed(what) => f.write_str(what),
            Self::Orphaned => f.write_str("whoever started this VM died"),
        }
    }
}

/// The one place where the VM's end is decided.
pub struct Ending {
    outcome: OnceLock<Outcome>,
    decided: EventFd,
}

impl Ending {
    /// Not decided yet.
    ///
    /// # Errors
    ///
    /// When the process may open no more descriptors.
    pub fn new() -> io::Result<Self> {
        Ok(Self { outcome: OnceLock::new(), decided: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)? })
    }

    /// Decides how the VM ends, unless that is decided.
    pub fn end(&self, outcome: Outcome) {
        if self.outcome.set(outcome).is_ok() {
            // Cannot fail: a counter that is written once does not overflow.
            let _ = self.decided.write(1);
        }
    }

    /// What was decided.
    #[must_use]
    pub fn outcome(&self) -> Option<Outcome> {
        self.outcome.get().cloned()
    }

    /// Whether it is decided.
    #[must_use]
    pub fn is_decided(&self) -> bool {
        self.outcome.get().is_some()
    }

    /// Readable once it is decided.
    #[must_use]
    pub fn decided(&self) -> &EventFd {
        &self.decided
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_outcome_stands() {
        let ending = Ending::new().unwrap();
        assert_eq!(ending.outcome(), None);
        ending.end(Outcome::Panicked);
        ending.end(Outcome::Reset);
        assert_eq!(ending.outcome(), Some(Outcome::Panicked));
        assert_eq!(ending.decided().read().unwrap(), 1);
    }
}
