//! Tells what file system a disk holds by the mark that each has at a fixed place.
//!
//! No more than these few bytes are read, and nothing but the name of a file system follows from them: what a disk's maker has
//! put on it is for the guest's kernel to read, not for the host's.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

/// A file system that the guest mounts from a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// ext2, ext3 and ext4, all of which ext4 mounts.
    Ext4,
    /// XFS.
    Xfs,
    /// EROFS, which cannot be written to.
    Erofs,
    /// SquashFS, which cannot be written to.
    Squashfs,
}

/// A disk that the guest cannot mount.
#[derive(Debug, thiserror::Error)]
pub enum SuperblockError {
    /// It cannot be read.
    #[error("the disk {path} cannot be read: {source}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Something else is on it.
    #[error("{path} holds {found}; a root is a raw image or block device with ext4, xfs, erofs or squashfs{remedy}")]
    Unsuitable {
        /// Which.
        path: PathBuf,
        /// What it seems to hold.
        found: &'static str,
        /// What to do about that, as the end of a sentence.
        remedy: &'static str,
    },
}

impl Kind {
    /// The type as mount(2) takes it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Erofs => "erofs",
            Self::Squashfs => "squashfs",
        }
    }

    /// Whether nobody can write to it.
    #[must_use]
    pub fn is_read_only(self) -> bool {
        matches!(self, Self::Erofs | Self::Squashfs)
    }

    /// What the disk at `path` holds.
    ///
    /// # Errors
    ///
    /// Fails where it cannot be read or holds anything else.
    pub fn of_disk(path: &Path) -> Result<Self, SuperblockError> {
        // A FIFO in its place must not block.
        let flags = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or(0);
        let file = File::options().read(true).custom_flags(flags).open(path);
        let found = file.and_then(|file| look(|at, bytes| read_at(&file, at, bytes)));
        let (found, remedy) = match found.map_err(|source| SuperblockError::Read { path: path.to_owned(), source })? {
            Found::FileSystem(kind) => return Ok(kind),
            Found::Other(found, remedy) => (found, remedy),
        };
        Err(SuperblockError::Unsuitable { path: path.to_owned(), found, remedy })
    }
}

/// A mark, where it is and what has it.
struct Mark<T> {
    at: u64,
    bytes: &'static [u8],
    what: T,
}

/// The kernel's numbers: `EXT4_SUPER_MAGIC` (s_magic, 0x38 into the superblock at 1024), `XFS_SB_MAGIC`,
/// `EROFS_SUPER_MAGIC_V1` (at 1024), `SQUASHFS_MAGIC`.
const FILE_SYSTEMS: [Mark<Kind>; 4] = [
    Mark { at: 1024, bytes: &0xe0f5_e1e2_u32.to_le_bytes(), what: Kind::Erofs },
    Mark { at: 0, bytes: b"hsqs", what: Kind::Squashfs },
    Mark { at: 0, bytes: b"XFSB", what: Kind::Xfs },
    Mark { at: 1024 + 0x38, bytes: &0xef53_u16.to_le_bytes(), what: Kind::Ext4 },
];

/// What people take for an image of a file system. A file system may have a boot sector in front, so these come after.
const OTHERS: [Mark<(&'static str, &'static str)>; 6] = [
    Mark { at: 65_536 + 64, bytes: b"_BHRfS_M", what: ("btrfs", "") },
    Mark { at: 0, bytes: b"QFI\xfb", what: ("a qcow2 image", ": convert it with `qemu-img convert -O raw`") },
    Mark { at: 512, bytes: b"EFI PART", what: ("a table of partitions", ": give one of its partitions") },
    Mark { at: 510, bytes: &[0x55, 0xaa], what: ("a table of partitions", ": give one of its partitions") },
    Mark { at: 0, bytes: &[0x1f, 0x8b], what: ("compressed data", ": unpack it first") },
    Mark { at: 0, bytes: &[0x28, 0xb5, 0x2f, 0xfd], what: ("compressed data", ": unpack it first") },
];

#[derive(Debug, PartialEq, Eq)]
enum Found {
    FileSystem(Kind),
    Other(&'static str, &'static str),
}

fn look(read: impl Fn(u64, &mut [u8]) -> io::Result<bool>) -> io::Result<Found> {
    for mark in &FILE_SYSTEMS {
        if is_there(&read, mark)? {
            return Ok(Found::FileSystem(mark.what));
        }
    }
    for mark in &OTHERS {
        if is_there(&read, mark)? {
            return Ok(Found::Other(mark.what.0, mark.what.1));
        }
    }
    Ok(Found::Other("no file system that is known", ""))
}

fn is_there<T>(read: impl Fn(u64, &mut [u8]) -> io::Result<bool>, mark: &Mark<T>) -> io::Result<bool> {
    let mut bytes = [0; 8];
    let bytes = &mut bytes[..mark.bytes.len()];
    Ok(read(mark.at, bytes)? && bytes == mark.bytes)
}

/// Fills `bytes`; false where the file ends before.
fn read_at(file: &File, at: u64, bytes: &mut [u8]) -> io::Result<bool> {
    match file.read_exact_at(bytes, at) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn found(disk: &[u8]) -> Found {
        let read = |at: u64, bytes: &mut [u8]| {
            let start = usize::try_from(at).unwrap();
            let Some(part) = disk.get(start..start + bytes.len()) else { return Ok(false) };
            bytes.copy_from_slice(part);
            Ok(true)
        };
        look(read).unwrap()
    }

    fn disk(marks: &[(usize, &[u8])]) -> Vec<u8> {
        let mut disk = vec![0; 70_000];
        for (at, bytes) in marks {
            disk[*at..at + bytes.len()].copy_from_slice(bytes);
        }
        disk
    }

    #[test]
    fn file_systems_are_told_by_their_marks() {
        for (at, mark, kind) in [
            (1080, &[0x53, 0xef][..], Kind::Ext4),
            (0, &b"XFSB"[..], Kind::Xfs),
            (1024, &[0xe2, 0xe1, 0xf5, 0xe0][..], Kind::Erofs),
            (0, &b"hsqs"[..], Kind::Squashfs),
        ] {
            assert_eq!(found(&disk(&[(at, mark)])), Found::FileSystem(kind));
        }
        // A boot sector in front of a file system is no table of partitions.
        assert_eq!(found(&disk(&[(510, &[0x55, 0xaa]), (1080, &[0x53, 0xef])])), Found::FileSystem(Kind::Ext4));
    }

    #[test]
    fn what_is_no_root_is_named_with_a_remedy() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        for (content, words) in [
            (disk(&[(0, b"QFI\xfb")]), ["qcow2", "qemu-img"]),
            (disk(&[(512, b"EFI PART")]), ["partitions", "give one"]),
            (disk(&[(65_600, b"_BHRfS_M")]), ["btrfs", "ext4"]),
            (vec![0x1f, 0x8b], ["compressed", "unpack"]),
            (Vec::new(), ["no file system", "ext4"]),
        ] {
            std::fs::write(&path, content).unwrap();
            let error = Kind::of_disk(&path).unwrap_err().to_string();
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
        }
        let missing = Kind::of_disk(&dir.path().join("missing")).unwrap_err();
        assert!(matches!(missing, SuperblockError::Read { .. }), "{missing}");
    }

    proptest! {
        #[test]
        fn no_disk_makes_the_reader_panic(disk in proptest::collection::vec(any::<u8>(), 0..2000)) {
            let _ = found(&disk);
        }
    }
}
