//! Connections and datagrams from the host to ports on the guest's loopback interface.
//!
//! Each is a connection to `FORWARD_PORT`. The host writes four bytes: the family that its client used (4 or 6), what it wants
//! (TCP or UDP) and the port in network order. The agent connects, answers one byte ([`CONNECTED`] or [`REFUSED`]), and from
//! then on the two connections are one. Datagrams each have their length before them.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional_with_sizes};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

use hull_protocol::{
    FORWARD_CONNECTED as CONNECTED, FORWARD_REFUSED as REFUSED, FORWARD_TCP as TCP, FORWARD_UDP as UDP,
};

use crate::server::Listener;
use crate::streams::BoxedConnection;

/// How long the host may take to say where to. It does so at once.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes under way in each direction.
const BUFFER_BYTES: usize = 32 << 10;
/// Longest datagram.
const MAX_DATAGRAM_BYTES: usize = 65_535;

/// Serves the port for ever.
pub(crate) async fn serve(listener: Listener) {
    loop {
        let connection = listener.next().await;
        tokio::spawn(async move {
            if let Err(error) = relay(connection).await {
                tracing::debug!("forward: {error}");
            }
        });
    }
}

async fn relay(mut host: BoxedConnection) -> io::Result<()> {
    let mut request = [0; 4];
    timeout(REQUEST_TIMEOUT, host.read_exact(&mut request)).await??;
    let [family, kind, high, low] = request;
    let port = u16::from_be_bytes([high, low]);
    match kind {
        TCP => match connect(family, port).await {
            Ok(mut guest) => {
                host.write_all(&[CONNECTED]).await?;
                copy_bidirectional_with_sizes(&mut host, &mut guest, BUFFER_BYTES, BUFFER_BYTES).await.map(drop)
            }
            Err(error) => refuse(host, error).await,
        },
        UDP => match datagram_socket(family, port).await {
            Ok(guest) => {
                host.write_all(&[CONNECTED]).await?;
                relay_datagrams(host, &guest).await
            }
            Err(error) => refuse(host, error).await,
        },
        _ => refuse(host, io::ErrorKind::Unsupported.into()).await,
    }
}

async fn refuse(mut host: BoxedConnection, error: io::Error) -> io::Result<()> {
    host.write_all(&[REFUSED]).await?;
    Err(error)
}

/// A socket for datagrams to and from a port alone. Whether anybody listens there shows when one has been sent.
async fn datagram_socket(family: u8, port: u16) -> io::Result<UdpSocket> {
    let own: SocketAddr = match family {
        6 => (Ipv6Addr::LOCALHOST, 0).into(),
        _ => (Ipv4Addr::LOCALHOST, 0).into(),
    };
    let socket = UdpSocket::bind(own).await?;
    socket.connect((own.ip(), port)).await?;
    Ok(socket)
}

/// Passes datagrams both ways until the host closes or nobody listens.
async fn relay_datagrams(host: BoxedConnection, guest: &UdpSocket) -> io::Result<()> {
    let (mut from_host, mut to_host) = tokio::io::split(host);
    let inward = async {
        let mut buffer = vec![0; MAX_DATAGRAM_BYTES];
        loop {
            let len = usize::from(from_host.read_u16().await?);
            from_host.read_exact(&mut buffer[..len]).await?;
            guest.send(&buffer[..len]).await?;
        }
    };
    let outward = async {
        let mut buffer = vec![0; MAX_DATAGRAM_BYTES];
        loop {
            let len = guest.recv(&mut buffer).await?;
            // Datagrams are shorter than 64 KiB.
            to_host.write_all(&[&(len as u16).to_be_bytes()[..], &buffer[..len]].concat()).await?;
        }
    };
    tokio::select! {
        ended = inward => ended,
        ended = outward => ended,
    }
}

/// Connects to whoever listens on the port, in the client's family first: a client that says `localhost` means either.
async fn connect(family: u8, port: u16) -> io::Result<TcpStream> {
    let mut addresses: [SocketAddr; 2] = [(Ipv4Addr::LOCALHOST, port).into(), (Ipv6Addr::LOCALHOST, port).into()];
    if family == 6 {
        addresses.reverse();
    }
    TcpStream::connect(&addresses[..]).await
}

#[cfg(test)]
mod tests {
    use tokio::net::{TcpListener, UnixStream};

    use super::*;

    async fn ask(request: [u8; 4]) -> (UnixStream, u8) {
        let (mut host, agent) = UnixStream::pair().unwrap();
        tokio::spawn(relay(Box::new(agent)));
        host.write_all(&request).await.unwrap();
        let answer = host.read_u8().await.unwrap();
        (host, answer)
    }

    #[tokio::test]
    async fn a_listener_is_reached_whatever_the_family() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let [high, low] = listener.local_addr().unwrap().port().to_be_bytes();
        for family in [4, 6] {
            let (mut host, answer) = ask([family, 0, high, low]).await;
            assert_eq!(answer, CONNECTED);
            let (mut guest, _) = listener.accept().await.unwrap();
            host.write_all(b"to the guest").await.unwrap();
            host.shutdown().await.unwrap();
            let mut text = String::new();
            guest.read_to_string(&mut text).await.unwrap();
            assert_eq!(text, "to the guest");
            // The other direction is still open.
            guest.write_all(b"back").await.unwrap();
            drop(guest);
            let mut text = String::new();
            host.read_to_string(&mut text).await.unwrap();
            assert_eq!(text, "back");
        }
    }

    #[tokio::test]
    async fn datagrams_keep_their_bounds() {
        for (family, address) in [(4, "127.0.0.1:0"), (6, "[::1]:0")] {
            let Ok(listener) = UdpSocket::bind(address).await else {
                eprintln!("skipped: no {address}");
                continue;
            };
            let [high, low] = listener.local_addr().unwrap().port().to_be_bytes();
            let (mut host, answer) = ask([family, UDP, high, low]).await;
            assert_eq!(answer, CONNECTED);
            host.write_all(&[0, 3, b'o', b'n', b'e', 0, 0, 0, 2, b'2', b'2']).await.unwrap();
            let mut buffer = [0; 16];
            let mut client = None;
            for wanted in [&b"one"[..], b"", b"22"] {
                let (len, from) = listener.recv_from(&mut buffer).await.unwrap();
                assert_eq!(&buffer[..len], wanted);
                client = Some(from);
            }
            listener.send_to(b"back", client.unwrap()).await.unwrap();
            let mut framed = [0; 6];
            host.read_exact(&mut framed).await.unwrap();
            assert_eq!(&framed, b"\0\x04back");
            // The end of the listener shows as that of the connection.
            drop(listener);
            host.write_all(&[0, 1, b'x']).await.unwrap();
            assert_eq!(host.read(&mut buffer).await.unwrap(), 0);
        }
    }

    #[tokio::test]
    async fn an_unknown_wish_is_refused() {
        assert_eq!(ask([4, 9, 0, 80]).await.1, REFUSED);
    }

    #[tokio::test]
    async fn a_port_without_listener_is_refused() {
        let port = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
        let [high, low] = port.to_be_bytes();
        let (mut host, answer) = ask([4, 0, high, low]).await;
        assert_eq!(answer, REFUSED);
        assert_eq!(host.read(&mut [0]).await.unwrap(), 0);
    }
}
