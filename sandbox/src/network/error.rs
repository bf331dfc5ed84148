//! What goes wrong with a sandbox's network.

use std::io;
use std::path::PathBuf;

use super::cni::CniError;
use super::user::UserError;

/// A network that a sandbox cannot have.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// There is no namespace at the path.
    #[error("cannot open the network namespace {path}: {source}; was its pod removed meanwhile?")]
    Open {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// What is there is something else, or the caller is not root.
    #[error("cannot enter {path}: {source}; it must be a network namespace, and hull must run as root")]
    Enter {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The namespace is that of the host.
    #[error("{0} is the host's own network, which a sandbox would take away from it; make one with `ip netns add`")]
    Host(PathBuf),
    /// A step that concerns the namespace as a whole.
    #[error("cannot {step} in the network namespace: {source}")]
    Namespace {
        /// What failed, as an infinitive.
        step: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A step that concerns one interface.
    #[error("interface {name}: cannot {step}: {source}{}", advice(.source))]
    Interface {
        /// Its name.
        name: String,
        /// What failed, as an infinitive.
        step: &'static str,
        /// Why.
        source: io::Error,
    },
    /// An interface that cannot be carried into a guest.
    #[error("interface {name}: {reason}")]
    Unsupported {
        /// Its name.
        name: String,
        /// Why not.
        reason: &'static str,
    },
    /// Another sandbox has the interface.
    #[error("interface {0} belongs to another sandbox; end that first, or give this one a namespace of its own")]
    Taken(String),
    /// More interfaces than a guest can have.
    #[error("the network namespace has {found} interfaces; a sandbox takes at most {most}")]
    TooMany {
        /// Those that there are.
        found: usize,
        /// Those that there may be.
        most: usize,
    },
    /// A network that CNI plugins were to make.
    #[error(transparent)]
    Cni(#[from] CniError),
    /// A network that passt was to make.
    #[error(transparent)]
    User(#[from] UserError),
    /// A namespace cannot be made.
    #[error("cannot make a network namespace: {0}; hull must run as root")]
    Make(#[source] io::Error),
    /// The note of what is to be undone cannot be written.
    #[error("cannot note the network in {path}: {source}; is the state directory full?")]
    Note {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// What to do about an error of the kernel's.
fn advice(error: &io::Error) -> &'static str {
    match rustix::io::Errno::from_io_error(error) {
        Some(rustix::io::Errno::NODEV | rustix::io::Errno::NXIO) => {
            "; it vanished while it was being taken, so something else is changing the namespace"
        }
        Some(rustix::io::Errno::NOENT) => {
            "; the host's kernel lacks a part: load the modules tun, sch_ingress, cls_u32 and act_mirred"
        }
        Some(rustix::io::Errno::PERM | rustix::io::Errno::ACCESS) => "; run as root",
        Some(rustix::io::Errno::NFILE | rustix::io::Errno::MFILE | rustix::io::Errno::NOMEM) => {
            "; the host is out of memory or descriptors"
        }
        _ => "",
    }
}

/// Names the step of what concerns a namespace.
pub(super) fn namespace_step(step: &'static str) -> impl Fn(io::Error) -> NetworkError {
    move |source| NetworkError::Namespace { step, source }
}

/// Names the step of what concerns an interface.
pub(super) fn interface_step<'a>(name: &'a str, step: &'static str) -> impl Fn(io::Error) -> NetworkError + 'a {
    move |source| NetworkError::Interface { name: name.to_owned(), step, source }
}
