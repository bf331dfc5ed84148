//! A sandbox's network: what a network namespace has, carried into the guest.
//!
//! Each interface of the namespace gets a tap beside it, and what arrives at one leaves by the other. The interface
//! itself stays as it is, with its addresses, so any CNI plugin, and any policy on the host's side of it, works as it
//! does without a VM. The guest gets an interface of the same name, address and size for each, with the same addresses,
//! routes and neighbours. Its own loopback interface gets what the namespace's has beyond what any has.
//!
//! ```text
//!   CNI's end ─── eth0 ──(ingress: redirect)──▶ hull0 ───▶ virtio-net of the guest
//!                  ▲                              │
//!                  └───────(redirect: ingress)────┘
//! ```
//!
//! Where there is no namespace, passt can carry the guest's packets: see `user`.
//!
//! **Ends.** Taps go with their last descriptor, which the VMM has. The filters are removed when `Taken` is dropped. An
//! owner that is killed leaves the filter at the interface, and a note in its directory by which `sweep` finds it; the next
//! sandbox that gets the namespace removes it too.
//!
//! **Loopback.** Connections and datagrams to a loopback address of the namespace, which no filter sees, are passed on by
//! the owner: see `forward` and `datagrams`.
//!
//! **Changes.** Interfaces, addresses, routes and rules that come or go later are carried over too: see `follow`.
//!
//! **Threads.** A namespace is entered by a thread that ends afterwards. What is done later goes through a socket that the
//! thread leaves behind, which keeps speaking of that namespace.

mod attachment;
pub mod cni;
mod datagrams;
mod describe;
mod error;
mod follow;
mod forward;
mod netlink;
mod redirect;
mod rules;
mod sysctls;
mod user;

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use hull_protocol::agent as wire;
use hull_vmm_api::config::MAX_NET_QUEUES;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkFlags, LinkMessage};
use rustix::fs::{Mode, OFlags};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde::{Deserialize, Serialize};

pub(crate) use self::attachment::{HostEnd, device_name};
use self::attachment::{Place, Taken, remove_all, take};
use self::cni::{Cni, CniNote, PortMapping};
use self::describe::LOOPBACK;
pub use self::error::NetworkError;
use self::error::namespace_step;
use self::netlink::Netlink;
use self::user::User;
pub use self::user::UserError;
use crate::agent::Agent;

/// The loopback interface is the first of every namespace.
const LOOPBACK_INDEX: u32 = 1;
/// The file in a sandbox's directory that says what is to be undone.
const NOTE: &str = "network.json";

/// Where a sandbox's network comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Network {
    /// Nowhere: the guest has a loopback interface.
    #[default]
    None,
    /// Every interface of this network namespace but its loopback, given by a path such as `/run/netns/NAME`.
    Namespace(PathBuf),
    /// A new namespace, in which the plugins of a CNI configuration make an interface.
    Cni {
        /// The configuration's name.
        name: String,
        /// Ports of the host that lead to the sandbox.
        ports: Vec<PortMapping>,
    },
    /// A program without privileges, passt, that makes the guest's connections on the host.
    User {
        /// Ports of the host that lead to the sandbox.
        ports: Vec<PortMapping>,
    },
}

/// A network in the hands of a sandbox, until this is dropped.
#[derive(Debug)]
pub(crate) struct Attachment {
    ends: Vec<HostEnd>,
    description: wire::Network,
    held: Held,
}

/// What a network comes from.
#[derive(Debug)]
enum Held {
    Namespace(Box<Taken>),
    User(User),
}

impl Attachment {
    /// The host's ends, in the order in which the description has the interfaces, the loopback interface aside. Once.
    pub(crate) fn take_ends(&mut self) -> Vec<HostEnd> {
        std::mem::take(&mut self.ends)
    }

    /// What the guest is to have.
    pub(crate) fn description(&self) -> &wire::Network {
        &self.description
    }

    /// The addresses of global scope in the description, but for those of the loopback interface: by these nobody outside
    /// knows the sandbox without a route of its own.
    pub(crate) fn addresses(&self) -> Vec<IpAddr> {
        let interfaces = self.description.interfaces.iter().filter(|interface| interface.name != LOOPBACK);
        let addresses = interfaces.flat_map(|interface| &interface.addresses);
        let octets = addresses.filter(|address| address.scope == 0).map(|address| &address.address[..]);
        let parse = |octets: &[u8]| match *octets {
            [a, b, c, d] => Some(IpAddr::from([a, b, c, d])),
            _ => <[u8; 16]>::try_from(octets).ok().map(IpAddr::from),
        };
        octets.filter_map(parse).collect()
    }

    /// What the network's maker wants for name servers, as a resolv.conf; empty where it says nothing.
    pub(crate) fn resolv_conf(&self) -> String {
        match &self.held {
            Held::Namespace(taken) => taken.resolv_conf(),
            Held::User(user) => user.resolv_conf(),
        }
    }

    /// Carries over to the guest, whose agent has been told of the description and whose VMM serves these sockets, what
    /// happens in the namespace from now on. In a tokio runtime.
    pub(crate) fn serve(&mut self, agent: &Agent, vsock: &Path, control: &Path) {
        if let Held::Namespace(taken) = &mut self.held {
            taken.forward(vsock);
            taken.follow(agent, self.description.clone(), control.to_owned());
        }
    }
}

/// What `sweep` needs to know.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Note {
    /// Of a namespace that outlives its sandbox.
    redirected: Option<Redirected>,
    cni: Option<CniNote>,
}

/// Interfaces that were taken.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Redirected {
    namespace: PathBuf,
    /// The namespace's identity: another one may come to have the same path.
    identity: (u64, u64),
    interfaces: Vec<u32>,
}

/// Takes the network for the sandbox `id`, whose directory is `dir`, with up to this many queues for each interface.
pub(crate) fn attach(
    network: &Network,
    id: &str,
    queues: usize,
    dir: &Path,
) -> Result<Option<Attachment>, NetworkError> {
    let (queues, note) = (queues.clamp(1, MAX_NET_QUEUES), dir.join(NOTE));
    match network {
        Network::None => Ok(None),
        Network::Namespace(path) => attach_namespace(path, queues, note).map(Some),
        Network::Cni { name, ports } => attach_cni(id, name, ports, queues, dir).map(Some),
        Network::User { ports } => {
            let (user, end, description) = User::start(ports)?;
            Ok(Some(Attachment { ends: vec![end], description, held: Held::User(user) }))
        }
    }
}

fn attach_namespace(path: &Path, queues: usize, note: PathBuf) -> Result<Attachment, NetworkError> {
    let namespace = open(path)?;
    let identity = identity(&namespace).map_err(|source| NetworkError::Open { path: path.to_owned(), source })?;
    let own = std::fs::File::open("/proc/thread-self/ns/net").and_then(|own| self::identity(&own));
    if own.is_ok_and(|own| own == identity) {
        return Err(NetworkError::Host(path.to_owned()));
    }
    let (taken, ends, description) = take(Place::new(path, namespace, queues, note, Some(identity)))?;
    Ok(Attachment { ends, description, held: Held::Namespace(Box::new(taken)) })
}

fn attach_cni(
    id: &str,
    name: &str,
    ports: &[PortMapping],
    queues: usize,
    dir: &Path,
) -> Result<Attachment, NetworkError> {
    let note = dir.join(NOTE);
    let sandboxes = dir.parent().unwrap_or(dir);
    let mut cni = Cni::find(id, name, ports, make_namespace().map_err(NetworkError::Make)?, sandboxes)?;
    let write = |cni: &Cni| write_note(&note, &Note { redirected: None, cni: Some(cni.note().clone()) });
    // Before: what plugins do half-way is to be undone too. After: with their result they can undo more.
    write(&cni)?;
    cni.add()?;
    write(&cni)?;
    // The namespace goes with its owner, and the filters with it, so the note stays as it is.
    let namespace = cni.namespace().try_clone().map_err(NetworkError::Make)?;
    let (mut taken, ends, description) = take(Place::new(&cni.path(), namespace, queues, note, None))?;
    taken.cni = Some(cni);
    Ok(Attachment { ends, description, held: Held::Namespace(Box::new(taken)) })
}

/// Makes a network namespace that lives as long as it is open, or something is in it.
fn make_namespace() -> io::Result<OwnedFd> {
    let thread = std::thread::Builder::new().name("network".to_owned()).spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)?;
        let mut loopback = LinkMessage::default();
        loopback.header.index = LOOPBACK_INDEX;
        loopback.header.flags = LinkFlags::Up;
        loopback.header.change_mask = LinkFlags::Up;
        Netlink::open()?.call(RouteNetlinkMessage::SetLink(loopback), 0)?;
        std::fs::File::open("/proc/thread-self/ns/net").map(OwnedFd::from)
    });
    thread?.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Undoes what the dead owner of the sandbox whose directory is `dir` did. Trouble is logged: the namespace is somebody
/// else's, and most often gone.
pub(crate) fn sweep(dir: &Path) {
    let path = dir.join(NOTE);
    let Ok(json) = std::fs::read(&path) else { return };
    let Ok(note) = serde_json::from_slice::<Note>(&json) else {
        tracing::warn!("{} is damaged; its network is left as it is", path.display());
        return;
    };
    if let Some(redirected) = &note.redirected {
        sweep_namespace(redirected);
    }
    if let Some(note) = &note.cni {
        cni::sweep(note);
    }
}

fn sweep_namespace(redirected: &Redirected) {
    let Ok(namespace) = open(&redirected.namespace) else { return };
    if identity(&namespace).is_ok_and(|identity| identity != redirected.identity) {
        return;
    }
    let undone = inside(&redirected.namespace, &namespace, || {
        let mut netlink = Netlink::open().map_err(namespace_step("open a netlink socket"))?;
        remove_all(&mut netlink, &redirected.interfaces);
        Ok(())
    });
    if let Err(error) = undone.flatten() {
        tracing::warn!("left behind: {error}");
    }
}

/// Whether a network of the kind [`Network::User`] can be had here.
#[must_use]
pub fn has_user() -> bool {
    user::program().is_some()
}

fn open(path: &Path) -> Result<OwnedFd, NetworkError> {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| NetworkError::Open { path: path.to_owned(), source: errno.into() })
}

fn identity(namespace: &impl AsFd) -> io::Result<(u64, u64)> {
    let stat = rustix::fs::fstat(namespace)?;
    Ok((stat.st_dev, stat.st_ino))
}

/// Does `work` on a thread in the namespace.
fn inside<T: Send>(path: &Path, namespace: &OwnedFd, work: impl FnOnce() -> T + Send) -> Result<T, NetworkError> {
    let enter = |source| NetworkError::Enter { path: path.to_owned(), source };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("network".to_owned()).spawn_scoped(scope, || {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
            Ok(work())
        });
        let outcome = thread.map_err(enter)?.join();
        outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic)).map_err(enter)
    })
}

fn write_note(path: &Path, note: &Note) -> Result<(), NetworkError> {
    let json = serde_json::to_vec(note).map_err(io::Error::from);
    json.and_then(|json| std::fs::write(path, json))
        .map_err(|source| NetworkError::Note { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests;
