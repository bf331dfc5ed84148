//! Attributes of mounts (mount_setattr(2)), set on a tree of mounts before anybody sees it.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use crate::children;

/// Makes a tree of mounts read-only, all that is mounted below its root included.
///
/// # Errors
///
/// Fails where the caller lacks `CAP_SYS_ADMIN`; with `ENOSYS` before Linux 5.12.
pub fn set_read_only(tree: BorrowedFd<'_>) -> io::Result<()> {
    set(tree, &libc::mount_attr { attr_set: libc::MOUNT_ATTR_RDONLY, attr_clr: 0, propagation: 0, userns_fd: 0 })
}

/// Lets nobody open a device through a tree of mounts, all that is mounted below its root included.
///
/// # Errors
///
/// As [`set_read_only`].
pub fn set_no_devices(tree: BorrowedFd<'_>) -> io::Result<()> {
    set(tree, &libc::mount_attr { attr_set: libc::MOUNT_ATTR_NODEV, attr_clr: 0, propagation: 0, userns_fd: 0 })
}

/// The same, and makes it read-only.
///
/// # Errors
///
/// As [`set_read_only`].
pub fn set_for_reading_only(tree: BorrowedFd<'_>) -> io::Result<()> {
    let attr_set = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NODEV;
    set(tree, &libc::mount_attr { attr_set, attr_clr: 0, propagation: 0, userns_fd: 0 })
}

/// Has a tree of mounts follow no other: what is mounted below its source, or unmounted, from now on is not so in the tree.
///
/// # Errors
///
/// Fails where the caller lacks `CAP_SYS_ADMIN`; with `ENOSYS` before Linux 5.12.
pub fn set_private(tree: BorrowedFd<'_>) -> io::Result<()> {
    set(tree, &libc::mount_attr { attr_set: 0, attr_clr: 0, propagation: libc::MS_PRIVATE, userns_fd: 0 })
}

/// Has files of a tree of mounts belong to others than their file system says, as `owners` maps them: a user of the file system is one
/// inside of that namespace, and is seen as the one outside.
///
/// # Errors
///
/// `EINVAL` where one of the file systems does not take part in this, `EPERM` for a tree that has been attached.
pub fn map_owners(tree: BorrowedFd<'_>, owners: &OwnedFd) -> io::Result<()> {
    // A descriptor is not negative.
    let userns_fd = owners.as_raw_fd() as u64;
    set(tree, &libc::mount_attr { attr_set: libc::MOUNT_ATTR_IDMAP, attr_clr: 0, propagation: 0, userns_fd })
}

fn set(tree: BorrowedFd<'_>, attributes: &libc::mount_attr) -> io::Result<()> {
    // SAFETY: the descriptor is open, the path is a string, and the kernel reads the structure, whose size it is told.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
            std::ptr::from_ref(attributes),
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A user namespace with these mappings, each a text as user_namespaces(7) has it for `uid_map` and `gid_map`. No process is left in it.
///
/// # Errors
///
/// Fails where the host allows no more user namespaces, or with `EINVAL` for a mapping that is none.
pub fn user_namespace(uid_map: &str, gid_map: &str) -> io::Result<OwnedFd> {
    let (child, _started) = children::start(idle_in_user_namespace, |child| u32::try_from(*child).ok())?;
    let namespace = describe(child, uid_map, gid_map);
    // SAFETY: the child is our own and has not been waited for, so no other process has its identifier.
    unsafe {
        libc::kill(child, libc::SIGKILL);
        libc::waitpid(child, std::ptr::null_mut(), 0);
    }
    namespace
}

/// A child in a user namespace of its own, which does nothing.
fn idle_in_user_namespace() -> io::Result<libc::pid_t> {
    let flags = libc::c_long::from(libc::CLONE_NEWUSER | libc::SIGCHLD);
    let none: libc::c_long = 0;
    // SAFETY: without CLONE_VM this is fork(2), with the child in a namespace of its own. The child makes no calls but
    // prctl(2) and pause(2), which are async-signal-safe.
    let child = unsafe { libc::syscall(libc::SYS_clone, flags, none, none, none, none) };
    match child {
        ..0 => Err(io::Error::last_os_error()),
        0 => loop {
            // SAFETY: see above. It ends by our signal, or with us.
            unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                libc::pause();
            }
        },
        // A process identifier fits.
        _ => Ok(child as libc::pid_t),
    }
}

fn describe(pid: libc::pid_t, uid_map: &str, gid_map: &str) -> io::Result<OwnedFd> {
    std::fs::write(format!("/proc/{pid}/uid_map"), uid_map)?;
    std::fs::write(format!("/proc/{pid}/gid_map"), gid_map)?;
    Ok(File::open(format!("/proc/{pid}/ns/user"))?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_needs_mappings_that_are_some() {
        match user_namespace("0 0 x", "0 0 1") {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            // Where the host or its sandbox has no user namespaces for tests.
            Err(error) => assert!(matches!(error.raw_os_error(), Some(libc::EPERM | libc::ENOSPC)), "{error}"),
            Ok(_) => panic!("x is no number"),
        }
    }
}
