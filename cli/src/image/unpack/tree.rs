//! The directory that a layer is unpacked into, and the only way to reach anything in it.
//!
//! A path's directory is opened by the kernel with the layer as root (`RESOLVE_IN_ROOT`), so symbolic links in a
//! layer mean what they will mean in the container: an absolute one starts at the layer, and `..`
//! ends there. Everything else is done to single names in a directory that was opened so. Nothing ever
//! resolves a path against the host.

use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, Stat, XattrFlags, openat2};
use rustix::io::Errno;

use super::path::{follow, split};
use crate::image::remove::remove_tree;

/// How many links may hide behind the directories of one path, as for the kernel.
const LINKS_MAX: u32 = 40;
/// Open directories to keep: an archive comes back to a parent after its children.
const CACHED: usize = 8;
/// The mode of directories that the archive does not list.
const UNLISTED_MODE: u32 = 0o755;

const OPAQUE: &str = "trusted.overlay.opaque";

pub(super) struct Tree {
    root: Rc<OwnedFd>,
    /// Most recently used last.
    cache: Vec<(Vec<u8>, Rc<OwnedFd>)>,
    umask: u32,
}

impl Tree {
    pub(super) fn new(root: OwnedFd) -> Self {
        Self { root: Rc::new(root), cache: Vec::with_capacity(CACHED), umask: umask() }
    }

    /// The bits of `mode` that a new file does not get.
    pub(super) fn masked(&self, mode: u32) -> u32 {
        mode & self.umask
    }

    /// Opens a directory that exists.
    pub(super) fn open(&mut self, path: &[u8]) -> Result<Rc<OwnedFd>, Errno> {
        if path.is_empty() {
            return Ok(self.root.clone());
        }
        if let Some(at) = self.cache.iter().rposition(|(cached, _)| cached == path) {
            let hit = self.cache.remove(at);
            let directory = hit.1.clone();
            self.cache.push(hit);
            return Ok(directory);
        }
        let directory = Rc::new(self.resolve(path, OFlags::empty())?);
        if self.cache.len() == CACHED {
            self.cache.remove(0);
        }
        self.cache.push((path.to_vec(), directory.clone()));
        Ok(directory)
    }

    /// Opens a directory without following a link in its last component, and without remembering it.
    pub(super) fn open_itself(&self, path: &[u8]) -> Result<OwnedFd, Errno> {
        self.resolve(if path.is_empty() { b"." } else { path }, OFlags::NOFOLLOW)
    }

    fn resolve(&self, path: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
        let flags = flags | OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        loop {
            // The kernel gives up if something is renamed anywhere while it looks at a `..`.
            match openat2(&self.root, path, flags, Mode::empty(), resolve) {
                Err(Errno::AGAIN | Errno::INTR) => {}
                other => return other,
            }
        }
    }

    /// Opens a directory, making what is missing of it.
    pub(super) fn ensure(&mut self, path: &[u8]) -> Result<Rc<OwnedFd>, Errno> {
        match self.open(path) {
            Err(Errno::NOENT | Errno::NOTDIR) => self.make_all(path, LINKS_MAX)?,
            other => return other,
        }
        self.open(path)
    }

    fn make_all(&mut self, path: &[u8], links_left: u32) -> Result<(), Errno> {
        let ends = path.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| at);
        for end in ends.chain([path.len()]) {
            let prefix = &path[..end];
            match self.open(prefix) {
                Err(Errno::NOENT | Errno::NOTDIR) => {}
                other => {
                    other?;
                    continue;
                }
            }
            let (parent_path, name) = split(prefix);
            let parent = self.open(parent_path)?;
            match stat(&parent, name) {
                Err(Errno::NOENT) => self.make_directory(&parent, name, UNLISTED_MODE)?,
                Err(error) => return Err(error),
                Ok(found) if FileType::from_raw_mode(found.st_mode) == FileType::Symlink => {
                    // It leads to what a lower layer has, or to what is yet to come.
                    let left = links_left.checked_sub(1).ok_or(Errno::LOOP)?;
                    let target = rustix::fs::readlinkat(&parent, name, Vec::new())?;
                    self.make_all(&follow(parent_path, target.as_bytes()), left)?;
                }
                Ok(found) if is_whiteout(&found) => {
                    rustix::fs::unlinkat(&parent, name, AtFlags::empty())?;
                    self.make_directory(&parent, name, UNLISTED_MODE)?;
                    set_opaque(self.open(prefix)?)?;
                }
                Ok(_) => return Err(Errno::NOTDIR),
            }
        }
        Ok(())
    }

    /// Makes a directory with just this mode.
    pub(super) fn make_directory(&self, parent: &OwnedFd, name: &[u8], mode: u32) -> Result<(), Errno> {
        rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(mode))?;
        if self.masked(mode) != 0 {
            rustix::fs::chmodat(parent, name, Mode::from_raw_mode(mode), AtFlags::empty())?;
        }
        Ok(())
    }

    /// Removes whatever has this name, so that something else can have it.
    pub(super) fn clear(&mut self, parent: &OwnedFd, name: &[u8]) -> Result<(), Errno> {
        match FileType::from_raw_mode(stat(parent, name)?.st_mode) {
            FileType::Directory => remove_tree(parent, name)?,
            _ => rustix::fs::unlinkat(parent, name, AtFlags::empty())?,
        }
        // A directory that was open may be gone, and a link that led to it may have been this name.
        self.cache.clear();
        Ok(())
    }
}

/// What has this name, itself.
pub(super) fn stat(parent: &OwnedFd, name: &[u8]) -> Result<Stat, Errno> {
    rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)
}

/// Whether overlayfs takes this for a name that the layer deletes.
pub(super) fn is_whiteout(found: &Stat) -> bool {
    FileType::from_raw_mode(found.st_mode) == FileType::CharacterDevice && found.st_rdev == 0
}

/// Makes overlayfs hide what lower layers have in this directory.
pub(super) fn set_opaque(directory: impl AsFd) -> Result<(), Errno> {
    rustix::fs::fsetxattr(directory, OPAQUE, b"y", XattrFlags::empty())
}

/// This process's umask, which has no call that only reads it.
fn umask() -> u32 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let umask = status.lines().find_map(|line| line.strip_prefix("Umask:"));
    // Unknown, it is taken to clear everything, which costs a call per file.
    umask.and_then(|text| u32::from_str_radix(text.trim(), 8).ok()).unwrap_or(0o777)
}

/// Whether this directory hides what lower layers have in it.
pub(in crate::image) fn opaque(directory: impl AsFd) -> bool {
    let mut value = [0];
    matches!(rustix::fs::fgetxattr(directory, OPAQUE, &mut value), Ok(1)) && value == *b"y"
}

/// Whether the unpacked layer at `path` hides all layers below it.
pub(in super::super) fn is_opaque(path: &std::path::Path) -> bool {
    let mut value = [0];
    matches!(rustix::fs::getxattr(path, OPAQUE, &mut value), Ok(1)) && value == *b"y"
}
