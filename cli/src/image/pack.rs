//! A layer's way back from its directory to a tar archive.
//!
//! The archive depends on nothing but the layer: names are in order, and what is not part of an image is left out. What overlayfs
//! needs becomes again what archives have: a character device 0:0 is `.wh.NAME`, the attribute of an opaque directory
//! `.wh..wh..opq`. Names, links and numbers that do not fit an old header are in a pax header.
//!
//! The layer is a stranger's, so nothing in it is followed, and no path resolved against the host.

use std::collections::HashMap;
use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Dir, FileType, Mode, OFlags, ResolveFlags, Stat, openat2};
use rustix::io::Errno;

use super::unpack::{is_wanted_attribute, opaque};

const BLOCK: usize = 512;
/// What an old header has room for.
const NAME_MAX: usize = 100;
const OCTAL_7_MAX: u64 = 0o7_777_777;
const OCTAL_11_MAX: u64 = 0o77_777_777_777;
const NEVER_WAIT: OFlags =
    OFlags::RDONLY.union(OFlags::NOFOLLOW).union(OFlags::NONBLOCK).union(OFlags::CLOEXEC).union(OFlags::NOCTTY);

/// Why a layer cannot be packed.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// The layer cannot be read.
    #[error("cannot read `{path}` of the layer: {source}")]
    Layer {
        /// In the layer.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// The archive cannot be written.
    #[error(transparent)]
    Write(io::Error),
}

/// Writes a layer as a tar archive.
pub(super) fn pack(layer: &OwnedFd, out: &mut impl Write) -> Result<(), PackError> {
    let mut packer = Packer { layer, out, links: HashMap::new(), buffer: vec![0; 256 << 10] };
    // Those that are still to be packed, the next one last.
    let mut left = vec![Vec::new()];
    while let Some(path) = left.pop() {
        let below = packer.directory(&path)?;
        left.extend(below.into_iter().rev());
    }
    packer.out.write_all(&[0; 2 * BLOCK]).map_err(PackError::Write)
}

struct Packer<'a, W> {
    layer: &'a OwnedFd,
    out: &'a mut W,
    /// The first name of each file that has several.
    links: HashMap<(u64, u64), Vec<u8>>,
    buffer: Vec<u8>,
}

/// An extended attribute's name and value.
type Attribute = (Vec<u8>, Vec<u8>);

/// One entry's header fields.
struct Head<'a> {
    kind: u8,
    name: &'a [u8],
    link: &'a [u8],
    size: u64,
    stat: &'a Stat,
    attributes: Vec<Attribute>,
}

impl<W: Write> Packer<'_, W> {
    /// Packs a directory and all in it that is none, and gives the directories in it.
    fn directory(&mut self, path: &[u8]) -> Result<Vec<Vec<u8>>, PackError> {
        let at = failed(path);
        let directory = self.open(path, OFlags::DIRECTORY).map_err(&at)?;
        let stat = rustix::fs::fstat(&directory).map_err(&at)?;
        let name = if path.is_empty() { b"./".to_vec() } else { [path, b"/"].concat() };
        let attributes = attributes(&directory).map_err(&at)?;
        self.head(Head { kind: b'5', name: &name, link: b"", size: 0, stat: &stat, attributes })?;
        if opaque(&directory) {
            self.marker(&join(path, b".wh..wh..opq"))?;
        }
        let mut names = Vec::new();
        for entry in Dir::read_from(&directory).map_err(&at)? {
            let entry = entry.map_err(&at)?;
            if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
                names.push(entry.file_name().to_owned());
            }
        }
        names.sort();
        let mut below = Vec::new();
        for name in names {
            let path = join(path, name.to_bytes());
            if self.entry(&directory, &name, &path)? {
                below.push(path);
            }
        }
        Ok(below)
    }

    /// Packs what is no directory; says whether it is one.
    fn entry(&mut self, directory: &OwnedFd, name: &CStr, path: &[u8]) -> Result<bool, PackError> {
        let at = failed(path);
        let stat = rustix::fs::statat(directory, name, rustix::fs::AtFlags::SYMLINK_NOFOLLOW).map_err(&at)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        if kind == FileType::Directory {
            return Ok(true);
        }
        if kind == FileType::CharacterDevice && stat.st_rdev == 0 {
            let (front, last) = path.split_at(path.len() - name.to_bytes().len());
            self.marker(&[front, b".wh.", last].concat())?;
            return Ok(false);
        }
        let mut head = Head { kind: b'0', name: path, link: b"", size: 0, stat: &stat, attributes: Vec::new() };
        if stat.st_nlink > 1 {
            if let Some(first) = self.links.get(&(stat.st_dev, stat.st_ino)) {
                let first = first.clone();
                self.head(Head { kind: b'1', link: &first, ..head })?;
                return Ok(false);
            }
            self.links.insert((stat.st_dev, stat.st_ino), path.to_vec());
        }
        let target;
        match kind {
            FileType::RegularFile => {
                let file = rustix::fs::openat(directory, name, NEVER_WAIT, Mode::empty()).map_err(&at)?;
                head.attributes = attributes(&file).map_err(&at)?;
                head.size = u64::try_from(stat.st_size).unwrap_or(0);
                let size = head.size;
                self.head(head)?;
                self.content(file.into(), size, path)?;
                return Ok(false);
            }
            FileType::Symlink => {
                target = rustix::fs::readlinkat(directory, name, Vec::new()).map_err(&at)?.into_bytes();
                (head.kind, head.link) = (b'2', &target);
            }
            FileType::CharacterDevice => head.kind = b'3',
            FileType::BlockDevice => head.kind = b'4',
            FileType::Fifo => head.kind = b'6',
            // Archives have no sockets.
            _ => return Ok(false),
        }
        self.head(head)?;
        Ok(false)
    }

    /// An empty file by whose name an archive says that something is hidden. When that was unpacked is not the image's.
    fn marker(&mut self, name: &[u8]) -> Result<(), PackError> {
        let mut pax = Vec::new();
        if name.len() > NAME_MAX {
            record(&mut pax, b"path", name);
        }
        self.pax(&pax)?;
        self.out.write_all(&header(b'0', name, b"", 0, |_| {})).map_err(PackError::Write)
    }

    /// What did not fit the header that follows, if anything.
    fn pax(&mut self, records: &[u8]) -> Result<(), PackError> {
        if records.is_empty() {
            return Ok(());
        }
        let extra = header(b'x', b"pax", b"", records.len() as u64, |_| {});
        self.out.write_all(&extra).and_then(|()| self.out.write_all(records)).map_err(PackError::Write)?;
        self.pad(records.len() as u64)
    }

    fn head(&mut self, head: Head<'_>) -> Result<(), PackError> {
        let stat = head.stat;
        let (uid, gid) = (u64::from(stat.st_uid), u64::from(stat.st_gid));
        let mut pax = Vec::new();
        let mut number = |key: &str, value: u64, max: u64| {
            if value > max {
                record(&mut pax, key.as_bytes(), value.to_string().as_bytes());
            }
            value.min(max)
        };
        let (uid, gid) = (number("uid", uid, OCTAL_7_MAX), number("gid", gid, OCTAL_7_MAX));
        let size = number("size", head.size, OCTAL_11_MAX);
        let seconds = u64::try_from(stat.st_mtime).ok().filter(|seconds| *seconds <= OCTAL_11_MAX);
        if seconds.is_none() || stat.st_mtime_nsec != 0 {
            record(&mut pax, b"mtime", time(stat).as_bytes());
        }
        for (key, value) in [("path", head.name), ("linkpath", head.link)] {
            if value.len() > NAME_MAX {
                record(&mut pax, key.as_bytes(), value);
            }
        }
        for (name, value) in &head.attributes {
            record(&mut pax, &[b"SCHILY.xattr.", name.as_slice()].concat(), value);
        }
        self.pax(&pax)?;
        let block = header(head.kind, head.name, head.link, size, |header| {
            header.set_mode(stat.st_mode & 0o7777);
            header.set_uid(uid);
            header.set_gid(gid);
            header.set_mtime(seconds.unwrap_or(0));
            if matches!(head.kind, b'3' | b'4') {
                // A ustar header takes both.
                let _ = header.set_device_major(rustix::fs::major(stat.st_rdev));
                let _ = header.set_device_minor(rustix::fs::minor(stat.st_rdev));
            }
        });
        self.out.write_all(&block).map_err(PackError::Write)
    }

    fn content(&mut self, mut file: File, size: u64, path: &[u8]) -> Result<(), PackError> {
        let mut left = size;
        while left > 0 {
            let wanted = self.buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            let n = match file.read(&mut self.buffer[..wanted]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
                other => other,
            };
            let n = n.map_err(|source| PackError::Layer { path: printable(path), source })?;
            self.out.write_all(&self.buffer[..n]).map_err(PackError::Write)?;
            left -= n as u64;
        }
        self.pad(size)
    }

    fn pad(&mut self, size: u64) -> Result<(), PackError> {
        self.out.write_all(&[0; BLOCK][..padding(size)]).map_err(PackError::Write)
    }

    fn open(&self, path: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        let path = if path.is_empty() { b"." } else { path };
        loop {
            match openat2(self.layer, path, NEVER_WAIT | flags, Mode::empty(), resolve) {
                Err(Errno::AGAIN | Errno::INTR) => {}
                other => return other,
            }
        }
    }
}

/// An old header; a name that is too long is cut, as a pax header has all of it.
pub(super) fn header(kind: u8, name: &[u8], link: &[u8], size: u64, set: impl FnOnce(&mut tar::Header)) -> [u8; BLOCK] {
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(tar::EntryType::new(kind));
    header.set_size(size);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    let old = header.as_old_mut();
    let copy = |field: &mut [u8; NAME_MAX], text: &[u8]| {
        let length = text.len().min(NAME_MAX);
        field[..length].copy_from_slice(&text[..length]);
    };
    copy(&mut old.name, name);
    copy(&mut old.linkname, link);
    set(&mut header);
    header.set_cksum();
    *header.as_bytes()
}

/// What follows so many bytes up to a whole block.
pub(super) fn padding(size: u64) -> usize {
    (size.next_multiple_of(BLOCK as u64) - size) as usize
}

/// A pax record, whose length counts its own digits.
fn record(pax: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while rest + length.to_string().len() != length {
        length = rest + length.to_string().len();
    }
    pax.extend(format!("{length} ").into_bytes());
    pax.extend([key, b"=", value, b"\n"].concat());
}

/// A time as pax has it: a decimal fraction, also of times before 1970.
fn time(stat: &Stat) -> String {
    let (seconds, nanoseconds) = (i128::from(stat.st_mtime), i128::from(stat.st_mtime_nsec));
    let all = seconds * 1_000_000_000 + nanoseconds;
    let sign = if all < 0 { "-" } else { "" };
    format!("{sign}{}.{:09}", all.abs() / 1_000_000_000, all.abs() % 1_000_000_000)
}

/// The extended attributes that an image may have, in order.
fn attributes(file: impl AsFd) -> Result<Vec<Attribute>, Errno> {
    let file = file.as_fd();
    let grown = |read: &dyn Fn(&mut [u8]) -> Result<usize, Errno>| {
        let mut buffer = vec![0; 4096];
        loop {
            match read(&mut buffer) {
                Ok(n) => {
                    buffer.truncate(n);
                    return Ok(buffer);
                }
                // Linux has no attribute, and no list of them, above 64 KiB.
                Err(Errno::RANGE) if buffer.len() < 65_536 => buffer.resize(65_536, 0),
                Err(error) => return Err(error),
            }
        }
    };
    let list = match grown(&|buffer| rustix::fs::flistxattr(file, buffer)) {
        Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
        other => other?,
    };
    let mut names: Vec<&[u8]> = list.split(|byte| *byte == 0).filter(|name| is_wanted_attribute(name)).collect();
    names.sort_unstable();
    let mut all = Vec::new();
    for name in names {
        let value = grown(&|buffer| rustix::fs::fgetxattr(file, name, buffer))?;
        all.push((name.to_vec(), value));
    }
    Ok(all)
}

fn join(directory: &[u8], name: &[u8]) -> Vec<u8> {
    if directory.is_empty() { name.to_vec() } else { [directory, b"/", name].concat() }
}

fn failed(path: &[u8]) -> impl Fn(Errno) -> PackError {
    let path = printable(path);
    move |error| PackError::Layer { path: path.clone(), source: error.into() }
}

fn printable(path: &[u8]) -> String {
    path.escape_ascii().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_records_length_counts_itself() {
        for length in 80..120 {
            let mut pax = Vec::new();
            record(&mut pax, b"path", &vec![b'x'; length]);
            let said: usize = String::from_utf8_lossy(&pax).split(' ').next().unwrap().parse().unwrap();
            assert_eq!(said, pax.len());
        }
    }

    #[test]
    fn padding_ends_blocks() {
        assert_eq!([0, 1, 511, 512, 513].map(padding), [0, 511, 1, 0, 511]);
    }
}
