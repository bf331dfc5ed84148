//! Connections to `127.0.0.1:PORT` and `[::1]:PORT` in a sandbox's namespace on the host, which a listener in the guest is
//! to take: that is how port forwarding reaches a pod (docs/decisions/0005).
//!
//! Nobody can tell on the host on which ports somebody listens in the guest. So one socket for each family takes the
//! connections to all ports, and the guest is asked for each when it comes. What the guest does not take is reset, as it
//! would be without a VM, only a moment later.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hull_protocol::{FORWARD_CONNECTED, FORWARD_PORT, FORWARD_TCP};
use hull_sandbox_sys::steer::{Steering, Targets, steer_loopback};
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, JoinSet};

use super::datagrams::{self, Flows, Grounds};
use crate::vsock;

/// Connections at a time; more wait to be accepted. The VMM carries 1,023 of all kinds.
const MAX_CONNECTIONS: usize = 512;
/// How long accepting rests after it failed, for want of descriptors say.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The sockets that take connections and datagrams, which wait in there until [`start`](Self::start).
#[derive(Debug)]
pub(super) struct Forwarding {
    listeners: Vec<TcpListener>,
    datagrams: Vec<UdpSocket>,
    steering: Steering,
    namespace: OwnedFd,
}

/// Forwarding at work, until it is dropped.
#[derive(Debug)]
pub(super) struct Running {
    tasks: Vec<JoinHandle<()>>,
    _steering: Arc<Steering>,
}

impl Forwarding {
    /// Takes connections and datagrams in `namespace`, in which the calling thread is.
    pub(super) fn open(namespace: &OwnedFd) -> io::Result<Self> {
        let ipv4 = listen(Ipv4Addr::LOCALHOST.into())?;
        // A namespace may have no IPv6.
        let ipv6 = listen(Ipv6Addr::LOCALHOST.into()).ok();
        let udp4 = datagrams::listen(false)?;
        let udp6 = datagrams::listen(true).ok();
        let targets = Targets {
            tcp4: ipv4.as_fd(),
            tcp6: ipv6.as_ref().map(AsFd::as_fd),
            udp4: Some(udp4.as_fd()),
            udp6: udp6.as_ref().map(AsFd::as_fd),
        };
        let steering = steer_loopback(namespace.as_fd(), targets)?;
        Ok(Self {
            listeners: std::iter::once(ipv4).chain(ipv6).collect(),
            datagrams: std::iter::once(udp4).chain(udp6).collect(),
            steering,
            namespace: namespace.try_clone()?,
        })
    }

    /// Passes them on to the guest behind the VMM's socket at `socket`. In a tokio runtime.
    pub(super) fn start(self, socket: PathBuf) -> io::Result<Running> {
        let socket: Arc<Path> = socket.into();
        let mut tasks = Vec::new();
        for listener in self.listeners {
            let listener = tokio::net::TcpListener::from_std(listener)?;
            tasks.push(tokio::spawn(serve(listener, socket.clone())));
        }
        let steering = Arc::new(self.steering);
        let grounds = Arc::new(Grounds {
            namespace: self.namespace,
            socket,
            steering: Arc::downgrade(&steering),
            flows: Flows::default(),
        });
        for datagrams in self.datagrams {
            let datagrams = tokio::net::UdpSocket::from_std(datagrams)?;
            tasks.push(tokio::spawn(datagrams::serve(datagrams, grounds.clone())));
        }
        Ok(Running { tasks, _steering: steering })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

fn listen(address: std::net::IpAddr) -> io::Result<TcpListener> {
    let listener = TcpListener::bind(SocketAddr::new(address, 0))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

async fn serve(listener: tokio::net::TcpListener, socket: Arc<Path>) {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    // Ends its tasks with this one.
    let mut connections = JoinSet::new();
    loop {
        // Never closed.
        let Ok(permit) = permits.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((client, _)) => {
                let socket = socket.clone();
                connections.spawn(async move {
                    if let Err(error) = relay(client, &socket).await {
                        tracing::debug!("a forwarded connection ended: {error}");
                    }
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!("a connection to the sandbox cannot be accepted: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
        while connections.try_join_next().is_some() {}
    }
}

async fn relay(mut client: TcpStream, socket: &Path) -> io::Result<()> {
    let mut guest = match connect(client.local_addr()?, FORWARD_TCP, socket).await {
        Ok(guest) => guest,
        Err(error) => {
            // Closing now resets the connection, as a port on which nobody listens does.
            rustix::net::sockopt::set_socket_linger(&client, Some(Duration::ZERO))?;
            return Err(error);
        }
    };
    copy_bidirectional(&mut client, &mut guest).await.map(drop)
}

/// Connects to the guest's listener for an address of its loopback interface, by the protocol of this kind.
pub(super) async fn connect(address: SocketAddr, kind: u8, socket: &Path) -> io::Result<UnixStream> {
    let socket = socket.to_owned();
    let guest =
        tokio::task::spawn_blocking(move || vsock::connect(&socket, FORWARD_PORT)).await?.map_err(io::Error::other)?;
    guest.set_nonblocking(true)?;
    let mut guest = UnixStream::from_std(guest)?;
    guest.write_all(&request(address, kind)).await?;
    match guest.read_u8().await? {
        FORWARD_CONNECTED => Ok(guest),
        _ => Err(io::Error::other(format!("nobody in the guest listens on port {}", address.port()))),
    }
}

/// Family, kind, port.
fn request(address: SocketAddr, kind: u8) -> [u8; 4] {
    let [high, low] = address.port().to_be_bytes();
    [if address.is_ipv6() { 6 } else { 4 }, kind, high, low]
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;

    use super::*;

    /// A VMM and agent that know one port, 80, and echo there, datagrams with their lengths as well.
    fn guest(socket: &Path) {
        let listener = UnixListener::bind(socket).unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                std::thread::spawn(move || {
                    let mut line = [0; 13];
                    stream.read_exact(&mut line).unwrap();
                    assert_eq!(&line, b"CONNECT 1027\n");
                    stream.write_all(b"OK 5\n").unwrap();
                    let mut request = [0; 4];
                    stream.read_exact(&mut request).unwrap();
                    let known = request[2..] == [0, 80];
                    stream.write_all(&[u8::from(!known)]).unwrap();
                    if known {
                        std::io::copy(&mut stream.try_clone().unwrap(), &mut stream).unwrap();
                    }
                });
            }
        });
    }

    #[test]
    fn any_port_of_the_loopback_addresses_is_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("vsock.sock");
        guest(&socket);
        let test = std::thread::spawn(move || {
            if nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).is_err() {
                eprintln!("skipped: this machine lets nobody make network namespaces");
                return;
            }
            super::super::tests::raise_loopback();
            let namespace: OwnedFd = std::fs::File::open("/proc/thread-self/ns/net").unwrap().into();
            let forwarding = match Forwarding::open(&namespace) {
                Ok(forwarding) => forwarding,
                Err(error) => {
                    eprintln!("skipped: the kernel steers no connections: {error}");
                    return;
                }
            };
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async move {
                let running = forwarding.start(socket).unwrap();
                for address in ["127.0.0.1:80", "127.8.8.8:80", "[::1]:80"] {
                    let mut client = TcpStream::connect(address).await.unwrap();
                    client.write_all(b"hello").await.unwrap();
                    client.shutdown().await.unwrap();
                    let mut text = String::new();
                    client.read_to_string(&mut text).await.unwrap();
                    assert_eq!(text, "hello", "{address}");
                }
                for (own, address) in
                    [("127.0.0.1:0", "127.0.0.1:80"), ("127.9.9.9:0", "127.8.8.8:80"), ("[::1]:0", "[::1]:80")]
                {
                    // One that is connected, and hears nobody else; and one that hears everybody, twice.
                    let connected = tokio::net::UdpSocket::bind(own).await.unwrap();
                    connected.connect(address).await.unwrap();
                    let free = tokio::net::UdpSocket::bind(own).await.unwrap();
                    let mut buffer = [0; 16];
                    for text in [&b"first"[..], b"", b"second"] {
                        connected.send(text).await.unwrap();
                        let len = connected.recv(&mut buffer).await.unwrap();
                        assert_eq!(&buffer[..len], text, "{address}");
                        free.send_to(text, address).await.unwrap();
                        let (len, from) = free.recv_from(&mut buffer).await.unwrap();
                        assert_eq!((&buffer[..len], from.to_string().as_str()), (text, address));
                    }
                }
                let mut client = TcpStream::connect("127.0.0.1:81").await.unwrap();
                let error = client.read_u8().await.unwrap_err();
                assert!(matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::UnexpectedEof));
                drop(running);
                assert!(TcpStream::connect("127.0.0.1:80").await.is_err());
            });
        });
        test.join().unwrap();
    }
}
