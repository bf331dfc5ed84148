//! Follows a namespace that a sandbox has: addresses, routes and rules that come or go there later come and go in the guest.
//!
//! The kernel announces changes; what it announces is not looked at, only that there was something. Then the namespace is
//! described anew, and the agent is told if that is another description than before.

use std::io;
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use hull_protocol::agent as wire;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with};
use tokio::task::JoinHandle;

use super::attachment::describe_links;
use super::describe::Link;
use super::netlink::Netlink;
use crate::agent::Agent;

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

    /// Tells the agent of changes to these interfaces, of which it was told `current`. In a tokio runtime.
    pub(super) fn start(self, links: Vec<Link>, current: wire::Network, agent: Agent) -> io::Result<Following> {
        let Self { socket, netlink } = self;
        let socket = tokio::net::UnixDatagram::from_std(socket)?;
        Ok(Following(tokio::spawn(follow(socket, netlink, links, current, agent))))
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn follow(
    socket: tokio::net::UnixDatagram,
    mut netlink: Netlink,
    links: Vec<Link>,
    mut current: wire::Network,
    agent: Agent,
) {
    loop {
        if let Err(error) = quiet(&socket).await {
            tracing::warn!("changes of the network are not followed any more: {error}");
            return;
        }
        let described = match describe_links(&mut netlink, &links) {
            Ok(described) => described,
            Err(error) => {
                tracing::warn!("a change of the network is not followed: {error}");
                continue;
            }
        };
        // Sysctls announce nothing; they stay as they were.
        let described = wire::Network { sysctls: current.sysctls.clone(), ..described };
        if described == current {
            continue;
        }
        match agent.update_network(&described).await {
            Ok(()) => current = described,
            // The next change brings another try.
            Err(error) => tracing::warn!("a change of the network does not reach the guest: {error}"),
        }
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
