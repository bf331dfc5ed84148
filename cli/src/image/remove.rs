//! Removing a tree whose shape a stranger chose.
//!
//! Recursion would need a stack frame and a descriptor per level, and a layer can be made deeper than either lasts.
//! So directories that are not empty are moved up to the top and done one after the other.

use std::os::fd::OwnedFd;

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags};
use rustix::io::Errno;

/// Removes the directory `name` and all below it. Links are removed, never followed.
pub(super) fn remove_tree(parent: &OwnedFd, name: &[u8]) -> Result<(), Errno> {
    match rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR) {
        Err(Errno::NOTEMPTY | Errno::EXIST) => {}
        other => return other,
    }
    let top = open_directory(parent, name)?;
    let mut moved = 0_u64;
    let mut waiting = empty(&top, |name| Ok(name.to_vec()))?;
    while let Some(name) = waiting.pop() {
        let directory = open_directory(&top, &name)?;
        let lifted = empty(&directory, |child| lift(&directory, child, &top, &mut moved))?;
        waiting.extend(lifted);
        rustix::fs::unlinkat(&top, name, AtFlags::REMOVEDIR)?;
    }
    rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR)
}

/// Moves a directory to the top, and gives the name that it has there.
fn lift(from: &OwnedFd, name: &[u8], top: &OwnedFd, moved: &mut u64) -> Result<Vec<u8>, Errno> {
    loop {
        *moved += 1;
        let there = format!(".hull-{moved}").into_bytes();
        match rustix::fs::renameat(from, name, top, &there) {
            Ok(()) => return Ok(there),
            // The layer has a name like ours.
            Err(Errno::NOTEMPTY | Errno::EXIST | Errno::NOTDIR) => {}
            // A directory's `..` changes, so its owner must be allowed to write to it.
            Err(Errno::ACCESS) => rustix::fs::chmodat(from, name, Mode::RWXU, AtFlags::empty())?,
            Err(error) => return Err(error),
        }
    }
}

/// Unlinks all that is not a directory, and calls `keep` for the directories that are not empty.
fn empty(directory: &OwnedFd, mut keep: impl FnMut(&[u8]) -> Result<Vec<u8>, Errno>) -> Result<Vec<Vec<u8>>, Errno> {
    let mut kept = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        if entry.file_type() != FileType::Directory {
            match rustix::fs::unlinkat(directory, name, AtFlags::empty()) {
                Err(Errno::ISDIR) => {}
                other => {
                    other?;
                    continue;
                }
            }
        }
        match rustix::fs::unlinkat(directory, name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(Errno::NOTEMPTY | Errno::EXIST) => kept.push(keep(name.to_bytes())?),
            Err(error) => return Err(error),
        }
    }
    Ok(kept)
}

fn open_directory(parent: &OwnedFd, name: &[u8]) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let open = || rustix::fs::openat(parent, name, flags, Mode::empty());
    let directory = match open() {
        Err(Errno::ACCESS) => {
            rustix::fs::chmodat(parent, name, Mode::RWXU, AtFlags::empty())?;
            open()?
        }
        other => other?,
    };
    if !rustix::process::geteuid().is_root() {
        rustix::fs::fchmod(&directory, Mode::RWXU)?;
    }
    Ok(directory)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn open(path: &std::path::Path) -> OwnedFd {
        fs::File::open(path).unwrap().into()
    }

    #[test]
    fn removes_what_it_is_told_to_and_nothing_that_links_lead_to() {
        let dir = tempfile::tempdir().unwrap();
        let (kept, tree) = (dir.path().join("kept"), dir.path().join("tree"));
        fs::create_dir_all(kept.join("deep")).unwrap();
        fs::create_dir_all(tree.join("a/b/c")).unwrap();
        fs::create_dir_all(tree.join(".hull-1/x")).unwrap();
        fs::write(tree.join(".hull-2"), "").unwrap();
        fs::write(tree.join("a/b/file"), "x").unwrap();
        symlink(&kept, tree.join("a/link")).unwrap();
        symlink("..", tree.join("up")).unwrap();
        fs::set_permissions(tree.join("a/b"), fs::Permissions::from_mode(0o500)).unwrap();
        remove_tree(&open(dir.path()), b"tree").unwrap();
        assert!(!tree.exists() && kept.join("deep").exists());
    }

    #[test]
    fn depth_does_not_matter() {
        let dir = tempfile::tempdir().unwrap();
        let mut parent = open(dir.path());
        for _ in 0..1500 {
            rustix::fs::mkdirat(&parent, "d", Mode::RWXU).unwrap();
            parent = rustix::fs::openat(&parent, "d", OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap();
            rustix::fs::mkdirat(&parent, "e", Mode::RWXU).unwrap();
        }
        remove_tree(&open(dir.path()), b"d").unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
