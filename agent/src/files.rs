//! Files that the host has in the guest's own memory because programs watch them: inotify tells of a change only where it is made.
//!
//! An update does what the kubelet does on the host, so that a watcher sees the events that it would see there: what is new is
//! written beside what is old, then each link is replaced in one step, then what is old goes.
//!
//! A privileged container can change the file system too, so no link in it is ever followed.

use std::collections::HashSet;
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, Uid};
use rustix::io::Errno;

use crate::error::{Error, Result, Step};

/// What is written under this name first, and then renamed. No name of a ConfigMap's key has a space.
const TEMPORARY: &str = "..new file";

/// A file, link or directory to be there.
#[derive(Clone, Debug)]
pub(crate) struct File {
    /// Below the root, which is the empty path.
    pub(crate) path: PathBuf,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) what: What,
}

#[derive(Clone, Debug)]
pub(crate) enum What {
    Directory,
    Contents(Vec<u8>),
    Link(String),
}

/// Makes `root` hold these files and no others.
pub(crate) fn update(root: &Path, files: &[File]) -> Result<()> {
    let failed = |file: &File| format!("write {}", root.join(&file.path).display());
    let directory = open(CWD, root, ResolveFlags::empty()).step_with(|| format!("open {}", root.display()))?;
    let (links, others): (Vec<&File>, Vec<&File>) = files.iter().partition(|file| matches!(file.what, What::Link(_)));
    for file in others.into_iter().chain(links) {
        file.put(&directory).step_with(|| failed(file))?;
    }
    let wanted: HashSet<&Path> = files.iter().map(|file| file.path.as_path()).collect();
    remove_others(&directory, Path::new(""), &wanted)
        .map_err(|errno| Error::failed(format!("remove old files of {}", root.display()), errno.to_string()))
}

/// Makes a directory below `root` unless something has its name already; no link is followed.
pub(crate) fn make_missing_directory(root: &OwnedFd, directory: &File) -> io::Result<()> {
    let Some(name) = directory.path.file_name() else { return Ok(()) };
    let parent = open_below(root, directory.path.parent().unwrap_or(Path::new("")))?;
    match rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(0o700)) {
        Ok(()) => Ok(directory.own(&open_below(&parent, name.as_ref())?, "", AtFlags::EMPTY_PATH)?),
        Err(Errno::EXIST) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

impl File {
    fn put(&self, root: &OwnedFd) -> io::Result<()> {
        let Some(name) = self.path.file_name() else { return Ok(self.own(root, "", AtFlags::EMPTY_PATH)?) };
        let parent = open_below(root, self.path.parent().unwrap_or(Path::new("")))?;
        match &self.what {
            What::Directory => {
                match rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(0o700)) {
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(errno) => return Err(errno.into()),
                }
                self.own(&open_below(&parent, name.as_ref())?, "", AtFlags::EMPTY_PATH)?;
            }
            // What has not changed is left alone, and nobody is told of it.
            What::Contents(contents) if !self.is_there(&parent, contents) => {
                let _ = rustix::fs::unlinkat(&parent, TEMPORARY, AtFlags::empty());
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let fd = rustix::fs::openat(&parent, TEMPORARY, flags, Mode::from_raw_mode(0o600))?;
                let mut file = fs::File::from(fd);
                file.write_all(contents)?;
                self.own(&OwnedFd::from(file), "", AtFlags::EMPTY_PATH)?;
                rustix::fs::renameat(&parent, TEMPORARY, &parent, name)?;
            }
            What::Link(target) if !is_link_to(&parent, name.as_ref(), target) => {
                let _ = rustix::fs::unlinkat(&parent, TEMPORARY, AtFlags::empty());
                rustix::fs::symlinkat(target.as_str(), &parent, TEMPORARY)?;
                self.own(&parent, TEMPORARY, AtFlags::SYMLINK_NOFOLLOW)?;
                rustix::fs::renameat(&parent, TEMPORARY, &parent, name)?;
            }
            What::Contents(_) | What::Link(_) => {}
        }
        Ok(())
    }

    /// Sets owner and permissions; of a link only the owner.
    fn own(&self, at: &OwnedFd, name: &str, flags: AtFlags) -> rustix::io::Result<()> {
        rustix::fs::chownat(at, name, Some(Uid::from_raw(self.uid)), Some(Gid::from_raw(self.gid)), flags)?;
        match self.what {
            What::Link(_) => Ok(()),
            // After the owner, whose change takes set-id bits away.
            _ => rustix::fs::fchmod(at, Mode::from_raw_mode(self.mode)),
        }
    }

    fn is_there(&self, parent: &OwnedFd, contents: &[u8]) -> bool {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let Some(name) = self.path.file_name() else { return false };
        let Ok(fd) = rustix::fs::openat(parent, name, flags, Mode::empty()) else { return false };
        let Ok(stat) = rustix::fs::fstat(&fd) else { return false };
        FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
            && (stat.st_mode & 0o7777, stat.st_uid, stat.st_gid) == (self.mode, self.uid, self.gid)
            && usize::try_from(stat.st_size) == Ok(contents.len())
            && holds(fs::File::from(fd), contents)
    }
}

fn holds(mut file: fs::File, contents: &[u8]) -> bool {
    let mut found = Vec::with_capacity(contents.len());
    file.read_to_end(&mut found).is_ok_and(|_| found == contents)
}

fn is_link_to(parent: &OwnedFd, name: &Path, target: &str) -> bool {
    rustix::fs::readlinkat(parent, name, Vec::new()).is_ok_and(|found| found.as_bytes() == target.as_bytes())
}

/// Removes what is in a directory and not wanted. `path` is that of the directory below the root.
fn remove_others(directory: &OwnedFd, path: &Path, wanted: &HashSet<&Path>) -> rustix::io::Result<()> {
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let inner = path.join(std::ffi::OsStr::new(name.to_str().map_err(|_| Errno::ILSEQ)?));
        let is_directory = rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)
            .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory);
        if is_directory {
            remove_others(&open_below(directory, inner.file_name().unwrap_or_default().as_ref())?, &inner, wanted)?;
        }
        if !wanted.contains(inner.as_path()) {
            let flags = if is_directory { AtFlags::REMOVEDIR } else { AtFlags::empty() };
            rustix::fs::unlinkat(directory, name, flags)?;
        }
    }
    Ok(())
}

fn open_below(root: &OwnedFd, path: &Path) -> rustix::io::Result<OwnedFd> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    open(root, path, ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS)
}

fn open(at: impl AsFd, path: &Path, resolve: ResolveFlags) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat2(at, path, flags, Mode::empty(), resolve)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, what: What) -> File {
        let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
        let mode = if matches!(what, What::Directory) { 0o755 } else { 0o644 };
        File { path: path.into(), mode, uid, gid, what }
    }

    fn version(number: u32, value: &str) -> Vec<File> {
        vec![
            file("", What::Directory),
            file(&format!("..{number}"), What::Directory),
            file(&format!("..{number}/key"), What::Contents(value.into())),
            file("..data", What::Link(format!("..{number}"))),
            file("key", What::Link("..data/key".into())),
        ]
    }

    #[test]
    fn an_update_leaves_the_new_files_and_no_others() {
        let dir = tempfile::tempdir().unwrap();
        update(dir.path(), &version(1, "old")).unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("key")).unwrap(), "old");
        update(dir.path(), &version(2, "new")).unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("key")).unwrap(), "new");
        let mut names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["..2", "..data", "key"]);
    }

    #[test]
    fn what_is_the_same_is_not_written_again() {
        use std::os::unix::fs::MetadataExt as _;
        let dir = tempfile::tempdir().unwrap();
        let inode = || fs::metadata(dir.path().join("key")).unwrap().ino();
        update(dir.path(), &version(1, "same")).unwrap();
        let before = inode();
        update(dir.path(), &version(1, "same")).unwrap();
        assert_eq!(inode(), before);
        update(dir.path(), &version(1, "else")).unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("key")).unwrap(), "else");
    }

    #[test]
    fn a_link_that_a_container_planted_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let victim = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(victim.path(), dir.path().join("..1")).unwrap();
        update(dir.path(), &version(1, "secret")).unwrap_err();
        assert_eq!(fs::read_dir(victim.path()).unwrap().count(), 0);
    }
}
