//! Datagrams to `127.0.0.1:PORT` and `[::1]:PORT` in a sandbox's namespace on the host, and the answers to them.
//!
//! As with connections, one socket for each family takes what is steered to it, whatever the port. The first datagram from a
//! client to a port makes a flow: a socket of its own, bound to the address that the client sent to and connected to the
//! client, so that the kernel brings it what follows and the client sees answers from where it asked; and a connection
//! to the guest's agent, which sends from a socket in the guest. A flow ends when nothing has come either way for a while,
//! or when one of its ends is told that nobody listens.
//!
//! Answers are datagrams to a port of a loopback address, too. What clients' ports get is not steered, or it would come back here.

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use hull_protocol::FORWARD_UDP;
use hull_sandbox_sys::steer::Steering;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, setsockopt, sockopt};
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt as rustix_sockopt};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::forward::connect;
use super::inside;

/// Flows at a time, of both families together; datagrams of more are lost. The VMM carries 1,023 connections of all kinds.
const MAX_FLOWS: usize = 256;
/// Datagrams that wait until a new flow has its connection to the guest.
const MAX_WAITING: usize = 64;
/// How long a flow lasts on which nothing moves: what Linux gives one that it tracks.
const IDLE: Duration = Duration::from_secs(30);
/// Longest datagram.
const MAX_DATAGRAM_BYTES: usize = 65_535;

/// Who sent to which address.
type Ends = (SocketAddr, SocketAddr);

/// What flows of one namespace need.
pub(super) struct Grounds {
    pub(super) namespace: OwnedFd,
    /// The VMM's socket.
    pub(super) socket: Arc<Path>,
    /// Gone where the sandbox is, which ends all flows.
    pub(super) steering: Weak<Steering>,
    pub(super) flows: Flows,
}

/// The flows that there are.
#[derive(Clone, Default)]
pub(super) struct Flows(Arc<Mutex<HashMap<Ends, mpsc::Sender<Vec<u8>>>>>);

impl Flows {
    fn lock(&self) -> MutexGuard<'_, HashMap<Ends, mpsc::Sender<Vec<u8>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes the socket of a family that takes datagrams to all ports, in the calling thread's namespace.
pub(super) fn listen(is_ipv6: bool) -> io::Result<UdpSocket> {
    let socket = if is_ipv6 {
        let socket = UdpSocket::bind((Ipv6Addr::LOCALHOST, 0))?;
        setsockopt(&socket, sockopt::Ipv6OrigDstAddr, &true)?;
        socket
    } else {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        setsockopt(&socket, sockopt::Ipv4OrigDstAddr, &true)?;
        socket
    };
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// Serves one of the sockets for ever.
pub(super) async fn serve(socket: tokio::net::UdpSocket, grounds: Arc<Grounds>) {
    // Ends its tasks with this one.
    let mut tasks = JoinSet::new();
    let mut buffer = vec![0; MAX_DATAGRAM_BYTES];
    loop {
        let received = socket.async_io(Interest::READABLE, || receive(&socket, &mut buffer)).await;
        while tasks.try_join_next().is_some() {}
        match received {
            Ok((len, Some(ends))) => {
                if let Some(first) = grounds.take(ends, &buffer[..len]) {
                    let grounds = grounds.clone();
                    tasks.spawn(async move {
                        if let Err(error) = grounds.carry(ends, first).await {
                            tracing::debug!("a flow of datagrams ended: {error}");
                        }
                        grounds.end(ends);
                    });
                }
            }
            Ok((_, None)) => {}
            // What an earlier datagram has brought about, such as that nobody takes an answer.
            Err(error) => tracing::debug!("a datagram to the sandbox is lost: {error}"),
        }
    }
}

/// Takes a datagram; answers its length, and where from and where to it was sent.
fn receive(socket: &tokio::net::UdpSocket, buffer: &mut [u8]) -> io::Result<(usize, Option<Ends>)> {
    let mut space = nix::cmsg_space!(nix::libc::sockaddr_in6);
    let mut parts = [io::IoSliceMut::new(buffer)];
    let message = recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::empty())?;
    let from = message.address.as_ref().and_then(address);
    let to = message.cmsgs()?.find_map(|message| match message {
        ControlMessageOwned::Ipv4OrigDstAddr(to) => {
            Some(SocketAddr::from((Ipv4Addr::from(u32::from_be(to.sin_addr.s_addr)), u16::from_be(to.sin_port))))
        }
        ControlMessageOwned::Ipv6OrigDstAddr(to) => {
            Some(SocketAddr::from((Ipv6Addr::from(to.sin6_addr.s6_addr), u16::from_be(to.sin6_port))))
        }
        _ => None,
    });
    Ok((message.bytes, from.zip(to)))
}

fn address(storage: &SockaddrStorage) -> Option<SocketAddr> {
    let ipv4 = storage.as_sockaddr_in().map(|address| SocketAddr::from((address.ip(), address.port())));
    ipv4.or_else(|| storage.as_sockaddr_in6().map(|address| SocketAddr::from((address.ip(), address.port()))))
}

impl Grounds {
    /// Hands a datagram to its flow; answers what a new flow starts with, if this makes one.
    fn take(&self, ends: Ends, datagram: &[u8]) -> Option<mpsc::Receiver<Vec<u8>>> {
        let mut flows = self.flows.lock();
        if let Some(flow) = flows.get(&ends) {
            // One that is too much is lost, as on any wire.
            let _ = flow.try_send(datagram.to_vec());
            return None;
        }
        if flows.len() == MAX_FLOWS {
            return None;
        }
        let (sender, receiver) = mpsc::channel(MAX_WAITING);
        let _ = sender.try_send(datagram.to_vec());
        // Before the first answer can come.
        if let Err(error) = self.steering.upgrade()?.pass(ends.0.port()) {
            tracing::debug!("a datagram to the sandbox is lost: {error}");
            return None;
        }
        flows.insert(ends, sender);
        Some(receiver)
    }

    fn end(&self, ends: Ends) {
        let mut flows = self.flows.lock();
        flows.remove(&ends);
        let client = ends.0.port();
        if !flows.keys().any(|(from, _)| from.port() == client)
            && let Some(steering) = self.steering.upgrade()
            && let Err(error) = steering.steer(client)
        {
            tracing::debug!("datagrams to port {client} are not passed on: {error}");
        }
    }

    /// Carries a flow until its end.
    async fn carry(&self, (client, to): Ends, mut first: mpsc::Receiver<Vec<u8>>) -> io::Result<()> {
        let socket = inside(Path::new("the sandbox's namespace"), &self.namespace, || answering(client, to))
            .map_err(io::Error::other)??;
        let socket = tokio::net::UdpSocket::from_std(socket)?;
        let guest = connect(to, FORWARD_UDP, &self.socket).await?;
        let (mut from_guest, mut to_guest) = guest.into_split();
        let moved = Mutex::new(Instant::now());
        let touch = || *moved.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        let out = async {
            let mut buffer = vec![0; MAX_DATAGRAM_BYTES];
            loop {
                tokio::select! {
                    Some(datagram) = first.recv() => send(&mut to_guest, &datagram).await?,
                    len = socket.recv(&mut buffer) => send(&mut to_guest, &buffer[..len?]).await?,
                }
                touch();
            }
        };
        let back = async {
            let mut buffer = vec![0; MAX_DATAGRAM_BYTES];
            loop {
                let len = usize::from(from_guest.read_u16().await?);
                from_guest.read_exact(&mut buffer[..len]).await?;
                touch();
                socket.send(&buffer[..len]).await?;
            }
        };
        let idle = async {
            loop {
                let end = *moved.lock().unwrap_or_else(PoisonError::into_inner) + IDLE;
                if end <= Instant::now() {
                    return;
                }
                tokio::time::sleep_until(end).await;
            }
        };
        tokio::select! {
            ended = out => ended,
            ended = back => ended,
            () = idle => Ok(()),
        }
    }
}

/// A datagram on a connection to the agent: behind its length.
async fn send(guest: &mut tokio::net::unix::OwnedWriteHalf, datagram: &[u8]) -> io::Result<()> {
    // Datagrams are shorter than 64 KiB.
    guest.write_all(&[&(datagram.len() as u16).to_be_bytes()[..], datagram].concat()).await
}

/// A socket that answers a client from the address that it sent to.
fn answering(client: SocketAddr, to: SocketAddr) -> io::Result<UdpSocket> {
    let family = if to.is_ipv6() { AddressFamily::INET6 } else { AddressFamily::INET };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::DGRAM, flags, None)?;
    // Other clients' flows have the same address.
    rustix_sockopt::set_socket_reuseaddr(&socket, true)?;
    rustix::net::bind(&socket, &to)?;
    rustix::net::connect(&socket, &client)?;
    Ok(socket.into())
}
