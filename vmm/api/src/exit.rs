//! How a VMM process ends.

/// The exit status of `hull-vmm`; standard error says the same in words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitCode {
    /// The guest powered off, or somebody asked for the end (control request, `SIGTERM`).
    Stopped = 0,
    /// The VMM failed by itself: an error of the host or of the VMM.
    Failed = 1,
    /// The configuration or the command line was refused; no VM came to be.
    BadConfig = 2,
    /// `/dev/kvm` is missing, may not be used, or lacks what Hull needs.
    NoKvm = 3,
    /// The kernel or initrd could not be loaded.
    BadKernel = 4,
    /// The guest asked for a reset. A guest kernel that panics with `panic=-1` ends so too unless it said so first.
    GuestReset = 10,
    /// The guest's kernel panicked (it told the panic device).
    GuestPanic = 11,
    /// A vCPU shut down by triple fault.
    GuestTripleFault = 12,
    /// KVM could not go on running the guest (internal error, failed entry).
    KvmError = 13,
}

impl ExitCode {
    /// The code that a process status stands for, if it is one of these.
    #[must_use]
    pub fn from_status(status: i32) -> Option<Self> {
        [
            Self::Stopped,
            Self::Failed,
            Self::BadConfig,
            Self::NoKvm,
            Self::BadKernel,
            Self::GuestReset,
            Self::GuestPanic,
            Self::GuestTripleFault,
            Self::KvmError,
        ]
        .into_iter()
        .find(|code| *code as i32 == status)
    }

    /// What happened, as the end of a sentence that starts with "the virtual machine".
    #[must_use]
    pub fn describe(self) -> &'static str {
        match self {
            Self::Stopped => "stopped",
            Self::Failed => "failed: an error of the host or the VMM",
            Self::BadConfig => "was refused: its configuration is not valid",
            Self::NoKvm => "could not start: KVM is missing or may not be used",
            Self::BadKernel => "could not start: its kernel or initrd could not be loaded",
            Self::GuestReset => "reset itself",
            Self::GuestPanic => "ended in a kernel panic",
            Self::GuestTripleFault => "crashed (triple fault)",
            Self::KvmError => "could not be run any further by KVM",
        }
    }
}
