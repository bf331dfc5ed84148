//! Looks into a container's root from outside. The image is hostile: its symbolic links are followed as if its root
//! were the root, by the kernel (`RESOLVE_IN_ROOT`).

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{Mode, OFlags, ResolveFlags, mkdirat, open, openat2};
use rustix::io::Errno;

/// Most that is read of a file: a passwd of many thousand users.
const READ_BYTES: u64 = 1 << 20;

fn resolve(root: impl AsFd, path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    openat2(root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve)
}

fn open_root(root: &Path) -> rustix::io::Result<OwnedFd> {
    open(root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

/// Reads a regular file, up to a bound, as text with whatever is not UTF-8 replaced.
pub(crate) fn read(root: &Path, path: &Path) -> io::Result<String> {
    // Not blocking on a FIFO, and only then asking whether it is one.
    let file = File::from(resolve(open_root(root)?, path, OFlags::RDONLY | OFlags::NONBLOCK)?);
    if !file.metadata()?.is_file() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut content = Vec::new();
    file.take(READ_BYTES).read_to_end(&mut content)?;
    Ok(String::from_utf8_lossy(&content).into_owned())
}

/// Makes a directory and those above it, as far as they are missing.
pub(crate) fn make_directories(root: &Path, path: &Path) -> io::Result<()> {
    let root = open_root(root)?;
    let mut made = PathBuf::from("/");
    let mut parent = resolve(&root, &made, OFlags::PATH | OFlags::DIRECTORY)?;
    for component in path.components() {
        let Component::Normal(name) = component else { continue };
        made.push(name);
        parent = match resolve(&root, &made, OFlags::PATH | OFlags::DIRECTORY) {
            Err(Errno::NOENT) => {
                mkdirat(&parent, name, Mode::from_raw_mode(0o755))?;
                resolve(&root, &made, OFlags::PATH | OFlags::DIRECTORY)?
            }
            result => result?,
        };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn links_stay_inside_the_root() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("etc")).unwrap();
        std::fs::write(root.path().join("etc/real"), "inside").unwrap();
        symlink("/etc/real", root.path().join("etc/passwd")).unwrap();
        symlink("../../../../../../etc/hostname", root.path().join("etc/escape")).unwrap();
        assert_eq!(read(root.path(), Path::new("etc/passwd")).unwrap(), "inside");
        assert!(read(root.path(), Path::new("etc/escape")).is_err());
        assert!(read(root.path(), Path::new("etc")).is_err());
    }

    #[test]
    fn missing_directories_are_made_behind_links() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("data")).unwrap();
        symlink("/data", root.path().join("srv")).unwrap();
        make_directories(root.path(), Path::new("/srv/a/b")).unwrap();
        assert!(root.path().join("data/a/b").is_dir());
        make_directories(root.path(), Path::new("/srv/a/b")).unwrap();
    }
}
