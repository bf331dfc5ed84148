//! The phases of a sandbox's life; see the crate's documentation for the diagram.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hull_protocol::MAX_ENTROPY_BYTES;
use hull_protocol::agent as wire;
use hull_protocol::agent::{CreateSandboxRequest, Storage, storage};
use rustix::rand::{GetRandomFlags, getrandom};

use crate::agent::{Agent, AgentError, answer, short};
use crate::config::{ConfigError, SandboxConfig};
use crate::disks::{DiskFile, Disks};
use crate::host::{Host, HostError};
use crate::network::{self, Attachment, NetworkError};
use crate::registry::{Claim, Registry, RegistryError};
use crate::share::{self, Caching, Share, ShareError};
use crate::turn::Turn;
use crate::vmm::{Sockets, Vmm, VmmError};

/// How long a guest may take to write everything back and power off before its VMM is killed.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(10);
/// How soon a VMM's end follows that of its connections.
const END_GRACE: Duration = Duration::from_secs(1);
/// Fresh entropy for a guest: one block of the kernel's input pool hash.
const ENTROPY_BYTES: usize = 64;
const _: () = assert!(ENTROPY_BYTES <= MAX_ENTROPY_BYTES);

/// A sandbox that did not come up, or went away.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// A wish that cannot be fulfilled.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// An installation that is not whole.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The state directory, or a name in use.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The tree that the guest sees.
    #[error(transparent)]
    Share(#[from] ShareError),
    /// The network.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// The VMM.
    #[error(transparent)]
    Vmm(#[from] VmmError),
    /// The agent.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// The guest boots, but its agent does not answer.
    #[error("the guest's agent did not answer within {seconds} s{}; --boot-timeout or guest.boot_timeout_s allows more", said(.console))]
    BootTimeout {
        /// The time it had.
        seconds: u64,
        /// What the guest printed last.
        console: Vec<String>,
    },
    /// The caller changed its mind.
    #[error("interrupted before the guest had booted")]
    Cancelled,
    /// The host has no randomness for the guest.
    #[error("cannot draw entropy for the guest: {0}")]
    Random(#[source] std::io::Error),
}

fn said(console: &[String]) -> String {
    if console.is_empty() { String::new() } else { format!("; its last words: {}", console.join(" | ")) }
}

/// Devices that a sandbox may have besides those of every sandbox.
#[derive(Clone, Debug, Default)]
pub struct Extras {
    /// Policies that volumes are to be cached by, each at most once.
    pub caching: Vec<Caching>,
    /// `/dev/vda` onwards in the guest.
    pub disks: Vec<DiskFile>,
}

/// A sandbox that has been checked and has its directory, but no VM.
#[derive(Debug)]
pub struct Configured {
    host: Host,
    config: SandboxConfig,
    claim: Claim,
    extras: Extras,
}

/// A sandbox whose VM boots.
#[derive(Debug)]
pub struct Booting {
    config: SandboxConfig,
    parts: Parts,
    sockets: Sockets,
    extras: Extras,
    /// Until its agent answers.
    turn: Turn,
}

/// A sandbox whose agent answers.
#[derive(Debug)]
pub struct Running {
    parts: Parts,
    agent: Agent,
    ready_us: u64,
    /// From the start.
    disks: Vec<DiskFile>,
}

/// What a sandbox with a VM holds, and must let go of in this order.
#[derive(Debug)]
struct Parts {
    vmm: Vmm,
    network: Option<Attachment>,
    share: Share,
    claim: Claim,
}

impl Parts {
    async fn abandon(mut self) {
        self.vmm.kill().await;
        drop(self.network.take());
        let removed = self.share.remove().map_err(SandboxError::from);
        if let Err(error) = removed.and_then(|()| Ok(self.claim.remove()?)) {
            tracing::warn!("left behind: {error}");
        }
    }
}

impl Configured {
    /// Checks `config` and makes the sandbox's directory.
    ///
    /// # Errors
    ///
    /// Fails where the wish cannot be fulfilled, a name is in use or Hull is not wholly installed.
    pub fn new(host: Host, config: SandboxConfig) -> Result<Self, SandboxError> {
        config.check()?;
        host.check()?;
        let claim = Registry::new(&host.state_dir, &host.data_dir).claim(&config.id, config.name.as_deref())?;
        Ok(Self { host, config, claim, extras: Extras::default() })
    }

    /// Gives the VM these devices, too.
    #[must_use]
    pub fn with(self, extras: Extras) -> Self {
        Self { extras, ..self }
    }

    /// The sandbox's directory.
    #[must_use]
    pub fn claim(&self) -> &Claim {
        &self.claim
    }

    /// Starts the VM, unless `cancelled` comes first, and returns while it boots. Where many boot at once it waits for its turn. The
    /// calling process must be in a mount namespace of its own ([`crate::share::enter_mount_namespace`]).
    ///
    /// # Errors
    ///
    /// Fails where the VMM cannot be started or `cancelled` has come; nothing is left behind then.
    pub async fn start(self, cancelled: impl Future<Output = ()>) -> Result<Booting, SandboxError> {
        let Self { host, config, claim, extras } = self;
        let turn = tokio::select! {
            biased;
            () = cancelled => {
                claim.remove()?;
                return Err(SandboxError::Cancelled);
            }
            turn = Turn::wait(&host.state_dir) => turn,
        };
        let sockets = Sockets::in_dir(claim.dir());
        let share = match Share::create(claim.dir().join(share::DIR), claim.layers().to_owned()) {
            Ok(share) => share,
            Err(error) => {
                claim.remove()?;
                return Err(error.into());
            }
        };
        let trees = extras.caching.iter().try_for_each(|caching| share.add_tree(*caching)).map_err(SandboxError::from);
        // A queue for each of the guest's CPUs.
        let network = || Ok(network::attach(&config.network, &config.id, config.cpus.into(), claim.dir())?);
        let started = trees.and_then(|()| network()).and_then(|mut network| {
            let ends = network.as_mut().map(Attachment::take_ends).unwrap_or_default();
            Ok((Vmm::spawn(&host, &config, &sockets, &share, ends, &extras)?, network))
        });
        match started {
            Ok((vmm, network)) => {
                let parts = Parts { vmm, network, share, claim };
                Ok(Booting { config, parts, sockets, extras, turn })
            }
            Err(error) => {
                share.remove()?;
                claim.remove()?;
                Err(error)
            }
        }
    }
}

impl Booting {
    /// The VMM's process identifier.
    #[must_use]
    pub fn vmm_pid(&self) -> Option<u32> {
        self.parts.vmm.pid()
    }

    /// The tree that the guest sees, to be filled while it boots.
    #[must_use]
    pub fn share(&self) -> &Share {
        &self.parts.share
    }

    /// The sandbox's directory.
    #[must_use]
    pub fn claim(&self) -> &Claim {
        &self.parts.claim
    }

    /// The addresses that the guest will have on its network: of global scope, in the order in which the interfaces have
    /// them.
    #[must_use]
    pub fn addresses(&self) -> Vec<std::net::IpAddr> {
        self.parts.network.as_ref().map(Attachment::addresses).unwrap_or_default()
    }

    /// What the network's maker wants for name servers, as the contents of a resolv.conf; empty where it says nothing.
    #[must_use]
    pub fn resolv_conf(&self) -> String {
        self.parts.network.as_ref().map(Attachment::resolv_conf).unwrap_or_default()
    }

    /// Ends the VM and removes everything.
    pub async fn abandon(self) {
        self.parts.abandon().await;
    }

    /// Waits until the agent answers and makes the guest into this sandbox, unless `cancelled` comes first.
    ///
    /// # Errors
    ///
    /// Fails where the guest dies or does not answer in time; nothing is left behind then.
    pub async fn ready(mut self, cancelled: impl Future<Output = ()>) -> Result<Running, SandboxError> {
        let outcome = tokio::select! {
            biased;
            () = cancelled => Err(SandboxError::Cancelled),
            outcome = self.set_up() => outcome,
        };
        drop(self.turn);
        match outcome {
            Ok((agent, ready_us)) => {
                if let Some(network) = &mut self.parts.network {
                    network.serve(&agent, &self.sockets.vsock, &self.sockets.control);
                }
                Ok(Running { parts: self.parts, agent, ready_us, disks: self.extras.disks })
            }
            Err(error) => {
                self.parts.abandon().await;
                Err(error)
            }
        }
    }

    async fn set_up(&mut self) -> Result<(Agent, u64), SandboxError> {
        let vmm = &mut self.parts.vmm;
        let greeted = tokio::select! {
            biased;
            greeted = vmm.ready() => Some(greeted?),
            () = tokio::time::sleep(self.config.boot_timeout) => None,
        };
        match greeted {
            // The agent's end closes when the VMM's does, so that is what has happened.
            Some(false) => return Err(vmm.wait().await.into()),
            None => {
                return Err(SandboxError::BootTimeout {
                    seconds: self.config.boot_timeout.as_secs(),
                    console: vmm.last_console_lines(8),
                });
            }
            Some(true) => {}
        }
        let network = self.parts.network.as_ref().map(|network| network.description().clone());
        let configured = tokio::select! {
            biased;
            agent = configure_guest(&self.sockets.vsock, &self.config, network, &self.extras.caching) => agent,
            ended = vmm.wait() => Err(ended.into()),
        };
        match configured {
            // The end of a VM shows first as that of its connections, and says more.
            Err(error @ SandboxError::Agent(_)) => match tokio::time::timeout(END_GRACE, vmm.wait()).await {
                Ok(ended) => Err(ended.into()),
                Err(_) => Err(error),
            },
            configured => configured,
        }
    }
}

async fn configure_guest(
    socket: &Path,
    config: &SandboxConfig,
    network: Option<wire::Network>,
    caching: &[Caching],
) -> Result<(Agent, u64), SandboxError> {
    let (agent, hello) = Agent::connect(socket).await?;
    let mut entropy = vec![0; ENTROPY_BYTES];
    getrandom(&mut entropy[..], GetRandomFlags::empty()).map_err(|errno| SandboxError::Random(errno.into()))?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let shares =
        std::iter::once(Caching::default()).chain(caching.iter().copied().filter(|caching| caching.share().is_some()));
    let storages = shares.map(|caching| Storage {
        source: Some(storage::Source::FsTag(caching.tag().to_owned())),
        fstype: "virtiofs".to_owned(),
        mount_point: caching.mount_point(),
        read_ahead_kib: caching.read_ahead_kib(),
        ..Default::default()
    });
    let storages = storages.collect();
    let request = CreateSandboxRequest {
        hostname: config.hostname.clone(),
        sysctls: config.sysctls.clone(),
        time_ns: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
        entropy,
        storages,
        network: network.into(),
        ..Default::default()
    };
    answer("CreateSandbox", agent.sandbox.create_sandbox(short(), &request).await)?;
    Ok((agent, hello.ready_us))
}

impl Running {
    /// The connection to the agent.
    #[must_use]
    pub fn agent(&self) -> &Agent {
        &self.agent
    }

    /// The sandbox's directory.
    #[must_use]
    pub fn claim(&self) -> &Claim {
        &self.parts.claim
    }

    /// The tree that the guest sees.
    #[must_use]
    pub fn share(&self) -> &Share {
        &self.parts.share
    }

    /// Disks for the guest; there are none yet besides those of its start, which grow with their devices as long as this lives. In a tokio
    /// runtime.
    #[must_use]
    pub fn disks(&self) -> Disks {
        let mut disks = Disks::new(Sockets::in_dir(self.parts.claim.dir()).control);
        disks.follow(&self.disks);
        disks
    }

    /// The VMM's process identifier; none once its end has been seen.
    #[must_use]
    pub fn vmm_pid(&self) -> Option<u32> {
        self.parts.vmm.pid()
    }

    /// Microseconds from the guest kernel's start until its agent listened, as the guest says.
    #[must_use]
    pub fn ready_us(&self) -> u64 {
        self.ready_us
    }

    /// Waits until the VM ends by itself, which it does only when something is wrong, and says what.
    pub async fn ended(&mut self) -> SandboxError {
        self.parts.vmm.wait().await.into()
    }

    /// Has the guest write everything back, ends the VM, and returns the directory to be kept or removed.
    ///
    /// # Errors
    ///
    /// Fails where mounts or directories will not go.
    pub async fn stop(mut self) -> Result<Claim, SandboxError> {
        let vmm = &mut self.parts.vmm;
        let orderly = async {
            if let Err(error) = self.agent.shutdown().await {
                // Where the VM has ended its caller knows better what to say of it.
                if vmm.is_running() {
                    tracing::warn!("the guest does not shut down: {error}");
                }
                return;
            }
            vmm.wait().await;
        };
        if tokio::time::timeout(SHUTDOWN_TIMEOUT, orderly).await.is_err() {
            tracing::warn!("the guest did not power off within {} s", SHUTDOWN_TIMEOUT.as_secs());
        }
        self.kill().await
    }

    /// Ends the VM without a word to the guest, which has not answered, and returns the directory as [`stop`](Self::stop) does.
    ///
    /// # Errors
    ///
    /// Fails where mounts or directories will not go.
    pub async fn kill(mut self) -> Result<Claim, SandboxError> {
        self.parts.vmm.kill().await;
        drop(self.parts.network.take());
        self.parts.share.remove()?;
        let sockets = Sockets::in_dir(self.parts.claim.dir());
        for socket in [sockets.vsock, sockets.control] {
            // A socket that is gone is what is wanted.
            let _ = std::fs::remove_file(socket);
        }
        Ok(self.parts.claim)
    }
}
