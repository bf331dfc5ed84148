//! What can go wrong, and the one place where it becomes a code on the wire.

use hull_sandbox::agent::AgentError;
use hull_sandbox::cgroup::CgroupError;
use hull_sandbox::disks::DiskError;
use hull_sandbox::ext4::Ext4Error;
use hull_sandbox::network::NetworkError;
use hull_sandbox::registry::RegistryError;
use hull_sandbox::root::RootError;
use hull_sandbox::sandbox::SandboxError;
use hull_sandbox::share::ShareError;
use hull_sandbox::vmm::VmmError;
use ttrpc::Code;

/// A request that was not carried out.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// There is no such container or process, or it has ended.
    #[error("{0}")]
    NotFound(String),
    /// The identifier is taken.
    #[error("{0}")]
    Exists(String),
    /// The state does not allow it.
    #[error("{0}")]
    State(String),
    /// A field of the request, of config.json or of an annotation.
    #[error("{0}")]
    Invalid(String),
    /// Something that Hull does not do.
    #[error("{0}")]
    Unsupported(String),
    /// A file or stream on the host.
    #[error("{what}: {source}")]
    Host {
        /// What was being done.
        what: String,
        /// Why it failed.
        source: std::io::Error,
    },
    /// The VM is gone.
    #[error("the pod's virtual machine is gone: {0}")]
    Gone(String),
    /// The sandbox did not come up.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// The guest.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// The pod's cgroup on the host.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// A block device.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The tree that the guest sees.
    #[error(transparent)]
    Share(#[from] ShareError),
    /// A container's root.
    #[error(transparent)]
    Root(#[from] RootError),
}

pub(crate) type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Names the step at which the host's system failed.
    pub(crate) fn host(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Host { what, source }
    }

    /// The gRPC code that containerd acts on.
    pub(crate) fn code(&self) -> Code {
        match self {
            Self::NotFound(_) => Code::NOT_FOUND,
            Self::Exists(_) => Code::ALREADY_EXISTS,
            // Not UNAVAILABLE, which containerd takes for a shim that is gone.
            Self::State(_) | Self::Gone(_) => Code::FAILED_PRECONDITION,
            Self::Invalid(_) => Code::INVALID_ARGUMENT,
            Self::Unsupported(_) => Code::UNIMPLEMENTED,
            Self::Host { source, .. } => of_io(source),
            Self::Sandbox(error) => of_sandbox(error),
            Self::Agent(error) => of_agent(error),
            Self::Cgroup(CgroupError::Version) => Code::FAILED_PRECONDITION,
            Self::Cgroup(CgroupError::Path(_)) => Code::INVALID_ARGUMENT,
            Self::Cgroup(CgroupError::Use { source, .. }) | Self::Disk(DiskError::Open { source, .. }) => of_io(source),
            Self::Disk(DiskError::InUse { .. } | DiskError::NotDirect { .. }) => Code::FAILED_PRECONDITION,
            Self::Disk(DiskError::Control { .. }) => Code::INTERNAL,
            Self::Disk(DiskError::Agent { source, .. }) => of_agent(source),
            Self::Share(error) | Self::Root(RootError::Share(error)) => of_share(error),
            Self::Root(RootError::Empty | RootError::Ext4(Ext4Error::Size(_))) => Code::INVALID_ARGUMENT,
            Self::Root(RootError::Ext4(Ext4Error::NoProgram)) => Code::FAILED_PRECONDITION,
            Self::Root(RootError::Ext4(Ext4Error::Make { source, .. })) => of_io(source),
        }
    }
}

fn of_sandbox(error: &SandboxError) -> Code {
    match error {
        SandboxError::Config(_) => Code::INVALID_ARGUMENT,
        SandboxError::Host(_) => Code::FAILED_PRECONDITION,
        SandboxError::Registry(RegistryError::NameTaken(_)) => Code::ALREADY_EXISTS,
        SandboxError::Registry(RegistryError::State { source, .. }) => of_io(source),
        SandboxError::Registry(_) => Code::INTERNAL,
        SandboxError::Share(error) => of_share(error),
        SandboxError::Vmm(
            VmmError::Open { source, .. } | VmmError::Socket { source, .. } | VmmError::Spawn(source),
        ) => of_io(source),
        SandboxError::Vmm(VmmError::Disk(_) | VmmError::Ended { .. }) | SandboxError::Random(_) => Code::INTERNAL,
        SandboxError::Agent(error) => of_agent(error),
        // A namespace that is not there, or not one, was named wrongly; the rest is what this host lacks.
        SandboxError::Network(NetworkError::Open { .. } | NetworkError::Enter { .. } | NetworkError::Host(_)) => {
            Code::INVALID_ARGUMENT
        }
        SandboxError::Network(NetworkError::Note { source, .. }) => of_io(source),
        SandboxError::Network(_) => Code::FAILED_PRECONDITION,
        SandboxError::BootTimeout { .. } => Code::DEADLINE_EXCEEDED,
        SandboxError::Cancelled => Code::CANCELLED,
    }
}

fn of_agent(error: &AgentError) -> Code {
    match error {
        // What a hostile guest says can be no more than a wrong answer to its own pod; but Unimplemented would make
        // containerd fall back to another version of the interface.
        AgentError::Refused { code: Code::UNIMPLEMENTED | Code::OK | Code::UNAVAILABLE, .. } => Code::INTERNAL,
        AgentError::Refused { code, .. } => *code,
        AgentError::Version { .. } => Code::FAILED_PRECONDITION,
        AgentError::Connect(_) | AgentError::Io(_) | AgentError::Silent { .. } => Code::INTERNAL,
    }
}

fn of_share(error: &ShareError) -> Code {
    match error {
        ShareError::Namespace(source)
        | ShareError::Owners { source, .. }
        | ShareError::Source { source, .. }
        | ShareError::Mount { source, .. }
        | ShareError::Make { source, .. } => of_io(source),
        ShareError::Nodes { .. } => Code::FAILED_PRECONDITION,
    }
}

fn of_io(error: &std::io::Error) -> Code {
    use std::io::ErrorKind;
    match error.kind() {
        // A file that is not there. NOT_FOUND would mean to containerd that the task is unknown.
        ErrorKind::NotFound => Code::FAILED_PRECONDITION,
        ErrorKind::PermissionDenied => Code::PERMISSION_DENIED,
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::OutOfMemory => Code::RESOURCE_EXHAUSTED,
        ErrorKind::InvalidInput | ErrorKind::InvalidFilename => Code::INVALID_ARGUMENT,
        _ => Code::INTERNAL,
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        Self::RpcStatus(ttrpc::get_status(error.code(), error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(code: Code) -> Error {
        AgentError::Refused { code, message: String::new() }.into()
    }

    #[test]
    fn what_containerd_acts_on_has_the_code_that_it_expects() {
        assert_eq!(Error::NotFound(String::new()).code(), Code::NOT_FOUND);
        assert_eq!(Error::Exists(String::new()).code(), Code::ALREADY_EXISTS);
        assert_eq!(Error::Gone(String::new()).code(), Code::FAILED_PRECONDITION);
        assert_eq!(refused(Code::NOT_FOUND).code(), Code::NOT_FOUND);
        let full = Error::host("write")(std::io::ErrorKind::StorageFull.into());
        assert_eq!(full.code(), Code::RESOURCE_EXHAUSTED);
        let taken = SandboxError::Registry(RegistryError::NameTaken("a".into()));
        assert_eq!(Error::from(taken).code(), Code::ALREADY_EXISTS);
    }

    #[test]
    fn a_guest_cannot_make_containerd_fall_back_or_give_the_shim_up() {
        for code in [Code::UNIMPLEMENTED, Code::UNAVAILABLE, Code::OK] {
            assert_eq!(refused(code).code(), Code::INTERNAL);
        }
    }

    #[test]
    fn a_vanished_source_is_not_taken_for_an_unknown_task() {
        let error = ShareError::Source { path: "/gone".into(), source: std::io::ErrorKind::NotFound.into() };
        assert_eq!(Error::from(error).code(), Code::FAILED_PRECONDITION);
        let fifo = Error::host("cannot open the stream")(std::io::ErrorKind::NotFound.into());
        assert_eq!(fifo.code(), Code::FAILED_PRECONDITION);
    }
}
