//! A layer's way from its blob to its tar entries: read, decompressed, verified.
//!
//! ```text
//! reading thread:  blob ──▶ hash ──▶ decompress ──▶ │ chunks │ ──▶ hash ──▶ tar reader    calling thread
//!                                    ▲              │ empty  │       │
//!                                    └──────────────│ buffers│◀──────┘
//! ```
//!
//! Decompressing costs about as much as unpacking, so each has a thread. A blob is verified against
//! its descriptor's digest while it is read, and its content against the configuration's diff id while it
//! is unpacked. What was unpacked before the end is reached is not to be trusted, nor used.

use std::fs::File;
use std::io::{self, BufRead, Read};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, SyncSender};

use flate2::bufread::MultiGzDecoder;
use sha2::{Digest as _, Sha256};

use super::digest::Digest;
use super::tar::{Input, TarError};

/// Large enough that system calls and wake-ups do not count, small enough to stay in the cache.
const CHUNK_BYTES: usize = 256 << 10;
const CHUNKS_AHEAD: usize = 4;

/// Why a layer's blob cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The blob, or what it decompresses to, is not what its name says.
    #[error("{what}: expected {expected}, found {found}: the image is damaged, so copy or build it again")]
    Mismatch {
        /// What was hashed.
        what: &'static str,
        /// What it should be.
        expected: Digest,
        /// What it is.
        found: Digest,
    },
    /// A compression that images may not use.
    #[error("the layer is compressed with {0}, but only gzip and zstd are supported: build the image again")]
    Compression(&'static str),
    /// The compressed data ends early or is malformed.
    #[error("the {format} data is damaged or cut short ({source}), so copy or build the image again")]
    Decompress {
        /// The compression.
        format: &'static str,
        /// What the decompressor says.
        source: io::Error,
    },
    /// The blob cannot be read.
    #[error("reading the blob: {0}")]
    Read(#[source] io::Error),
}

/// A part of a file, such as a blob inside an archive.
#[derive(Clone, Debug)]
pub(super) struct Region {
    pub(super) file: Arc<File>,
    pub(super) offset: u64,
    pub(super) length: u64,
}

impl Region {
    /// Reads what `buffer` holds from `position` in the region on; less only at the region's end.
    fn read_at(&self, buffer: &mut [u8], position: u64) -> io::Result<usize> {
        let left = self.length.saturating_sub(position);
        let wanted = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let mut filled = 0;
        while filled < wanted {
            match self.file.read_at(&mut buffer[filled..wanted], self.offset + position + filled as u64) {
                Ok(0) => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file got shorter")),
                Ok(n) => filled += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(filled)
    }

    /// All of it.
    pub(super) fn read_all(&self) -> io::Result<Vec<u8>> {
        let mut all = vec![0; usize::try_from(self.length).map_err(io::Error::other)?];
        self.read_at(&mut all, 0)?;
        Ok(all)
    }
}

/// What a blob begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    Plain,
    Gzip,
    Zstd,
    Other(&'static str),
}

impl Format {
    pub(super) fn of(start: &[u8]) -> Self {
        match start {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd,
            // zstd's skippable frames, which may come first.
            [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Self::Zstd,
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Self::Other("xz"),
            [b'B', b'Z', b'h', b'1'..=b'9', ..] => Self::Other("bzip2"),
            [0x04, 0x22, 0x4d, 0x18, ..] => Self::Other("lz4"),
            _ => Self::Plain,
        }
    }
}

/// Runs `unpack` on the content of the blob in `region` and verifies all of it.
///
/// An error of the blob itself is returned in preference to the one that it made `unpack` meet. At most `budget` bytes
/// of content are let through; the one after is reported to `unpack` as a full disk.
pub(super) fn with_content<T, E>(
    region: &Region,
    blob: Option<Digest>,
    diff_id: Digest,
    budget: u64,
    unpack: impl FnOnce(Content) -> Result<(T, Content), E>,
) -> Result<T, E>
where
    E: From<StreamError> + From<TarError>,
{
    let (full_sender, full) = mpsc::sync_channel(CHUNKS_AHEAD);
    let (empty_sender, empty) = mpsc::sync_channel(CHUNKS_AHEAD + 2);
    let content = Content { full, empty: empty_sender, chunk: Vec::new(), position: 0, budget, hasher: Sha256::new() };
    let (produced, unpacked) = std::thread::scope(|scope| {
        let producer = scope.spawn(|| produce(region, blob, diff_id, Outlet { full: full_sender, empty }));
        let unpacked = unpack(content).and_then(|(value, mut content)| {
            let rest = content.skip(u64::MAX).map_err(TarError::Io)?;
            debug_assert_eq!(rest, 0, "the reader has seen the content to its end");
            Ok((value, Digest::finish(content.hasher)))
        });
        (producer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), unpacked)
    });
    let format = produced?;
    if unpacked.is_err() && format == Format::Plain {
        // Perhaps it is damaged, which is then the better thing to say.
        let mut source = Source { hasher: Some(Sha256::new()), ..Source::new(region) };
        let found = source.digest().map_err(StreamError::Read)?;
        if found != diff_id {
            let what = "the layer does not have its digest";
            return Err(StreamError::Mismatch { what, expected: diff_id, found }.into());
        }
    }
    let (value, found) = unpacked?;
    if found != diff_id {
        let what = "the layer's content does not have its diff id";
        return Err(StreamError::Mismatch { what, expected: diff_id, found }.into());
    }
    Ok(value)
}

/// The digest of what a blob decompresses to.
pub(super) fn content_digest(region: &Region) -> Result<Digest, StreamError> {
    let mut source = Source::new(region);
    let format = Format::of(source.fill_buf().map_err(StreamError::Read)?);
    let mut hasher = Sha256::new();
    let hashed = match format {
        Format::Plain => io::copy(&mut source, &mut Sink(&mut hasher)).map_err(StreamError::Read),
        Format::Gzip => io::copy(&mut MultiGzDecoder::new(&mut source), &mut Sink(&mut hasher))
            .map_err(|source| StreamError::Decompress { format: "gzip", source }),
        Format::Zstd => zstd::Decoder::with_buffer(&mut source)
            .and_then(|mut decoder| io::copy(&mut decoder, &mut Sink(&mut hasher)))
            .map_err(|source| StreamError::Decompress { format: "zstd", source }),
        Format::Other(name) => Err(StreamError::Compression(name)),
    };
    hashed.map(|_| Digest::finish(hasher))
}

struct Sink<'a>(&'a mut Sha256);

impl io::Write for Sink<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A layer's decompressed bytes.
pub(super) struct Content {
    full: Receiver<Vec<u8>>,
    empty: SyncSender<Vec<u8>>,
    chunk: Vec<u8>,
    position: usize,
    budget: u64,
    hasher: Sha256,
}

impl Input for Content {
    fn fill(&mut self) -> io::Result<&[u8]> {
        if self.position == self.chunk.len() {
            // Nobody takes it once the reading thread is done.
            let _ = self.empty.try_send(std::mem::take(&mut self.chunk));
            self.position = 0;
            if let Ok(chunk) = self.full.recv() {
                self.budget = self.budget.checked_sub(chunk.len() as u64).ok_or(io::ErrorKind::StorageFull)?;
                self.hasher.update(&chunk);
                self.chunk = chunk;
            }
        }
        Ok(&self.chunk[self.position..])
    }

    fn consume(&mut self, n: usize) {
        self.position += n;
    }
}

/// The reading thread's end of the chunks' round trip.
struct Outlet {
    full: SyncSender<Vec<u8>>,
    empty: Receiver<Vec<u8>>,
}

impl Outlet {
    /// Sends on what `read` puts into a buffer until that is nothing, or nobody wants more.
    fn pump(&self, mut read: impl FnMut(&mut [u8]) -> io::Result<usize>) -> io::Result<()> {
        loop {
            let mut chunk = self.empty.try_recv().unwrap_or_default();
            chunk.resize(CHUNK_BYTES, 0);
            let mut filled = 0;
            while filled < CHUNK_BYTES {
                match read(&mut chunk[filled..])? {
                    0 => break,
                    n => filled += n,
                }
            }
            chunk.truncate(filled);
            if filled == 0 || self.full.send(chunk).is_err() {
                return Ok(());
            }
        }
    }
}

fn produce(region: &Region, blob: Option<Digest>, diff_id: Digest, outlet: Outlet) -> Result<Format, StreamError> {
    let mut source = Source::new(region);
    let format = Format::of(source.fill_buf().map_err(StreamError::Read)?);
    if format == Format::Plain {
        // Not compressed, so the content's hash is the blob's, and that is the other thread's work.
        if let Some(expected) = blob.filter(|blob| *blob != diff_id) {
            let what = "the layer is not compressed, but its digest is not its diff id";
            return Err(StreamError::Mismatch { what, expected, found: diff_id });
        }
        let mut position = 0;
        let read = |buffer: &mut [u8]| {
            let n = region.read_at(buffer, position)?;
            position += n as u64;
            Ok(n)
        };
        return outlet.pump(read).map_err(StreamError::Read).map(|()| format);
    }
    let mut hasher = Sha256::new();
    hasher.update(source.fill_buf().map_err(StreamError::Read)?);
    source.hasher = blob.map(|_| hasher);
    let pumped = match format {
        Format::Gzip => {
            let mut decoder = MultiGzDecoder::new(&mut source);
            let pumped = outlet.pump(|buffer| decoder.read(buffer));
            pumped.map_err(|source| StreamError::Decompress { format: "gzip", source })
        }
        Format::Zstd => zstd::Decoder::with_buffer(&mut source)
            .and_then(|mut decoder| outlet.pump(|buffer| decoder.read(buffer)))
            .map_err(|source| StreamError::Decompress { format: "zstd", source }),
        Format::Other(name) => Err(StreamError::Compression(name)),
        Format::Plain => unreachable!("handled above"),
    };
    // Whoever unpacks need not wait until the digest of a broken blob is known.
    drop(outlet);
    if let Some(expected) = blob {
        let found = source.digest().map_err(StreamError::Read)?;
        if found != expected {
            let what = "the layer's blob does not have its digest";
            return Err(StreamError::Mismatch { what, expected, found });
        }
    }
    pumped.map(|()| format)
}

/// A blob as a decompressor reads it: hashed as it goes by.
struct Source<'a> {
    region: &'a Region,
    position: u64,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    hasher: Option<Sha256>,
}

impl<'a> Source<'a> {
    fn new(region: &'a Region) -> Self {
        Self { region, position: 0, buffer: vec![0; CHUNK_BYTES], start: 0, end: 0, hasher: None }
    }

    /// The digest of the whole blob; reads what no decompressor wanted.
    fn digest(&mut self) -> io::Result<Digest> {
        while !self.fill_buf()?.is_empty() {
            self.start = self.end;
        }
        Ok(Digest::finish(self.hasher.take().unwrap_or_default()))
    }
}

impl BufRead for Source<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.start == self.end {
            (self.start, self.end) = (0, self.region.read_at(&mut self.buffer, self.position)?);
            self.position += self.end as u64;
            if let Some(hasher) = &mut self.hasher {
                hasher.update(&self.buffer[..self.end]);
            }
        }
        Ok(&self.buffer[self.start..self.end])
    }

    fn consume(&mut self, n: usize) {
        self.start += n;
    }
}

impl Read for Source<'_> {
    fn read(&mut self, target: &mut [u8]) -> io::Result<usize> {
        let piece = self.fill_buf()?;
        let n = piece.len().min(target.len());
        target[..n].copy_from_slice(&piece[..n]);
        self.consume(n);
        Ok(n)
    }
}

/// Reads a region as a tar archive, passing over file data without reading it.
pub(super) struct Seeking {
    region: Region,
    position: u64,
    buffer: Vec<u8>,
    start: usize,
}

/// A header, a long name, and the header after: most of what is read is not passed over.
const HEADERS_BYTES: usize = 4096;

impl Seeking {
    pub(super) fn new(region: Region) -> Self {
        Self { region, position: 0, buffer: Vec::new(), start: 0 }
    }
}

impl Input for Seeking {
    fn fill(&mut self) -> io::Result<&[u8]> {
        if self.start == self.buffer.len() {
            self.start = 0;
            self.buffer.resize(HEADERS_BYTES, 0);
            let n = self.region.read_at(&mut self.buffer, self.position);
            self.buffer.truncate(*n.as_ref().unwrap_or(&0));
            self.position += n? as u64;
        }
        Ok(&self.buffer[self.start..])
    }

    fn consume(&mut self, n: usize) {
        self.start += n;
    }

    fn skip(&mut self, n: u64) -> io::Result<u64> {
        let buffered = (self.buffer.len() - self.start) as u64;
        if n <= buffered {
            self.start += n as usize;
            return Ok(n);
        }
        let beyond = (n - buffered).min(self.region.length - self.position);
        self.position += beyond;
        self.start = self.buffer.len();
        Ok(buffered + beyond)
    }
}
