//! The wire side of the control protocol ([`hull_vmm_api::control`]): lines in, lines out, descriptors beside.

use std::io::{self, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use hull_vmm_api::config::MAX_NET_QUEUES;
use hull_vmm_api::control::{MAX_LINE_BYTES, Request, Response};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::machine::Machine;
use crate::config::Opener;
use crate::outcome::Outcome;

/// Most descriptors that may come with one request: a network interface's.
const MAX_ATTACHED: usize = MAX_NET_QUEUES;
/// How long a client may take to make room for an answer before it is given up: the main thread waits for it.
const WRITE_TIMEOUT: Duration = Duration::from_millis(500);

/// Whether a client is still there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is.
    Stays,
    /// It closed its end or broke the protocol.
    Gone,
}

/// One client of the control socket.
pub struct Client {
    stream: UnixStream,
    /// What came of the line that is not complete yet.
    line: Vec<u8>,
    attached: Vec<OwnedFd>,
}

impl Client {
    /// A client that just connected.
    ///
    /// # Errors
    ///
    /// When the socket cannot be set up.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
        Ok(Self { stream, line: Vec::new(), attached: Vec::new() })
    }

    /// Takes what arrived and answers every request that is complete. Call it when the socket is readable.
    pub fn serve(&mut self, machine: &mut Machine) -> Verdict {
        match self.receive() {
            Ok(0) => return Verdict::Gone,
            Ok(_) => {}
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(_) => return Verdict::Gone,
        }
        while let Some(end) = self.line.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.line.drain(..=end).collect();
            let attached = std::mem::take(&mut self.attached);
            let response = answer(&line, attached, machine);
            if self.send(&response).is_err() {
                return Verdict::Gone;
            }
        }
        if self.line.len() > MAX_LINE_BYTES { Verdict::Gone } else { Verdict::Stays }
    }

    fn receive(&mut self) -> io::Result<usize> {
        let mut data = [0u8; 4096];
        let mut fds = [-1; MAX_ATTACHED];
        let mut parts = [libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: data.len() }];
        // SAFETY: the one part is a live buffer of that length.
        let received = unsafe { self.stream.recv_with_fds(&mut parts, &mut fds) };
        let (len, count) = received.map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        for fd in &fds[..count] {
            // SAFETY: the kernel just made these descriptors for this process.
            let fd = unsafe { OwnedFd::from_raw_fd(*fd) };
            if self.attached.len() < MAX_ATTACHED {
                self.attached.push(fd);
            }
        }
        self.line.extend_from_slice(&data[..len]);
        Ok(len)
    }

    fn send(&mut self, response: &Response) -> io::Result<()> {
        let mut line = serde_json::to_vec(response)?;
        line.push(b'\n');
        self.stream.write_all(&line)
    }
}

fn answer(line: &[u8], attached: Vec<OwnedFd>, machine: &mut Machine) -> Response {
    let error = |error: &dyn std::fmt::Display| Response::Error { message: error.to_string() };
    let request = match serde_json::from_slice(line) {
        Ok(request) => request,
        Err(problem) => return error(&format_args!("the request is not valid: {problem}")),
    };
    let mut opener = Opener::with_attached(attached);
    match request {
        Request::Status => Response::Status(machine.status()),
        Request::Counters => Response::Counters(machine.counters()),
        Request::Pause => {
            machine.pause();
            Response::Ok
        }
        Request::Resume => {
            machine.resume();
            Response::Ok
        }
        Request::AddDisk(disk) => match machine.add_disk(disk, &mut opener) {
            Ok(address) => Response::Added { pci_address: address.to_string() },
            Err(problem) => error(&problem),
        },
        Request::AddShare(share) => match machine.add_share(share, &mut opener) {
            Ok(address) => Response::Added { pci_address: address.to_string() },
            Err(problem) => error(&problem),
        },
        Request::AddNet(net) => match machine.add_net(net, &mut opener) {
            Ok(address) => Response::Added { pci_address: address.to_string() },
            Err(problem) => error(&problem),
        },
        Request::RemoveDevice { id } => match machine.remove_device(&id) {
            Ok(()) => Response::Ok,
            Err(problem) => error(&problem),
        },
        Request::ResizeDisk { id } => match machine.resize_disk(&id) {
            Ok(size_bytes) => Response::Resized { size_bytes },
            Err(problem) => error(&problem),
        },
        Request::SetLink { id, up } => match machine.set_link(&id, up) {
            Ok(()) => Response::Ok,
            Err(problem) => error(&problem),
        },
        Request::Stop { hard } => {
            machine.ending().end(if hard { Outcome::Killed } else { Outcome::Stopped });
            Response::Ok
        }
    }
}
