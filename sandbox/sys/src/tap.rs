//! Taps: Ethernet interfaces whose other end is a descriptor (`Documentation/networking/tuntap.rst` of Linux).
//!
//! A tap made here lives in the network namespace of the calling thread and ends with the last of its descriptors,
//! whoever holds that.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

/// The device from which taps are made.
pub const DEVICE: &str = "/dev/net/tun";

/// A new tap.
#[derive(Debug)]
pub struct Tap {
    /// The name that the kernel gave it.
    pub name: String,
    /// A descriptor for each queue, with `IFF_VNET_HDR` and `IFF_NO_PI` set.
    pub queues: Vec<OwnedFd>,
}

/// Makes a tap with this many queues. `pattern` is its name, in which `%d` becomes the first number that is free.
///
/// # Errors
///
/// `NotFound` without the device; `EBUSY` where the name is taken, `EPERM` without `CAP_NET_ADMIN`, `EINVAL` for a name of
/// more than 15 bytes.
pub fn create(pattern: &str, queues: usize) -> io::Result<Tap> {
    let mut request = request(pattern)?;
    let several = if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | several;
    let mut descriptors = Vec::new();
    for _ in 0..queues.max(1) {
        let device = File::options().read(true).write(true).open(DEVICE)?;
        // Low bits, none of which is that of the sign.
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        // SAFETY: the request reads and writes an ifreq, whose name ends in a zero byte. With the first queue the kernel
        // replaces the pattern by the name, so the further ones join the same interface.
        if unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } < 0 {
            return Err(io::Error::last_os_error());
        }
        descriptors.push(device.into());
    }
    let name = request.ifr_name.iter().take_while(|byte| **byte != 0).map(|byte| *byte as u8).collect();
    let name = String::from_utf8(name).map_err(io::Error::other)?;
    Ok(Tap { name, queues: descriptors })
}

fn request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: all-zero is a valid ifreq, a plain C structure.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= libc::IFNAMSIZ {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_must_fit() {
        assert_eq!(create("a-name-of-16-byt", 1).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
