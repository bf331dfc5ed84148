//! Temporary directories that never outlive their process by much.
//!
//! Whatever is to appear in the store is made here and renamed into place. The maker holds a lock on its
//! directory; a directory without a lock is one whose maker is dead, and the next process removes it.

use std::fs::{DirBuilder, File, TryLockError};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::lock::still_there;
use super::remove::remove_tree;

/// A directory of this process, removed with all that is still in it.
pub(super) struct Staging {
    path: PathBuf,
    _lock: File,
}

impl Staging {
    /// Makes one in `directory`, on the same file system as the rest of the store.
    pub(super) fn new(directory: &Path) -> io::Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        loop {
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let path = directory.join(format!("{}-{number}", std::process::id()));
            match DirBuilder::new().mode(0o700).create(&path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                other => other?,
            }
            // Until the lock is granted somebody may take the directory for a dead process's.
            let lock = match File::open(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                other => other?,
            };
            match lock.lock() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                other => other?,
            }
            if still_there(&lock, &path)? {
                return Ok(Self { path, _lock: lock });
            }
        }
    }

    /// A path in it.
    pub(super) fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // What cannot be removed now will be tried again by the next process.
        let _ = remove(&self.path);
    }
}

/// Removes the directories of dead processes.
pub(super) fn sweep(directory: &Path) -> io::Result<()> {
    let entries = match directory.read_dir() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    for entry in entries {
        let path = entry?.path();
        // It may be gone by now, or another process's to remove.
        let Ok(lock) = File::open(&path) else { continue };
        match lock.try_lock() {
            Ok(()) => drop(remove(&path)),
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(error)) => return Err(error),
        }
    }
    Ok(())
}

fn remove(path: &Path) -> io::Result<()> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Ok(()) };
    let parent: OwnedFd = File::open(parent)?.into();
    Ok(remove_tree(&parent, name.as_bytes())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_nobody_holds_is_swept() {
        let dir = tempfile::tempdir().unwrap();
        let held = Staging::new(dir.path()).unwrap();
        std::fs::write(held.join("file"), "x").unwrap();
        let stale = dir.path().join("4000000000-0");
        std::fs::create_dir_all(stale.join("layer/etc")).unwrap();
        sweep(dir.path()).unwrap();
        assert!(held.join("file").exists() && !stale.exists());
        drop(held);
        assert_eq!(dir.path().read_dir().unwrap().count(), 0);
    }
}
