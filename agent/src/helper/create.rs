//! Makes a container with libcontainer, up to a first process that waits to be started.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;

use libcontainer::container::builder::ContainerBuilder;
use libcontainer::error::{LibcontainerError, MissingSpecError};
use libcontainer::syscall::syscall::SyscallType;
use oci_spec::runtime::{LinuxIdMapping, Process, Spec};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::Pid;
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer};

use super::executor::Executor;
use super::message::CreateRequest;
use super::{Outcome, process};
use crate::container::rootfs;
use crate::error::{Error, Result, Step, chain};
use crate::streams::stdio::set_size;

/// The socket in the bundle on which libcontainer hands over the terminal.
const CONSOLE_SOCKET: &str = "console.sock";
/// What the executor's refusals start with, by which they are known after passing through libcontainer as text.
const ARGS_REFUSED: &str = "process.args: ";

pub(super) fn run(request: &CreateRequest, streams: Vec<OwnedFd>) -> Result<Outcome> {
    let spec = Spec::load(request.bundle.join("config.json")).step("read the specification")?;
    let container_process = spec.process().as_ref().ok_or_else(|| Error::invalid("process", "is missing"))?;
    process::set_oom_score(container_process)?;
    if let Some(root) = spec.root() {
        make_working_directory(root.path(), container_process);
    }
    let owner = outer_uid(&spec, container_process.user().uid());
    for stream in &streams {
        process::give_stream(stream, owner).step("hand over a stream")?;
    }

    let mut builder = ContainerBuilder::new(request.container_id.clone(), SyscallType::Linux)
        .with_root_path(&request.state)
        .map_err(|error| understand(&error))?
        .with_executor(Executor);
    let mut streams = streams.into_iter();
    let mut console = None;
    if request.terminal {
        console = Some(console_socket(&request.bundle)?);
        builder = builder.with_console_socket(Some(request.bundle.join(CONSOLE_SOCKET)));
    } else {
        let (Some(stdin), Some(stdout), Some(stderr)) = (streams.next(), streams.next(), streams.next()) else {
            return Err(Error::failed("create the container", "there are no streams"));
        };
        builder = builder.with_stdin(stdin).with_stdout(stdout).with_stderr(stderr);
    }
    let container = builder
        .as_init(&request.bundle)
        .with_systemd(false)
        .with_detach(true)
        // A sibling of this process, hence a child of the agent.
        .as_sibling(true)
        .build()
        .map_err(|error| understand(&error))?;

    let terminal = match console {
        Some(listener) => {
            let master = receive_terminal(&listener).step("receive the terminal")?;
            set_size(&master, request.window).step("set the terminal's size")?;
            // libcontainer leaves it to root, and then nobody else can open /dev/console or /dev/stdout.
            let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
            let slave = ioctl_tiocgptpeer(&master, flags).step("open the terminal")?;
            rustix::fs::fchown(&slave, Some(rustix::fs::Uid::from_raw(owner)), None).step("hand over the terminal")?;
            Some(master)
        }
        None => None,
    };
    let pid = container.pid().and_then(|pid| Pid::from_raw(pid.as_raw()));
    Ok(Outcome { pid, terminal })
}

/// The process's working directory is made if it is missing, as runc does. A root that is read-only, or a directory
/// that a mount will bring, shows when the process changes to it.
fn make_working_directory(root: &Path, container_process: &Process) {
    if let Err(error) = rootfs::make_directories(root, container_process.cwd()) {
        tracing::debug!("make the working directory: {error}");
    }
}

/// A user of the container in the guest's numbers.
fn outer_uid(spec: &Spec, uid: u32) -> u32 {
    let mappings = spec.linux().as_ref().and_then(|linux| linux.uid_mappings().as_ref());
    match mappings {
        Some(mappings) if !mappings.is_empty() => map(mappings, uid).unwrap_or(uid),
        _ => uid,
    }
}

fn map(mappings: &[LinuxIdMapping], id: u32) -> Option<u32> {
    mappings.iter().find_map(|mapping| {
        let distance = id.checked_sub(mapping.container_id())?;
        (distance < mapping.size()).then(|| mapping.host_id().checked_add(distance))?
    })
}

fn console_socket(bundle: &Path) -> Result<UnixListener> {
    // By its name alone, because a bundle's path can be longer than a socket's may be.
    std::env::set_current_dir(bundle).step("enter the bundle")?;
    UnixListener::bind(CONSOLE_SOCKET).step("make the console socket")
}

fn receive_terminal(listener: &UnixListener) -> std::io::Result<OwnedFd> {
    let (socket, _) = listener.accept()?;
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut name = [0; 64];
    let parts = &mut [std::io::IoSliceMut::new(&mut name)];
    recvmsg(socket.as_fd(), parts, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let master = control.drain().find_map(|part| match part {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    master.map(File::from).map(OwnedFd::from).ok_or_else(|| std::io::Error::other("there is none"))
}

/// Tells what is wrong with the specification from what went wrong with it.
fn understand(error: &LibcontainerError) -> Error {
    let text = chain(error);
    if let Some((_, reason)) = text.split_once(ARGS_REFUSED) {
        return Error::invalid("process.args", reason.to_owned());
    }
    match error {
        LibcontainerError::InvalidSpec(reason) => Error::invalid("spec", reason.to_string()),
        LibcontainerError::MissingSpec(MissingSpecError::Process) => Error::invalid("process", text),
        LibcontainerError::MissingSpec(_) | LibcontainerError::InvalidInput(_) => Error::invalid("spec", text),
        LibcontainerError::UserNamespace(_) | LibcontainerError::NoUserNamespace => {
            Error::invalid("linux.uidMappings", text)
        }
        LibcontainerError::NetDevicesError(_) => Error::invalid("linux.netDevices", text),
        _ => Error::failed("create the container", text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_mapped_to_the_guests_numbers() {
        let mappings: Vec<LinuxIdMapping> = serde_json::from_str(
            r#"[{"containerID":0,"hostID":100000,"size":10},{"containerID":10,"hostID":5,"size":1}]"#,
        )
        .unwrap();
        assert_eq!(map(&mappings, 0), Some(100_000));
        assert_eq!(map(&mappings, 9), Some(100_009));
        assert_eq!(map(&mappings, 10), Some(5));
        assert_eq!(map(&mappings, 11), None);
    }
}
