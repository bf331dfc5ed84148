//! The connections that clients hold, counted: the end waits until theirs has come.
//!
//! containerd's client picks at random between an answer and the end of the connection where it sees both at once. So a shim that
//! has answered its last request leaves the closing to the client.

use std::io::Result;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use ttrpc::asynchronous::transport::Listener;

/// How many there are.
#[derive(Clone, Debug, Default)]
pub(crate) struct Connections(watch::Sender<usize>);

/// One of them, until it is dropped.
struct Connection {
    stream: UnixStream,
    counted: Connections,
}

impl Connections {
    /// A listener whose connections are counted here.
    ///
    /// # Errors
    ///
    /// Fails where `listener` cannot be waited for.
    pub(crate) fn listener(&self, listener: std::os::unix::net::UnixListener) -> Result<Listener> {
        listener.set_nonblocking(true)?;
        let listener = UnixListener::from_std(listener)?;
        Ok(Listener::new(Accepted { listener, counted: self.clone() }))
    }

    /// Waits until no client holds one.
    pub(crate) async fn closed(&self) {
        // The sender is this value's own, so this does not fail.
        let _ = self.0.subscribe().wait_for(|open| *open == 0).await;
    }
}

impl Connection {
    fn new(stream: UnixStream, counted: Connections) -> Self {
        counted.0.send_modify(|open| *open += 1);
        Self { stream, counted }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.counted.0.send_modify(|open| *open -= 1);
    }
}

/// What is accepted, without end.
struct Accepted {
    listener: UnixListener,
    counted: Connections,
}

impl futures_core::Stream for Accepted {
    type Item = Result<Connection>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let accepted = self.listener.poll_accept(context);
        accepted.map(|accepted| Some(accepted.map(|(stream, _)| Connection::new(stream, self.counted.clone()))))
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[std::io::IoSlice<'_>],
    ) -> Poll<Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use ttrpc::asynchronous::Server;

    use super::*;

    #[tokio::test]
    async fn the_end_waits_for_clients_to_close() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let connections = Connections::default();
        let listener = connections.listener(std::os::unix::net::UnixListener::bind(&path).unwrap()).unwrap();
        let mut server = Server::new().add_listener(listener);
        server.start().await.unwrap();
        connections.closed().await;
        let client = UnixStream::connect(&path).await.unwrap();
        connections.0.subscribe().wait_for(|open| *open == 1).await.unwrap();
        // Nothing else runs here, so there is nothing that could close it meanwhile.
        assert!(tokio::time::timeout(Duration::from_millis(1), connections.closed()).await.is_err());
        drop(client);
        connections.closed().await;
    }
}
