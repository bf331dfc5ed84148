//! The daemon: one thread that serves one pod until that is gone.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::sandbox_async::create_sandbox;
use containerd_shim_protos::shim_async::create_task;
use hull_sandbox::host::Host;
use hull_sandbox::share::enter_mount_namespace;
use hull_settings::{Level, Settings};
use ttrpc::asynchronous::{Server, Service};

use crate::Trouble;
use crate::connections::Connections;
use crate::events::Publisher;
use crate::flags::Flags;
use crate::orphans;
use crate::pod::Pod;
use crate::sandbox::SandboxService;
use crate::streams::STREAMING;
use crate::task::TaskService;

/// How long clients may take at the end to read what they were answered and to close.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a shim waits for its pod to be created. containerd asks for that as soon as it has the address; one that was
/// killed just then may know nothing of the shim when it comes back.
const CREATE_TIMEOUT: Duration = Duration::from_secs(60);
/// Threads for what blocks for a moment: opening connections to the guest.
const BLOCKING_THREADS: usize = 4;
/// What they do is shallow.
const STACK_BYTES: usize = 256 * 1024;

/// Serves the pod on the socket that is standard input.
pub(crate) fn run(flags: &Flags) -> Result<(), Trouble> {
    let settings = Settings::load()?;
    let level = if flags.debug { Level::Debug } else { settings.log.level.value };
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).with_max_level(filter(level)).init();
    // Before any thread exists: mounts made from here on end with this process.
    enter_mount_namespace()?;
    let listener = UnixListener::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    // Known from here, since the bundle may be gone at the end.
    let socket = listener.local_addr()?.as_pathname().map(Path::to_owned);
    let host = settings.host(Host::discover()?);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_stack_size(STACK_BYTES)
        .thread_keep_alive(Duration::from_secs(1))
        .build()?;
    let outcome = runtime.block_on(serve(flags, host, settings, listener));
    if let Err(error) = &outcome {
        tracing::error!("{error}");
    }
    if let Some(socket) = socket {
        // Gone already where somebody was quicker.
        let _ = std::fs::remove_file(socket);
    }
    outcome
}

async fn serve(flags: &Flags, host: Host, settings: Settings, listener: UnixListener) -> Result<(), Trouble> {
    orphans::adopt()?;
    let publisher = Publisher::start(&std::env::var("TTRPC_ADDRESS")?, &flags.namespace);
    let pod = Pod::new(&flags.pod, &flags.namespace, host, settings, publisher);
    let connections = Connections::default();
    let mut server = Server::new().add_listener(connections.listener(listener)?).register_service(services(&pod));
    server.start().await?;
    let unclaimed = pod.clone();
    tokio::spawn(async move {
        tokio::time::sleep(CREATE_TIMEOUT).await;
        unclaimed.shutdown().await;
    });
    pod.finished().await;
    if tokio::time::timeout(SHUTDOWN_TIMEOUT, connections.closed()).await.is_err() {
        tracing::debug!("clients still hold connections");
    }
    // With those that are left, no answer is on its way any more.
    let _ = tokio::time::timeout(SHUTDOWN_TIMEOUT, server.shutdown()).await;
    Ok(())
}

fn filter(level: Level) -> tracing::Level {
    match level {
        Level::Error => tracing::Level::ERROR,
        Level::Warn => tracing::Level::WARN,
        Level::Info => tracing::Level::INFO,
        Level::Debug => tracing::Level::DEBUG,
    }
}

/// The sandbox service, that of streams, and both versions of the task service, which differ in nothing but their names.
fn services(pod: &Arc<Pod>) -> HashMap<String, Service> {
    let mut services = create_sandbox(Arc::new(SandboxService(pod.clone())));
    for name in ["containerd.task.v2.Task", "containerd.task.v3.Task"] {
        let task = create_task(Arc::new(TaskService(pod.clone())));
        services.extend(task.into_values().map(|service| (name.to_owned(), service)));
    }
    services.insert(STREAMING.to_owned(), pod.streaming().service());
    services
}
