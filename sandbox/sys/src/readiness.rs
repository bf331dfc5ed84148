//! Descriptors that the runtime waits for.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Has the runtime tell when a descriptor can be read.
///
/// # Errors
///
/// Fails where epoll(7) does not take it.
pub fn readable(descriptor: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd has the same open descriptor until it is dropped, and the AsyncFd, which owns it, deregisters it first.
    Ok(unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) }?)
}
