//! A layer's archive becomes a directory that overlayfs can use as a lower layer.
//!
//! Deletions are what differs: the archive's `.wh.NAME` becomes a character device 0:0, and
//! `.wh..wh..opq` the attribute `trusted.overlay.opaque`. Metadata of directories is set last, because filling
//! them changes their times and may need permissions that they do not give.

mod meta;
mod path;
mod tree;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;

pub(super) use meta::wanted as is_wanted_attribute;
use meta::{Maker, Meta};
pub use path::PathError;
use path::{normalise, split};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, makedev};
use rustix::io::Errno;
use tree::{Tree, set_opaque, stat};
pub(super) use tree::{is_opaque, opaque};

use super::stream::StreamError;
use super::tar::{Entry, Input, Kind, Reader, TarError, printable};

/// Ten times what the largest images have in one layer.
const ENTRIES_MAX: u64 = 5_000_000;
/// Room that a directory, a link or a small file takes, so that a layer of nothing but names has a size.
const ENTRY_BYTES: u64 = 512;

const WHITEOUT: &[u8] = b".wh.";
const AUFS: &[u8] = b".wh..wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// Why a layer cannot be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// An entry's name is none that a layer may have.
    #[error("entry `{entry}` {source}: refused, because honest layers have no such names")]
    Name {
        /// The name.
        entry: String,
        /// What is wrong with it.
        source: PathError,
    },
    /// A hard link to something that is not in the layer.
    #[error("entry `{entry}` is a hard link to `{target}`, which {why}: refused; build the image again")]
    HardLink {
        /// The link.
        entry: String,
        /// What it links to.
        target: String,
        /// What is wrong with that.
        why: String,
    },
    /// An entry that makes no sense where it is.
    #[error("entry `{entry}` {why}: refused; build the image again")]
    Misplaced {
        /// The entry.
        entry: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The layer has more entries than any honest one.
    #[error("the layer has more than {ENTRIES_MAX} entries: refused")]
    TooMany,
    /// Space, inodes or quota ran out, or would.
    #[error(
        "the disk is full: the layer does not fit into the free space of the image store; remove images or use a larger disk"
    )]
    DiskFull,
    /// The user may not make what the layer has.
    #[error("may not {step} `{entry}`: unpacking this layer takes root")]
    Permission {
        /// What was not permitted.
        step: &'static str,
        /// The entry.
        entry: String,
    },
    /// A system call failed.
    #[error("cannot {step} `{entry}`: {source}")]
    Io {
        /// What failed.
        step: &'static str,
        /// The entry.
        entry: String,
        /// Why.
        source: io::Error,
    },
    /// The archive is damaged.
    #[error(transparent)]
    Tar(TarError),
    /// The blob is damaged.
    #[error(transparent)]
    Stream(#[from] StreamError),
}

impl From<TarError> for UnpackError {
    fn from(error: TarError) -> Self {
        match error {
            TarError::Io(error) if error.kind() == io::ErrorKind::StorageFull => Self::DiskFull,
            other => Self::Tar(other),
        }
    }
}

impl UnpackError {
    fn new(step: &'static str, entry: &[u8], error: Errno) -> Self {
        let entry = || if entry.is_empty() { "/".to_owned() } else { printable(entry) };
        match error {
            Errno::NOSPC | Errno::DQUOT => Self::DiskFull,
            Errno::PERM | Errno::ACCESS => Self::Permission { step, entry: entry() },
            Errno::NOTDIR => Self::Misplaced { entry: entry(), why: "is below something that is no directory" },
            Errno::LOOP => Self::Misplaced { entry: entry(), why: "is below a loop of symbolic links" },
            Errno::NAMETOOLONG => Self::Name { entry: entry(), source: PathError::TooLong },
            other => Self::Io { step, entry: entry(), source: other.into() },
        }
    }
}

/// Unpacks all entries into the empty directory `root`, and says how large they are.
pub(super) fn unpack<I: Input>(archive: &mut Reader<I>, root: OwnedFd) -> Result<u64, UnpackError> {
    let mut unpacker = Unpacker {
        tree: Tree::new(root),
        maker: Maker::this_process(),
        directories: BTreeMap::from([(Vec::new(), None)]),
        entries: 0,
        bytes: 0,
    };
    // An inherited default ACL would change every mode.
    let _ =
        rustix::fs::fremovexattr(unpacker.tree.open_itself(b"").map_err(at("open", b""))?, "system.posix_acl_default");
    while let Some(mut entry) = archive.next()? {
        unpacker.entries += 1;
        if unpacker.entries > ENTRIES_MAX {
            return Err(UnpackError::TooMany);
        }
        unpacker.place(&mut entry, archive)?;
    }
    unpacker.finish()
}

/// For `map_err`: the step that failed, and on which entry.
fn at<'a>(step: &'static str, entry: &'a [u8]) -> impl Fn(Errno) -> UnpackError + 'a {
    move |error| UnpackError::new(step, entry, error)
}

/// What a directory's entry says of it.
struct Pending {
    meta: Meta,
    /// It was made with the mode that it is to have.
    has_mode: bool,
}

struct Unpacker {
    tree: Tree,
    maker: Maker,
    /// Directories by path, with what is left to be set. The root has none unless it has an entry.
    directories: BTreeMap<Vec<u8>, Option<Pending>>,
    entries: u64,
    bytes: u64,
}

impl Unpacker {
    fn place<I: Input>(&mut self, entry: &mut Entry, archive: &mut Reader<I>) -> Result<(), UnpackError> {
        let path =
            normalise(&entry.name).map_err(|source| UnpackError::Name { entry: printable(&entry.name), source })?;
        let (parent_path, name) = split(&path);
        if path.is_empty() {
            if entry.kind != Kind::Directory {
                return Err(misplaced(entry, "takes the place of the layer's root"));
            }
            self.directories.insert(path, Some(Pending { meta: Meta::of(entry), has_mode: false }));
            return Ok(());
        }
        match parent_path.split(|byte| *byte == b'/').find(|component| component.starts_with(WHITEOUT)) {
            Some(aufs) if aufs.starts_with(AUFS) => return Ok(()),
            Some(_) => return Err(misplaced(entry, "is below a deleted name")),
            None => {}
        }
        if name.starts_with(AUFS) && name != OPAQUE {
            // Bookkeeping of aufs that some old images carry.
            return Ok(());
        }
        let parent = self.tree.ensure(parent_path).map_err(at("make the directory of", &path))?;
        if name == OPAQUE {
            return set_opaque(&parent).map_err(at("mark as opaque the directory of", &path));
        }
        if let Some(deleted) = name.strip_prefix(WHITEOUT) {
            if matches!(deleted, b"" | b"." | b"..") {
                return Err(misplaced(entry, "deletes no name"));
            }
            return whiteout(&parent, deleted).map_err(at("delete what is named by", &path));
        }
        self.bytes += ENTRY_BYTES;
        match entry.kind {
            Kind::Directory => self.directory(&parent, &path, Meta::of(entry)),
            Kind::Regular => self.regular(&parent, &path, entry, archive),
            Kind::HardLink => self.hard_link(&parent, &path, entry),
            Kind::Symlink => {
                let make = || rustix::fs::symlinkat(entry.link.as_slice(), &parent, name);
                self.replace(&parent, &path, make).map_err(at("make the symbolic link", &path))?;
                self.set_itself(&parent, name, Meta::of(entry)).map_err(at("set the owner or time of", &path))
            }
            Kind::Fifo | Kind::CharacterDevice | Kind::BlockDevice => self.node(&parent, &path, entry),
        }
    }

    /// Makes something, if need be after removing what had its name.
    fn replace<T>(
        &mut self,
        parent: &OwnedFd,
        path: &[u8],
        mut make: impl FnMut() -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        match make() {
            Err(Errno::EXIST) => {}
            other => return other,
        }
        let below = [path, b"/"].concat();
        let gone = self.directories.range(below.clone()..).map(|(known, _)| known);
        let gone: Vec<_> = gone.take_while(|known| known.starts_with(&below)).cloned().collect();
        for path in gone.iter().map(Vec::as_slice).chain([path]) {
            self.directories.remove(path);
        }
        self.tree.clear(parent, split(path).1)?;
        make()
    }

    fn directory(&mut self, parent: &OwnedFd, path: &[u8], meta: Meta) -> Result<(), UnpackError> {
        let name = split(path).1;
        // A mode that lets its owner fill it, and that no child inherits, need not wait.
        let harmless = meta.mode & 0o7700 == 0o700;
        let exists = match self.tree.make_directory(parent, name, if harmless { meta.mode } else { 0o700 }) {
            Err(Errno::EXIST) => true,
            other => other.map(|()| false).map_err(at("make the directory", path))?,
        };
        if exists && !is_directory(parent, name).map_err(at("examine", path))? {
            // What was here hid a lower layer's directory, and so must this.
            self.tree
                .clear(parent, name)
                .and_then(|()| self.tree.make_directory(parent, name, 0o700))
                .and_then(|()| set_opaque(self.tree.open_itself(path)?))
                .map_err(at("put a directory in the place of", path))?;
        }
        self.directories.insert(path.to_vec(), Some(Pending { meta, has_mode: harmless && !exists }));
        Ok(())
    }

    fn regular<I: Input>(
        &mut self,
        parent: &OwnedFd,
        path: &[u8],
        entry: &mut Entry,
        archive: &mut Reader<I>,
    ) -> Result<(), UnpackError> {
        let name = split(path).1;
        let meta = Meta::of(entry);
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let first_mode = meta.mode & 0o777;
        let make = || rustix::fs::openat(parent, name, flags, Mode::from_raw_mode(first_mode));
        let file = self.replace(parent, path, make).map_err(at("make", path))?;
        match &entry.sparse {
            None => copy(&file, path, archive, entry.size, None)?,
            Some(segments) => {
                for segment in segments {
                    copy(&file, path, archive, segment.length, Some(segment.offset))?;
                }
                rustix::fs::ftruncate(&file, entry.size).map_err(at("set the length of", path))?;
            }
        }
        self.bytes += entry.sparse.as_ref().map_or(entry.size, |all| all.iter().map(|segment| segment.length).sum());
        let has_mode = meta.mode & 0o7000 == 0 && self.tree.masked(meta.mode) == 0;
        meta.apply(&file, self.maker, has_mode).map_err(|(step, error)| UnpackError::new(step, path, error))
    }

    fn hard_link(&mut self, parent: &OwnedFd, path: &[u8], entry: &Entry) -> Result<(), UnpackError> {
        let refuse = |why: String| {
            let (entry, target) = (printable(&entry.name), printable(&entry.link));
            UnpackError::HardLink { entry, target, why }
        };
        let name = split(path).1;
        let target = normalise(&entry.link).map_err(|error| refuse(error.to_string()))?;
        let (target_parent, target_name) = split(&target);
        let missing = |error| match error {
            Errno::NOENT | Errno::NOTDIR => refuse("is not in the layer".to_owned()),
            other => UnpackError::new("make the hard link", path, other),
        };
        let from = self.tree.open(target_parent).map_err(missing)?;
        let there = match target_name {
            b"" => Err(Errno::NOENT),
            _ => stat(&from, target_name),
        };
        let there = there.map_err(missing)?;
        if FileType::from_raw_mode(there.st_mode) == FileType::Directory {
            return Err(refuse("is a directory".to_owned()));
        }
        let make = || rustix::fs::linkat(&from, target_name, parent, name, AtFlags::empty());
        match make() {
            Err(Errno::EXIST) => {}
            other => return other.map_err(missing),
        }
        let here = stat(parent, name).map_err(at("examine", path))?;
        if (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino) {
            return Ok(());
        }
        self.replace(parent, path, make).map_err(missing)
    }

    fn node(&mut self, parent: &OwnedFd, path: &[u8], entry: &mut Entry) -> Result<(), UnpackError> {
        let name = split(path).1;
        let meta = Meta::of(entry);
        let (kind, device) = match entry.kind {
            Kind::CharacterDevice => (FileType::CharacterDevice, makedev(entry.device.0, entry.device.1)),
            Kind::BlockDevice => (FileType::BlockDevice, makedev(entry.device.0, entry.device.1)),
            _ => (FileType::Fifo, 0),
        };
        let make = || rustix::fs::mknodat(parent, name, kind, meta.mode(), device);
        self.replace(parent, path, make).map_err(at("make the special file", path))?;
        let wrong_mode = meta.owner(self.maker).is_some() || self.tree.masked(meta.mode) != 0;
        let mode = meta.mode();
        self.set_itself(parent, name, meta).map_err(at("set the owner or time of", path))?;
        if wrong_mode {
            rustix::fs::chmodat(parent, name, mode, AtFlags::empty()).map_err(at("set the mode of", path))?;
        }
        Ok(())
    }

    /// Owner and time of what cannot be opened for it.
    fn set_itself(&self, parent: &OwnedFd, name: &[u8], meta: Meta) -> Result<(), Errno> {
        if let Some((uid, gid)) = meta.owner(self.maker) {
            rustix::fs::chownat(parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
        }
        rustix::fs::utimensat(parent, name, &meta.times(), AtFlags::SYMLINK_NOFOLLOW)
    }

    /// Settles the directories, the deepest first.
    fn finish(self) -> Result<u64, UnpackError> {
        for (path, pending) in self.directories.into_iter().rev() {
            let directory = match self.tree.open_itself(&path) {
                Ok(directory) => directory,
                // Something replaced it under another name for the same place.
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => continue,
                Err(error) => return Err(UnpackError::new("open", &path, error)),
            };
            let Pending { meta, has_mode } = match pending {
                Some(pending) => pending,
                // Ordinary users cannot give it to root, nor does it matter to them.
                None if !rustix::process::geteuid().is_root() => continue,
                None => Pending { meta: Meta::of_root(), has_mode: false },
            };
            meta.apply(&directory, self.maker, has_mode)
                .map_err(|(step, error)| UnpackError::new(step, &path, error))?;
        }
        Ok(self.bytes)
    }
}

fn is_directory(parent: &OwnedFd, name: &[u8]) -> Result<bool, Errno> {
    Ok(FileType::from_raw_mode(stat(parent, name)?.st_mode) == FileType::Directory)
}

fn misplaced(entry: &Entry, why: &'static str) -> UnpackError {
    UnpackError::Misplaced { entry: printable(&entry.name), why }
}

/// Makes overlayfs hide what lower layers have under this name; what this layer has stays.
fn whiteout(parent: &OwnedFd, name: &[u8]) -> Result<(), Errno> {
    match rustix::fs::mknodat(parent, name, FileType::CharacterDevice, Mode::empty(), 0) {
        Err(Errno::EXIST) => {}
        other => return other,
    }
    if is_directory(parent, name)? {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        set_opaque(rustix::fs::openat(parent, name, flags, Mode::empty())?)?;
    }
    Ok(())
}

/// Writes `length` bytes of the current entry's data, from the file's position on or at an offset.
fn copy<I: Input>(
    file: &OwnedFd,
    path: &[u8],
    archive: &mut Reader<I>,
    length: u64,
    mut offset: Option<u64>,
) -> Result<(), UnpackError> {
    let mut left = length;
    while left > 0 {
        let piece = archive.data()?;
        let piece = &piece[..piece.len().min(usize::try_from(left).unwrap_or(usize::MAX))];
        let written = match offset {
            None => rustix::io::write(file, piece),
            Some(offset) => rustix::io::pwrite(file, piece, offset),
        };
        let written = match written {
            Err(Errno::INTR) => 0,
            other => other.map_err(at("write", path))?,
        };
        archive.consume(written);
        left -= written as u64;
        offset = offset.map(|offset| offset + written as u64);
    }
    Ok(())
}
