//! Events, taken as containerd takes them.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use containerd_shim_protos::api::{PauseRequest, ResumeRequest, ShutdownRequest};
use containerd_shim_protos::events::task::TaskExit;
use containerd_shim_protos::protobuf::well_known_types::empty::Empty;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::ttrpc::{Result as Answer, Server, TtrpcContext};
use containerd_shim_protos::{Events, create_events};

use super::*;

/// How long an event may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Notes the topic of each event; for an exit, of what.
struct Noted(std::sync::Mutex<Sender<String>>);

impl Events for Noted {
    fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> Answer<Empty> {
        let envelope = request.envelope;
        assert_eq!(envelope.namespace, "tests");
        assert!(envelope.timestamp.seconds > 0);
        let mut text = envelope.topic.trim_start_matches("/tasks/").to_owned();
        if text == "exit" {
            assert_eq!(envelope.event.type_url, "containerd.events.TaskExit");
            let exit = TaskExit::parse_from_bytes(&envelope.event.value).unwrap();
            assert!(exit.exited_at.seconds > 0 && exit.pid > 0);
            text = format!("exit of {} in {} with {}", exit.id, exit.container_id, exit.exit_status);
        }
        // The test may have failed.
        let _ = self.0.lock().unwrap().send(text);
        Ok(Empty::new())
    }
}

/// Takes events at a socket from now on.
fn take_events(socket: &Path) -> (Server, Receiver<String>) {
    let (sender, events) = channel();
    let service = create_events(Arc::new(Noted(std::sync::Mutex::new(sender))));
    let mut server = Server::new().bind(&format!("unix://{}", socket.display())).unwrap().register_service(service);
    server.start().unwrap();
    (server, events)
}

#[track_caller]
fn expect(events: &Receiver<String>, wanted: &[&str]) {
    for wanted in wanted {
        let event = events.recv_timeout(PATIENCE).unwrap_or_else(|error| panic!("no {wanted}: {error}"));
        assert_eq!(event, *wanted);
    }
}

#[test]
fn events_order_is_that_of_what_happened_and_a_containers_exit_is_the_last() {
    run(async {
        let shim = Shim::start_telling("told", |dir| dir.join("events").display().to_string()).await;
        // Nobody takes them yet: they wait, in their order.
        let bundle = shim.single_bundle("sleep 1000");
        shim.tasks().create(patience(), &create("told", &bundle)).await.unwrap();
        shim.start_task("told", "").await.unwrap();
        let (server, events) = take_events(&shim.dir.join("events"));
        expect(&events, &["create", "start"]);

        shim.exec("told", "short", "exit 3").await;
        expect(&events, &["exec-added", "exec-started", "exit of short in told with 3"]);
        shim.tasks().pause(patience(), &PauseRequest { id: "told".into(), ..Default::default() }).await.unwrap();
        shim.tasks().resume(patience(), &ResumeRequest { id: "told".into(), ..Default::default() }).await.unwrap();
        expect(&events, &["paused", "resumed"]);
        shim.exec("told", "long", "sleep 1000").await;
        expect(&events, &["exec-added", "exec-started"]);

        // containerd goes, and comes back at the same place.
        server.shutdown();
        std::fs::remove_file(shim.dir.join("events")).unwrap();
        shim.kill("told", "", Signal::SIGKILL).await.unwrap();
        assert_eq!(shim.wait_task("told", "").await, 137);
        let (_server, events) = take_events(&shim.dir.join("events"));
        expect(&events, &["exit of long in told with 137", "exit of told in told with 137"]);
        shim.delete_task("told", "").await.unwrap();
        // The last one comes before the shim ends.
        shim.tasks().shutdown(patience(), &ShutdownRequest { id: "told".into(), ..Default::default() }).await.unwrap();
        fixture::wait_gone(shim.pid());
        assert_eq!(events.try_iter().collect::<Vec<_>>(), ["delete"]);
    });
}
