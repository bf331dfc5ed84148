//! A microVM of somebody's own kernel: no agent, no container, no state.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};

use hull_vmm_api::config::{BootConfig, ConsoleConfig, CpusConfig, MemoryConfig, VmConfig};

use crate::disks::DiskFile;
use crate::host::Host;
use crate::read_only;
use crate::share::enter_mount_namespace;
use crate::vmm::{Inherited, VmmError, as_first_of_pid_namespace, config_file, describe, open_read_only};

/// What a bare microVM is made of.
#[derive(Clone, Debug)]
pub struct BareConfig {
    /// An uncompressed `vmlinux`.
    pub kernel: PathBuf,
    /// Its initial RAM file system.
    pub initrd: Option<PathBuf>,
    /// Its disks.
    pub disks: Vec<DiskFile>,
    /// The kernel's command line.
    pub cmdline: String,
    /// Virtual CPUs.
    pub cpus: u8,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Whether the console takes this process's standard input.
    pub input: bool,
}

/// How a bare microVM ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BareExit {
    /// Whether the guest powered off.
    pub orderly: bool,
    /// What happened, as the end of a sentence about the virtual machine.
    pub reason: String,
}

/// Runs a bare microVM whose console is this process's standard output, until its end.
///
/// # Errors
///
/// Fails where a file cannot be opened or the VMM cannot be started.
pub fn run(host: &Host, config: &BareConfig) -> Result<BareExit, VmmError> {
    let mut fds = Inherited::default();
    let spawn = VmmError::Spawn;
    let stdout = std::io::stdout().as_fd().try_clone_to_owned().map_err(spawn)?;
    let input = match config.input {
        true => Some(fds.add(std::io::stdin().as_fd().try_clone_to_owned().map_err(spawn)?)),
        false => None,
    };
    let disks = fds.add_disks(&config.disks)?;
    let initrd = config.initrd.as_ref().map(|path| open_read_only(path)).transpose()?;
    let vm = VmConfig {
        cpus: CpusConfig { boot: config.cpus, max: config.cpus },
        memory: MemoryConfig { size_mib: config.memory_mib },
        boot: BootConfig {
            kernel: fds.add(open_read_only(&config.kernel)?),
            initrd: initrd.map(|initrd| fds.add(initrd)),
            cmdline: config.cmdline.clone(),
        },
        console: Some(ConsoleConfig { output: fds.add(stdout), input }),
        debug_console: None,
        vsock: None,
        shares: Vec::new(),
        disks,
        pmems: Vec::new(),
        nets: Vec::new(),
    };
    let status = spawn_and_wait(host, fds, &vm)?;
    Ok(BareExit { orderly: status.success(), reason: describe(status) })
}

fn spawn_and_wait(host: &Host, mut fds: Inherited, vm: &VmConfig) -> Result<ExitStatus, VmmError> {
    use command_fds::CommandFdExt;
    // Held until the VM's end: if this process dies, the VMM sees the pipe close.
    let (lifeline_read, _lifeline) = std::io::pipe().map_err(VmmError::Spawn)?;
    let lifeline = fds.add_number(lifeline_read.into());
    let config_fd = fds.add_number(config_file(vm)?);
    let mut command = std::process::Command::new(&host.vmm);
    command
        .args(["--config-fd", &config_fd.to_string(), "--lifeline-fd", &lifeline.to_string()])
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .fd_mappings(fds.into_mappings())
        .map_err(|error| VmmError::Spawn(std::io::Error::other(error)))?;
    // Entering the jail takes root; somebody else's process has no more rights than they, and its filter.
    let mut child = if rustix::process::geteuid().is_root() {
        command.arg("--jail-empty");
        as_first_of_pid_namespace(|| {
            enter_mount_namespace().map_err(std::io::Error::other)?;
            read_only::protect(&host.vmm)?;
            command.spawn()
        })
    } else {
        command.spawn()
    }
    .map_err(VmmError::Spawn)?;
    drop(command);
    child.wait().map_err(VmmError::Spawn)
}
