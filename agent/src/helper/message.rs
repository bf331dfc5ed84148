//! The two messages between the agent and a helper.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read as _, Seek as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use oci_spec::runtime::Process;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};

use super::Outcome;
use crate::error::{Error, Result, Step};
use crate::streams::stdio::WindowSize;

/// Most descriptors in one message: the request itself, three streams, a process.
const MAX_DESCRIPTORS: usize = 5;
/// Most bytes of an answer; longer reasons are cut.
const ANSWER_BYTES: usize = 16 * 1024;
const REASON_BYTES: usize = 2048;

#[derive(Serialize, Deserialize)]
pub(crate) enum Request {
    /// With the three standard streams, unless it is for a terminal.
    Create(CreateRequest),
    /// With the container's first process as a pidfd, then as for `Create`.
    Exec(Box<ExecRequest>),
    Hooks(HookRequest),
}

#[derive(Serialize, Deserialize)]
pub(crate) struct CreateRequest {
    pub(crate) container_id: String,
    /// Where the container's config.json is.
    pub(crate) bundle: PathBuf,
    /// Where libcontainer keeps the container's state.
    pub(crate) state: PathBuf,
    pub(crate) terminal: bool,
    pub(crate) window: WindowSize,
}

#[derive(Serialize, Deserialize)]
pub(crate) struct ExecRequest {
    pub(crate) bundle: PathBuf,
    /// The directory of the container's cgroup.
    pub(crate) cgroup: PathBuf,
    /// The container's first process.
    pub(crate) init_pid: i32,
    pub(crate) process: Process,
    pub(crate) window: WindowSize,
}

#[derive(Serialize, Deserialize)]
pub(crate) struct HookRequest {
    pub(crate) container_id: String,
    pub(crate) bundle: PathBuf,
    pub(crate) state: PathBuf,
    pub(crate) kind: HookKind,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) enum HookKind {
    Poststart,
    Poststop,
}

/// What a helper answers.
#[derive(Serialize, Deserialize)]
pub(super) enum Answer {
    Done { pid: Option<i32> },
    Invalid { field: String, reason: String },
    Failed { step: String, cause: String },
}

impl Answer {
    pub(super) fn into_result(self) -> Result<Option<i32>> {
        match self {
            Self::Done { pid } => Ok(pid),
            Self::Invalid { field, reason } => Err(Error::invalid(field, reason)),
            Self::Failed { step, cause } => Err(Error::failed(step, cause)),
        }
    }
}

/// Sends a request. It travels in a memory file, because environments and arguments can be longer than a message.
pub(super) fn send_request(socket: impl AsFd, request: &Request, descriptors: &[OwnedFd]) -> io::Result<()> {
    let mut memory = File::from(memfd_create("request", MemfdFlags::CLOEXEC)?);
    memory.write_all(&serde_json::to_vec(request)?)?;
    memory.rewind()?;
    let mut all = vec![memory.as_fd()];
    all.extend(descriptors.iter().map(AsFd::as_fd));
    send(socket, &[0], &all)
}

/// A helper's request and the descriptors that came with it.
pub(super) fn receive_request(socket: impl AsFd) -> Result<(Request, Vec<OwnedFd>)> {
    let received = receive(socket, &mut [0]).step("receive the request")?;
    let Some((_, mut descriptors)) = received.filter(|(_, descriptors)| !descriptors.is_empty()) else {
        return Err(Error::failed("receive the request", "there is none"));
    };
    let mut json = Vec::new();
    File::from(descriptors.remove(0)).read_to_end(&mut json).step("read the request")?;
    Ok((serde_json::from_slice(&json).step("understand the request")?, descriptors))
}

pub(super) fn send_answer(socket: impl AsFd, result: Result<Outcome>) -> io::Result<()> {
    let mut terminal = None;
    let cut = |text: String| text.chars().take(REASON_BYTES).collect::<String>();
    let answer = match result {
        Ok(outcome) => {
            terminal = outcome.terminal;
            Answer::Done { pid: outcome.pid.map(|pid| pid.as_raw_nonzero().get()) }
        }
        Err(Error::Invalid { field, reason }) => {
            Answer::Invalid { field: cut(field.into_owned()), reason: cut(reason) }
        }
        Err(Error::Failed { step, cause }) => Answer::Failed { step: cut(step.into_owned()), cause: cut(cause) },
        Err(error) => Answer::Failed { step: "run the helper".into(), cause: cut(error.to_string()) },
    };
    let descriptors: Vec<_> = terminal.iter().map(AsFd::as_fd).collect();
    send(socket, &serde_json::to_vec(&answer)?, &descriptors)
}

/// An answer, or `None` from a helper that has ended without one.
pub(super) fn receive_answer(socket: impl AsFd) -> io::Result<Option<(Answer, Option<OwnedFd>)>> {
    let mut bytes = vec![0; ANSWER_BYTES];
    match receive(socket, &mut bytes)? {
        None => Ok(None),
        Some((length, mut descriptors)) => Ok(Some((serde_json::from_slice(&bytes[..length])?, descriptors.pop()))),
    }
}

fn send(socket: impl AsFd, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

fn receive(socket: impl AsFd, bytes: &mut [u8]) -> io::Result<Option<(usize, Vec<OwnedFd>)>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message = recvmsg(socket, &mut [IoSliceMut::new(bytes)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut descriptors = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = part {
            descriptors.extend(received);
        }
    }
    if message.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(io::Error::other("the message is too long"));
    }
    Ok((message.bytes > 0).then_some((message.bytes, descriptors)))
}

#[cfg(test)]
mod tests {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    fn sockets() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
    }

    #[test]
    fn a_request_of_any_length_arrives_with_its_descriptors() {
        let (agent, helper) = sockets();
        let request = HookRequest {
            container_id: "x".repeat(1 << 20),
            bundle: "/b".into(),
            state: "/s".into(),
            kind: HookKind::Poststop,
        };
        let descriptors = [File::open("/dev/null").unwrap().into(), File::open("/").unwrap().into()];
        send_request(&agent, &Request::Hooks(request), &descriptors).unwrap();
        let (request, received) = receive_request(&helper).unwrap();
        assert!(matches!(request, Request::Hooks(HookRequest { container_id, .. }) if container_id.len() == 1 << 20));
        assert_eq!(received.len(), 2);
        assert!(File::from(received.into_iter().nth(1).unwrap()).metadata().unwrap().is_dir());
    }

    #[test]
    fn answers_carry_a_terminal_or_a_reason() {
        let (agent, helper) = sockets();
        let terminal = Some(File::open("/dev/null").unwrap().into());
        let outcome = Outcome { pid: rustix::process::Pid::from_raw(7), terminal };
        send_answer(&helper, Ok(outcome)).unwrap();
        let (answer, terminal) = receive_answer(&agent).unwrap().unwrap();
        assert_eq!(answer.into_result().unwrap(), Some(7));
        assert!(terminal.is_some());

        send_answer(&helper, Err(Error::invalid("field", "x".repeat(1 << 20)))).unwrap();
        let (answer, _) = receive_answer(&agent).unwrap().unwrap();
        assert!(matches!(answer.into_result(), Err(Error::Invalid { field, .. }) if field == "field"));

        drop(helper);
        assert!(receive_answer(&agent).unwrap().is_none());
    }
}
