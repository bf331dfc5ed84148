//! The owner of a sandbox with one container, from its start to its end.
//!
//! The work that does not need the guest (the container's root, its volumes, its files) is done while the guest boots.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use hull_sandbox::agent::AgentError;
use hull_sandbox::config::SandboxConfig;
use hull_sandbox::container::{Connections, Process, Setup, Streams};
use hull_sandbox::host::Host;
use hull_sandbox::network::Network;
use hull_sandbox::registry::{Phase, Record};
use hull_sandbox::root::{Prepared, Root};
use hull_sandbox::sandbox::{Booting, Configured, Extras, Running, SandboxError};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::log::LogWriter;
use crate::mounts::{Kind, Mounts};
use crate::spec::{self, Container, GuestMount, Program};
use crate::streams::{Attach, Pumps};
use crate::terminal;
use crate::{Error, dns};

/// Everything that is decided before a VM exists.
#[derive(Debug)]
pub(crate) struct Plan {
    pub host: Host,
    pub config: SandboxConfig,
    pub record: Record,
    pub program: Program,
    pub content: Content,
    pub streams: Streams,
    pub attach: Attach,
    /// Remove everything at the end, rather than keep record and log.
    pub remove: bool,
}

/// What the container's file system is made of.
#[derive(Debug)]
pub(crate) struct Content {
    pub root: Root,
    pub container: Container,
    pub mounts: Mounts,
    /// The layers of the images that `mounts` has, in its order.
    pub image_layers: Vec<Vec<PathBuf>>,
    pub files: Files,
}

/// What is decided of the files that name things on the network.
#[derive(Debug)]
pub(crate) struct Files {
    /// Name servers; without any, those of the network or the host.
    pub servers: Vec<std::net::IpAddr>,
    /// Lines for /etc/hosts beside the usual ones.
    pub extra_hosts: Vec<(String, std::net::IpAddr)>,
}

/// Runs the plan's program and returns its exit status. `started` is called once it runs.
pub(crate) async fn supervise(plan: Plan, started: impl FnOnce()) -> Result<u8, Error> {
    let mut signals = Signals::new()?;
    let Plan { host, config, mut record, program, content, streams, attach, remove } = plan;
    let network = config.network.clone();
    let extras = Extras { caching: content.mounts.caching(), disks: content.mounts.disks.clone() };
    let booting = Configured::new(host, config)?.with(extras).start(signals.interruption()).await?;
    record.vmm_pid = booting.vmm_pid();
    let prepared = booting
        .claim()
        .write(&record)
        .map_err(Error::from)
        .and_then(|()| prepare(&booting, &record.id, &content, &network))
        .and_then(|(root, mounts)| Ok((spec::container(&program, &root.path, &content.container, &mounts)?, root)));
    let prepared = match prepared {
        Ok(prepared) => prepared,
        Err(error) => {
            booting.abandon().await;
            return Err(error);
        }
    };
    let mut running = booting.ready(signals.interruption()).await?;
    tracing::debug!(ready_us = running.ready_us(), "the agent answers");

    let log = if remove {
        None
    } else {
        let path = running.claim().dir().join("output.log");
        Some(Arc::new(Mutex::new(LogWriter::create(&path)?)))
    };
    let outcome = run(&mut running, &mut record, &prepared, streams, attach, log.as_ref(), &mut signals, started).await;
    drop(log);
    let claim = running.stop().await?;
    record.vmm_pid = None;
    match outcome {
        Ok(code) => {
            if remove {
                claim.remove()?;
            } else {
                record.phase = Phase::Exited;
                record.exit_code = Some(code);
                claim.keep(&record)?;
            }
            Ok(code)
        }
        Err(Failure { started, error }) => {
            // What never ran is of no use to anybody; what did has output that may say what went wrong.
            if remove || !started {
                claim.remove()?;
            } else {
                record.phase = Phase::Exited;
                record.failure = Some(error.to_string());
                claim.keep(&record)?;
            }
            Err(error)
        }
    }
}

/// Fills the tree that the guest sees; returns the root and what to mount in the container.
fn prepare(
    booting: &Booting,
    id: &str,
    content: &Content,
    network: &Network,
) -> Result<(Prepared, Vec<GuestMount>), Error> {
    let Content { root, container, mounts, image_layers, files } = content;
    let share = booting.share();
    let root = root.prepare(share, id)?;
    let mut made = Vec::new();
    let hosts = dns::hosts(&container.hostname, &booting.addresses(), &files.extra_hosts);
    let hostname = format!("{}\n", container.hostname);
    let resolv_conf = dns::resolv_conf(network, &files.servers, booting.resolv_conf());
    let resolv_conf = resolv_conf.as_ref().map(|contents| ("resolv.conf", contents));
    for (name, contents) in [("hosts", &hosts), ("hostname", &hostname)].into_iter().chain(resolv_conf) {
        let destination = format!("/etc/{name}");
        if mounts.replaces(&destination) {
            continue;
        }
        let source = share.add_file(id, name, contents.as_bytes())?;
        made.push(GuestMount::bind(source, destination, &["rw".to_owned()]));
    }
    let mut images = image_layers.iter();
    for (index, mount) in mounts.mounts.iter().enumerate() {
        let (destination, options) = (mount.destination.clone(), &mount.options);
        let of_kind = |kind: &str, source: String| GuestMount {
            kind: kind.to_owned(),
            source,
            destination: destination.clone(),
            options: options.clone(),
        };
        made.push(match &mount.kind {
            Kind::Bind(volume, caching) => {
                let source = share.add_cached_volume(id, index, volume, *caching)?;
                GuestMount::bind(source, destination, options)
            }
            Kind::Image(_) => {
                let layers = images.next().map(Vec::as_slice).unwrap_or_default();
                GuestMount::bind(share.add_image(id, index, layers)?, destination, options)
            }
            Kind::Tmpfs => of_kind("tmpfs", "tmpfs".to_owned()),
            Kind::Disk { index, fstype } => of_kind(fstype, spec::disk_node(*index)),
        });
    }
    Ok((root, made))
}

/// A run that ended otherwise than by its program's exit.
struct Failure {
    /// Whether the program had started.
    started: bool,
    error: Error,
}

#[expect(clippy::too_many_arguments, reason = "one caller, which owns them all")]
async fn run(
    running: &mut Running,
    record: &mut Record,
    (spec, root): &(oci_spec::runtime::Spec, Prepared),
    streams: Streams,
    attach: Attach,
    log: Option<&Arc<Mutex<LogWriter>>>,
    signals: &mut Signals,
    started: impl FnOnce(),
) -> Result<u8, Failure> {
    let agent = running.agent().clone();
    let before = |error: Error| Failure { started: false, error };
    let mut disks = running.disks();
    let launch = async {
        let storages = root.plug(&mut disks, &agent, &record.id).await?;
        let user = record.guest_user.clone().unwrap_or_default();
        let setup = Setup { storages, user, ..Setup::default() };
        let (process, connections) = Process::create(&agent, &record.id, spec, streams, setup).await?;
        process.start().await?;
        Ok::<_, Error>((process, connections))
    };
    let (process, connections) = tokio::select! {
        biased;
        launched = launch => match launched.map_err(|error: Error| error.downcast::<AgentError>()) {
            Ok(launched) => launched,
            Err(Ok(error)) if matches!(*error, AgentError::Silent { .. }) => {
                return Err(before(cause(running, *error).await));
            }
            Err(Ok(error)) => return Err(before(error)),
            Err(Err(error)) => return Err(before(error)),
        },
        ended = running.ended() => return Err(before(ended.into())),
    };
    record.phase = Phase::Running;
    running.claim().write(record).map_err(|error| before(error.into()))?;
    started();
    let after = |error: Error| Failure { started: true, error };
    let code = tokio::select! {
        biased;
        ended = running.ended() => Err(ended.into()),
        code = attend(&process, connections, streams, attach, log, signals) => code,
    };
    match code {
        Ok(code) => Ok(code),
        Err(error) => match error.downcast::<AgentError>() {
            Ok(error) => Err(after(cause(running, *error).await)),
            Err(error) => Err(after(error)),
        },
    }
}

/// An agent that fell silent may have done so because its VM ended, which says more.
async fn cause(running: &mut Running, error: AgentError) -> Error {
    /// The VMM's exit follows the end of its connections at once, if that is what happened.
    const GRACE: std::time::Duration = std::time::Duration::from_secs(1);
    match tokio::time::timeout(GRACE, running.ended()).await {
        Ok(ended) => ended.into(),
        Err(_) => error.into(),
    }
}

/// Carries a started process's streams and passes signals on until it has ended and all its output has been carried.
pub(crate) async fn attend(
    process: &Process,
    connections: Connections,
    streams: Streams,
    attach: Attach,
    log: Option<&Arc<Mutex<LogWriter>>>,
    signals: &mut Signals,
) -> Result<u8, Error> {
    let with_terminal = matches!(streams, Streams::Terminal { .. });
    let raw_mode = if with_terminal && terminal::is_interactive() { Some(terminal::RawMode::enter()?) } else { None };
    let pumps = Pumps::start(connections, with_terminal, attach, log)?;
    let mut exit = std::pin::pin!(process.wait());
    let status = loop {
        tokio::select! {
            biased;
            status = &mut exit => break status?,
            received = signals.next() => forward(process, received, with_terminal).await,
        }
    };
    tokio::task::spawn_blocking(|| pumps.finish()).await?;
    drop(raw_mode);
    // 128 + 64 signals at most, and an exit status has eight bits.
    Ok(u8::try_from(status.code).unwrap_or(crate::FAILED))
}

async fn forward(process: &Process, received: i32, with_terminal: bool) {
    let forwarded = if received == SignalKind::window_change().as_raw_value() {
        if !with_terminal {
            return;
        }
        let (columns, rows) = terminal::size();
        process.resize(columns, rows).await
    } else {
        process.signal(received.unsigned_abs(), false).await
    };
    if let Err(error) = forwarded {
        tracing::debug!("signal {received} not passed on: {error}");
    }
}

/// The signals that are for the program rather than for hull.
#[derive(Debug)]
pub(crate) struct Signals(Vec<(i32, Signal)>);

impl Signals {
    pub(crate) fn new() -> std::io::Result<Self> {
        let kinds = [
            SignalKind::interrupt(),
            SignalKind::terminate(),
            SignalKind::hangup(),
            SignalKind::quit(),
            SignalKind::user_defined1(),
            SignalKind::user_defined2(),
            SignalKind::window_change(),
        ];
        kinds.into_iter().map(|kind| Ok((kind.as_raw_value(), signal(kind)?))).collect::<std::io::Result<_>>().map(Self)
    }

    /// Waits for the next one.
    async fn next(&mut self) -> i32 {
        std::future::poll_fn(|context| {
            for (number, signal) in &mut self.0 {
                if signal.poll_recv(context).is_ready() {
                    return std::task::Poll::Ready(*number);
                }
            }
            std::task::Poll::Pending
        })
        .await
    }

    /// Waits for one that asks for the end.
    async fn interruption(&mut self) {
        while self.next().await == SignalKind::window_change().as_raw_value() {}
    }
}

/// What an interrupted boot ends with.
pub(crate) fn interrupted(error: &Error) -> bool {
    matches!(error.downcast_ref::<SandboxError>(), Some(SandboxError::Cancelled))
}

/// Where the log of a kept container is.
pub(crate) fn log_path(host: &Host, id: &str) -> PathBuf {
    host.state_dir.join(id).join("output.log")
}
