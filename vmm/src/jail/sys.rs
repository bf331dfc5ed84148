//! The system calls of the jail.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

const CAPABILITY_VERSION_3: u32 = 0x2008_0522;
/// linux/securebits.h: a change of user leaves capabilities alone; executing a program as root gives none.
const SECBITS: libc::c_ulong = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 3;
// linux/mount.h
const FSOPEN_CLOEXEC: libc::c_uint = 1;
const FSCONFIG_SET_STRING: libc::c_uint = 1;
const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
const FSMOUNT_CLOEXEC: libc::c_uint = 1;
const MOUNT_ATTR_NOSUID: libc::c_uint = 0x2;
const MOUNT_ATTR_NODEV: libc::c_uint = 0x4;
const MOUNT_ATTR_NOEXEC: libc::c_uint = 0x8;

pub(super) fn unshare(namespaces: libc::c_int) -> io::Result<()> {
    // SAFETY: no pointers.
    check(unsafe { libc::unshare(namespaces) })
}

/// A `/proc` that nobody finds by a name, of the calling process's PID namespace, with its processes and nothing else.
pub(super) fn mount_private_proc() -> io::Result<OwnedFd> {
    // SAFETY: terminated strings; the calls take and make descriptors by number.
    unsafe {
        let context = owned(libc::syscall(libc::SYS_fsopen, c"proc".as_ptr(), FSOPEN_CLOEXEC))?;
        let fd = context.as_raw_fd();
        let no_value = std::ptr::null::<libc::c_char>();
        let (key, value) = (c"subset".as_ptr(), c"pid".as_ptr());
        check(libc::syscall(libc::SYS_fsconfig, fd, FSCONFIG_SET_STRING, key, value, 0) as libc::c_int)?;
        check(libc::syscall(libc::SYS_fsconfig, fd, FSCONFIG_CMD_CREATE, no_value, no_value, 0) as libc::c_int)?;
        let attributes = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC;
        owned(libc::syscall(libc::SYS_fsmount, fd, FSMOUNT_CLOEXEC, attributes))
    }
}

pub(super) fn open_at(dir: &OwnedFd, path: &CStr, flags: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: a terminated string.
    owned(unsafe { libc::openat(dir.as_raw_fd(), path.as_ptr(), flags | libc::O_CLOEXEC) }.into())
}

pub(super) fn receive_mounts_only() -> io::Result<()> {
    mount(None, c"/", None, libc::MS_SLAVE | libc::MS_REC, None)
}

/// An empty file system that takes nothing.
pub(super) fn mount_nothing(target: &CStr) -> io::Result<()> {
    let flags = libc::MS_RDONLY | libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
    mount(Some(c"nothing"), target, Some(c"tmpfs"), flags, Some(c"size=4k,nr_inodes=1,mode=0555"))
}

#[cfg(test)]
pub(super) fn mount_tmpfs(target: &std::path::Path) -> io::Result<()> {
    use std::os::unix::ffi::OsStrExt;
    let target = std::ffi::CString::new(target.as_os_str().as_bytes())?;
    mount(Some(c"test"), &target, Some(c"tmpfs"), 0, None)
}

fn mount(
    source: Option<&CStr>,
    target: &CStr,
    kind: Option<&CStr>,
    flags: libc::c_ulong,
    data: Option<&CStr>,
) -> io::Result<()> {
    let pointer = |text: Option<&CStr>| text.map_or(std::ptr::null(), CStr::as_ptr);
    // SAFETY: terminated strings, or none where the flags ask for none.
    check(unsafe { libc::mount(pointer(source), target.as_ptr(), pointer(kind), flags, pointer(data).cast()) })
}

/// Makes the working directory the root, and detaches what was the root.
pub(super) fn pivot_here() -> io::Result<()> {
    // SAFETY: terminated strings.
    unsafe {
        check(libc::syscall(libc::SYS_pivot_root, c".".as_ptr(), c".".as_ptr()) as libc::c_int)?;
        check(libc::umount2(c".".as_ptr(), libc::MNT_DETACH))
    }
}

pub(super) fn keep_capabilities_over_user_changes() -> io::Result<()> {
    // SAFETY: no pointers.
    check(unsafe { libc::prctl(libc::PR_SET_SECUREBITS, SECBITS) })
}

pub(super) fn set_identity(user: u32, group: u32) -> io::Result<()> {
    // SAFETY: an empty list needs no pointer.
    unsafe {
        check(libc::setgroups(0, std::ptr::null()))?;
        check(libc::setresgid(group, group, group))?;
        check(libc::setresuid(user, user, user))
    }
}

/// Keeps these capabilities and no others, now and for whatever might be executed.
pub(super) fn keep_capabilities(kept: &[u32]) -> io::Result<()> {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    #[derive(Clone, Copy, Default)]
    #[repr(C)]
    struct Set {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    // Newer kernels have more than this one may know of: up to the first that does not exist.
    for capability in (0..64).filter(|capability| !kept.contains(capability)) {
        // SAFETY: no pointers.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(capability)) } < 0 {
            match io::Error::last_os_error() {
                error if error.raw_os_error() == Some(libc::EINVAL) => break,
                error => return Err(error),
            }
        }
    }
    let mut sets = [Set::default(); 2];
    for capability in kept {
        let set = &mut sets[*capability as usize / 32];
        set.effective |= 1 << (capability % 32);
        set.permitted = set.effective;
    }
    let header = Header { version: CAPABILITY_VERSION_3, pid: 0 };
    // SAFETY: the kernel reads a header and, for this version, two sets.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw const header, sets.as_ptr()) } as libc::c_int)
}

pub(super) fn forbid_new_privileges() -> io::Result<()> {
    // SAFETY: no pointers.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })
}

pub(super) fn close(fd: RawFd) {
    // SAFETY: the caller is a child of its own, and gives up a descriptor that was copied into it.
    unsafe { libc::close(fd) };
}

#[cfg(test)]
pub(super) fn is_root() -> bool {
    // SAFETY: no pointers.
    unsafe { libc::geteuid() == 0 }
}

#[cfg(test)]
pub(super) fn make_device(path: &CStr) -> io::Result<()> {
    // SAFETY: a terminated string.
    check(unsafe { libc::mknod(path.as_ptr(), libc::S_IFBLK | 0o600, libc::makedev(8, 0)) })
}

/// A child made by [`fork`].
pub(super) struct Child(libc::pid_t);

/// Runs `work` in a copy of this process, which must have one thread. The copy ends with it.
pub(super) fn fork(work: impl FnOnce() -> io::Result<()>) -> io::Result<Child> {
    // SAFETY: with one thread, the copy is a whole process.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            // The errno travels as the exit status.
            let status = match work() {
                Ok(()) => 0,
                Err(error) => error.raw_os_error().unwrap_or(libc::EIO),
            };
            // SAFETY: does not return; nothing of the parent's is flushed or run.
            unsafe { libc::_exit(status) }
        }
        pid => Ok(Child(pid)),
    }
}

impl Child {
    /// Waits for the child's end, and returns the error that it ended with.
    pub(super) fn wait(self) -> io::Result<()> {
        let mut status = 0;
        loop {
            // SAFETY: the kernel writes one integer.
            if unsafe { libc::waitpid(self.0, &raw mut status, 0) } >= 0 {
                break;
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
        match (libc::WIFEXITED(status), libc::WEXITSTATUS(status)) {
            (true, 0) => Ok(()),
            (true, errno) => Err(io::Error::from_raw_os_error(errno)),
            (false, _) => Err(io::Error::other("the helper was killed")),
        }
    }
}

/// Runs `work` in a copy of the calling thread's process and waits for it. For tests, whose harness has threads.
#[cfg(test)]
pub(super) fn in_a_fork(work: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    let report = move || work().inspect_err(|error| eprintln!("{error}"));
    fork(report)?.wait()
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Takes what a system call has just returned.
fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    // Descriptors are small.
    let fd = fd as RawFd;
    check(fd)?;
    // SAFETY: a descriptor that a system call has just made for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
