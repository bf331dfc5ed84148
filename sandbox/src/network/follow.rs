//! Follows a namespace that a sandbox has: interfaces, addresses, routes and rules that come or go there later come and go in
//! the guest.
//!
//! The kernel announces changes; what it announces is not looked at, only that there was something. Then the namespace is
//! looked at anew. An interface that has gone goes first, since another one may come under its name: the agent is told,
//! lets go of the device, and the VMM takes it off the bus. One that has come, and is up, gets a tap as those from the
//! start did; the VMM puts it on the bus and the agent finds it there. In the end the agent is told of the namespace as it is
//! now, if that is another description than before.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use hull_protocol::agent::{self as wire, AddDeviceRequest, RemoveDeviceRequest};
use hull_vmm_api::config::{NetConfig, Resource};
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with};
use tokio::task::JoinHandle;

use super::attachment::{HostEnd, Joined, MAX_INTERFACES, Place, describe_links, is_for_guest, remove_all};
use super::describe::{self, Link};
use super::error::{NetworkError, interface_step, namespace_step};
use super::netlink::Netlink;
use super::redirect;
use crate::agent::{Agent, AgentError, answer, long, short};
use crate::control::{Control, ControlError, Request, Response};

/// Groups of announcements (`<linux/rtnetlink.h>`): links, addresses, routes and rules of both families. Neighbours are
/// left out: the host's own discoveries among them never end.
const GROUPS: [u32; 7] = [1, 5, 7, 8, 9, 11, 19];
/// How long things must have been quiet before they are looked at: changes come in bursts.
const QUIET: Duration = Duration::from_millis(20);
/// How long a burst may last before it is looked at all the same.
const PATIENCE: Duration = Duration::from_secs(1);
/// Enough for one announcement; the rest of a longer one is of no interest.
const ANNOUNCEMENT_BYTES: usize = 4096;

/// Listens in a namespace. Announcements wait in here until [`start`](Self::start).
#[derive(Debug)]
pub(super) struct Follower {
    /// A netlink socket. The type is that of other sockets with datagrams, since tokio has none for these, and receiving is
    /// the same for all.
    socket: UnixDatagram,
    netlink: Netlink,
}

/// Following, until it is dropped.
#[derive(Debug)]
pub(super) struct Following(JoinHandle<()>);

/// What is known of the namespace and its guest.
pub(super) struct Known {
    pub(super) place: Place,
    pub(super) joined: Vec<Joined>,
    /// What the agent has been told.
    pub(super) told: wire::Network,
    pub(super) agent: Agent,
    /// The VMM's control socket.
    pub(super) control: PathBuf,
}

/// A change that is not followed.
#[derive(Debug, thiserror::Error)]
enum FollowError {
    #[error(transparent)]
    Network(#[from] NetworkError),
    #[error(transparent)]
    Control(#[from] ControlError),
    #[error("the guest refuses: {0}")]
    Agent(#[from] AgentError),
}

impl Follower {
    /// Listens in the calling thread's namespace.
    pub(super) fn open() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        // rtnetlink is the protocol with the number 0.
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
        let groups = GROUPS.iter().fold(0, |groups, group| groups | 1 << (group - 1));
        bind(&socket, &SocketAddrNetlink::new(0, groups))?;
        Ok(Self { socket: socket.into(), netlink: Netlink::open()? })
    }

    /// Follows from what is known. In a tokio runtime.
    pub(super) fn start(self, known: Known) -> io::Result<Following> {
        let Self { socket, netlink } = self;
        let socket = tokio::net::UnixDatagram::from_std(socket)?;
        let made = known.joined.len();
        let sysctls = known.told.sysctls.clone();
        let followed = Followed { netlink, made, refused: HashSet::new(), sysctls, known };
        Ok(Following(tokio::spawn(follow(socket, followed))))
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn follow(socket: tokio::net::UnixDatagram, mut followed: Followed) {
    loop {
        if let Err(error) = quiet(&socket).await {
            tracing::warn!("changes of the network are not followed any more: {error}");
            return;
        }
        // The next change brings another try.
        if let Err(error) = followed.catch_up().await {
            tracing::warn!("a change of the network is not followed: {error}");
        }
    }
}

struct Followed {
    netlink: Netlink,
    /// How many interfaces there have been, for their devices' names.
    made: usize,
    /// Those that could not be taken, of which it has been said.
    refused: HashSet<u32>,
    /// Those of the interfaces that there are. They announce no changes, so they stay as they were found.
    sysctls: HashMap<String, String>,
    known: Known,
}

impl Followed {
    async fn catch_up(&mut self) -> Result<(), FollowError> {
        let links = describe::links(&mut self.netlink).map_err(namespace_step("list the interfaces"))?;
        self.refused.retain(|index| links.iter().any(|link| link.index == *index));
        self.part(&links).await?;
        for link in &links {
            let known = self.known.joined.iter().any(|joined| [joined.link.index, joined.tap].contains(&link.index));
            if known || self.refused.contains(&link.index) {
                continue;
            }
            let joined = match is_for_guest(link, &links) {
                Ok(false) => continue,
                Ok(true) => self.join(link).await,
                Err(error) => Err(error.into()),
            };
            if let Err(error) = joined {
                self.refused.insert(link.index);
                tracing::warn!("an interface that has come is not taken: {error}");
            }
        }
        self.adapt(&links).await?;
        self.tell().await
    }

    /// Lets go of the interfaces that are not among `links` any more.
    async fn part(&mut self, links: &[Link]) -> Result<(), FollowError> {
        let is_here = |joined: &Joined| links.iter().any(|link| link.index == joined.link.index);
        let (here, gone) = std::mem::take(&mut self.known.joined).into_iter().partition(is_here);
        self.known.joined = here;
        let gone: Vec<Joined> = gone;
        if gone.is_empty() {
            return Ok(());
        }
        for joined in &gone {
            let of_interface = |path: &String| path.split('/').any(|part| part == joined.link.name);
            self.sysctls.retain(|path, _| !of_interface(path));
            self.known.place.forget(joined.link.index)?;
        }
        // Whatever the guest says of it: what is gone is gone.
        let told = self.tell().await;
        for joined in gone {
            self.unplug(&joined.device).await?;
        }
        told
    }

    /// Gives the guest an interface that has come.
    async fn join(&mut self, link: &Link) -> Result<(), FollowError> {
        if self.known.joined.len() == MAX_INTERFACES {
            return Err(NetworkError::TooMany { found: MAX_INTERFACES + 1, most: MAX_INTERFACES }.into());
        }
        let (joined, end, sysctls) = self.known.place.join(link, format!("net{}", self.made))?;
        self.made += 1;
        let plugged = self.plug(&joined.device, end).await;
        if let Err(error) = plugged {
            remove_all(&mut self.netlink, &[link.index]);
            self.known.place.forget(link.index)?;
            return Err(error);
        }
        self.known.joined.push(joined);
        self.sysctls.extend(sysctls);
        Ok(())
    }

    /// Takes over the MTUs that interfaces have now, whether they do without ARP and whether their links are up.
    async fn adapt(&mut self, links: &[Link]) -> Result<(), FollowError> {
        for at in 0..self.known.joined.len() {
            let joined = &mut self.known.joined[at];
            let Some(now) = links.iter().find(|link| link.index == joined.link.index) else { continue };
            if now.mtu != joined.link.mtu {
                redirect::resize(&mut self.netlink, joined.tap, now.mtu)
                    .map_err(interface_step(&joined.link.name, "change the MTU of the tap beside it"))?;
                joined.link.mtu = now.mtu;
            }
            joined.link.no_arp = now.no_arp;
            if now.has_carrier != joined.link.has_carrier {
                let request = Request::SetLink { id: joined.device.clone(), up: now.has_carrier };
                self.call(request, Vec::new()).await?;
                self.known.joined[at].link.has_carrier = now.has_carrier;
            }
        }
        Ok(())
    }

    /// Tells the agent what the namespace has, if that is news.
    async fn tell(&mut self) -> Result<(), FollowError> {
        let links: Vec<Link> = self.known.joined.iter().map(|joined| joined.link.clone()).collect();
        let described = describe_links(&mut self.netlink, &links)?;
        let described = wire::Network { sysctls: self.sysctls.clone(), ..described };
        if described != self.known.told {
            self.known.agent.update_network(&described).await?;
            self.known.told = described;
        }
        Ok(())
    }

    /// Puts a device on the guest's bus, and waits until the guest has it.
    async fn plug(&self, device: &str, end: HostEnd) -> Result<(), FollowError> {
        let HostEnd { backend, queues, mac, mtu, link_down } = end;
        let attached = (0..queues.len()).map(Resource::Attached).collect();
        let net = NetConfig { id: device.to_owned(), backend, queues: attached, mac, mtu, link_down };
        let Response::Added { pci_address } = self.call(Request::AddNet(net), queues).await? else {
            return Err(ControlError::Connection(io::ErrorKind::InvalidData.into()).into());
        };
        let request = AddDeviceRequest { pci_address, ..Default::default() };
        if let Err(error) = answer("AddDevice", self.known.agent.sandbox.add_device(long(), &request).await) {
            self.unplug(device).await?;
            return Err(error.into());
        }
        Ok(())
    }

    /// Takes a device off the guest's bus, and lets go of its tap with it, even if the guest does not.
    async fn unplug(&self, device: &str) -> Result<(), FollowError> {
        if let Response::Status(status) = self.call(Request::Status, Vec::new()).await?
            && let Some(found) = status.devices.into_iter().find(|found| found.id == device)
        {
            let request = RemoveDeviceRequest { pci_address: found.pci_address, ..Default::default() };
            match answer("RemoveDevice", self.known.agent.sandbox.remove_device(short(), &request).await) {
                Err(error) if !error.is_not_found() => {
                    tracing::warn!("the guest does not let go of {device}: {error}");
                }
                _ => {}
            }
        }
        self.call(Request::RemoveDevice { id: device.to_owned() }, Vec::new()).await?;
        Ok(())
    }

    async fn call(&self, request: Request, files: Vec<OwnedFd>) -> Result<Response, ControlError> {
        let control = self.known.control.clone();
        // The VMM answers soon, but this thread has others to serve.
        let called = tokio::task::spawn_blocking(move || Control::connect(&control)?.call_with(&request, &files));
        called.await.map_err(|error| ControlError::Connection(error.into()))?
    }
}

/// Waits for an announcement, and then until there has been none for a while.
async fn quiet(socket: &tokio::net::UnixDatagram) -> io::Result<()> {
    drain(socket).await?;
    let patience = Instant::now() + PATIENCE;
    while Instant::now() < patience {
        match tokio::time::timeout(QUIET, drain(socket)).await {
            Ok(more) => more?,
            Err(_quiet) => break,
        }
    }
    Ok(())
}

/// Takes announcements away, once there is one.
async fn drain(socket: &tokio::net::UnixDatagram) -> io::Result<()> {
    let mut announcement = [0; ANNOUNCEMENT_BYTES];
    socket.readable().await?;
    loop {
        match socket.try_recv(&mut announcement) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            // More than the socket holds: something was announced, and that is all that counts.
            Err(error) if rustix::io::Errno::from_io_error(&error) == Some(rustix::io::Errno::NOBUFS) => {}
            Err(error) => return Err(error),
        }
    }
}
