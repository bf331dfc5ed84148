//! Events to containerd, in the order in which they happened.
//!
//! One task sends them one by one, so a failure that is tried again never lets a later event pass an earlier one.

use std::time::{Duration, SystemTime};

use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::EventsClient;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{MessageField, MessageFull};
use tokio::sync::{mpsc, oneshot};
use ttrpc::asynchronous::Client;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::with_duration;

/// Events that wait while containerd is away; as many as its own shim keeps.
const CAPACITY: usize = 2048;
/// How often an event is tried that containerd does not take.
const ATTEMPTS: u32 = 5;
/// Longest time between two looks for a containerd that is away.
const PAUSE: Duration = Duration::from_secs(4);
/// How long containerd may take to accept one.
const FORWARD_TIMEOUT: Duration = Duration::from_secs(5);

enum Item {
    Event(Box<Envelope>),
    /// Answered once everything before it has been sent or given up.
    Flush(oneshot::Sender<()>),
}

/// The queue's entrance.
#[derive(Clone, Debug)]
pub(crate) struct Publisher {
    namespace: String,
    queue: mpsc::Sender<Item>,
}

impl std::fmt::Debug for Item {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Event(envelope) => f.debug_tuple("Event").field(&envelope.topic).finish(),
            Self::Flush(_) => f.write_str("Flush"),
        }
    }
}

impl Publisher {
    /// Starts to publish to the socket at `address`, in a task of the current runtime.
    pub(crate) fn start(address: &str, namespace: &str) -> Self {
        let (queue, items) = mpsc::channel(CAPACITY);
        let path = address.strip_prefix("unix://").unwrap_or(address).to_owned();
        tokio::spawn(send_all(path, items));
        Self { namespace: namespace.to_owned(), queue }
    }

    /// Queues an event.
    pub(crate) fn publish<M: MessageFull>(&self, topic: &str, event: &M) {
        let envelope = Envelope {
            timestamp: MessageField::some(timestamp(SystemTime::now())),
            namespace: self.namespace.clone(),
            topic: topic.to_owned(),
            event: MessageField::some(any(event)),
            ..Default::default()
        };
        if self.queue.try_send(Item::Event(Box::new(envelope))).is_err() {
            tracing::error!("the event {topic} is lost: containerd has not taken {CAPACITY} before it");
        }
    }

    /// Waits until all events have been sent, for at most `limit`.
    pub(crate) async fn flush(&self, limit: Duration) {
        let (done, flushed) = oneshot::channel();
        let flush = async {
            if self.queue.send(Item::Flush(done)).await.is_ok() {
                // An error means that the task is gone, with nothing left to wait for.
                let _ = flushed.await;
            }
        };
        if tokio::time::timeout(limit, flush).await.is_err() {
            tracing::warn!("containerd has not taken all events");
        }
    }
}

/// containerd names a message in an `Any` by its bare full name.
pub(crate) fn any<M: MessageFull>(message: &M) -> Any {
    Any {
        type_url: M::descriptor().full_name().to_owned(),
        // Fails only where a required field is missing, which proto3 does not have.
        value: message.write_to_bytes().unwrap_or_default(),
        ..Default::default()
    }
}

/// A point in time as protobuf has it.
pub(crate) fn timestamp(time: SystemTime) -> Timestamp {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or(0),
        ..Default::default()
    }
}

async fn send_all(path: String, mut items: mpsc::Receiver<Item>) {
    let mut client = None;
    while let Some(item) = items.recv().await {
        match item {
            Item::Event(envelope) => send(&path, &mut client, *envelope).await,
            // Whoever waited may have given up.
            Item::Flush(done) => drop(done.send(())),
        }
    }
}

async fn send(path: &str, client: &mut Option<EventsClient>, envelope: Envelope) {
    let topic = envelope.topic.clone();
    let request = ForwardRequest { envelope: MessageField::some(envelope), ..Default::default() };
    for attempt in 1..=ATTEMPTS {
        let connected = match client {
            Some(client) => client,
            None => client.insert(connect(path).await),
        };
        match connected.forward(with_duration(FORWARD_TIMEOUT), &request).await {
            Ok(_) => return,
            Err(error) => {
                tracing::warn!("the event {topic} was not taken ({attempt} of {ATTEMPTS}): {error}");
                *client = None;
            }
        }
        if attempt < ATTEMPTS {
            // containerd may be ending.
            tokio::time::sleep(Duration::from_secs(attempt.into())).await;
        }
    }
    tracing::error!("the event {topic} is lost");
}

/// Connects to containerd, however long that is away: what happens meanwhile waits in the queue.
async fn connect(path: &str) -> EventsClient {
    let mut pause = Duration::from_secs(1);
    loop {
        match tokio::net::UnixStream::connect(path).await {
            Ok(stream) => return EventsClient::new(Client::new(Socket::new(stream))),
            Err(error) if pause < PAUSE => tracing::warn!("nobody takes events at {path}, so they wait: {error}"),
            Err(_) => {}
        }
        tokio::time::sleep(pause).await;
        pause = PAUSE.min(pause * 2);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use containerd_shim_protos::events::task::TaskOOM;
    use containerd_shim_protos::shim_async::{Events, create_events};
    use protobuf::Message;
    use protobuf::well_known_types::empty::Empty;
    use ttrpc::asynchronous::{Server, TtrpcContext};

    use super::*;

    /// Takes events, and tells whose they are.
    struct Containerd(mpsc::UnboundedSender<String>);

    #[async_trait::async_trait]
    impl Events for Containerd {
        async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
            let event = TaskOOM::parse_from_bytes(&request.envelope.event.value).unwrap();
            self.0.send(event.container_id).unwrap();
            Ok(Empty::new())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn events_wait_for_a_containerd_that_is_away_for_an_hour() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("events").display().to_string();
        let publisher = Publisher::start(&socket, "tests");
        for id in ["first", "second"] {
            publisher.publish("/tasks/oom", &TaskOOM { container_id: id.into(), ..Default::default() });
        }
        tokio::time::sleep(Duration::from_secs(3600)).await;
        tokio::time::resume();
        let (taken, mut told) = mpsc::unbounded_channel();
        let service = create_events(Arc::new(Containerd(taken)));
        let mut server = Server::new().bind(&format!("unix://{socket}")).unwrap().register_service(service);
        server.start().await.unwrap();
        publisher.flush(Duration::from_secs(60)).await;
        assert_eq!((told.try_recv().unwrap(), told.try_recv().unwrap()), ("first".into(), "second".into()));
    }

    #[test]
    fn messages_are_named_as_containerd_names_them() {
        let any = any(&TaskOOM { container_id: "c".into(), ..Default::default() });
        assert_eq!(any.type_url, "containerd.events.TaskOOM");
        assert!(!any.value.is_empty());
    }

    #[test]
    fn a_time_before_the_epoch_is_the_epoch() {
        let before = SystemTime::UNIX_EPOCH - Duration::from_secs(1);
        assert_eq!(timestamp(before), Timestamp::default());
    }
}
