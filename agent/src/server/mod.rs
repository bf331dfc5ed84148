//! Listens for the host and hands its connections on: to ttrpc on one port, to the parking of streams on the other.
//!
//! Only the host is served. The guest's own processes can reach these ports too, through vsock's loopback, and are
//! turned away: whoever speaks to the agent owns the guest.

mod container;
mod convert;
mod network;
mod sandbox;
mod status;

use std::io;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_core::Stream;
use hull_protocol::agent_ttrpc::{create_container_service, create_sandbox_service};
use hull_protocol::{AGENT_PORT, FORWARD_PORT, READY_GREETING, READY_PORT, STREAM_PORT};
use tokio::io::AsyncWriteExt as _;
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};
use ttrpc::r#async::Server;
use ttrpc::r#async::transport::Listener as TtrpcListener;

use crate::container::Containers;
use crate::error::{Error, Result, Step};
use crate::sandbox::Sandbox;
use crate::streams::BoxedConnection;

/// Connections that wait to be taken over by ttrpc. The host opens one.
const BACKLOG: usize = 8;
/// How long accepting rests after it failed, for want of descriptors say.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Where a port is.
pub(crate) enum Listener {
    Vsock(VsockListener),
    /// For tests on a machine without a VMM.
    Unix(UnixListener),
}

impl Listener {
    pub(crate) fn vsock(port: u32) -> Result<Self> {
        VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port))
            .map(Self::Vsock)
            .step_with(|| format!("listen on vsock port {port}"))
    }

    pub(crate) fn unix(path: &Path) -> Result<Self> {
        UnixListener::bind(path).map(Self::Unix).step_with(|| format!("listen on {}", path.display()))
    }

    /// The next connection of the host's.
    pub(crate) async fn next(&self) -> BoxedConnection {
        loop {
            match self.accept().await {
                Ok(connection) => return connection,
                Err(error) => {
                    tracing::error!("accept: {error}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    async fn accept(&self) -> io::Result<BoxedConnection> {
        match self {
            Self::Unix(listener) => Ok(Box::new(listener.accept().await?.0)),
            Self::Vsock(listener) => loop {
                let (connection, peer) = listener.accept().await?;
                if peer.cid() == VMADDR_CID_HOST {
                    return Ok(Box::new(connection));
                }
                tracing::warn!("refused a connection from inside the guest");
            },
        }
    }
}

/// The agent's ports in a guest.
pub(crate) struct Ports {
    pub(crate) rpc: Listener,
    pub(crate) streams: Listener,
    pub(crate) forward: Listener,
}

/// Listens on all ports.
pub(crate) fn listen_on_vsock() -> Result<Ports> {
    Ok(Ports {
        rpc: Listener::vsock(AGENT_PORT)?,
        streams: Listener::vsock(STREAM_PORT)?,
        forward: Listener::vsock(FORWARD_PORT)?,
    })
}

/// Serves requests and streams. Returns only if that fails.
pub(crate) async fn run(
    rpc: Listener,
    streams: Listener,
    sandbox: Arc<Sandbox>,
    containers: Arc<Containers>,
) -> Result<()> {
    let parking = containers.parking.clone();
    tokio::spawn(async move {
        loop {
            parking.park(streams.next().await);
        }
    });

    let (sender, receiver) = mpsc::channel(BACKLOG);
    let services = Services { sandbox, containers: containers.clone() };
    let mut server = Server::new()
        .add_listener(TtrpcListener::new(Accepted(receiver)))
        .register_service(create_sandbox_service(Arc::new(services.clone())))
        .register_service(create_container_service(Arc::new(services)));
    server.start().await.step("start the server")?;
    tokio::spawn(containers.reaper.clone().run());
    while sender.send(Ok(rpc.next().await)).await.is_ok() {}
    Err(Error::failed("serve", "the server has ended"))
}

/// Tells the host that the ports are served. A host that does not listen for that finds out by itself.
pub(crate) async fn greet() {
    let host = VsockAddr::new(VMADDR_CID_HOST, READY_PORT);
    let greeted = async {
        let mut connection = VsockStream::connect(host).await?;
        connection.write_all(READY_GREETING).await?;
        connection.shutdown(std::net::Shutdown::Both)
    };
    if let Err(error) = greeted.await {
        tracing::info!("greet the host: {error}");
    }
}

/// What both services act on.
#[derive(Clone)]
struct Services {
    sandbox: Arc<Sandbox>,
    containers: Arc<Containers>,
}

/// Accepted connections as a stream, which is what ttrpc takes.
struct Accepted(mpsc::Receiver<io::Result<BoxedConnection>>);

impl Stream for Accepted {
    type Item = io::Result<BoxedConnection>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(context)
    }
}

/// Runs an operation to its end even if its caller goes away half-way, so that nothing is left half-made.
async fn detached<T: Send + 'static>(operation: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
    tokio::spawn(operation).await.step("finish the operation")?
}
