//! The host's side of a disk: a raw image or a block device, and the system calls on it.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, RawFd};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::sync::atomic::{AtomicU64, Ordering};

use vmm_sys_util::eventfd::EventFd;

use super::BlockError;
use super::geometry::{Geometry, PAGE};
use super::request::{Range, SECTOR_BYTES};

// linux/fs.h
const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;
const BLKDISCARD: libc::c_ulong = 0x1277;

/// Written where the host has no faster way to zero.
static ZEROES: Aligned = Aligned([0; ASIDE_BYTES]);

/// Bytes of a transfer that goes through memory of the VMM's own, at a time.
const ASIDE_BYTES: usize = 64 << 10;

/// Memory that any host takes transfers from.
#[repr(align(4096))]
struct Aligned([u8; ASIDE_BYTES]);

/// A disk image or block device, open.
pub(super) struct Disk {
    file: File,
    is_device: bool,
    /// As the guest knows it.
    capacity_sectors: AtomicU64,
    geometry: Geometry,
}

impl Disk {
    /// Takes over `file` and asks the host for its geometry.
    pub(super) fn new(file: File, read_only: bool) -> Result<Self, BlockError> {
        let metadata = file.metadata().map_err(|source| BlockError::Inspect { step: "stat", source })?;
        // SAFETY: takes no pointer.
        let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
        if flags < 0 {
            return Err(BlockError::Inspect { step: "fcntl(F_GETFL)", source: io::Error::last_os_error() });
        }
        if flags & libc::O_PATH != 0
            || flags & libc::O_ACCMODE == libc::O_WRONLY
            || (!read_only && flags & libc::O_ACCMODE != libc::O_RDWR)
        {
            return Err(BlockError::Access);
        }
        let is_device = metadata.file_type().is_block_device();
        if !is_device && !metadata.is_file() {
            return Err(BlockError::NotADisk);
        }
        let geometry = Geometry::of(&file, is_device, flags & libc::O_DIRECT != 0)?;
        let disk = Self { file, is_device, capacity_sectors: AtomicU64::new(0), geometry };
        disk.set_capacity_sectors(disk.measure()?);
        Ok(disk)
    }

    /// The same to look at, without the file: nothing can be read or written.
    pub(super) fn without_file(&self) -> io::Result<Self> {
        let nothing = EventFd::new(libc::EFD_CLOEXEC)?;
        // SAFETY: the descriptor was just made, and nobody else has it.
        let file = unsafe { File::from_raw_fd(nothing.into_raw_fd()) };
        let capacity_sectors = AtomicU64::new(self.capacity_sectors());
        Ok(Self { file, is_device: self.is_device, capacity_sectors, geometry: self.geometry })
    }

    /// How many sectors the file or device has now, in whole logical blocks.
    pub(super) fn measure(&self) -> Result<u64, BlockError> {
        let len = if self.is_device {
            let mut len = 0_u64;
            // SAFETY: the kernel writes one such integer.
            unsafe { ioctl_get(&self.file, BLKGETSIZE64, "ioctl(BLKGETSIZE64)", &mut len)? };
            len
        } else {
            self.file.metadata().map_err(|source| BlockError::Inspect { step: "stat", source })?.len()
        };
        let logical = u64::from(self.geometry.logical);
        Ok(len / logical * (logical / SECTOR_BYTES))
    }

    pub(super) fn capacity_sectors(&self) -> u64 {
        self.capacity_sectors.load(Ordering::Acquire)
    }

    pub(super) fn set_capacity_sectors(&self, sectors: u64) {
        self.capacity_sectors.store(sectors, Ordering::Release);
    }

    pub(super) fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    pub(super) fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Fills all of `iovecs` from `offset` on; a file that ends before is an error.
    ///
    /// # Safety
    ///
    /// The memory must be mapped and open to be written by others at any time.
    pub(super) unsafe fn read(&self, mut iovecs: &mut [libc::iovec], mut offset: u64) -> io::Result<()> {
        while !iovecs.is_empty() {
            // SAFETY: the caller vouches for the memory; the count is at most `MAX_SEGMENTS`.
            let done =
                unsafe { libc::preadv(self.fd(), iovecs.as_ptr(), iovecs.len() as libc::c_int, offset as libc::off_t) };
            iovecs = step(iovecs, &mut offset, done as i64)?;
        }
        Ok(())
    }

    /// Writes all of `iovecs` from `offset` on, to stable storage if `durable`.
    ///
    /// # Safety
    ///
    /// The memory must be mapped.
    pub(super) unsafe fn write(
        &self,
        mut iovecs: &mut [libc::iovec],
        mut offset: u64,
        durable: bool,
    ) -> io::Result<()> {
        let flags = if durable { libc::RWF_DSYNC } else { 0 };
        while !iovecs.is_empty() {
            let count = iovecs.len() as libc::c_int;
            // SAFETY: the caller vouches for the memory; the count is at most `MAX_SEGMENTS`.
            let done = unsafe { libc::pwritev2(self.fd(), iovecs.as_ptr(), count, offset as libc::off_t, flags) };
            iovecs = step(iovecs, &mut offset, done as i64)?;
        }
        Ok(())
    }

    /// Has `put` take each part of the `len` bytes from `offset` on, in order, by way of memory that the host takes transfers to.
    pub(super) fn read_aside(&self, offset: u64, len: usize, mut put: impl FnMut(usize, &[u8])) -> io::Result<()> {
        aside(len, |done, buffer| {
            self.file.read_exact_at(buffer, offset + done as u64)?;
            put(done, buffer);
            Ok(())
        })
    }

    /// Writes `len` bytes from `offset` on, parts of which `get` fills in, in order; to stable storage if `durable`.
    pub(super) fn write_aside(
        &self,
        offset: u64,
        len: usize,
        durable: bool,
        mut get: impl FnMut(usize, &mut [u8]),
    ) -> io::Result<()> {
        aside(len, |done, buffer| {
            get(done, buffer);
            self.file.write_all_at(buffer, offset + done as u64)
        })?;
        if durable { self.flush() } else { Ok(()) }
    }

    /// Makes stable what was written.
    pub(super) fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Tells the host that `range` is not needed; what it reads as afterwards is open.
    pub(super) fn discard(&self, range: Range) -> io::Result<()> {
        if range.len == 0 {
            return Ok(());
        }
        if self.is_device {
            let bounds = [range.offset, range.len];
            // SAFETY: the kernel reads two 64-bit integers.
            return check(unsafe { libc::ioctl(self.fd(), BLKDISCARD, bounds.as_ptr()) });
        }
        self.fallocate(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, range)
    }

    /// Zeroes `range`, by the fastest way that the host has.
    pub(super) fn write_zeroes(&self, range: Range) -> io::Result<()> {
        if range.len == 0 {
            return Ok(());
        }
        let mode = if range.unmap { libc::FALLOC_FL_PUNCH_HOLE } else { libc::FALLOC_FL_ZERO_RANGE };
        match self.fallocate(mode | libc::FALLOC_FL_KEEP_SIZE, range) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL)) => {
                let (mut offset, end) = (range.offset, range.offset + range.len);
                while offset < end {
                    let len = usize::try_from(end - offset).map_or(ASIDE_BYTES, |left| left.min(ASIDE_BYTES));
                    self.file.write_all_at(&ZEROES.0[..len], offset)?;
                    offset += len as u64;
                }
                Ok(())
            }
            result => result,
        }
    }

    fn fallocate(&self, mode: libc::c_int, range: Range) -> io::Result<()> {
        loop {
            // SAFETY: takes no pointer.
            let result =
                unsafe { libc::fallocate(self.fd(), mode, range.offset as libc::off_t, range.len as libc::off_t) };
            match check(result) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }
}

/// Does the parts of a transfer of `len` bytes one after the other, each with as much memory as it has bytes.
fn aside(len: usize, mut part: impl FnMut(usize, &mut [u8]) -> io::Result<()>) -> io::Result<()> {
    let mut memory = vec![0; len.min(ASIDE_BYTES) + PAGE as usize];
    let start = memory.as_ptr().align_offset(PAGE as usize);
    let mut done = 0;
    while done < len {
        let count = (len - done).min(ASIDE_BYTES);
        part(done, &mut memory[start..start + count])?;
        done += count;
    }
    Ok(())
}

/// What remains of a transfer after a system call that returned `done`.
fn step<'a>(iovecs: &'a mut [libc::iovec], offset: &mut u64, done: i64) -> io::Result<&'a mut [libc::iovec]> {
    match usize::try_from(done) {
        Err(_) => match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::Interrupted => Ok(iovecs),
            error => Err(error),
        },
        // The end of a file that became shorter, or a disk that takes no more.
        Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
        Ok(done) => {
            *offset += done as u64;
            let skip = advance(iovecs, done);
            Ok(&mut iovecs[skip..])
        }
    }
}

/// Takes `done` bytes off the front of `iovecs`; returns how many of them are used up.
pub(super) fn advance(iovecs: &mut [libc::iovec], mut done: usize) -> usize {
    for (i, iovec) in iovecs.iter_mut().enumerate() {
        if done < iovec.iov_len {
            iovec.iov_base = iovec.iov_base.wrapping_byte_add(done);
            iovec.iov_len -= done;
            return i;
        }
        done -= iovec.iov_len;
    }
    iovecs.len()
}

/// # Safety
///
/// `request` must be one for which the kernel writes a `T`.
pub(super) unsafe fn ioctl_get<T>(
    file: &File,
    request: libc::c_ulong,
    step: &'static str,
    value: &mut T,
) -> Result<(), BlockError> {
    // SAFETY: the caller vouches for the type that the kernel writes.
    check(unsafe { libc::ioctl(file.as_raw_fd(), request, value) })
        .map_err(|source| BlockError::Inspect { step, source })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn iovec(base: usize, len: usize) -> libc::iovec {
        libc::iovec { iov_base: base as *mut libc::c_void, iov_len: len }
    }

    #[test]
    fn a_partial_transfer_goes_on_where_it_ended() {
        let mut iovecs = [iovec(0x1000, 10), iovec(0x2000, 10), iovec(0x3000, 10)];
        assert_eq!(advance(&mut iovecs, 13), 1);
        assert_eq!((iovecs[1].iov_base as usize, iovecs[1].iov_len), (0x2003, 7));
        assert_eq!(advance(&mut iovecs[1..], 7), 1);
        assert_eq!(advance(&mut iovecs[2..], 10), 1);
    }

    #[test]
    fn the_capacity_is_whole_sectors() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1000).unwrap();
        assert_eq!(Disk::new(file, false).unwrap().capacity_sectors(), 1);
    }

    #[test]
    fn what_is_not_a_disk_or_not_writable_is_refused() {
        let directory = File::open("/").unwrap();
        assert!(matches!(Disk::new(directory, true), Err(BlockError::NotADisk)));
        let image = tempfile::NamedTempFile::new().unwrap();
        assert!(matches!(Disk::new(File::open(image.path()).unwrap(), false), Err(BlockError::Access)));
        assert!(Disk::new(File::open(image.path()).unwrap(), true).is_ok());
    }

    #[test]
    fn ranges_are_zeroed_and_discarded() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; 8192], 0).unwrap();
        let disk = Disk::new(file.try_clone().unwrap(), false).unwrap();
        disk.write_zeroes(Range { offset: 512, len: 512, unmap: false }).unwrap();
        disk.write_zeroes(Range { offset: 4096, len: 4096, unmap: true }).unwrap();
        disk.discard(Range { offset: 0, len: 0, unmap: false }).unwrap();
        let mut data = [0; 8192];
        file.read_exact_at(&mut data, 0).unwrap();
        assert_eq!((data[511], data[512], data[1023], data[1024], data[4096]), (7, 0, 0, 7, 0));
        assert_eq!(file.metadata().unwrap().len(), 8192);
    }
}
