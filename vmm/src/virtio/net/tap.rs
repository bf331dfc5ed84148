//! The host's end of a queue pair: one descriptor of a tap interface (`drivers/net/tun.c` of Linux).
//!
//! The tap is made and named by whoever starts the VMM. It must be an Ethernet tap (`IFF_TAP`) without packet
//! information (`IFF_NO_PI`) and with the virtio header (`IFF_VNET_HDR`); with more than one queue pair, it has one
//! descriptor for each (`IFF_MULTI_QUEUE`). Nothing here needs a privilege.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use super::feature;
use super::packet::HEADER_BYTES;

/// A queue of the host's network: packets go out and come in whole, each behind a virtio header of 12 bytes.
///
/// Its descriptor is non-blocking.
pub(super) trait Queue: Send + Sync {
    /// The descriptor, for waiting.
    fn fd(&self) -> RawFd;

    /// The features of a device that need the host's help: checksums and segments that one side leaves to the other.
    fn features(&self) -> u64;

    /// Lets the host leave to the guest what these feature bits say that it can do by itself: checksums, segments.
    /// Holds for all queues of the interface.
    fn set_offloads(&self, features: u64) -> io::Result<()>;

    /// Has the host spread packets over this queue too, or no longer.
    fn set_attached(&self, attached: bool) -> io::Result<()>;

    /// Takes one packet; answers its length, more than there was room for if it did not fit. Fails with
    /// `ConnectionAborted` where the host's end is gone for good.
    ///
    /// # Safety
    ///
    /// `iovecs` must point to memory that stays mapped during the call and may change under everybody's hands.
    unsafe fn read(&self, iovecs: &[libc::iovec]) -> io::Result<usize> {
        // SAFETY: as the caller promises.
        let len = unsafe { libc::readv(self.fd(), iovecs.as_ptr(), iovecs.len() as libc::c_int) };
        usize::try_from(len).map_err(|_| match io::Error::last_os_error() {
            // The descriptor has no interface any more: somebody deleted it.
            error if error.raw_os_error() == Some(libc::EBADFD) => io::ErrorKind::ConnectionAborted.into(),
            error => error,
        })
    }

    /// Gives one packet, which may wait for [`flush`](Self::flush).
    ///
    /// # Safety
    ///
    /// `iovecs` must point to memory that stays mapped during the call.
    unsafe fn write(&self, iovecs: &[libc::iovec]) -> io::Result<()> {
        // SAFETY: as the caller promises.
        match unsafe { libc::writev(self.fd(), iovecs.as_ptr(), iovecs.len() as libc::c_int) } {
            0.. => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Sends what waits; `WouldBlock` where some of it has to wait until the descriptor can be written to.
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Why a descriptor cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The host refuses a question or setting.
    #[error("{step} failed: {source}; the descriptor must be of a tap interface")]
    Setting {
        /// The request.
        step: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The interface was made in another way.
    #[error("the interface's flags are {0:#x}: a tap with IFF_NO_PI and IFF_VNET_HDR is needed")]
    Flags(u16),
    /// Something else for a connection.
    #[error("it is no socket; a network of the kind `stream` needs a connected Unix stream socket")]
    NoSocket,
    /// Several descriptors of an interface for one.
    #[error("several queues need a tap that was made with IFF_MULTI_QUEUE")]
    SingleQueue,
}

/// A descriptor of `/dev/net/tun`, attached to a tap.
pub(super) struct Tap {
    fd: OwnedFd,
    uso: bool,
}

/// `ioctl` with an argument by value or reference.
fn request(fd: &OwnedFd, request: libc::Ioctl, argument: libc::c_ulong) -> io::Result<()> {
    // SAFETY: callers pass a number where the request takes one, and otherwise the address of a live structure of the
    // kind that the request reads or writes.
    match unsafe { libc::ioctl(fd.as_raw_fd(), request, argument) } {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn no_interface() -> libc::ifreq {
    // SAFETY: all-zero is a valid ifreq, a plain C structure.
    unsafe { std::mem::zeroed() }
}

impl Tap {
    /// Checks what `fd` is and prepares it; `multiqueue` says that it is one of several.
    pub(super) fn new(fd: OwnedFd, multiqueue: bool) -> Result<Self, TapError> {
        let step = |step| move |source| TapError::Setting { step, source };
        let mut interface = no_interface();
        request(&fd, libc::TUNGETIFF, (&raw mut interface) as libc::c_ulong).map_err(step("TUNGETIFF"))?;
        // SAFETY: the request filled in the flags.
        let flags = unsafe { interface.ifr_ifru.ifru_flags } as u16;
        let wanted = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as u16;
        if flags & wanted != wanted {
            return Err(TapError::Flags(flags));
        }
        if multiqueue && flags & libc::IFF_MULTI_QUEUE as u16 == 0 {
            return Err(TapError::SingleQueue);
        }
        let header: libc::c_int = HEADER_BYTES as libc::c_int;
        request(&fd, libc::TUNSETVNETHDRSZ, (&raw const header) as libc::c_ulong).map_err(step("TUNSETVNETHDRSZ"))?;
        let little_endian: libc::c_int = 1;
        request(&fd, libc::TUNSETVNETLE, (&raw const little_endian) as libc::c_ulong).map_err(step("TUNSETVNETLE"))?;
        set_nonblocking(&fd).map_err(step("O_NONBLOCK"))?;
        // Linux has it from 6.2 on. The driver settles what is used in the end.
        let uso = request(&fd, libc::TUNSETOFFLOAD, offload_flags(feature::ALL_GUEST_OFFLOADS)).is_ok();
        request(&fd, libc::TUNSETOFFLOAD, 0).map_err(step("TUNSETOFFLOAD"))?;
        Ok(Self { fd, uso })
    }
}

impl Queue for Tap {
    fn fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    fn features(&self) -> u64 {
        let always = feature::CSUM
            | feature::CTRL_GUEST_OFFLOADS
            | feature::GUEST_CSUM
            | feature::GUEST_TSO4
            | feature::GUEST_TSO6
            | feature::GUEST_ECN
            | feature::HOST_TSO4
            | feature::HOST_TSO6
            | feature::HOST_ECN;
        if self.uso { always | feature::GUEST_USO | feature::HOST_USO } else { always }
    }

    fn set_offloads(&self, features: u64) -> io::Result<()> {
        request(&self.fd, libc::TUNSETOFFLOAD, offload_flags(features))
    }

    fn set_attached(&self, attached: bool) -> io::Result<()> {
        let mut interface = no_interface();
        let flag = if attached { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
        interface.ifr_ifru.ifru_flags = flag as libc::c_short;
        request(&self.fd, libc::TUNSETQUEUE, (&raw const interface) as libc::c_ulong)
    }
}

/// The argument of `TUNSETOFFLOAD` for what a guest can take (virtio 1.3, section 5.1.3).
fn offload_flags(features: u64) -> libc::c_ulong {
    if features & feature::GUEST_CSUM == 0 {
        // Section 5.1.3.1: without checksums there are no segments.
        return 0;
    }
    let mut flags = libc::TUN_F_CSUM;
    for (feature, flag) in [
        (feature::GUEST_TSO4, libc::TUN_F_TSO4),
        (feature::GUEST_TSO6, libc::TUN_F_TSO6),
        (feature::GUEST_ECN, libc::TUN_F_TSO_ECN),
    ] {
        if features & feature != 0 {
            flags |= flag;
        }
    }
    // Linux takes UDP segmentation for both families or for none.
    if features & feature::GUEST_USO == feature::GUEST_USO {
        flags |= libc::TUN_F_USO4 | libc::TUN_F_USO6;
    }
    // A congestion mark needs a segment to stand in.
    if flags & (libc::TUN_F_TSO4 | libc::TUN_F_TSO6) == 0 {
        flags &= !libc::TUN_F_TSO_ECN;
    }
    libc::c_ulong::from(flags)
}

pub(super) fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    // SAFETY: the descriptor is open; both calls only concern its flags.
    let result = unsafe {
        let flags = libc::fcntl(fd.as_raw_fd(), libc::F_GETFL);
        libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offloads_follow_their_dependencies() {
        let flags = |features| offload_flags(features) as libc::c_uint;
        assert_eq!(flags(feature::GUEST_TSO4 | feature::GUEST_USO), 0);
        assert_eq!(flags(feature::GUEST_CSUM), libc::TUN_F_CSUM);
        assert_eq!(flags(feature::GUEST_CSUM | feature::GUEST_ECN), libc::TUN_F_CSUM);
        assert_eq!(
            flags(feature::GUEST_CSUM | feature::GUEST_TSO6 | feature::GUEST_ECN),
            libc::TUN_F_CSUM | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN
        );
        let uso = libc::TUN_F_USO4 | libc::TUN_F_USO6;
        assert_eq!(flags(feature::GUEST_CSUM | feature::GUEST_USO) & uso, uso);
        assert_eq!(flags(feature::GUEST_CSUM | feature::GUEST_USO & (1 << 54)) & uso, 0);
    }

    /// A tap in a namespace of the calling thread's own, where the machine lets tests make one.
    fn tap(flags: libc::c_int, queues: usize) -> Option<Vec<OwnedFd>> {
        // SAFETY: affects this thread alone.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            eprintln!("skipped: this machine lets nobody make network namespaces");
            return None;
        }
        let mut interface = no_interface();
        interface.ifr_ifru.ifru_flags = flags as libc::c_short;
        let open = || {
            let device = std::fs::File::options().read(true).write(true).open("/dev/net/tun").ok()?;
            let fd = OwnedFd::from(device);
            request(&fd, libc::TUNSETIFF, (&raw mut interface) as libc::c_ulong).ok()?;
            Some(fd)
        };
        std::iter::repeat_with(open).take(queues).collect()
    }

    const FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

    #[test]
    fn a_tap_takes_what_a_driver_may_ask_for() {
        let Some(fds) = tap(FLAGS | libc::IFF_MULTI_QUEUE, 2) else { return };
        let taps: Vec<Tap> = fds.into_iter().map(|fd| Tap::new(fd, true).unwrap()).collect();
        for features in [0, feature::GUEST_CSUM, feature::ALL_GUEST_OFFLOADS & !feature::GUEST_USO] {
            taps[0].set_offloads(features).unwrap();
        }
        for attached in [false, true] {
            taps[1].set_attached(attached).unwrap();
            let mut packet = [0_u8; 64];
            let parts = [libc::iovec { iov_base: packet.as_mut_ptr().cast(), iov_len: packet.len() }];
            // SAFETY: the one part is a live buffer of that length.
            let error = unsafe { taps[1].read(&parts) }.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        }
    }

    #[test]
    fn a_tap_made_in_another_way_is_refused() {
        let Some(mut fds) = tap(FLAGS & !libc::IFF_VNET_HDR, 1) else { return };
        assert!(matches!(Tap::new(fds.remove(0), false), Err(TapError::Flags(_))));
        let Some(mut fds) = tap(FLAGS, 1) else { return };
        assert!(matches!(Tap::new(fds.remove(0), true), Err(TapError::SingleQueue)));
    }

    #[test]
    fn a_descriptor_that_is_no_tap_is_refused() {
        let null = std::fs::File::open("/dev/null").unwrap();
        assert!(matches!(Tap::new(null.into(), false), Err(TapError::Setting { step: "TUNGETIFF", .. })));
    }
}
