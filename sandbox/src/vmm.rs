//! The VMM process of a sandbox.

use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use command_fds::{CommandFdExt, FdMapping};
use hull_protocol::{READY_PORT, SHARE_TAG};
use hull_sandbox_sys::children::{self, Started};
use hull_vmm_api::config::{
    BootConfig, CachePolicy, ConsoleConfig, CpusConfig, DiskConfig, GuestPort, MemoryConfig, NetConfig, PmemConfig,
    Resource, ShareConfig, VmConfig, VsockConfig,
};
use hull_vmm_api::exit::ExitCode;
use rustix::fs::OFlags;
use rustix::pipe::{PipeFlags, pipe_with};
use tokio::process::{Child, Command};

use crate::broker;
use crate::config::SandboxConfig;
use crate::console::Tail;
use crate::disks::{DiskError, DiskFile, disk_name};
use crate::host::Host;
use crate::network::{HostEnd, device_name};
use crate::read_only;
use crate::sandbox::Extras;
use crate::share::{Caching, Share};

/// The context identifier of every guest: sockets of different VMs never meet, since each VM has a Unix socket of its own.
const GUEST_CID: u32 = 3;
/// The device that holds the guest's image: `/dev/pmem0`, its root, by the kernel parameters that every guest gets.
const IMAGE_ID: &str = "image";

/// A VMM that did not start.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// A file that the VMM needs cannot be opened.
    #[error("cannot open {path}: {source}")]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A disk cannot be opened.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A socket cannot be made.
    #[error("cannot make the socket {path}: {source}; a socket's path has at most 107 bytes")]
    Socket {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A pipe, thread or process cannot be made.
    #[error("cannot start the virtual machine monitor: {0}")]
    Spawn(#[source] std::io::Error),
    /// The process ended.
    #[error("the virtual machine {reason}{}", details(.lines))]
    Ended {
        /// What its exit status says.
        reason: String,
        /// What it, or the guest, printed last.
        lines: Vec<String>,
    },
}

fn details(lines: &[String]) -> String {
    if lines.is_empty() { String::new() } else { format!(": {}", lines.join(" | ")) }
}

/// The VMM process, from its start to its end.
#[derive(Debug)]
pub(crate) struct Vmm {
    child: Child,
    _started: Started,
    /// Closed with this value, or with the process that holds it: the VMM's sign that it must end.
    _lifeline: OwnedFd,
    console: Tail,
    log: Tail,
    log_thread: Option<std::thread::JoinHandle<()>>,
    ready: Option<UnixStream>,
}

/// Sockets that the VMM serves, as paths that other processes can reach.
#[derive(Clone, Debug)]
pub(crate) struct Sockets {
    pub(crate) vsock: PathBuf,
    pub(crate) control: PathBuf,
}

impl Sockets {
    pub(crate) fn in_dir(dir: &Path) -> Self {
        Self { vsock: dir.join("vsock.sock"), control: dir.join("control.sock") }
    }
}

impl Vmm {
    /// Starts a VMM for `config`, whose share is the tree at `share`, parts of it with other caching being shares of their own, and
    /// whose network interfaces have these `ends`.
    pub(crate) fn spawn(
        host: &Host,
        config: &SandboxConfig,
        sockets: &Sockets,
        share: &Share,
        ends: Vec<HostEnd>,
        extras: &Extras,
    ) -> Result<Self, VmmError> {
        // It is one of them, and could open itself by its own /proc.
        for path in [&host.vmm, &host.kernel, &host.image] {
            read_only::protect(path).map_err(|source| VmmError::Open { path: path.clone(), source })?;
        }
        let mut fds = Inherited::default();
        let (console_read, console_write) = pipe()?;
        let (log_read, log_write) = pipe()?;
        let (lifeline_read, lifeline_write) = pipe()?;
        let (ready, ready_guest) = UnixStream::pair().map_err(VmmError::Spawn)?;

        let vm = VmConfig {
            cpus: CpusConfig { boot: config.cpus, max: config.max_cpus },
            memory: MemoryConfig { size_mib: config.memory_mib },
            boot: BootConfig {
                kernel: fds.add(open_protected(&host.kernel)?),
                initrd: None,
                cmdline: config.cmdline(),
            },
            console: Some(ConsoleConfig { output: fds.add(console_write), input: None }),
            debug_console: None,
            vsock: Some(VsockConfig {
                guest_cid: GUEST_CID,
                listener: fds.add(listen(&sockets.vsock)?.into()),
                guest_ports: vec![GuestPort { port: READY_PORT, stream: fds.add(ready_guest.into()) }],
            }),
            shares: [Caching::Auto].iter().chain(&extras.caching).map(|caching| share_of(*caching)).collect(),
            disks: fds.add_disks(&extras.disks)?,
            pmems: vec![PmemConfig { id: IMAGE_ID.into(), file: fds.add(open_protected(&host.image)?) }],
            nets: ends.into_iter().enumerate().map(|(index, end)| fds.add_net(index, end)).collect(),
        };
        let control = fds.add_number(listen(&sockets.control)?.into());
        let lifeline = fds.add_number(lifeline_read);
        let broker = fds.add_number(broker::start(share.nodes_or_mounts()).map_err(VmmError::Spawn)?);
        let config_fd = fds.add_number(config_file(&vm)?);

        let mut command = Command::new(&host.vmm);
        command
            .args(["--config-fd", &config_fd.to_string()])
            .args(["--control-fd", &control.to_string()])
            .args(["--lifeline-fd", &lifeline.to_string()])
            .args(["--broker-fd", &broker.to_string()])
            .arg("--jail")
            .arg(share.root())
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log_write)
            .fd_mappings(fds.into_mappings())
            .map_err(|error| VmmError::Spawn(std::io::Error::other(error)))?
            // A terminal's Ctrl-C is for the container, which gets it from hull.
            .process_group(0)
            .kill_on_drop(true);
        let runtime = tokio::runtime::Handle::current();
        let spawn = || {
            as_first_of_pid_namespace(|| {
                let _entered = runtime.enter();
                command.spawn()
            })
        };
        let (child, started) = children::start(spawn, Child::id).map_err(|source| match source.kind() {
            std::io::ErrorKind::NotFound => VmmError::Open { path: host.vmm.clone(), source },
            _ => VmmError::Spawn(source),
        })?;
        // The command holds the descriptors meant for the VMM; with them open here no pipe would ever end.
        drop(command);

        let (console, _) = Tail::follow(console_read, "console").map_err(VmmError::Spawn)?;
        let (log, log_thread) = Tail::follow(log_read, "vmm-log").map_err(VmmError::Spawn)?;
        Ok(Self {
            child,
            _started: started,
            _lifeline: lifeline_write,
            console,
            log,
            log_thread: Some(log_thread),
            ready: Some(ready),
        })
    }

    /// The process's identifier; none once its end has been seen.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Whether the process's end has not been seen yet.
    pub(crate) fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits until the guest says that its agent listens; answers false where the guest closes without a word.
    pub(crate) async fn ready(&mut self) -> Result<bool, VmmError> {
        let Some(ready) = self.ready.take() else { return Ok(true) };
        ready.set_nonblocking(true).map_err(VmmError::Spawn)?;
        let ready = tokio::net::UnixStream::from_std(ready).map_err(VmmError::Spawn)?;
        let mut greeting = Vec::new();
        while greeting.len() < hull_protocol::READY_GREETING.len() {
            ready.readable().await.map_err(VmmError::Spawn)?;
            match ready.try_read_buf(&mut greeting) {
                Ok(0) => return Ok(false),
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(VmmError::Spawn(error)),
            }
        }
        Ok(greeting == hull_protocol::READY_GREETING)
    }

    /// Waits for the process's end and says what it was.
    pub(crate) async fn wait(&mut self) -> VmmError {
        let reason = match self.child.wait().await {
            Ok(status) => describe(status),
            Err(error) => format!("cannot be waited for: {error}"),
        };
        if let Some(thread) = self.log_thread.take() {
            // All of the VMM's words are in the pipe by now, and its end follows at once.
            let _ = thread.join();
        }
        let mut lines = self.log.last_lines(1);
        lines.extend(self.last_console_lines(4));
        VmmError::Ended { reason, lines }
    }

    /// The guest's last words.
    pub(crate) fn last_console_lines(&self, count: usize) -> Vec<String> {
        self.console.last_lines(count)
    }

    /// Ends the process at once and waits for it.
    pub(crate) async fn kill(&mut self) {
        // Fails only where the process has ended already.
        let _ = self.child.kill().await;
    }
}

/// Has `spawn` start a process as the first one of a PID namespace.
///
/// A thread that has asked for one cannot start threads any more, so one is spent on it.
pub(crate) fn as_first_of_pid_namespace<T: Send>(
    spawn: impl FnOnce() -> std::io::Result<T> + Send,
) -> std::io::Result<T> {
    let work = || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWPID)?;
        spawn()
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("spawn-vmm".to_owned()).spawn_scoped(scope, work)?;
        thread.join().unwrap_or_else(|_| Err(std::io::Error::other("the thread that starts it panicked")))
    })
}

/// The share of the tree, or of the part of it, that has this policy.
fn share_of(caching: Caching) -> ShareConfig {
    let (tag, directory) = caching.share().unwrap_or((SHARE_TAG, ""));
    ShareConfig {
        id: tag.into(),
        tag: tag.into(),
        // In its jail the VMM sees the tree as its root.
        root: Resource::Path(Path::new("/").join(directory)),
        read_only: false,
        cache: match caching {
            Caching::Never => CachePolicy::Never,
            Caching::Auto => CachePolicy::Auto,
            Caching::Always => CachePolicy::Always,
        },
        private: Some(crate::share::ROOT.to_owned()),
    }
}

/// What an exit status of the VMM means, as the end of a sentence about the virtual machine.
pub(crate) fn describe(status: std::process::ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => ExitCode::from_status(code)
            .map_or_else(|| format!("ended with the unknown status {code}"), |code| code.describe().to_owned()),
        (None, Some(signal)) if signal == rustix::process::Signal::SYS.as_raw() => {
            "was killed by a system call that its filter forbids; please report this".to_owned()
        }
        (None, Some(signal)) => format!("was killed by signal {signal}"),
        (None, None) => "ended".to_owned(),
    }
}

/// The descriptors that the VMM inherits. They keep the order in which they were added, from 3 up.
#[derive(Default)]
pub(crate) struct Inherited(Vec<FdMapping>);

impl Inherited {
    /// Adds a descriptor and says how the configuration names it.
    pub(crate) fn add(&mut self, parent_fd: OwnedFd) -> Resource {
        Resource::Fd(self.add_number(parent_fd))
    }

    /// Adds a descriptor and says its number in the VMM.
    pub(crate) fn add_number(&mut self, parent_fd: OwnedFd) -> RawFd {
        // At most a handful, so this cannot wrap.
        let child_fd = 3 + self.0.len() as RawFd;
        self.0.push(FdMapping { parent_fd, child_fd });
        child_fd
    }

    /// Adds the descriptors of an interface's end and says how the configuration describes it.
    fn add_net(&mut self, index: usize, end: HostEnd) -> NetConfig {
        let HostEnd { backend, queues, mac, mtu, link_down } = end;
        let queues = queues.into_iter().map(|queue| self.add(queue)).collect();
        NetConfig { id: device_name(index), backend, queues, mac, mtu, link_down }
    }

    /// Opens disks and says how the configuration describes them.
    pub(crate) fn add_disks(&mut self, disks: &[DiskFile]) -> Result<Vec<DiskConfig>, VmmError> {
        let disks = disks.iter().enumerate().map(|(index, disk)| {
            let file = self.add(disk.open()?);
            Ok(DiskConfig { id: disk_name(index), file, read_only: disk.read_only, serial: disk.serial.clone() })
        });
        disks.collect()
    }

    pub(crate) fn into_mappings(self) -> Vec<FdMapping> {
        self.0
    }
}

/// Opens a file for a VMM that is to read it, and to do nothing else with it.
pub(crate) fn open_read_only(path: &Path) -> Result<OwnedFd, VmmError> {
    read_only::open(path, OFlags::empty()).map_err(|source| VmmError::Open { path: path.to_owned(), source })
}

/// Opens a file that has been [protected](read_only::protect).
fn open_protected(path: &Path) -> Result<OwnedFd, VmmError> {
    read_only::open_protected(path).map_err(|source| VmmError::Open { path: path.to_owned(), source })
}

fn listen(path: &Path) -> Result<UnixListener, VmmError> {
    UnixListener::bind(path).map_err(|source| VmmError::Socket { path: path.to_owned(), source })
}

fn pipe() -> Result<(OwnedFd, OwnedFd), VmmError> {
    pipe_with(PipeFlags::CLOEXEC).map_err(|errno| VmmError::Spawn(errno.into()))
}

/// A file in memory that holds the configuration, to be read from its start.
pub(crate) fn config_file(config: &VmConfig) -> Result<OwnedFd, VmmError> {
    let spawn = |error: std::io::Error| VmmError::Spawn(error);
    let json = serde_json::to_vec(config).map_err(|error| spawn(error.into()))?;
    let fd = rustix::fs::memfd_create("vm-config", rustix::fs::MemfdFlags::CLOEXEC).map_err(|e| spawn(e.into()))?;
    let mut rest = &json[..];
    while !rest.is_empty() {
        let count = rustix::io::write(fd.as_fd(), rest).map_err(|errno| spawn(errno.into()))?;
        rest = &rest[count..];
    }
    rustix::fs::seek(&fd, rustix::fs::SeekFrom::Start(0)).map_err(|errno| spawn(errno.into()))?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn the_configuration_survives_its_file() {
        let config = VmConfig {
            cpus: CpusConfig { boot: 1, max: 1 },
            memory: MemoryConfig { size_mib: 128 },
            boot: BootConfig { kernel: Resource::Fd(3), initrd: None, cmdline: "quiet".into() },
            console: None,
            debug_console: None,
            vsock: None,
            shares: Vec::new(),
            pmems: Vec::new(),
            disks: Vec::new(),
            nets: Vec::new(),
        };
        let mut json = String::new();
        std::fs::File::from(config_file(&config).unwrap()).read_to_string(&mut json).unwrap();
        assert_eq!(serde_json::from_str::<VmConfig>(&json).unwrap(), config);
    }

    #[test]
    fn inherited_descriptors_count_up_from_three() {
        let mut fds = Inherited::default();
        let (a, b) = pipe().unwrap();
        assert_eq!((fds.add(a), fds.add(b)), (Resource::Fd(3), Resource::Fd(4)));
    }
}
