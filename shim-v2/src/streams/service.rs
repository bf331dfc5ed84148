//! Streams that containerd opens to the shim, on the socket that serves tasks too (`io_type = "streaming"`).
//!
//! A client names the stream that it wants to be the other end of, before the process exists and again whenever it comes back, as
//! after a restart of containerd. So each name has a place where the latest client waits until the process's side takes it:
//!
//! ```text
//! no client ──comes──▶ waiting ──taken──▶ in use ──another comes──▶ the other in its stead
//! ```
//!
//! Whoever sends may send as many bytes as the receiver has granted by window updates, so neither keeps more than that for the other.
//! The end of a process's side is the end of the stream. A client that is gone without a word is noticed when something is sent.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use tokio::sync::{Notify, oneshot};
use ttrpc::r#async::ServerStream;
use ttrpc::asynchronous::{Service, StreamHandler, StreamInner, TtrpcContext};
use ttrpc::{Code, Response};

use crate::generated::streaming::{Data, StreamInit, WindowUpdate};

/// The service's name.
pub(crate) const NAME: &str = "containerd.services.streaming.v1.Streaming";
const INIT: &str = "containerd.services.streaming.v1.StreamInit";
const DATA: &str = "containerd.types.transfer.Data";
const WINDOW_UPDATE: &str = "containerd.types.transfer.WindowUpdate";
/// The answer to the first message; containerd looks only at that there is one.
const READY: &str = "google.protobuf.Empty";

/// Bytes in a message, as many as containerd's own have.
const MAX_DATA_BYTES: usize = 32 * 1024;
/// What is granted at a time, and so half of what may be on its way.
const WINDOW_BYTES: i32 = 64 * 1024;
/// Most clients that wait for processes: those of containers that were never created would otherwise add up. 64 execs at once
/// have 192.
const MAX_WAITING: usize = 1024;

/// All streams of a pod, by the names that containerd gives them.
#[derive(Debug, Default)]
pub(crate) struct Streaming {
    places: Mutex<Places>,
}

#[derive(Debug, Default)]
struct Places {
    by_name: HashMap<String, Place>,
    /// Names of which no process is known, oldest first.
    strangers: VecDeque<String>,
}

#[derive(Debug, Default)]
struct Place {
    waiting: Option<Client>,
    arrived: Arc<Notify>,
    /// Whether the process's side has ended, so that whoever comes finds the end.
    is_finished: bool,
}

/// A client's end. Dropping it ends the stream after what has been sent.
#[derive(Debug)]
struct Client {
    stream: ServerStream<Any, Any>,
    _end: oneshot::Sender<()>,
}

impl Streaming {
    /// The ttrpc service.
    pub(crate) fn service(self: &Arc<Self>) -> Service {
        let handler: Arc<dyn StreamHandler + Send + Sync> = Arc::new(Handler(self.clone()));
        Service { methods: HashMap::new(), streams: HashMap::from([("Stream".to_owned(), handler)]) }
    }

    /// Has a name for a process; a client that has come for it already is kept.
    pub(super) fn reserve(self: &Arc<Self>, name: &str) -> (Reservation, Side) {
        let mut places = self.lock();
        places.strangers.retain(|stranger| stranger != name);
        let place = places.by_name.entry(name.to_owned()).or_default();
        place.is_finished = false;
        let arrived = place.arrived.clone();
        let side = Side { streaming: self.clone(), name: name.to_owned(), arrived, client: None, window: 0 };
        (Reservation { streaming: self.clone(), name: name.to_owned() }, side)
    }

    fn come(&self, name: String, client: Client) {
        let mut places = self.lock();
        if !places.by_name.contains_key(&name) {
            places.strangers.push_back(name.clone());
            if places.strangers.len() > MAX_WAITING
                && let Some(oldest) = places.strangers.pop_front()
            {
                tracing::warn!("nobody has asked for the stream {oldest}, and it is ended");
                places.by_name.remove(&oldest);
            }
        }
        let place = places.by_name.entry(name).or_default();
        if !place.is_finished {
            place.waiting = Some(client);
            place.arrived.notify_one();
        }
    }

    fn take_waiting(&self, name: &str) -> Option<Client> {
        self.lock().by_name.get_mut(name)?.waiting.take()
    }

    fn lock(&self) -> MutexGuard<'_, Places> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A name that is a process's. Dropping it forgets the name.
#[derive(Debug)]
pub(super) struct Reservation {
    streaming: Arc<Streaming>,
    name: String,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let forgotten = self.streaming.lock().by_name.remove(&self.name);
        // Not under the lock: a client's end wakes others.
        drop(forgotten);
    }
}

/// A process's side of a stream: its input or its output. Dropping it is the end of the stream.
#[derive(Debug)]
pub(super) struct Side {
    streaming: Arc<Streaming>,
    name: String,
    arrived: Arc<Notify>,
    client: Option<Client>,
    /// Bytes that may still be sent: of output to the client, of input by it.
    window: i64,
}

/// What happens at the other end.
enum Event {
    /// A client has come, in the stead of the one before.
    Came,
    Said(Any),
    /// It says no more.
    Closed,
    /// Its connection is broken.
    Lost,
}

impl Side {
    /// Sends all of `bytes`, as fast as clients take them; without a client it waits for one, as for a FIFO's reader.
    pub(super) async fn write(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            // The latest is the one that reads.
            if let Some(client) = self.streaming.take_waiting(&self.name) {
                self.adopt(client);
            }
            let count = bytes.len().min(MAX_DATA_BYTES).min(usize::try_from(self.window).unwrap_or(0));
            if let Some(client) = self.client.as_ref().filter(|_| count > 0) {
                let data = Data { data: bytes[..count].to_vec(), ..Default::default() };
                match client.stream.send(&pack(&data, DATA)).await {
                    Ok(()) => {
                        bytes = &bytes[count..];
                        self.window -= count as i64;
                    }
                    Err(_) => self.client = None,
                }
                continue;
            }
            match self.next().await {
                Event::Came => {}
                Event::Said(message) => match unpack::<WindowUpdate>(&message, WINDOW_UPDATE) {
                    Some(update) => self.window = self.window.saturating_add(update.update.max(0).into()),
                    None => tracing::debug!("the stream {} carries {} to a process", self.name, message.type_url),
                },
                // Another may read on.
                Event::Closed | Event::Lost => self.client = None,
            }
        }
    }

    /// Receives the next bytes; none once a client has closed the stream. Loses nothing when it is cancelled.
    pub(super) async fn read(&mut self) -> Option<Vec<u8>> {
        loop {
            if self.window < WINDOW_BYTES.into()
                && let Some(client) = &self.client
            {
                // First, so that a call that is cancelled meanwhile does not grant it twice.
                self.window += i64::from(WINDOW_BYTES);
                let update = WindowUpdate { update: WINDOW_BYTES, ..Default::default() };
                if client.stream.send(&pack(&update, WINDOW_UPDATE)).await.is_err() {
                    self.client = None;
                }
            }
            match self.next().await {
                Event::Came => {}
                Event::Said(message) => match unpack::<Data>(&message, DATA) {
                    Some(data) => {
                        self.window -= data.data.len() as i64;
                        return Some(data.data);
                    }
                    None => tracing::debug!("the stream {} carries {} from a client", self.name, message.type_url),
                },
                Event::Closed => return None,
                Event::Lost => self.client = None,
            }
        }
    }

    async fn next(&mut self) -> Event {
        let said = async {
            match &mut self.client {
                Some(client) => client.stream.recv().await,
                None => std::future::pending().await,
            }
        };
        let client = tokio::select! {
            biased;
            client = arrival(&self.streaming, &self.name, &self.arrived) => client,
            said = said => return match said {
                Ok(Some(message)) => Event::Said(message),
                Ok(None) => Event::Closed,
                Err(_) => Event::Lost,
            },
        };
        self.adopt(client);
        Event::Came
    }

    fn adopt(&mut self, client: Client) {
        // Grants are between two ends, so they start anew.
        (self.client, self.window) = (Some(client), 0);
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        let late = self.streaming.lock().by_name.get_mut(&self.name).and_then(|place| {
            place.is_finished = true;
            place.waiting.take()
        });
        drop(late);
    }
}

async fn arrival(streaming: &Streaming, name: &str, arrived: &Notify) -> Client {
    loop {
        if let Some(client) = streaming.take_waiting(name) {
            return client;
        }
        arrived.notified().await;
    }
}

/// The service's one method.
struct Handler(Arc<Streaming>);

#[async_trait]
impl StreamHandler for Handler {
    async fn handler(&self, _: TtrpcContext, inner: StreamInner) -> ttrpc::Result<Option<Response>> {
        let mut stream = ServerStream::<Any, Any>::new(inner);
        let Some(mut message) = stream.recv().await? else { return Ok(None) };
        // The request that opens a stream has no message, and containerd's does not say so: ttrpc takes it for an empty one.
        if message.type_url.is_empty() && message.value.is_empty() {
            let Some(next) = stream.recv().await? else { return Ok(None) };
            message = next;
        }
        let name = unpack::<StreamInit>(&message, INIT).map(|init| init.id).filter(|name| !name.is_empty());
        let Some(name) = name else {
            let reason = "the first message of a stream has to name it";
            return Err(ttrpc::Error::RpcStatus(ttrpc::get_status(Code::INVALID_ARGUMENT, reason)));
        };
        stream.send(&Any { type_url: READY.to_owned(), ..Default::default() }).await?;
        let (end, ended) = oneshot::channel();
        self.0.come(name, Client { stream, _end: end });
        // Fails when the client's end is dropped, which is what is waited for.
        let _ = ended.await;
        Ok(None)
    }
}

fn pack(message: &impl Message, name: &str) -> Any {
    // Writing to memory does not fail.
    Any { type_url: name.to_owned(), value: message.write_to_bytes().unwrap_or_default(), ..Default::default() }
}

/// The message in `any`, if it is of this name; with or without a prefix, as in URLs of types.
fn unpack<M: Message>(any: &Any, name: &str) -> Option<M> {
    let found = any.type_url.rsplit('/').next()?;
    (found == name).then(|| M::parse_from_bytes(&any.value).ok()).flatten()
}

#[cfg(test)]
pub(super) mod testing {
    //! A server with the service on a socket of its own, and clients as containerd has them.

    use std::os::unix::net::UnixListener;

    use ttrpc::asynchronous::transport::Listener;
    use ttrpc::asynchronous::{Client as Connection, ClientStream, Server};
    use ttrpc::proto::Request;

    use super::*;

    pub(in crate::streams) struct Shim {
        pub(in crate::streams) streaming: Arc<Streaming>,
        pub(in crate::streams) address: String,
        _server: Server,
        _dir: tempfile::TempDir,
    }

    pub(in crate::streams) struct Peer {
        stream: ClientStream<Any, Any>,
        _connection: Connection,
    }

    impl Shim {
        pub(in crate::streams) async fn start() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("s");
            let listener = Listener::try_from(UnixListener::bind(&path).unwrap()).unwrap();
            let streaming = Arc::new(Streaming::default());
            let services = HashMap::from([(NAME.to_owned(), streaming.service())]);
            let mut server = Server::new().add_listener(listener).register_service(services);
            server.start().await.unwrap();
            Self { streaming, address: format!("unix://{}", path.display()), _server: server, _dir: dir }
        }

        pub(in crate::streams) async fn peer(&self, first: &Any) -> Result<Peer, ttrpc::Error> {
            let connection = Connection::connect(&self.address).await.unwrap();
            let request = Request { service: NAME.into(), method: "Stream".into(), ..Default::default() };
            let mut stream = ClientStream::new(connection.new_stream(request, true, true).await?);
            stream.send(first).await?;
            stream.recv().await.map(|_| Peer { stream, _connection: connection })
        }

        /// As ttrpc for Go opens a stream: the request is taken for a first message without content.
        pub(in crate::streams) async fn named_as_by_go(&self, name: &str) -> Peer {
            let connection = Connection::connect(&self.address).await.unwrap();
            let request = Request { service: NAME.into(), method: "Stream".into(), ..Default::default() };
            let mut stream = ClientStream::new(connection.new_stream(request, true, true).await.unwrap());
            stream.send(&Any::default()).await.unwrap();
            stream.send(&pack(&StreamInit { id: name.into(), ..Default::default() }, INIT)).await.unwrap();
            stream.recv().await.unwrap();
            Peer { stream, _connection: connection }
        }

        pub(in crate::streams) async fn named(&self, name: &str) -> Peer {
            self.peer(&pack(&StreamInit { id: name.into(), ..Default::default() }, INIT)).await.unwrap()
        }
    }

    impl Peer {
        pub(in crate::streams) async fn grant(&self, update: i32) {
            let update = WindowUpdate { update, ..Default::default() };
            self.stream.send(&pack(&update, WINDOW_UPDATE)).await.unwrap();
        }

        /// The next bytes, or the end.
        pub(in crate::streams) async fn read(&mut self) -> Option<Vec<u8>> {
            self.stream.recv().await.ok().map(|any| unpack::<Data>(&any, DATA).unwrap().data)
        }

        pub(in crate::streams) async fn granted(&mut self) -> i32 {
            unpack::<WindowUpdate>(&self.stream.recv().await.unwrap(), WINDOW_UPDATE).unwrap().update
        }

        pub(in crate::streams) async fn write(&self, bytes: &[u8]) {
            let data = Data { data: bytes.to_vec(), ..Default::default() };
            self.stream.send(&pack(&data, DATA)).await.unwrap();
        }

        pub(in crate::streams) async fn close(&self) {
            self.stream.close_send().await.unwrap();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::testing::Shim;
    use super::*;

    #[tokio::test]
    async fn output_is_sent_as_far_as_it_is_granted_and_then_ends() {
        let shim = Shim::start().await;
        // Before the process, as containerd opens it.
        let mut peer = shim.named("c-stdout").await;
        let (_name, mut side) = shim.streaming.reserve("c-stdout");
        let sent: Vec<u8> = (0..200_000_u32).map(|number| (number % 251) as u8).collect();
        let writer = tokio::spawn({
            let sent = sent.clone();
            async move { side.write(&sent).await }
        });
        let mut received = Vec::new();
        let mut granted = 0;
        loop {
            if received.len() == granted {
                assert!(!writer.is_finished() || granted >= sent.len());
                granted += 50_000;
                peer.grant(50_000).await;
            }
            let Some(bytes) = peer.read().await else { break };
            received.extend(bytes);
            assert!(received.len() <= granted, "{} bytes of {granted}", received.len());
        }
        assert!(received == sent);
    }

    #[tokio::test]
    async fn a_client_that_vanishes_is_followed_by_the_next() {
        let shim = Shim::start().await;
        let (_name, mut side) = shim.streaming.reserve("c-stdout");
        let mut first = shim.named("c-stdout").await;
        first.grant(4).await;
        let writer = tokio::spawn(async move { side.write(b"one two").await });
        assert_eq!(first.read().await.unwrap(), b"one ");
        drop(first);
        let mut second = shim.named("c-stdout").await;
        second.grant(100).await;
        assert_eq!(second.read().await.unwrap(), b"two");
        assert_eq!(second.read().await, None);
        writer.await.unwrap();
    }

    #[tokio::test]
    async fn input_is_granted_carried_and_closed() {
        let shim = Shim::start().await;
        let (_name, mut side) = shim.streaming.reserve("c-stdin");
        let mut peer = shim.named("c-stdin").await;
        let reader = tokio::spawn(async move {
            let mut received = Vec::new();
            while let Some(bytes) = side.read().await {
                received.extend(bytes);
            }
            received
        });
        assert_eq!(peer.granted().await, WINDOW_BYTES);
        peer.write(b"some ").await;
        assert_eq!(peer.granted().await, WINDOW_BYTES);
        peer.write(b"words").await;
        peer.close().await;
        assert_eq!(reader.await.unwrap(), b"some words");
    }

    #[tokio::test]
    async fn a_client_that_comes_late_finds_the_end() {
        let shim = Shim::start().await;
        let (name, side) = shim.streaming.reserve("c-stdout");
        drop(side);
        assert_eq!(shim.named("c-stdout").await.read().await, None);
        drop(name);
        assert!(shim.streaming.lock().by_name.is_empty());
    }

    #[tokio::test]
    async fn a_stream_that_go_opens_is_named_by_its_second_message() {
        let shim = Shim::start().await;
        let (_name, mut side) = shim.streaming.reserve("c-stdout");
        let mut peer = shim.named_as_by_go("c-stdout").await;
        peer.grant(100).await;
        side.write(b"words").await;
        assert_eq!(peer.read().await.unwrap(), b"words");
    }

    #[tokio::test]
    async fn a_stream_without_a_name_is_refused() {
        let shim = Shim::start().await;
        for first in [pack(&StreamInit::default(), INIT), pack(&Data::default(), DATA)] {
            assert!(shim.peer(&first).await.is_err());
        }
    }

    #[tokio::test]
    async fn clients_that_nobody_asks_for_do_not_add_up() {
        let shim = Shim::start().await;
        let mut first = shim.named("0").await;
        for number in 1..=MAX_WAITING {
            shim.streaming.lock().strangers.push_back(number.to_string());
        }
        let _last = shim.named("last").await;
        assert_eq!(first.read().await, None);
    }
}
