//! A client of the VMM's control socket.

use std::io::{BufRead, BufReader, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use hull_vmm_api::control::MAX_LINE_BYTES;
pub use hull_vmm_api::control::{Counters, Request, Response, Status};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

/// Most files with a request: an interface has no more queues.
const MAX_FILES: usize = hull_vmm_api::config::MAX_NET_QUEUES;
/// How long the VMM may take to answer: it does so from its event loop, which never waits for the guest.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// A request that the VMM did not carry out.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The socket cannot be reached, or broke.
    #[error("cannot talk to the virtual machine monitor: {0}; has it ended?")]
    Connection(#[source] std::io::Error),
    /// The answer is no answer.
    #[error("the virtual machine monitor's answer is not understood: {0}")]
    Answer(#[source] serde_json::Error),
    /// The VMM says no.
    #[error("the virtual machine monitor refused: {0}")]
    Refused(String),
}

/// A connection to the VMM's control socket.
#[derive(Debug)]
pub struct Control {
    stream: BufReader<UnixStream>,
}

impl Control {
    /// Connects to the control socket at `path`.
    ///
    /// # Errors
    ///
    /// Fails where no VMM listens there.
    pub fn connect(path: &Path) -> Result<Self, ControlError> {
        let stream = UnixStream::connect(path).map_err(ControlError::Connection)?;
        stream.set_read_timeout(Some(ANSWER_TIMEOUT)).map_err(ControlError::Connection)?;
        Ok(Self { stream: BufReader::new(stream) })
    }

    /// Sends a request and waits for its answer, at most five seconds.
    ///
    /// # Errors
    ///
    /// Fails where the connection breaks, and with [`ControlError::Refused`] where the VMM does.
    pub fn call(&mut self, request: &Request) -> Result<Response, ControlError> {
        let line = line_of(request)?;
        self.stream.get_mut().write_all(&line).map_err(ControlError::Connection)?;
        self.answer()
    }

    /// The same with open files, which the request calls [`Attached(0)`](hull_vmm_api::config::Resource::Attached) and so on:
    /// at most 8.
    ///
    /// # Errors
    ///
    /// Those of [`Control::call`].
    pub fn call_with(&mut self, request: &Request, files: &[OwnedFd]) -> Result<Response, ControlError> {
        let line = line_of(request)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
        let mut attached = SendAncillaryBuffer::new(&mut space);
        let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        if !files.is_empty() && !attached.push(SendAncillaryMessage::ScmRights(&files)) {
            return Err(ControlError::Connection(std::io::ErrorKind::InvalidInput.into()));
        }
        let sent = sendmsg(self.stream.get_ref(), &[IoSlice::new(&line)], &mut attached, SendFlags::NOSIGNAL);
        let sent = sent.map_err(|errno| ControlError::Connection(errno.into()))?;
        self.stream.get_mut().write_all(&line[sent..]).map_err(ControlError::Connection)?;
        self.answer()
    }

    fn answer(&mut self) -> Result<Response, ControlError> {
        let mut answer = String::new();
        let count = self
            .stream
            .by_ref()
            .take(MAX_LINE_BYTES as u64)
            .read_line(&mut answer)
            .map_err(ControlError::Connection)?;
        if count == 0 {
            return Err(ControlError::Connection(std::io::ErrorKind::UnexpectedEof.into()));
        }
        match serde_json::from_str(&answer).map_err(ControlError::Answer)? {
            Response::Error { message } => Err(ControlError::Refused(crate::console::printable(&message))),
            response => Ok(response),
        }
    }
}

fn line_of(request: &Request) -> Result<Vec<u8>, ControlError> {
    let mut line = serde_json::to_vec(request).map_err(ControlError::Answer)?;
    line.push(b'\n');
    Ok(line)
}
