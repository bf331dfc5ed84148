//! Connections from the host to ports on the guest's loopback interface.
//!
//! Each is a connection to `FORWARD_PORT`. The host writes four bytes: the family that its client used (4 or 6), a zero and
//! the port in network order. The agent connects, answers one byte ([`CONNECTED`] or [`REFUSED`]), and from then on the
//! two connections are one.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional_with_sizes};
use tokio::net::TcpStream;
use tokio::time::timeout;

use hull_protocol::{FORWARD_CONNECTED as CONNECTED, FORWARD_REFUSED as REFUSED};

use crate::server::Listener;
use crate::streams::BoxedConnection;

/// How long the host may take to say where to. It does so at once.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes under way in each direction.
const BUFFER_BYTES: usize = 32 << 10;

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
    let [family, _, high, low] = request;
    match connect(family, u16::from_be_bytes([high, low])).await {
        Ok(mut guest) => {
            host.write_all(&[CONNECTED]).await?;
            copy_bidirectional_with_sizes(&mut host, &mut guest, BUFFER_BYTES, BUFFER_BYTES).await.map(drop)
        }
        Err(error) => {
            host.write_all(&[REFUSED]).await?;
            Err(error)
        }
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
    async fn a_port_without_listener_is_refused() {
        let port = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
        let [high, low] = port.to_be_bytes();
        let (mut host, answer) = ask([4, 0, high, low]).await;
        assert_eq!(answer, REFUSED);
        assert_eq!(host.read(&mut [0]).await.unwrap(), 0);
    }
}
