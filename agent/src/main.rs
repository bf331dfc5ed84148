//! The agent of a Hull guest: PID 1, which runs the containers that the host asks for.
//!
//! One thread serves everything: two ttrpc services on one vsock port, standard streams on another. Containers are
//! made by helpers, processes of their own started from the same binary.
#![deny(unsafe_code)]

mod cgroup;
mod cli;
mod container;
mod cpus;
mod devices;
mod error;
mod events;
mod files;
mod forward;
mod helper;
mod init;
mod log;
mod network;
mod overlay;
mod reaper;
mod sandbox;
mod server;
mod storage;
mod streams;
mod sys;
mod volumes;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use rustix::process::{getpid, set_child_subreaper};

use crate::container::Containers;
use crate::error::{Result, Step};
use crate::sandbox::Sandbox;
use crate::server::Listener;

/// Where a guest keeps what it has of its containers.
const STATE_DIRECTORY: &str = "/run/hull/containers";
/// Where it has volumes in its memory.
const VOLUMES_DIRECTORY: &str = "/run/hull/volumes";

fn main() -> ExitCode {
    let mut words = std::env::args_os();
    if words.next().is_some_and(|name| name == helper::NAME) {
        return helper::main();
    }
    let result = if getpid().is_init() {
        run(|| Box::pin(serve_guest()))
    } else {
        match cli::parse(words.map(|word| word.to_string_lossy().into_owned())) {
            Ok(options) => run(|| Box::pin(serve_machine(options))),
            Err(reason) => {
                eprintln!("hull-agent: {reason}\n{}", cli::USAGE);
                return ExitCode::from(2);
            }
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hull-agent: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(serve: impl FnOnce() -> std::pin::Pin<Box<dyn Future<Output = Result<()>>>>) -> Result<()> {
    // A thread that blocks is rare here, and soon ends again.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().step("start the runtime")?;
    runtime.block_on(serve())
}

/// As the first process of a guest.
async fn serve_guest() -> Result<()> {
    init::early()?;
    let server::Ports { rpc, streams, forward } = server::listen_on_vsock()?;
    let sandbox = Arc::new(Sandbox::new(true));
    // A connection made from here on waits for the rest.
    tokio::spawn(server::greet());
    init::late();
    tokio::spawn(forward::serve(forward));
    tracing::info!(
        "listening {} us after the kernel's start, set up after {} us",
        sandbox.ready_us,
        sandbox::uptime_us()
    );
    let cgroup = cgroup::Cgroup::at(init::CONTAINERS_CGROUP.as_ref());
    let containers =
        Arc::new(Containers::new(cgroup, PathBuf::from(STATE_DIRECTORY), PathBuf::from(VOLUMES_DIRECTORY)));
    server::run(rpc, streams, sandbox, containers).await
}

/// As some process of some machine, for tests.
async fn serve_machine(options: cli::Options) -> Result<()> {
    log::start(log::level_from_environment(), false);
    set_child_subreaper(Some(getpid())).step("become the reaper of orphans")?;
    let rpc = Listener::unix(&options.listen)?;
    let streams = Listener::unix(&options.streams)?;
    let cgroup = init::make_containers_cgroup(&options.cgroup)?;
    let containers = Arc::new(Containers::new(cgroup, options.state.join("containers"), options.state.join("volumes")));
    server::run(rpc, streams, Arc::new(Sandbox::new(false)), containers).await
}
