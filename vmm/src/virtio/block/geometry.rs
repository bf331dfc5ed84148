//! The blocks of a disk as its host has them: what the guest is told of them (virtio 1.3, section 5.2.4), and what transfers past the
//! host's page cache must keep to.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use super::BlockError;

// linux/fs.h
const BLKSSZGET: libc::c_ulong = 0x1268;
const BLKPBSZGET: libc::c_ulong = 0x127b;
const BLKIOMIN: libc::c_ulong = 0x1278;
const BLKIOOPT: libc::c_ulong = 0x1279;
const BLKALIGNOFF: libc::c_ulong = 0x127a;

/// Bytes of a sector, the least that a logical block has.
const SECTOR: u32 = 512;
/// Bytes of a guest's page: a logical block beyond that is one that its kernel refuses.
pub(super) const PAGE: u32 = 4096;

/// Sizes in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Geometry {
    /// What the guest is to address the disk in.
    pub(super) logical: u32,
    /// What the host writes as a whole.
    pub(super) physical: u32,
    /// From the disk's start to the first boundary of a physical block.
    pub(super) offset: u32,
    /// The least that is transferred without a penalty.
    pub(super) minimum: u32,
    /// What is best transferred at once; 0 where nothing is.
    pub(super) optimal: u32,
    /// The alignment of memory, where transfers go past the page cache; they come in logical blocks then.
    pub(super) direct: Option<u32>,
}

impl Geometry {
    /// That of `file`, a block device or not, opened with `O_DIRECT` or not.
    pub(super) fn of(file: &File, is_device: bool, direct: bool) -> Result<Self, BlockError> {
        let mut blocks = if is_device { Self::of_device(file)? } else { Self::of_file() };
        if direct {
            let fallback = if is_device { blocks.logical } else { PAGE };
            let (memory, logical) = direct_alignment(file)?.unwrap_or((fallback, fallback));
            blocks.logical = logical.max(if is_device { blocks.logical } else { SECTOR });
            blocks.direct = Some(memory.max(1));
        } else {
            // The page cache takes any.
            blocks.logical = blocks.logical.min(PAGE);
        }
        blocks.checked()
    }

    /// A file system's own blocks are pages as a rule, and what lies below them it does not tell.
    fn of_file() -> Self {
        Self { logical: SECTOR, physical: PAGE, offset: 0, minimum: PAGE, optimal: 0, direct: None }
    }

    fn of_device(file: &File) -> Result<Self, BlockError> {
        let (mut logical, mut physical, mut minimum, mut optimal, mut offset) = (0_u32, 0_u32, 0_u32, 0_u32, 0_i32);
        // SAFETY: the kernel writes one integer of the type that each request is defined for.
        unsafe {
            super::disk::ioctl_get(file, BLKSSZGET, "ioctl(BLKSSZGET)", &mut logical)?;
            super::disk::ioctl_get(file, BLKPBSZGET, "ioctl(BLKPBSZGET)", &mut physical)?;
            super::disk::ioctl_get(file, BLKIOMIN, "ioctl(BLKIOMIN)", &mut minimum)?;
            super::disk::ioctl_get(file, BLKIOOPT, "ioctl(BLKIOOPT)", &mut optimal)?;
            super::disk::ioctl_get(file, BLKALIGNOFF, "ioctl(BLKALIGNOFF)", &mut offset)?;
        }
        // Below zero for a device that is misaligned through and through.
        Ok(Self { logical, physical, offset: u32::try_from(offset).unwrap_or(0), minimum, optimal, direct: None })
    }

    fn checked(self) -> Result<Self, BlockError> {
        let Self { logical, physical, offset, minimum, optimal, direct } = self;
        let is_block = |size: u32, most: u32| size.is_power_of_two() && (SECTOR..=most).contains(&size);
        let memory = direct.unwrap_or(1);
        if direct.is_some() && !(is_block(logical, PAGE) && memory.is_power_of_two() && memory <= PAGE) {
            return Err(BlockError::Alignment { logical, memory });
        }
        if !is_block(logical, PAGE) || !is_block(physical, 1 << 20) {
            return Err(BlockError::NotADisk);
        }
        let physical = physical.max(logical);
        let whole = |size: u32| size - size % logical;
        Ok(Self {
            physical,
            offset: whole(offset % physical),
            minimum: whole(minimum).max(physical),
            optimal: whole(optimal),
            ..self
        })
    }

    /// The configuration space's `topology` (bytes 24 to 31): everything in logical blocks, the first as a power of two.
    pub(super) fn topology(&self) -> [u8; 8] {
        let blocks = |size: u32| size / self.logical;
        let exponent = self.physical.ilog2() - self.logical.ilog2();
        let offset = u8::try_from(blocks(self.offset)).unwrap_or(0);
        let minimum = u16::try_from(blocks(self.minimum)).unwrap_or(1 << exponent.min(15)).to_le_bytes();
        let optimal = blocks(self.optimal).to_le_bytes();
        // At most the 20 bits of a physical block.
        [exponent as u8, offset, minimum[0], minimum[1], optimal[0], optimal[1], optimal[2], optimal[3]]
    }

    /// Whether the host takes a transfer to or from just this memory.
    pub(super) fn takes(&self, iovecs: &[libc::iovec]) -> bool {
        let Some(memory) = self.direct else { return true };
        let (memory, logical) = (memory as usize, self.logical as usize);
        iovecs
            .iter()
            .all(|part| (part.iov_base as usize).is_multiple_of(memory) && part.iov_len.is_multiple_of(logical))
    }
}

/// What transfers past the page cache must keep to, in memory and on disk; `None` where the host does not say, as before Linux 6.1.
fn direct_alignment(file: &File) -> Result<Option<(u32, u32)>, BlockError> {
    // SAFETY: plain integers, for which zero is a value.
    let mut stat: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path is an empty string with its end, and the kernel writes one such structure.
    let result = unsafe {
        libc::statx(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, &raw mut stat)
    };
    if result < 0 {
        return Err(BlockError::Inspect { step: "statx", source: io::Error::last_os_error() });
    }
    match (stat.stx_dio_mem_align, stat.stx_dio_offset_align) {
        _ if stat.stx_mask & libc::STATX_DIOALIGN == 0 => Ok(None),
        (_, 0) => Err(BlockError::NotDirect),
        alignment => Ok(Some(alignment)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(logical: u32, physical: u32, offset: u32, minimum: u32, optimal: u32) -> Result<Geometry, BlockError> {
        Geometry { logical, physical, offset, minimum, optimal, direct: None }.checked()
    }

    #[test]
    fn topology_is_told_in_logical_blocks() {
        let told = device(512, 4096, 3584, 4096, 1 << 20).unwrap().topology();
        assert_eq!(told, [3, 7, 8, 0, 0, 8, 0, 0]);
        assert_eq!(device(4096, 4096, 0, 65536, 0).unwrap().topology(), [0, 0, 16, 0, 0, 0, 0, 0]);
        // What a device says that makes no sense: a physical block below the logical one, sizes of no whole blocks.
        assert_eq!(device(4096, 512, 100, 1000, 5000).unwrap().topology(), [0, 0, 1, 0, 1, 0, 0, 0]);
        // Too much for its field.
        assert_eq!(device(512, 512, 0, u32::MAX, 0).unwrap().topology(), [0, 0, 1, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn what_no_guest_can_use_is_refused() {
        for (logical, physical) in [(0, 512), (256, 512), (513, 4096), (512, 0), (512, 2 << 20), (1 << 16, 1 << 16)] {
            assert!(device(logical, physical, 0, 0, 0).is_err(), "{logical} {physical}");
        }
        let direct = |logical, memory| Geometry { logical, direct: Some(memory), ..Geometry::of_file() }.checked();
        assert!(direct(4096, 4).is_ok() && direct(512, 4096).is_ok());
        for (logical, memory) in [(8192, 512), (512, 8192), (512, 3)] {
            assert!(matches!(direct(logical, memory), Err(BlockError::Alignment { .. })), "{logical} {memory}");
        }
    }

    #[test]
    fn only_what_goes_past_the_page_cache_must_be_aligned() {
        let part = |base: usize, len| libc::iovec { iov_base: base as *mut libc::c_void, iov_len: len };
        let cached = Geometry::of_file();
        let direct = Geometry { direct: Some(512), ..cached };
        for (parts, aligned) in [
            (vec![part(512, 512), part(4096, 8192)], true),
            (vec![part(512, 512), part(4100, 512)], false),
            (vec![part(512, 100), part(1024, 412)], false),
        ] {
            assert!(cached.takes(&parts));
            assert_eq!(direct.takes(&parts), aligned);
        }
    }
}
