//! What a request asks for (virtio 1.3, section 5.2.6): taken from its chain and judged, with nothing done yet.

use vm_memory::ByteValued;

use super::super::queue::Chain;

/// Bytes of a sector, the unit of the protocol whatever the block size.
pub(super) const SECTOR_BYTES: u64 = 512;
/// Length of the answer to `VIRTIO_BLK_T_GET_ID`.
pub(super) const ID_BYTES: usize = 20;
/// Most ranges of one discard or write-zeroes request, announced as `max_discard_seg` and `max_write_zeroes_seg`:
/// enough for a file system's trim batches, little enough that a request stays short.
pub(super) const MAX_RANGES: u32 = 32;
/// Most sectors of one discarded range (1 GiB): a request holds up those behind it.
pub(super) const MAX_DISCARD_SECTORS: u32 = (1 << 30) / 512;
/// Most sectors of one zeroed range (64 MiB): where the host cannot zero, that much is written.
pub(super) const MAX_ZEROES_SECTORS: u32 = (64 << 20) / 512;

const HEADER_BYTES: usize = size_of::<Header>();

const VIRTIO_BLK_T_IN: u32 = 0;
const VIRTIO_BLK_T_OUT: u32 = 1;
const VIRTIO_BLK_T_FLUSH: u32 = 4;
const VIRTIO_BLK_T_GET_ID: u32 = 8;
const VIRTIO_BLK_T_DISCARD: u32 = 11;
const VIRTIO_BLK_T_WRITE_ZEROES: u32 = 13;

const VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP: u32 = 1;

/// The last byte of every answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// What a request may touch.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) capacity_sectors: u64,
    /// Transfers come in whole blocks of this many sectors.
    pub(super) block_sectors: u64,
    pub(super) read_only: bool,
}

/// A request that keeps within its [`Limits`].
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// To the first `len` bytes of the writable part.
    Read {
        offset: u64,
        len: usize,
    },
    /// From the `len` bytes of the readable part at [`Request::WRITE_DATA`].
    Write {
        offset: u64,
        len: usize,
    },
    Flush,
    GetId,
    Discard(Vec<Range>),
    WriteZeroes(Vec<Range>),
}

/// Bytes of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) offset: u64,
    pub(super) len: u64,
    /// The space may be given back to the host.
    pub(super) unmap: bool,
}

#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Header {
    kind: u32,
    reserved: u32,
    sector: u64,
}

// SAFETY: integers without padding.
unsafe impl ByteValued for Header {}

#[derive(Clone, Copy, Default)]
#[repr(C)]
struct WireRange {
    sector: u64,
    sectors: u32,
    flags: u32,
}

// SAFETY: integers without padding.
unsafe impl ByteValued for WireRange {}

impl Request {
    /// Where the data of a write begins in the readable part.
    pub(super) const WRITE_DATA: usize = HEADER_BYTES;

    /// Reads and judges the request in `chain`, which has room for a status.
    ///
    /// # Errors
    ///
    /// The status to answer with.
    pub(super) fn parse(chain: &Chain, limits: &Limits) -> Result<Self, Status> {
        let header: Header = chain.read_obj(0).ok_or(Status::IoError)?;
        let data_in = chain.readable_len() - HEADER_BYTES;
        let data_out = chain.writable_len().checked_sub(1).ok_or(Status::IoError)?;
        match header.kind {
            VIRTIO_BLK_T_IN => Ok(Self::Read { offset: limits.transfer(header.sector, data_out)?, len: data_out }),
            VIRTIO_BLK_T_OUT => {
                limits.writable()?;
                Ok(Self::Write { offset: limits.transfer(header.sector, data_in)?, len: data_in })
            }
            VIRTIO_BLK_T_FLUSH => Ok(Self::Flush),
            VIRTIO_BLK_T_GET_ID => Ok(Self::GetId),
            VIRTIO_BLK_T_DISCARD => Ok(Self::Discard(limits.ranges(chain, data_in, MAX_DISCARD_SECTORS, 0)?)),
            VIRTIO_BLK_T_WRITE_ZEROES => Ok(Self::WriteZeroes(limits.ranges(
                chain,
                data_in,
                MAX_ZEROES_SECTORS,
                VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
            )?)),
            _ => Err(Status::Unsupported),
        }
    }

    /// The memory that a transfer is to or from; good as long as the chain lives.
    pub(super) fn iovecs(&self, chain: &Chain) -> Vec<libc::iovec> {
        match *self {
            Self::Read { len, .. } => chain.writable_iovecs(0, len),
            Self::Write { len, .. } => chain.readable_iovecs(Self::WRITE_DATA, len),
            _ => Vec::new(),
        }
    }
}

impl Limits {
    fn writable(&self) -> Result<(), Status> {
        if self.read_only { Err(Status::IoError) } else { Ok(()) }
    }

    /// The byte offset of a transfer of `len` bytes at `sector`.
    fn transfer(&self, sector: u64, len: usize) -> Result<u64, Status> {
        let len = len as u64;
        if !len.is_multiple_of(SECTOR_BYTES * self.block_sectors) || !sector.is_multiple_of(self.block_sectors) {
            return Err(Status::IoError);
        }
        self.within(sector, len / SECTOR_BYTES)
    }

    /// The byte offset of `sector`, if it and `sectors` from there on exist.
    fn within(&self, sector: u64, sectors: u64) -> Result<u64, Status> {
        let end = sector.checked_add(sectors).ok_or(Status::IoError)?;
        if end > self.capacity_sectors { Err(Status::IoError) } else { Ok(sector * SECTOR_BYTES) }
    }

    /// The ranges of a discard or write-zeroes request; all are checked before any is touched.
    fn ranges(&self, chain: &Chain, bytes: usize, max_sectors: u32, flags: u32) -> Result<Vec<Range>, Status> {
        self.writable()?;
        let count = bytes / size_of::<WireRange>();
        if count == 0 || count > MAX_RANGES as usize || !bytes.is_multiple_of(size_of::<WireRange>()) {
            return Err(Status::IoError);
        }
        (0..count)
            .map(|i| {
                let at = HEADER_BYTES + i * size_of::<WireRange>();
                let range: WireRange = chain.read_obj(at).ok_or(Status::IoError)?;
                // Section 5.2.6.2: unknown flags, and unmap in a discard, are answered with "unsupported".
                if range.flags & !flags != 0 {
                    return Err(Status::Unsupported);
                }
                if range.sectors > max_sectors {
                    return Err(Status::IoError);
                }
                let offset = self.within(range.sector, u64::from(range.sectors))?;
                Ok(Range { offset, len: u64::from(range.sectors) * SECTOR_BYTES, unmap: range.flags != 0 })
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    use super::super::super::testing::{DriverQueue, FakeInterrupt, memory};
    use super::*;

    const LIMITS: Limits = Limits { capacity_sectors: 100, block_sectors: 1, read_only: false };

    fn parse(readable: &[u8], writable: u32, limits: Limits) -> Result<Request, Status> {
        let memory = memory(0x10_0000);
        let mut driver = DriverQueue::new(&memory, 0, 16);
        memory.write_slice(readable, GuestAddress(0x2_0000)).unwrap();
        let mut segments = vec![(0x2_0000, u32::try_from(readable.len()).unwrap(), false)];
        if writable > 0 {
            segments.push((0x8_0000, writable, true));
        }
        driver.add(&segments);
        let chain = driver.device_end(0, Arc::new(FakeInterrupt::default())).pop().unwrap();
        Request::parse(&chain, &limits)
    }

    fn header(kind: u32, sector: u64) -> Vec<u8> {
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend([0; 4]);
        bytes.extend(sector.to_le_bytes());
        bytes
    }

    fn ranges(kind: u32, list: &[(u64, u32, u32)]) -> Vec<u8> {
        let mut bytes = header(kind, 0);
        for &(sector, sectors, flags) in list {
            bytes.extend(sector.to_le_bytes());
            bytes.extend(sectors.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
        }
        bytes
    }

    #[test]
    fn transfers_within_the_disk_pass() {
        assert_eq!(
            parse(&header(VIRTIO_BLK_T_IN, 98), 1025, LIMITS),
            Ok(Request::Read { offset: 98 * 512, len: 1024 })
        );
        let mut write = header(VIRTIO_BLK_T_OUT, 99);
        write.extend([0; 512]);
        assert_eq!(parse(&write, 1, LIMITS), Ok(Request::Write { offset: 99 * 512, len: 512 }));
        assert_eq!(parse(&header(VIRTIO_BLK_T_IN, 100), 1, LIMITS), Ok(Request::Read { offset: 51200, len: 0 }));
    }

    #[test]
    fn transfers_beyond_the_end_or_of_broken_length_fail() {
        for (sector, writable) in
            [(99, 1025), (100, 513), (101, 1), (u64::MAX, 513), (u64::MAX / 512, 513), (0, 512), (0, 100)]
        {
            assert_eq!(parse(&header(VIRTIO_BLK_T_IN, sector), writable, LIMITS), Err(Status::IoError), "{sector}");
        }
    }

    #[test]
    fn transfers_come_in_whole_blocks() {
        let limits = Limits { capacity_sectors: 96, block_sectors: 8, ..LIMITS };
        let read = |sector, bytes: u32| parse(&header(VIRTIO_BLK_T_IN, sector), bytes + 1, limits);
        assert_eq!(read(88, 4096), Ok(Request::Read { offset: 88 * 512, len: 4096 }));
        for (sector, bytes) in [(0, 512), (8, 4608), (4, 4096), (92, 4096), (96, 4096)] {
            assert_eq!(read(sector, bytes), Err(Status::IoError), "{sector} {bytes}");
        }
        let mut write = header(VIRTIO_BLK_T_OUT, 1);
        write.extend([0; 4096]);
        assert_eq!(parse(&write, 1, limits), Err(Status::IoError));
    }

    #[test]
    fn a_short_header_or_a_missing_status_fails() {
        assert_eq!(parse(&header(VIRTIO_BLK_T_FLUSH, 0)[..15], 1, LIMITS), Err(Status::IoError));
        assert_eq!(parse(&header(VIRTIO_BLK_T_FLUSH, 0), 0, LIMITS), Err(Status::IoError));
    }

    #[test]
    fn unknown_kinds_are_unsupported() {
        for kind in [2, 3, 9, 14, u32::MAX] {
            assert_eq!(parse(&header(kind, 0), 1, LIMITS), Err(Status::Unsupported));
        }
    }

    #[test]
    fn a_read_only_disk_takes_no_change() {
        let limits = Limits { read_only: true, ..LIMITS };
        let mut write = header(VIRTIO_BLK_T_OUT, 0);
        write.extend([0; 512]);
        assert_eq!(parse(&write, 1, limits), Err(Status::IoError));
        for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
            assert_eq!(parse(&ranges(kind, &[(0, 1, 0)]), 1, limits), Err(Status::IoError));
        }
        assert_eq!(parse(&header(VIRTIO_BLK_T_FLUSH, 0), 1, limits), Ok(Request::Flush));
    }

    #[test]
    fn ranges_are_all_checked() {
        assert_eq!(
            parse(&ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[(1, 2, 1), (99, 1, 0)]), 1, LIMITS),
            Ok(Request::WriteZeroes(vec![
                Range { offset: 512, len: 1024, unmap: true },
                Range { offset: 99 * 512, len: 512, unmap: false }
            ]))
        );
        let discard = VIRTIO_BLK_T_DISCARD;
        assert_eq!(parse(&ranges(discard, &[(1, 2, 1)]), 1, LIMITS), Err(Status::Unsupported));
        assert_eq!(parse(&ranges(discard, &[(1, 2, 2)]), 1, LIMITS), Err(Status::Unsupported));
        assert_eq!(parse(&ranges(discard, &[(0, 1, 0), (100, 1, 0)]), 1, LIMITS), Err(Status::IoError));
        assert_eq!(parse(&ranges(discard, &[(u64::MAX, 1, 0)]), 1, LIMITS), Err(Status::IoError));
        assert_eq!(parse(&ranges(discard, &[]), 1, LIMITS), Err(Status::IoError));
        assert_eq!(parse(&ranges(discard, &[(0, 1, 0)])[..31], 1, LIMITS), Err(Status::IoError));
        assert_eq!(parse(&ranges(discard, &[(0, 1, 0); 33]), 1, LIMITS), Err(Status::IoError));
        let vast = Limits { capacity_sectors: u64::MAX / 512, ..LIMITS };
        assert_eq!(parse(&ranges(discard, &[(0, MAX_DISCARD_SECTORS + 1, 0)]), 1, vast), Err(Status::IoError));
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn no_bytes_reach_beyond_the_disk(
            kind in prop_oneof![0..16_u32, any::<u32>()],
            sector in prop_oneof![0..128_u64, any::<u64>()],
            body in proptest::collection::vec(any::<u8>(), 0..200),
            writable in 0..3000_u32,
        ) {
            let mut readable = header(kind, sector);
            readable.extend(body);
            let end = LIMITS.capacity_sectors * SECTOR_BYTES;
            match parse(&readable, writable, LIMITS) {
                Ok(Request::Read { offset, len } | Request::Write { offset, len }) => {
                    prop_assert!(offset + len as u64 <= end);
                }
                Ok(Request::Discard(ranges) | Request::WriteZeroes(ranges)) => {
                    prop_assert!(ranges.iter().all(|r| r.offset + r.len <= end));
                }
                _ => {}
            }
        }
    }
}
