//! The interfaces of one namespace in the hands of a sandbox.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use hull_protocol::agent as wire;
use hull_sandbox_sys::tap::{self, Tap};
use hull_vmm_api::config::{MacAddress, NetBackend};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};

use super::cni::Cni;
use super::describe::{self, Link};
use super::error::{NetworkError, interface_step, namespace_step};
use super::follow::{Follower, Following};
use super::forward::{self, Forwarding};
use super::netlink::Netlink;
use super::redirect::{self, Found};
use super::{Note, inside, rules, sysctls, write_note};
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
}

/// A namespace whose traffic goes to a sandbox, until this is dropped.
#[derive(Debug)]
pub(super) struct Taken {
    netlink: Netlink,
    /// Indices of interfaces that may have a filter.
    redirected: Vec<u32>,
    links: Vec<Link>,
    follower: Option<Follower>,
    following: Option<Following>,
    /// None where the host's kernel cannot.
    forwarding: Option<Forwarding>,
    forwarded: Option<forward::Running>,
    note: PathBuf,
    pub(super) cni: Option<Cni>,
}

impl Taken {
    /// What the network's maker wants for name servers, as a resolv.conf; empty where it says nothing.
    pub(super) fn resolv_conf(&self) -> String {
        self.cni.as_ref().map(Cni::resolv_conf).unwrap_or_default()
    }

    /// Tells the agent, which was told of the description, of what changes in the namespace from now on. In a tokio
    /// runtime.
    pub(super) fn follow(&mut self, agent: &Agent, description: wire::Network) {
        let start = |follower: Follower| follower.start(self.links.clone(), description, agent.clone());
        match self.follower.take().map(start).transpose() {
            Ok(following) => self.following = following,
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

    /// Makes a tap beside an interface and joins the two.
    fn add_tap(&mut self, link: &Link, queues: usize) -> Result<HostEnd, NetworkError> {
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
        Ok(HostEnd { backend: NetBackend::Tap, queues, mac, mtu: u16::try_from(link.mtu).ok() })
    }
}

impl Drop for Taken {
    /// Lets the interfaces go. The taps go with the VMM.
    fn drop(&mut self) {
        remove_all(&mut self.netlink, &self.redirected);
        drop(self.cni.take());
        // Gone with the sandbox's directory at the latest.
        let _ = std::fs::remove_file(&self.note);
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

/// Takes the interfaces of a namespace. `note` says what to write down before anything is done to these interfaces.
pub(super) fn take(
    path: &Path,
    namespace: &OwnedFd,
    queues: usize,
    note_path: PathBuf,
    note: impl FnOnce(Vec<u32>) -> Option<Note> + Send,
) -> Result<(Taken, Vec<HostEnd>, wire::Network), NetworkError> {
    inside(path, namespace, || {
        let mut netlink = Netlink::open().map_err(namespace_step("open a netlink socket"))?;
        let (links, description) = look(&mut netlink)?;
        // From here on, so that nothing is missed between this look and the first announcement.
        let follower = Follower::open().map_err(namespace_step("listen for changes"))?;
        let forwarding = Forwarding::open(namespace).inspect_err(|error| {
            tracing::warn!("connections to 127.0.0.1 in {} do not reach the guest: {error}", path.display());
        });
        let redirected: Vec<u32> = links.iter().map(|link| link.index).collect();
        if let Some(note) = note(redirected.clone()) {
            write_note(&note_path, &note)?;
        }
        let mut taken = Taken {
            netlink,
            redirected,
            links: links.clone(),
            follower: Some(follower),
            following: None,
            forwarding: forwarding.ok(),
            forwarded: None,
            note: note_path,
            cni: None,
        };
        let mut taps = Vec::new();
        for link in &links {
            taps.push(taken.add_tap(link, queues)?);
        }
        Ok((taken, taps, description))
    })?
}

/// Describes these interfaces, as far as they are still there, and the routes and rules of their namespace.
pub(super) fn describe_links(netlink: &mut Netlink, links: &[Link]) -> Result<wire::Network, NetworkError> {
    let mut description =
        describe::describe(netlink, links).map_err(namespace_step("read addresses, routes and neighbours"))?;
    description.rules = rules::describe(netlink).map_err(namespace_step("read the routing rules"))?;
    Ok(description)
}

/// Reads what there is in the namespace, and sees to it that nobody else has it.
fn look(netlink: &mut Netlink) -> Result<(Vec<Link>, wire::Network), NetworkError> {
    let links = chosen(describe::links(netlink).map_err(namespace_step("list the interfaces"))?)?;
    let mut description = describe_links(netlink, &links)?;
    description.sysctls = sysctls::read(links.iter().map(|link| link.name.as_str()));
    for link in &links {
        let found = redirect::look(netlink, link.index).map_err(interface_step(&link.name, "read its filters"))?;
        match found {
            Found::Nothing => {}
            Found::Live => return Err(NetworkError::Taken(link.name.clone())),
            Found::Stale => redirect::remove(netlink, link.index)
                .map_err(interface_step(&link.name, "remove the filter that a dead sandbox left"))?,
        }
    }
    Ok((links, description))
}

/// The interfaces that the guest is to have. Those that are down carry nothing, such as the tunnels that some modules put
/// into every namespace.
pub(super) fn chosen(links: Vec<Link>) -> Result<Vec<Link>, NetworkError> {
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
