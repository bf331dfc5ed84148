//! Advisory file locks, by which several `hull` processes share one store.
//!
//! Every lock is a `flock`, so the kernel drops it when its owner dies, however it dies. Lock files
//! may be unlinked by whoever holds them exclusively, so a lock counts only if, once it is granted, the
//! path still leads to the locked file.
//!
//! Lock order: a blob's lock, of which a task holds one at a time, then the turn at unpacking a layer, then that layer's lock, then the
//! store's lock. No process waits for a layer's exclusive lock: shared ones are kept for as long as a container lives, and a process
//! that waits for one may hold others.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::OFlags;

/// Who may hold a lock beside us.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Share {
    /// Others that also ask for `Shared`.
    Shared,
    /// Nobody.
    Exclusive,
}

/// Waits for the lock on the file at `path`, which is made if it is missing.
pub(super) fn lock(path: &Path, share: Share) -> io::Result<File> {
    loop {
        let file = open(path)?;
        let granted = match share {
            Share::Shared => file.lock_shared(),
            Share::Exclusive => file.lock(),
        };
        match granted {
            Ok(()) if still_there(&file, path)? => return Ok(file),
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Takes the exclusive lock on the file at `path` unless somebody holds it now.
pub(super) fn try_lock(path: &Path) -> io::Result<Option<File>> {
    let file = open(path)?;
    match file.try_lock() {
        Ok(()) => Ok(still_there(&file, path)?.then_some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
        .open(path)
}

/// Whether `path` still leads to the open `file`.
pub(super) fn still_there(file: &File, path: &Path) -> io::Result<bool> {
    let ours = file.metadata()?;
    match std::fs::symlink_metadata(path) {
        Ok(there) => Ok((ours.dev(), ours.ino()) == (there.dev(), there.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Keeps an image's layers in the store for as long as it, or a clone, lives.
///
/// The hold is a shared `flock` on each layer's use file. A process that starts a long-lived child may
/// pass it the descriptors of [`Hold::fds`]: the hold lasts until the last copy of them is closed.
#[derive(Clone, Debug)]
pub struct Hold(Arc<Vec<File>>);

impl Hold {
    pub(super) fn new(locks: Vec<File>) -> Self {
        Self(Arc::new(locks))
    }

    /// The locked descriptors, all of them close-on-exec.
    pub fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.0.iter().map(AsFd::as_fd)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_excludes_and_ends_with_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let shared = lock(&path, Share::Shared).unwrap();
        let hold = Hold::new(vec![lock(&path, Share::Shared).unwrap()]);
        let copy = hold.clone();
        drop((shared, hold));
        assert!(try_lock(&path).unwrap().is_none(), "a clone holds on");
        drop(copy);
        assert!(try_lock(&path).unwrap().is_some());
    }

    #[test]
    fn a_waiter_does_not_end_up_with_an_unlinked_lock() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let first = lock(&path, Share::Exclusive).unwrap();
        let waiter = std::thread::spawn({
            let path = path.clone();
            move || lock(&path, Share::Exclusive).unwrap()
        });
        std::thread::sleep(std::time::Duration::from_millis(30));
        std::fs::remove_file(&path).unwrap();
        drop(first);
        let second = waiter.join().unwrap();
        assert!(still_there(&second, &path).unwrap());
    }
}
