//! Processes of their own for what must not happen in PID 1: libcontainer changes its process (working directory,
//! dumpability, OOM score), blocks, runs hooks and waits for children.
//!
//! The agent starts itself again as a helper. Its standard input is a socket, on which it gets one message: a request
//! as JSON in a memory file, and the descriptors that the request speaks of. It does that one thing, answers with one
//! message, and ends. What it starts becomes the agent's child by `CLONE_PARENT`, not its own.
//!
//! Of the agent's descriptors a helper gets only those, so a container that is created and not started holds no
//! other container's streams open.

mod create;
mod exec;
mod executor;
mod hooks;
mod message;
mod process;

pub(crate) use message::{CreateRequest, ExecRequest, HookKind, HookRequest, Request};

use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode, Stdio};

use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{Pid, Resource, Rlimit, setrlimit, umask};
use tokio::io::Interest;

use crate::error::{Error, Result, Step, with_reasons};

/// The name under which the agent starts itself as a helper.
pub(crate) const NAME: &str = "hull-container-helper";

/// What a container's process may have unless its specification says otherwise, as with containerd's service: of open files the soft limit
/// that programs expect, and a hard one that none runs into; of processes as many as the guest and the container's cgroup allow. The
/// kernel's own limit of these is half of what its memory allows, and counts a user's in all containers.
const LIMITS: [(Resource, Rlimit); 2] = [
    (Resource::Nofile, Rlimit { current: Some(1024), maximum: Some(1 << 20) }),
    (Resource::Nproc, Rlimit { current: None, maximum: None }),
];

/// What a helper has made.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// The process, where the request was for one.
    pub(crate) pid: Option<Pid>,
    /// The master of its terminal, if it has one.
    pub(crate) terminal: Option<OwnedFd>,
}

/// Has a helper carry out a request. Its processes end up as children of this one; the caller must hold a birth.
pub(crate) async fn run(request: Request, descriptors: Vec<OwnedFd>) -> Result<Outcome> {
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
        .step("make the helper's socket")?;
    message::send_request(&ours, &request, &descriptors).step("send the helper its request")?;
    // The reaper collects it; a helper that dies early is noticed by the end of its socket.
    Command::new("/proc/self/exe")
        .arg0(NAME)
        .env_clear()
        .env(crate::log::LEVEL_VARIABLE, crate::log::level().to_string())
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .step("start the helper")?;
    drop(descriptors);
    rustix::io::ioctl_fionbio(&ours, true).step("prepare the helper's socket")?;
    let socket = crate::sys::watch(ours, Interest::READABLE).step("watch the helper's socket")?;
    let answer = socket
        .async_io(Interest::READABLE, |socket| message::receive_answer(socket))
        .await
        .step("hear from the helper")?;
    let Some((answer, terminal)) = answer else {
        return Err(Error::failed("run the helper", "it ended without an answer"));
    };
    let pid = answer.into_result()?;
    Ok(Outcome { pid: pid.and_then(Pid::from_raw), terminal })
}

/// A helper's whole life.
pub(crate) fn main() -> ExitCode {
    let errors = crate::log::start_collecting(crate::log::level_from_environment());
    let socket = std::io::stdin();
    let result = message::receive_request(&socket).and_then(|(request, descriptors)| {
        for (resource, limit) in LIMITS {
            setrlimit(resource, limit).step_with(|| format!("set the limit {resource:?}"))?;
        }
        umask(Mode::from_raw_mode(0o022));
        match request {
            Request::Create(request) => create::run(&request, descriptors),
            Request::Exec(request) => exec::run(&request, descriptors),
            Request::Hooks(request) => hooks::run(&request).map(|()| Outcome { pid: None, terminal: None }),
        }
    });
    // The reasons behind a failure, where the error itself does not have them.
    let result = result.map_err(|error| match (error, errors) {
        (Error::Failed { step, cause }, Ok(errors)) => {
            Error::Failed { step, cause: with_reasons(&cause, &crate::log::collected(&errors)) }
        }
        (error, _) => error,
    });
    match message::send_answer(&socket, result) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("answer the agent: {error}");
            ExitCode::FAILURE
        }
    }
}
