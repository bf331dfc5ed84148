//! A tar reader for hostile archives.
//!
//! It differs from a general one in what it refuses: every piece of metadata has a cap, so no archive
//! can make it hold more than about a mebibyte; and in what it hands out: file data is lent straight out of the
//! caller's buffer, never copied. It reads ustar, GNU and pax archives with long names, large numbers,
//! extended attributes and sparse files. Where implementations differ it does as Go's `archive/tar`
//! does, since that is what nearly all images are made and read with: global pax headers set
//! nothing, and links, devices and directories carry no data whatever their size field says.

mod header;
mod pax;
mod sparse;

use std::io;

use header::{BLOCK, Header};
use pax::Pax;
pub(super) use sparse::Segment;

/// Longest path the kernel takes, without its terminating NUL.
pub(super) const PATH_MAX: usize = 4095;
/// A GNU long name or link: a path, its NUL, and slack for writers that pad to a block.
const LONG_NAME_CAP: u64 = 8192;
/// One pax header. An extended attribute is at most 64 KiB, and a file seldom has more than two.
const PAX_CAP: u64 = 1 << 20;
/// What may follow the end marker: padding to the record size, which no writer makes larger.
const TRAILER_CAP: u64 = 16 << 20;

/// Why an archive cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum TarError {
    /// The archive ends in the middle of an entry.
    #[error("the archive ends in the middle of an entry: it was cut short, so copy or build it again")]
    Truncated,
    /// A block that should be a header is none.
    #[error("no tar header at byte {0}: the archive is damaged or is not a tar archive")]
    Header(u64),
    /// A number in a header is malformed or out of range.
    #[error("bad {0} in a tar header: the archive is damaged")]
    Number(&'static str),
    /// A pax header is malformed.
    #[error("bad pax header: the archive is damaged")]
    Pax,
    /// The map of a sparse file contradicts itself.
    #[error("bad sparse map of `{0}`: the archive is damaged")]
    Sparse(String),
    /// A name or header is larger than any honest one.
    #[error("a {what} of {size} bytes, above the limit of {cap}: the archive is damaged or hostile")]
    TooLong {
        /// What is too long.
        what: &'static str,
        /// Its length.
        size: u64,
        /// The limit.
        cap: u64,
    },
    /// An entry of a type that images do not use.
    #[error("entry `{name}` has type `{kind}`, which images do not use: build the image again")]
    Kind {
        /// The entry.
        name: String,
        /// Its type flag.
        kind: char,
    },
    /// Data after the archive's end marker.
    #[error("more than {TRAILER_CAP} bytes follow the end of the archive: it is damaged or hostile")]
    Trailer,
    /// The input failed.
    #[error("reading the archive: {0}")]
    Io(#[from] io::Error),
}

/// Buffered input whose buffer is lent out.
pub(super) trait Input {
    /// The bytes at hand, more being fetched if there are none; empty at the end.
    fn fill(&mut self) -> io::Result<&[u8]>;
    /// Marks `n` of the bytes last lent as read.
    fn consume(&mut self, n: usize);
    /// Passes over up to `n` bytes and says how many there were.
    fn skip(&mut self, n: u64) -> io::Result<u64> {
        let mut left = n;
        while left > 0 {
            let step = self.fill()?.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            if step == 0 {
                break;
            }
            self.consume(step);
            left -= step as u64;
        }
        Ok(n - left)
    }
}

impl Input for &[u8] {
    fn fill(&mut self) -> io::Result<&[u8]> {
        Ok(self)
    }

    fn consume(&mut self, n: usize) {
        *self = &self[n..];
    }
}

/// A point in time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Time {
    pub(super) seconds: i64,
    pub(super) nanoseconds: u32,
}

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Regular,
    HardLink,
    Symlink,
    CharacterDevice,
    BlockDevice,
    Directory,
    Fifo,
}

/// One entry's metadata, names unchecked and as the archive has them.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) name: Vec<u8>,
    pub(super) link: Vec<u8>,
    pub(super) kind: Kind,
    /// The twelve permission bits.
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: Time,
    pub(super) device: (u32, u32),
    /// The file's length, holes included.
    pub(super) size: u64,
    /// Where the data lies in the file, if not all of it in one piece.
    pub(super) sparse: Option<Vec<Segment>>,
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Reads an archive, entry by entry.
pub(super) struct Reader<I> {
    input: I,
    position: u64,
    /// Unread data of the current entry, and the padding behind it.
    data: u64,
    padding: u64,
    ended: bool,
}

impl<I: Input> Reader<I> {
    pub(super) fn new(input: I) -> Self {
        Self { input, position: 0, data: 0, padding: 0, ended: false }
    }

    /// The next entry; its data may be read until the one after is asked for.
    pub(super) fn next(&mut self) -> Result<Option<Entry>, TarError> {
        self.skip_rest()?;
        let mut block = [0; BLOCK];
        let (mut long_name, mut long_link, mut pax) = (None, None, Pax::default());
        while !self.ended && self.read_header(&mut block)? {
            let header = Header::new(&block).ok_or(TarError::Header(self.position - BLOCK as u64))?;
            let size = header.size()?;
            match header.type_flag() {
                b'L' => long_name = Some(self.read_text(size, "file name")?),
                b'K' => long_link = Some(self.read_text(size, "link target")?),
                b'x' => pax = Pax::parse(&self.read_small(size, "pax header", PAX_CAP)?)?,
                b'g' => drop(self.read_small(size, "pax header", PAX_CAP)?),
                _ => return self.entry(header, long_name, long_link, pax).map(Some),
            }
        }
        if long_name.is_some() || long_link.is_some() || pax != Pax::default() {
            return Err(TarError::Truncated);
        }
        Ok(None)
    }

    /// The next piece of the current entry's data; empty once all of it was consumed.
    pub(super) fn data(&mut self) -> Result<&[u8], TarError> {
        if self.data == 0 {
            return Ok(&[]);
        }
        let piece = self.input.fill()?;
        if piece.is_empty() {
            return Err(TarError::Truncated);
        }
        let usable = piece.len().min(usize::try_from(self.data).unwrap_or(usize::MAX));
        Ok(&piece[..usable])
    }

    /// Marks `n` bytes of the last piece as read.
    pub(super) fn consume(&mut self, n: usize) {
        self.input.consume(n);
        self.position += n as u64;
        self.data -= n as u64;
    }

    /// Where the current entry's unread data begins in the archive.
    pub(super) fn position(&self) -> u64 {
        self.position
    }

    /// Reads what follows the last entry, so that the input has been seen to its end.
    pub(super) fn finish(mut self) -> Result<I, TarError> {
        self.skip_rest()?;
        if self.input.skip(TRAILER_CAP)? == TRAILER_CAP && !self.input.fill()?.is_empty() {
            return Err(TarError::Trailer);
        }
        Ok(self.input)
    }

    fn entry(
        &mut self,
        header: Header<'_>,
        long_name: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
        mut pax: Pax,
    ) -> Result<Entry, TarError> {
        let name = pax.path.take().or(long_name).unwrap_or_else(|| header.name());
        let link = pax.link.take().or(long_link).unwrap_or_else(|| header.link());
        for (what, text) in [("file name", &name), ("link target", &link)] {
            if text.len() > PATH_MAX {
                return Err(TarError::TooLong { what, size: text.len() as u64, cap: PATH_MAX as u64 });
            }
        }
        let flag = header.type_flag();
        let kind = match flag {
            b'0' | 0 | b'7' | b'S' if name.ends_with(b"/") => Kind::Directory,
            b'0' | 0 | b'7' | b'S' => Kind::Regular,
            b'1' => Kind::HardLink,
            b'2' => Kind::Symlink,
            b'3' => Kind::CharacterDevice,
            b'4' => Kind::BlockDevice,
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            other => return Err(TarError::Kind { name: printable(&name), kind: char::from(other) }),
        };
        let stored = if kind == Kind::Regular { pax.size.map_or_else(|| header.size(), Ok)? } else { 0 };
        self.data = stored;
        self.padding = stored.wrapping_neg() % BLOCK as u64;
        if stored > i64::MAX.unsigned_abs() {
            return Err(TarError::Number("size"));
        }
        let map = match kind {
            Kind::Regular if flag == b'S' => Some(self.old_sparse_map(header, stored, &name)?),
            Kind::Regular => self.pax_sparse_map(&mut pax, &name)?,
            _ => None,
        };
        let (size, sparse) = map.map_or((stored, None), |(size, map)| (size, Some(map)));
        Ok(Entry {
            kind,
            mode: header.mode()?,
            uid: pax.uid.map_or_else(|| header.uid(), Ok)?,
            gid: pax.gid.map_or_else(|| header.gid(), Ok)?,
            mtime: pax.mtime.map_or_else(|| header.mtime(), Ok)?,
            device: match kind {
                Kind::CharacterDevice | Kind::BlockDevice => header.device()?,
                _ => (0, 0),
            },
            size,
            sparse,
            xattrs: pax.xattrs,
            name: pax.sparse.name.take().unwrap_or(name),
            link,
        })
    }

    fn skip_rest(&mut self) -> Result<(), TarError> {
        let rest = self.data + self.padding;
        if rest > 0 {
            // Padding that is missing at the very end hurts nobody.
            let skipped = self.input.skip(rest)?;
            if skipped < self.data {
                return Err(TarError::Truncated);
            }
            self.position += skipped;
            (self.data, self.padding) = (0, 0);
        }
        Ok(())
    }

    /// Reads a block; false at the end of the archive, which is a zero block or the end of the input.
    fn read_header(&mut self, block: &mut [u8; BLOCK]) -> Result<bool, TarError> {
        let more = self.read_block(block)?;
        self.ended = !more || block.iter().all(|byte| *byte == 0);
        Ok(!self.ended)
    }

    /// Reads a whole block, or nothing at the end of the input.
    fn read_block(&mut self, block: &mut [u8; BLOCK]) -> Result<bool, TarError> {
        let mut filled = 0;
        while filled < BLOCK {
            let piece = self.input.fill()?;
            let step = piece.len().min(BLOCK - filled);
            match step {
                0 if filled == 0 => return Ok(false),
                0 => return Err(TarError::Truncated),
                _ => block[filled..filled + step].copy_from_slice(&piece[..step]),
            }
            self.input.consume(step);
            filled += step;
        }
        self.position += BLOCK as u64;
        Ok(true)
    }

    /// Reads the data of a metadata entry and its padding.
    fn read_small(&mut self, size: u64, what: &'static str, cap: u64) -> Result<Vec<u8>, TarError> {
        if size > cap {
            return Err(TarError::TooLong { what, size, cap });
        }
        (self.data, self.padding) = (size, size.wrapping_neg() % BLOCK as u64);
        let mut all = Vec::with_capacity(size as usize);
        loop {
            let piece = self.data()?;
            if piece.is_empty() {
                break;
            }
            let step = piece.len();
            all.extend_from_slice(piece);
            self.consume(step);
        }
        self.skip_rest()?;
        Ok(all)
    }

    fn read_text(&mut self, size: u64, what: &'static str) -> Result<Vec<u8>, TarError> {
        let mut text = self.read_small(size, what, LONG_NAME_CAP)?;
        text.truncate(text.iter().position(|byte| *byte == 0).unwrap_or(text.len()));
        Ok(text)
    }
}

/// A name as it may be shown on a terminal.
pub(super) fn printable(name: &[u8]) -> String {
    const SHOWN: usize = 200;
    match std::str::from_utf8(name) {
        Ok(text) if !text.chars().any(char::is_control) && name.len() <= SHOWN => text.to_owned(),
        _ if name.len() > SHOWN => format!("{}...", name[..SHOWN].escape_ascii()),
        _ => name.escape_ascii().to_string(),
    }
}

#[cfg(test)]
mod tests;
