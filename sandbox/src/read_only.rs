//! Files of the host that a VMM reads.
//!
//! In its user namespace the VMM has the capabilities of a file server, for all files whose owners the namespace knows, which is all that
//! it has a descriptor of: it could change the mode of one that is open for reading, and open it anew for writing. So it gets such files through
//! a mount that nothing can be changed through.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use hull_sandbox_sys::mounts;
use rustix::fs::{CWD, Mode, OFlags, StatVfsMountFlags, fstatvfs, statvfs};
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, move_mount, open_tree};

use crate::share::is_unknown;

/// Opens a file or block device for reading, with more `flags`. Whoever has the descriptor can neither change the file nor what is known of
/// it, nor open it anew for writing. Before Linux 5.12, or for somebody who may not mount, it is opened as it is.
///
/// # Errors
///
/// Fails where it cannot be opened for reading.
pub(crate) fn open(path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
    let flags = flags | OFlags::RDONLY | OFlags::CLOEXEC;
    let Some(mount) = mount_of(path)? else { return Ok(rustix::fs::open(path, flags, Mode::empty())?) };
    let file = rustix::fs::open(format!("/proc/self/fd/{}", mount.as_raw_fd()), flags, Mode::empty())?;
    // A device can be opened now, and not once more.
    forbid_changes(&mount)?;
    Ok(file)
}

/// Has the calling process, in a mount namespace of its own, see a file such that nobody can change it who has got hold of it there. It keeps
/// its path, by which people find it in lists of what a process has open or mapped.
///
/// # Errors
///
/// Fails where the file is not there, or cannot be mounted.
pub(crate) fn protect(path: &Path) -> io::Result<()> {
    if statvfs(path)?.f_flag.contains(StatVfsMountFlags::RDONLY) {
        return Ok(());
    }
    let Some(mount) = mount_of(path)? else { return Ok(()) };
    forbid_changes(&mount)?;
    let flags = rustix::mount::MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    Ok(move_mount(&mount, "", CWD, path, flags)?)
}

/// Opens for reading what has been [protected](protect), or what somebody has put in its place since.
///
/// # Errors
///
/// As [`open`].
pub(crate) fn open_protected(path: &Path) -> io::Result<OwnedFd> {
    let file = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    if fstatvfs(&file)?.f_flag.contains(StatVfsMountFlags::RDONLY) { Ok(file) } else { open(path, OFlags::empty()) }
}

/// A mount of one file that is nowhere yet; `None` where there can be none.
fn mount_of(path: &Path) -> io::Result<Option<OwnedFd>> {
    match open_tree(CWD, path, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC) {
        Err(Errno::NOSYS | Errno::PERM) => Ok(None),
        Err(Errno::INVAL) => {
            Err(io::Error::other("the mount that it is on is another namespace's, or unbindable; move it to another"))
        }
        result => Ok(Some(result?)),
    }
}

fn forbid_changes(mount: &OwnedFd) -> io::Result<()> {
    match mounts::set_for_reading_only(mount.as_fd()) {
        Err(error) if is_unknown(&error) => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn what_is_open_for_reading_stays_as_it_is() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: only root can mount");
            return;
        }
        let path = tempfile::NamedTempFile::new_in("/var/tmp").unwrap();
        std::fs::write(path.path(), "kept").unwrap();
        let file = open(path.path(), OFlags::empty()).unwrap();
        assert_eq!(rustix::fs::fchmod(&file, Mode::from_raw_mode(0o4777)), Err(Errno::ROFS));
        let anew = format!("/proc/self/fd/{}", file.as_raw_fd());
        assert_eq!(rustix::fs::open(&anew, OFlags::RDWR, Mode::empty()).unwrap_err(), Errno::ROFS);
        let mut content = String::new();
        std::fs::File::from(file).read_to_string(&mut content).unwrap();
        assert_eq!(content, "kept");
        // Others are not concerned.
        std::fs::write(path.path(), "changed").unwrap();
    }

    #[test]
    fn a_file_that_is_protected_is_so_in_the_own_namespace_and_once() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: only root can mount");
            return;
        }
        let path = tempfile::NamedTempFile::new_in("/var/tmp").unwrap();
        let path = path.path();
        let in_namespace = || {
            crate::share::enter_mount_namespace().unwrap();
            protect(path).unwrap();
            protect(path).unwrap();
            let mounts = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
            let lines = mounts.lines().filter(|line| line.split(' ').nth(4) == path.to_str());
            let error = std::fs::write(path, "changed").unwrap_err();
            (lines.count(), error.raw_os_error())
        };
        let replaced = || open_protected(path).map(|file| rustix::fs::fchmod(&file, Mode::from_raw_mode(0o4777)));
        assert_eq!(replaced().unwrap(), Err(Errno::ROFS), "though it is not protected");
        let seen = std::thread::scope(|scope| scope.spawn(in_namespace).join().unwrap());
        assert_eq!(seen, (1, Some(Errno::ROFS.raw_os_error())));
        std::fs::write(path, "changed").unwrap();
    }

    #[test]
    fn what_is_not_there_cannot_be_opened() {
        assert_eq!(open(Path::new("/no/such/file"), OFlags::empty()).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
