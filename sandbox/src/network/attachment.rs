//! The interfaces of one namespace in the hands of a sandbox.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use hull_protocol::agent as wire;
use hull_sandbox_sys::tap::{self, Tap};
use hull_vmm_api::config::{MacAddress, NetBackend};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};

use super::cni::Cni;
use super::describe::{self, LOOPBACK, Link};
use super::error::{NetworkError, interface_step, namespace_step};
use super::follow::{Follower, Following, Known};
use super::forward::{self, Forwarding};
use super::netlink::Netlink;
use super::redirect::{self, Found};
use super::{Note, Redirected, inside, rules, sysctls, write_note};
use crate::agent::Agent;

/// Most interfaces of a sandbox: half of the places on the guest's bus.
pub(super) const MAX_INTERFACES: usize = 16;
/// How taps are named; the kernel fills in a number.
const TAP_PATTERN: &str = "hull%d";

/// The host's end of an interface, for the VMM.
#[derive(Debug)]
pub(crate) struct HostEnd {
    pub(crate) backend: NetBackend,
    pub(crate) queues: Vec<OwnedFd>,
    pub(crate) mac: MacAddress,
    pub(crate) mtu: Option<u16>,
    /// Whether the guest's link is down at first.
    pub(crate) link_down: bool,
}

/// A namespace whose traffic goes to a sandbox, until this is dropped.
#[derive(Debug)]
pub(super) struct Taken {
    netlink: Netlink,
    place: Place,
    joined: Vec<Joined>,
    follower: Option<Follower>,
    following: Option<Following>,
    /// None where the host's kernel cannot.
    forwarding: Option<Forwarding>,
    forwarded: Option<forward::Running>,
    pub(super) cni: Option<Cni>,
}

impl Taken {
    /// What the network's maker wants for name servers, as a resolv.conf; empty where it says nothing.
    pub(super) fn resolv_conf(&self) -> String {
        self.cni.as_ref().map(Cni::resolv_conf).unwrap_or_default()
    }

    /// Tells the agent, which was told of the description, and the VMM of what changes in the namespace from now on. In a
    /// tokio runtime.
    pub(super) fn follow(&mut self, agent: &Agent, description: wire::Network, control: PathBuf) {
        let Some(follower) = self.follower.take() else { return };
        let start = self.place.share().and_then(|place| {
            let known = Known { place, joined: self.joined.clone(), told: description, agent: agent.clone(), control };
            follower.start(known)
        });
        match start {
            Ok(following) => self.following = Some(following),
            Err(error) => tracing::warn!("changes of the network are not followed: {error}"),
        }
    }

    /// Passes connections to the namespace's loopback addresses on to the guest behind the VMM's socket at `socket`, from
    /// now on. In a tokio runtime.
    pub(super) fn forward(&mut self, socket: &Path) {
        let started = self.forwarding.take().map(|forwarding| forwarding.start(socket.to_owned())).transpose();
        match started {
            Ok(running) => self.forwarded = running,
            Err(error) => tracing::warn!("connections to 127.0.0.1 do not reach the guest: {error}"),
        }
    }
}

impl Drop for Taken {
    /// Lets the interfaces go. The taps go with the VMM.
    fn drop(&mut self) {
        drop(self.following.take());
        remove_all(&mut self.netlink, &self.place.redirected());
        drop(self.cni.take());
        // Gone with the sandbox's directory at the latest.
        let _ = std::fs::remove_file(&self.place.note);
    }
}

/// An interface and the tap beside it.
#[derive(Clone, Debug)]
pub(super) struct Joined {
    pub(super) link: Link,
    /// The tap's index.
    pub(super) tap: u32,
    /// What the guest's device allows for: the MTU at which the interface came.
    pub(super) most_mtu: u32,
    /// The device's name in the VMM.
    pub(super) device: String,
}

/// A namespace, and how its interfaces are taken.
#[derive(Debug)]
pub(super) struct Place {
    path: PathBuf,
    namespace: OwnedFd,
    /// Most queues of an interface.
    queues: usize,
    /// Where it is noted which filters are to be removed after a death.
    note: PathBuf,
    /// The namespace's identity, if it outlives the sandbox.
    identity: Option<(u64, u64)>,
    /// Indices of interfaces that may have a filter.
    redirected: Arc<Mutex<Vec<u32>>>,
}

impl Place {
    pub(super) fn new(
        path: &Path,
        namespace: OwnedFd,
        queues: usize,
        note: PathBuf,
        identity: Option<(u64, u64)>,
    ) -> Self {
        Self { path: path.to_owned(), namespace, queues, note, identity, redirected: Arc::default() }
    }

    /// The same place in other hands.
    fn share(&self) -> io::Result<Self> {
        let Self { path, namespace, queues, note, identity, redirected } = self;
        Ok(Self {
            path: path.clone(),
            namespace: namespace.try_clone()?,
            queues: *queues,
            note: note.clone(),
            identity: *identity,
            redirected: redirected.clone(),
        })
    }

    fn redirected(&self) -> Vec<u32> {
        self.redirected.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Changes which interfaces may have a filter, and notes it.
    fn change(&self, change: impl FnOnce(&mut Vec<u32>)) -> Result<(), NetworkError> {
        let mut redirected = self.redirected.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut redirected);
        let Some(identity) = self.identity else { return Ok(()) };
        let noted = Redirected { namespace: self.path.clone(), identity, interfaces: redirected.clone() };
        write_note(&self.note, &Note { redirected: Some(noted), cni: None })
    }

    /// Removes the filter at an interface that was not taken in the end.
    pub(super) fn let_go(&self, netlink: &mut Netlink, index: u32) {
        remove_all(netlink, &[index]);
        // There is an error to tell of already, and a number too many in the note does no harm.
        let _ = self.forget(index);
    }

    /// Takes note that an interface has no filter any more.
    pub(super) fn forget(&self, index: u32) -> Result<(), NetworkError> {
        self.change(|redirected| redirected.retain(|other| *other != index))
    }

    /// Joins an interface that has come; answers its sysctls, too.
    pub(super) fn join(
        &self,
        link: &Link,
        device: String,
    ) -> Result<(Joined, HostEnd, HashMap<String, String>), NetworkError> {
        inside(&self.path, &self.namespace, || {
            let mut netlink = Netlink::open().map_err(namespace_step("open a netlink socket"))?;
            clear(&mut netlink, link)?;
            self.change(|redirected| redirected.push(link.index))?;
            let (joined, end) = self.add_tap(&mut netlink, link, device).inspect_err(|_| {
                self.let_go(&mut netlink, link.index);
            })?;
            let mut sysctls = sysctls::read(std::iter::once(link.name.as_str()));
            sysctls.retain(|path, _| path.split('/').any(|part| part == link.name));
            Ok((joined, end, sysctls))
        })?
    }

    /// Makes a tap beside an interface and joins the two, in the namespace.
    fn add_tap(&self, netlink: &mut Netlink, link: &Link, device: String) -> Result<(Joined, HostEnd), NetworkError> {
        let step = |step| interface_step(&link.name, step);
        let mac = <[u8; 6]>::try_from(&link.mac[..]).ok().and_then(|mac| MacAddress::try_from(mac).ok());
        let mac = mac.ok_or(NetworkError::Unsupported {
            name: link.name.clone(),
            reason: "its address is not that of one interface; give it another one",
        })?;
        let Tap { name, queues } = tap::create(TAP_PATTERN, self.queues).map_err(step("make a tap beside it"))?;
        let tap = describe::links(netlink)
            .and_then(|links| links.into_iter().find(|link| link.name == name).ok_or(io::ErrorKind::NotFound.into()))
            .map_err(step("find the tap beside it"))?
            .index;
        sysctls::disable_ipv6(&name).map_err(step("keep the tap beside it from speaking IPv6"))?;
        let mut change = LinkMessage::default();
        change.header.index = tap;
        change.header.flags = LinkFlags::Up;
        change.header.change_mask = LinkFlags::Up;
        change.attributes.push(LinkAttribute::Mtu(link.mtu));
        netlink
            .call(RouteNetlinkMessage::SetLink(change), 0)
            .map_err(step("bring up the tap beside it with its MTU"))?;
        // First the way out, so that the first packet that comes in finds one for its answer.
        redirect::add(netlink, tap, link.index).map_err(step("redirect the guest's traffic to it"))?;
        redirect::add(netlink, link.index, tap).map_err(step("redirect its traffic to the guest"))?;
        let mtu = u16::try_from(link.mtu).ok();
        let end = HostEnd { backend: NetBackend::Tap, queues, mac, mtu, link_down: !link.has_carrier };
        Ok((Joined { link: link.clone(), tap, most_mtu: link.mtu, device }, end))
    }
}

/// Removes Hull's filters at these interfaces; trouble is logged.
pub(super) fn remove_all(netlink: &mut Netlink, indices: &[u32]) {
    for &index in indices {
        match redirect::remove(netlink, index) {
            // An interface that has gone has taken its filters with it.
            Err(error) if rustix::io::Errno::from_io_error(&error) == Some(rustix::io::Errno::NODEV) => {}
            Err(error) => tracing::warn!("the filter at interface {index} is left behind: {error}"),
            Ok(()) => {}
        }
    }
}

/// Takes the interfaces of a namespace.
pub(super) fn take(place: Place) -> Result<(Taken, Vec<HostEnd>, wire::Network), NetworkError> {
    let (path, namespace) = (place.path.clone(), place.share().map_err(NetworkError::Make)?.namespace);
    inside(&path, &namespace, || {
        let mut netlink = Netlink::open().map_err(namespace_step("open a netlink socket"))?;
        let (links, description) = look(&mut netlink)?;
        // From here on, so that nothing is missed between this look and the first announcement.
        let follower = Follower::open().map_err(namespace_step("listen for changes"))?;
        let forwarding = Forwarding::open(&namespace).inspect_err(|error| {
            tracing::warn!("connections to 127.0.0.1 in {} do not reach the guest: {error}", path.display());
        });
        // Before anything is done to them.
        place.change(|redirected| redirected.extend(links.iter().map(|link| link.index)))?;
        let mut taken = Taken {
            netlink,
            place,
            joined: Vec::new(),
            follower: Some(follower),
            following: None,
            forwarding: forwarding.ok(),
            forwarded: None,
            cni: None,
        };
        let mut ends = Vec::new();
        for (index, link) in links.iter().enumerate() {
            let (joined, end) = taken.place.add_tap(&mut taken.netlink, link, device_name(index))?;
            taken.joined.push(joined);
            ends.push(end);
        }
        Ok((taken, ends, description))
    })?
}

/// What the VMM calls the device of the interface that was taken as number `index`, from 0.
pub(crate) fn device_name(index: usize) -> String {
    format!("net{index}")
}

/// Describes the interfaces that were `taken`, as far as they are still there, and behind them the loopback interface among
/// `all` of their namespace, its routes and rules.
pub(super) fn describe_links(
    netlink: &mut Netlink,
    taken: &[Link],
    all: &[Link],
) -> Result<wire::Network, NetworkError> {
    // Where it is down, its addresses are nobody's.
    let loopback = all.iter().find(|link| link.is_loopback && link.is_up);
    let links: Vec<Link> = taken.iter().chain(loopback).cloned().collect();
    let mut description =
        describe::describe(netlink, &links).map_err(namespace_step("read addresses, routes and neighbours"))?;
    let rules = rules::describe(netlink).map_err(namespace_step("read the routing rules"))?;
    (description.rules, description.missing_rules) = (rules.added, rules.missing);
    Ok(description)
}

/// Reads what there is in the namespace, and sees to it that nobody else has it.
fn look(netlink: &mut Netlink) -> Result<(Vec<Link>, wire::Network), NetworkError> {
    let all = describe::links(netlink).map_err(namespace_step("list the interfaces"))?;
    let links = chosen(&all)?;
    let mut description = describe_links(netlink, &links, &all)?;
    let names = links.iter().map(|link| link.name.as_str());
    description.sysctls = sysctls::read(names.chain(std::iter::once(LOOPBACK)));
    for link in &links {
        clear(netlink, link)?;
    }
    Ok((links, description))
}

/// Sees to it that nobody else has an interface, and removes what is left of a dead sandbox.
fn clear(netlink: &mut Netlink, link: &Link) -> Result<(), NetworkError> {
    let found = redirect::look(netlink, link.index).map_err(interface_step(&link.name, "read its filters"))?;
    match found {
        Found::Nothing => Ok(()),
        Found::Live => Err(NetworkError::Taken(link.name.clone())),
        Found::Stale => redirect::remove(netlink, link.index)
            .map_err(interface_step(&link.name, "remove the filter that a dead sandbox left")),
    }
}

/// The interfaces that the guest is to have.
pub(super) fn chosen(links: &[Link]) -> Result<Vec<Link>, NetworkError> {
    let mut chosen = Vec::new();
    for link in links {
        if is_for_guest(link, links)? {
            chosen.push(link.clone());
        }
    }
    if chosen.len() > MAX_INTERFACES {
        return Err(NetworkError::TooMany { found: chosen.len(), most: MAX_INTERFACES });
    }
    Ok(chosen)
}

/// Whether the guest is to have an interface, one of `links`. Those that are down carry nothing, such as the tunnels that
/// some modules put into every namespace.
pub(super) fn is_for_guest(link: &Link, links: &[Link]) -> Result<bool, NetworkError> {
    let unsupported = |reason| Err(NetworkError::Unsupported { name: link.name.clone(), reason });
    // The bridge or bond above it is taken instead.
    if link.is_loopback || !link.is_up || link.controller.is_some() {
        return Ok(false);
    }
    if !link.is_ethernet || link.mac.len() != 6 {
        return unsupported("it is not an Ethernet interface; take it down or out of the namespace");
    }
    let is_up = |index| links.iter().any(|other| other.index == index && other.is_up);
    if link.lower.is_some_and(is_up) {
        return unsupported("it sits on another interface of the namespace; make it on the host instead");
    }
    Ok(true)
}
