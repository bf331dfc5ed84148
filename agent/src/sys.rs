//! The system calls that no safe crate offers. All of the agent's `unsafe` is here, behind safe functions.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::process::Pid;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// `RNDADDENTROPY` of random(4): mixes bytes into the pool and credits them.
const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
/// `RNDRESEEDCRNG` of random(4): has the generator draw a new key from the pool at once.
const RNDRESEEDCRNG: libc::Ioctl = 0x5207;
/// Most bytes that [`add_entropy`] takes at once.
const ENTROPY_BYTES: usize = hull_protocol::MAX_ENTROPY_BYTES;

/// `struct rand_pool_info` of `<linux/random.h>` with a buffer of fixed size.
#[repr(C)]
struct RandPoolInfo {
    entropy_count: libc::c_int,
    buf_size: libc::c_int,
    buf: [u8; ENTROPY_BYTES],
}

/// Which side of a [`fork_sibling`] this is.
pub(crate) enum Fork {
    Parent(Pid),
    Child,
}

/// Forks a process whose parent is this process's parent, so that it outlives this one without becoming an orphan
/// of a PID namespace.
///
/// For single-threaded processes only; the container helper, its one caller, is such a process.
pub(crate) fn fork_sibling() -> io::Result<Fork> {
    // SAFETY: without CLONE_VM and with a null stack, clone(2) is fork(2) with another parent: the child runs on its
    // own copy of this stack. No other thread exists that could hold a lock (of the allocator, say) in the copy.
    let pid = unsafe { libc::syscall(libc::SYS_clone, libc::CLONE_PARENT | libc::SIGCHLD, 0, 0, 0, 0) };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Fork::Child),
        pid => Pid::from_raw(pid as i32).map(Fork::Parent).ok_or_else(|| io::Error::other("clone: not a pid")),
    }
}

/// Ends the process at once: no destructors, no atexit handlers. For the child side of a fork.
pub(crate) fn exit_now(code: i32) -> ! {
    // SAFETY: _exit(2) has no preconditions.
    unsafe { libc::_exit(code) }
}

/// Has the runtime tell when a descriptor is ready.
pub(crate) fn watch(descriptor: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd has the same open descriptor from here until it is dropped, which the AsyncFd, its owner,
    // does only after it has deregistered it.
    Ok(unsafe { AsyncFd::register_with_interest(descriptor, interest) }?)
}

/// Sends a signal by its number, of which the safe wrapper knows only those with names.
pub(crate) fn kill(pid: Pid, signal: i32) -> io::Result<()> {
    // SAFETY: kill(2) touches no memory of this process.
    check(unsafe { libc::kill(pid.as_raw_nonzero().get(), signal) })
}

/// Mixes `bytes` into the kernel's entropy pool, credits all their bits, and has the generator reseed.
pub(crate) fn add_entropy(random: impl AsFd, bytes: &[u8]) -> io::Result<()> {
    let length = bytes.len().min(ENTROPY_BYTES);
    let mut info = RandPoolInfo {
        entropy_count: (length * 8) as libc::c_int,
        buf_size: length as libc::c_int,
        buf: [0; ENTROPY_BYTES],
    };
    info.buf[..length].copy_from_slice(&bytes[..length]);
    // SAFETY: the request reads a rand_pool_info and `buf_size` bytes behind it, all of which are in `info`.
    check(unsafe { libc::ioctl(random.as_fd().as_raw_fd(), RNDADDENTROPY, &raw const info) })?;
    // SAFETY: the request takes no argument.
    check(unsafe { libc::ioctl(random.as_fd().as_raw_fd(), RNDRESEEDCRNG) })
}

/// Sets the flags `IFF_UP | IFF_RUNNING` on a network interface (netdevice(7)).
pub(crate) fn set_interface_up(socket: impl AsFd, name: &str) -> io::Result<()> {
    // SAFETY: all-zero is a valid ifreq, a plain C structure.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= libc::IFNAMSIZ {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the request reads an ifreq, whose name ends in a zero byte by the check above.
    check(unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), libc::SIOCSIFFLAGS as libc::Ioctl, &raw const request) })
}

/// One instruction of an eBPF program: `struct bpf_insn` of `<linux/bpf.h>`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BpfInstruction {
    pub(crate) code: u8,
    /// The destination register in the low nibble, the source in the high one.
    pub(crate) registers: u8,
    pub(crate) offset: i16,
    pub(crate) immediate: i32,
}

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_DETACH: libc::c_int = 9;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_F_ALLOW_MULTI: u32 = 2;

/// The head of `union bpf_attr` for `BPF_PROG_LOAD`.
#[repr(C)]
#[derive(Default)]
struct BpfLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
}

/// The head of `union bpf_attr` for `BPF_PROG_ATTACH` and `BPF_PROG_DETACH`.
#[repr(C)]
struct BpfAttach {
    target_fd: u32,
    attach_bpf_fd: u32,
    attach_type: u32,
    attach_flags: u32,
}

/// How often a program is offered to the kernel.
const LOAD_ATTEMPTS: usize = 10;

/// Loads a program that decides over a cgroup's use of devices.
pub(crate) fn bpf_load_device_program(program: &[BpfInstruction]) -> io::Result<OwnedFd> {
    let attributes = BpfLoad {
        prog_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        insn_cnt: program.len() as u32,
        insns: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        ..BpfLoad::default()
    };
    until_not_interrupted(|| {
        // SAFETY: the kernel reads `insn_cnt` instructions and the licence, a C string; both live through the call.
        let fd = unsafe {
            libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const attributes, std::mem::size_of::<BpfLoad>())
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call has just made this descriptor, and nobody else knows it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
    })
}

/// Calls again where the verifier has given up with `EAGAIN`, as it does when a signal has come: those of children that end are many.
fn until_not_interrupted<T>(mut load: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    for _ in 1..LOAD_ATTEMPTS {
        match load() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            result => return result,
        }
    }
    load()
}

/// Has the program decide for the cgroup whose directory is given, together with those attached before.
pub(crate) fn bpf_attach_device_program(cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    bpf_attachment(BPF_PROG_ATTACH, cgroup, program, BPF_F_ALLOW_MULTI)
}

/// Takes back a [`bpf_attach_device_program`].
pub(crate) fn bpf_detach_device_program(cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    bpf_attachment(BPF_PROG_DETACH, cgroup, program, 0)
}

fn bpf_attachment(command: libc::c_int, cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>, flags: u32) -> io::Result<()> {
    let attributes = BpfAttach {
        target_fd: cgroup.as_raw_fd() as u32,
        attach_bpf_fd: program.as_raw_fd() as u32,
        attach_type: BPF_CGROUP_DEVICE,
        attach_flags: flags,
    };
    // SAFETY: the kernel reads this structure and nothing behind it.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, &raw const attributes, std::mem::size_of::<BpfAttach>()) };
    check(result as libc::c_int)
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_offered_again_until_the_kernel_has_looked_at_it() {
        let loading = |answers: &[Result<i32, i32>]| {
            let mut answers = answers.iter();
            let mut calls = 0;
            let result = until_not_interrupted(|| {
                calls += 1;
                answers.next().copied().unwrap_or(Err(libc::EAGAIN)).map_err(io::Error::from_raw_os_error)
            });
            (result.map_err(|error| error.raw_os_error()), calls)
        };
        assert_eq!(loading(&[Err(libc::EAGAIN), Err(libc::EAGAIN), Ok(7)]), (Ok(7), 3));
        assert_eq!(loading(&[Err(libc::EINVAL)]), (Err(Some(libc::EINVAL)), 1));
        assert_eq!(loading(&[]), (Err(Some(libc::EAGAIN)), LOAD_ATTEMPTS));
    }
}
