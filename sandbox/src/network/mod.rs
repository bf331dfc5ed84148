//! A sandbox's network: what a network namespace has, carried into the guest.
//!
//! Each interface of the namespace gets a tap beside it, and what arrives at one leaves by the other. The interface
//! itself stays as it is, with its addresses, so any CNI plugin, and any policy on the host's side of it, works as it
//! does without a VM. The guest gets an interface of the same name, address and size for each, with the same addresses,
//! routes and neighbours.
//!
//! ```text
//!   CNI's end ─── eth0 ──(ingress: redirect)──▶ hull0 ───▶ virtio-net of the guest
//!                  ▲                              │
//!                  └───────(redirect: ingress)────┘
//! ```
//!
//! **Ends.** Taps go with their last descriptor, which the VMM has. The filters are removed when [`Attachment`] is dropped. An
//! owner that is killed leaves the filter at the interface, and a note in its directory by which [`sweep`] finds it; the next
//! sandbox that gets the namespace removes it too.
//!
//! **Loopback.** Connections to a loopback address of the namespace, which no filter sees, are passed on by the owner:
//! see [`forward`].
//!
//! **Threads.** A namespace is entered by a thread that ends afterwards. What is done later goes through a socket that the
//! thread leaves behind, which keeps speaking of that namespace.

mod describe;
mod error;
mod forward;
mod netlink;
mod redirect;
mod sysctls;

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use hull_protocol::agent as wire;
use hull_sandbox_sys::tap::{self, Tap};
use hull_vmm_api::config::{MAX_NET_QUEUES, MacAddress};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use rustix::fs::{Mode, OFlags};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde::{Deserialize, Serialize};

use self::describe::Link;
pub use self::error::NetworkError;
use self::forward::Forwarding;
use self::netlink::Netlink;
use self::redirect::Found;

/// Most interfaces of a sandbox: half of the places on the guest's bus.
const MAX_INTERFACES: usize = 16;
/// How taps are named; the kernel fills in a number.
const TAP_PATTERN: &str = "hull%d";
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
}

/// A tap for the VMM.
#[derive(Debug)]
pub(crate) struct TapInterface {
    pub(crate) queues: Vec<OwnedFd>,
    pub(crate) mac: MacAddress,
    pub(crate) mtu: Option<u16>,
}

/// A namespace whose traffic goes to a sandbox, until this is dropped.
#[derive(Debug)]
pub(crate) struct Attachment {
    netlink: Netlink,
    /// Indices of interfaces that may have a filter.
    redirected: Vec<u32>,
    taps: Vec<TapInterface>,
    description: wire::Network,
    /// None where the host's kernel cannot.
    forwarding: Option<Forwarding>,
    forwarded: Option<forward::Running>,
    note: PathBuf,
}

/// What [`sweep`] needs to know.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Note {
    namespace: PathBuf,
    /// The namespace's identity: another one may come to have the same path.
    identity: (u64, u64),
    interfaces: Vec<u32>,
}

/// Takes all interfaces of the namespace at `path` for the sandbox whose directory is `dir`, with up to this many queues
/// each.
pub(crate) fn attach(path: &Path, queues: usize, dir: &Path) -> Result<Attachment, NetworkError> {
    let namespace = open(path)?;
    let identity = identity(&namespace).map_err(|source| NetworkError::Open { path: path.to_owned(), source })?;
    let own = std::fs::File::open("/proc/thread-self/ns/net").and_then(|own| self::identity(&own));
    if own.is_ok_and(|own| own == identity) {
        return Err(NetworkError::Host(path.to_owned()));
    }
    let note = Note { namespace: path.to_owned(), identity, interfaces: Vec::new() };
    let queues = queues.clamp(1, MAX_NET_QUEUES);
    inside(path, &namespace, || {
        let mut attachment = take(note, queues, dir.join(NOTE))?;
        attachment.forwarding = Forwarding::open(&namespace)
            .inspect_err(|error| {
                tracing::warn!("connections to 127.0.0.1 in {} do not reach the guest: {error}", path.display());
            })
            .ok();
        Ok(attachment)
    })?
}

/// Undoes what the dead owner of the sandbox whose directory is `dir` did to a namespace. Trouble is logged: the namespace
/// is somebody else's, and most often gone.
pub(crate) fn sweep(dir: &Path) {
    let path = dir.join(NOTE);
    let Ok(json) = std::fs::read(&path) else { return };
    let Ok(note) = serde_json::from_slice::<Note>(&json) else {
        tracing::warn!("{} is damaged; its network is left as it is", path.display());
        return;
    };
    let Ok(namespace) = open(&note.namespace) else { return };
    if identity(&namespace).is_ok_and(|identity| identity != note.identity) {
        return;
    }
    let undone = inside(&note.namespace, &namespace, || {
        let mut netlink = Netlink::open().map_err(namespace_step("open a netlink socket"))?;
        remove_all(&mut netlink, &note.interfaces);
        Ok(())
    });
    if let Err(error) = undone.flatten() {
        tracing::warn!("left behind: {error}");
    }
}

fn namespace_step(step: &'static str) -> impl Fn(io::Error) -> NetworkError {
    move |source| NetworkError::Namespace { step, source }
}

fn interface_step<'a>(name: &'a str, step: &'static str) -> impl Fn(io::Error) -> NetworkError + 'a {
    move |source| NetworkError::Interface { name: name.to_owned(), step, source }
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

/// In the namespace: reads what is there, and puts a tap beside each interface.
fn take(mut note: Note, queues: usize, note_path: PathBuf) -> Result<Attachment, NetworkError> {
    let mut netlink = Netlink::open().map_err(namespace_step("open a netlink socket"))?;
    let links = chosen(describe::links(&mut netlink).map_err(namespace_step("list the interfaces"))?)?;
    let mut description =
        describe::describe(&mut netlink, &links).map_err(namespace_step("read addresses, routes and neighbours"))?;
    description.sysctls = sysctls::read(links.iter().map(|link| link.name.as_str()));
    for link in &links {
        let found = redirect::look(&mut netlink, link.index).map_err(interface_step(&link.name, "read its filters"))?;
        match found {
            Found::Nothing => {}
            Found::Live => return Err(NetworkError::Taken(link.name.clone())),
            Found::Stale => redirect::remove(&mut netlink, link.index)
                .map_err(interface_step(&link.name, "remove the filter that a dead sandbox left"))?,
        }
    }
    note.interfaces = links.iter().map(|link| link.index).collect();
    write_note(&note_path, &note)?;
    let mut attachment = Attachment {
        netlink,
        redirected: note.interfaces,
        taps: Vec::new(),
        description,
        forwarding: None,
        forwarded: None,
        note: note_path,
    };
    for link in &links {
        let tap = attachment.add_tap(link, queues)?;
        attachment.taps.push(tap);
    }
    Ok(attachment)
}

/// The interfaces that the guest is to have. Those that are down carry nothing, such as the tunnels that some modules put
/// into every namespace.
fn chosen(links: Vec<Link>) -> Result<Vec<Link>, NetworkError> {
    let up: Vec<u32> = links.iter().filter(|link| link.is_up).map(|link| link.index).collect();
    let unsupported = |link: &Link, reason| Err(NetworkError::Unsupported { name: link.name.clone(), reason });
    let mut chosen = Vec::new();
    for link in links {
        // The bridge or bond above it is taken instead.
        if link.is_loopback || !link.is_up || link.controller.is_some() {
            continue;
        }
        if !link.is_ethernet || link.mac.len() != 6 {
            return unsupported(&link, "it is not an Ethernet interface; take it down or out of the namespace");
        }
        if link.lower.is_some_and(|lower| up.contains(&lower)) {
            return unsupported(&link, "it sits on another interface of the namespace; make it on the host instead");
        }
        chosen.push(link);
    }
    if chosen.len() > MAX_INTERFACES {
        return Err(NetworkError::TooMany { found: chosen.len(), most: MAX_INTERFACES });
    }
    Ok(chosen)
}

fn write_note(path: &Path, note: &Note) -> Result<(), NetworkError> {
    let json = serde_json::to_vec(note).map_err(io::Error::from);
    json.and_then(|json| std::fs::write(path, json))
        .map_err(|source| NetworkError::Note { path: path.to_owned(), source })
}

impl Attachment {
    /// The taps, in the order in which the description has the interfaces. Once.
    pub(crate) fn take_taps(&mut self) -> Vec<TapInterface> {
        std::mem::take(&mut self.taps)
    }

    /// The addresses of global scope in the description.
    pub(crate) fn addresses(&self) -> Vec<IpAddr> {
        let addresses = self.description.interfaces.iter().flat_map(|interface| &interface.addresses);
        let octets = addresses.filter(|address| address.scope == 0).map(|address| &address.address[..]);
        let parse = |octets: &[u8]| match *octets {
            [a, b, c, d] => Some(IpAddr::from([a, b, c, d])),
            _ => <[u8; 16]>::try_from(octets).ok().map(IpAddr::from),
        };
        octets.filter_map(parse).collect()
    }

    /// What the guest is to have. Once.
    pub(crate) fn take_description(&mut self) -> wire::Network {
        std::mem::take(&mut self.description)
    }

    /// Passes connections to the namespace's loopback addresses on to the guest behind the VMM's socket at `socket`, from
    /// now on. In a tokio runtime.
    pub(crate) fn forward(&mut self, socket: &Path) {
        let started = self.forwarding.take().map(|forwarding| forwarding.start(socket.to_owned())).transpose();
        match started {
            Ok(running) => self.forwarded = running,
            Err(error) => tracing::warn!("connections to 127.0.0.1 do not reach the guest: {error}"),
        }
    }

    /// Makes a tap beside an interface and joins the two.
    fn add_tap(&mut self, link: &Link, queues: usize) -> Result<TapInterface, NetworkError> {
        let step = |step| interface_step(&link.name, step);
        let mac = <[u8; 6]>::try_from(&link.mac[..]).ok().and_then(|mac| MacAddress::try_from(mac).ok());
        let mac = mac.ok_or(NetworkError::Unsupported {
            name: link.name.clone(),
            reason: "its address is not that of one interface; give it another one",
        })?;
        let Tap { name, queues } = tap::create(TAP_PATTERN, queues).map_err(step("make a tap beside it"))?;
        let tap = describe::links(&mut self.netlink)
            .and_then(|links| links.into_iter().find(|link| link.name == name).ok_or(io::ErrorKind::NotFound.into()))
            .map_err(step("find the tap beside it"))?
            .index;
        sysctls::disable_ipv6(&name).map_err(step("keep the tap beside it from speaking IPv6"))?;
        let mut change = LinkMessage::default();
        change.header.index = tap;
        change.header.flags = LinkFlags::Up;
        change.header.change_mask = LinkFlags::Up;
        change.attributes.push(LinkAttribute::Mtu(link.mtu));
        self.netlink
            .call(RouteNetlinkMessage::SetLink(change), 0)
            .map_err(step("bring up the tap beside it with its MTU"))?;
        // First the way out, so that the first packet that comes in finds one for its answer.
        redirect::add(&mut self.netlink, tap, link.index).map_err(step("redirect the guest's traffic to it"))?;
        redirect::add(&mut self.netlink, link.index, tap).map_err(step("redirect its traffic to the guest"))?;
        Ok(TapInterface { queues, mac, mtu: u16::try_from(link.mtu).ok() })
    }
}

impl Drop for Attachment {
    /// Lets the interfaces go. The taps go with the VMM.
    fn drop(&mut self) {
        remove_all(&mut self.netlink, &self.redirected);
        // Gone with the sandbox's directory at the latest.
        let _ = std::fs::remove_file(&self.note);
    }
}

fn remove_all(netlink: &mut Netlink, indices: &[u32]) {
    for &index in indices {
        match redirect::remove(netlink, index) {
            // An interface that has gone has taken its filters with it.
            Err(error) if rustix::io::Errno::from_io_error(&error) == Some(rustix::io::Errno::NODEV) => {}
            Err(error) => tracing::warn!("the filter at interface {index} is left behind: {error}"),
            Ok(()) => {}
        }
    }
}

#[cfg(test)]
mod tests;
