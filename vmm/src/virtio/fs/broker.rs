//! What takes capabilities of the host, asked of the process that started the VMM ([`hull_vmm_api::broker`]).

use std::ffi::CStr;
use std::io;
use std::net::Shutdown;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use hull_vmm_api::broker::{Request, TRUSTED, parse_answer};
use vmm_sys_util::sock_ctrl_msg::ScmSocket as _;

use super::state::errno;

/// What names of attributes for security modules and programs' capabilities begin with (xattr(7)).
const SECURITY: &[u8] = b"security.";

/// The one that the process was given.
static OF_PROCESS: OnceLock<Arc<Broker>> = OnceLock::new();

/// A connection to whoever acts for the shares of this process.
pub(super) struct Broker {
    /// For one request and its answer. Made of a connected socket that keeps messages apart, which is all that this type asks of it.
    socket: Mutex<UnixDatagram>,
}

impl Broker {
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self { socket: Mutex::new(socket.into()) }
    }

    /// Makes `socket` lead to the one that shares made from now on ask.
    pub(super) fn of_process_is(socket: OwnedFd) {
        // The first one stays: a process is given one.
        let _ = OF_PROCESS.set(Arc::new(Self::new(socket)));
    }

    pub(super) fn of_process() -> Option<Arc<Self>> {
        OF_PROCESS.get().cloned()
    }

    /// Whether an attribute is for administrators, for whom this process is never taken.
    pub(super) fn is_trusted(name: &CStr) -> bool {
        name.to_bytes().starts_with(TRUSTED)
    }

    /// Whether what failed with `error` is a change of an attribute that takes a capability of the host.
    pub(super) fn may_help(error: &io::Error, name: &CStr) -> bool {
        error.raw_os_error() == Some(libc::EPERM) && (Self::is_trusted(name) || name.to_bytes().starts_with(SECURITY))
    }

    /// Has a request on the file `fd` obeyed, and returns what was asked for. Where nobody listens any more it is refused, as without a
    /// broker.
    pub(super) fn ask(&self, fd: RawFd, request: &Request<'_>) -> io::Result<Vec<u8>> {
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        socket.send_with_fd(&request.to_bytes()[..], fd).map_err(|error| match error.errno() {
            libc::EPIPE | libc::ECONNRESET | libc::ENOTCONN => errno(libc::EPERM),
            number => errno(number),
        })?;
        let mut answer = vec![0; request.longest_answer()];
        let len = loop {
            match socket.recv(&mut answer) {
                Ok(len) => break len,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Were the answer to come yet, the next request would take it for its own.
                Err(_) => {
                    let _ = socket.shutdown(Shutdown::Both);
                    break 0;
                }
            }
        };
        match parse_answer(&answer[..len]) {
            Some(Ok(data)) => Ok(data.to_vec()),
            Some(Err(number)) => Err(errno(number)),
            // Its end, where the VMM's is about to come.
            None => Err(errno(libc::EPERM)),
        }
    }
}
