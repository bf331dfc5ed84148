//! Guest RAM: private, anonymous memory of this process, with files laid over it where the guest starts with their
//! contents, and behind it files that the guest has as persistent memory.
//!
//! Nothing is copied and nothing touched that need not be: a page costs the host memory when the guest first uses it,
//! and a page of a file that no guest wrote to is shared by all of them through the host's page cache.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use vm_memory::{
    Bytes, GuestAddress, GuestMemory as _, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
};

use crate::arch::layout::{self, PAGE_SIZE};
use crate::virtio::device::GuestMemory;

/// Pages asked about at once when counting resident ones: 64 MiB of memory, 16 KiB of answer.
const RESIDENCY_BATCH: usize = 16 * 1024;

/// What can go wrong with guest memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host does not let the process map that much.
    #[error(
        "cannot map {mib} MiB of guest memory: {source}; give the VM less memory, or raise the host's limits \
         (ulimit -v, vm.overcommit_memory)"
    )]
    Map {
        /// How much.
        mib: u64,
        /// Why not.
        source: io::Error,
    },
    /// Regions overlap; the layout is wrong.
    #[error("guest memory regions do not fit together: {0}")]
    Regions(vm_memory::GuestRegionCollectionError),
    /// An address range is not all in RAM.
    #[error("guest addresses {start:#x} to {end:#x} are not in its memory; give the VM more memory")]
    OutOfRange {
        /// First address.
        start: u64,
        /// First address behind the range.
        end: u64,
    },
    /// A file cannot be laid over memory.
    #[error("cannot map the file into guest memory: {0}; it must be a regular file")]
    MapFile(io::Error),
    /// A file ends early or cannot be read.
    #[error("cannot read the file: {0}")]
    ReadFile(io::Error),
}

/// Reserves guest RAM of `size_bytes`, laid out as the board has it.
///
/// # Errors
///
/// When the host refuses that much address space.
pub fn allocate(size_bytes: u64) -> Result<GuestMemory, MemoryError> {
    allocate_with_pmem(size_bytes, &[]).map(|(memory, _)| memory)
}

/// Reserves guest RAM as [`allocate`] does, and puts each of `files` behind it, filled up with zeros to what
/// [`layout::pmem`] gives it; the ranges are where they are.
///
/// Guest and VMM share a file's pages with all who use it. The guest must be kept from writing (a read-only memory slot); what
/// a device writes there on its behalf goes to a private copy, and the file stays as it is. It must not be truncated while the
/// VM lives, which would kill the VM.
///
/// # Errors
///
/// When the host refuses that much address space, or to map a file.
pub fn allocate_with_pmem(size_bytes: u64, files: &[&File]) -> Result<(GuestMemory, Vec<Range<u64>>), MemoryError> {
    let file_sizes = files.iter().map(|file| file.metadata().map(|metadata| metadata.len()));
    let file_sizes = file_sizes.collect::<io::Result<Vec<_>>>().map_err(MemoryError::ReadFile)?;
    let pmem = layout::pmem(size_bytes, &file_sizes);
    let regions = layout::ram(size_bytes).iter().chain(&pmem).map(reserve).collect::<Result<Vec<_>, _>>()?;
    let memory = Arc::new(GuestMemoryMmap::from_regions(regions).map_err(MemoryError::Regions)?);
    for ((file, size), range) in files.iter().zip(file_sizes).zip(&pmem) {
        // With the rest of its last page, which the kernel fills with zeros.
        map_file(&memory, range.start, file, 0, size)?;
        leave_out_of_dumps(&memory, range);
    }
    Ok((memory, pmem))
}

fn reserve(range: &Range<u64>) -> Result<GuestRegionMmap, MemoryError> {
    let size = range.end - range.start;
    let map = |source| MemoryError::Map { mib: size >> 20, source };
    let len = usize::try_from(size).map_err(io::Error::other).map_err(map)?;
    let mapping = MmapRegion::build(
        None,
        len,
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
    )
    .map_err(|error| map(io::Error::other(error)))?;
    let out_of_range = MemoryError::OutOfRange { start: range.start, end: range.end };
    GuestRegionMmap::new(mapping, GuestAddress(range.start)).ok_or(out_of_range)
}

/// Puts `len` bytes of `file` from `offset` on at guest address `at`, so that the guest sees a private copy of them.
///
/// Whole pages that lie alike in file and memory are mapped; the rest is read. What is mapped changes with the file until
/// the guest first writes to it, so the file must be left alone while the VM lives, and truncating it kills the VM.
///
/// # Errors
///
/// When the range is not in RAM, or the file cannot be mapped or read.
pub fn place_file(memory: &GuestMemory, at: u64, file: &File, offset: u64, len: u64) -> Result<(), MemoryError> {
    let out_of_range = || MemoryError::OutOfRange { start: at, end: at.saturating_add(len) };
    let end = at.checked_add(len).ok_or_else(out_of_range)?;
    let first_page = at.next_multiple_of(PAGE_SIZE);
    let last_page = end - end % PAGE_SIZE;
    if at % PAGE_SIZE != offset % PAGE_SIZE || first_page >= last_page {
        return read_file(memory, at, file, offset, len);
    }
    read_file(memory, at, file, offset, first_page - at)?;
    map_file(memory, first_page, file, offset + (first_page - at), last_page - first_page)?;
    read_file(memory, last_page, file, offset + (last_page - at), end - last_page)
}

/// Copies `len` bytes of `file` from `offset` on to guest address `at`: for what the guest will write to, in large pages
/// where the host has them, since it is much cheaper to copy at once than to fault in each page, first to be read and then to be
/// written.
///
/// The file must not be truncated meanwhile: that would kill the process.
///
/// # Errors
///
/// When the range is not in RAM, or the file cannot be mapped.
pub fn copy_file(memory: &GuestMemory, at: u64, file: &File, offset: u64, len: u64) -> Result<(), MemoryError> {
    let end = at.saturating_add(len);
    let source = Window::open(file, offset, len)?;
    let mut rest = source.bytes();
    for slice in memory.get_slices(GuestAddress(at), rest.len()) {
        let slice = slice.map_err(|_| MemoryError::OutOfRange { start: at, end })?;
        let guard = slice.ptr_guard_mut();
        advise_large_pages(guard.as_ptr(), slice.len());
        let (piece, behind) = rest.split_at(slice.len());
        slice.copy_from(piece);
        rest = behind;
    }
    Ok(())
}

/// A piece of a file, mapped to be read. Copying from it takes the processor's widest moves, which the kernel, asked to read a
/// file, does without.
struct Window {
    start: *mut libc::c_void,
    mapped: usize,
    /// Where the piece begins in the mapping, and its length.
    lead: usize,
    len: usize,
}

impl Window {
    fn open(file: &File, offset: u64, len: u64) -> Result<Self, MemoryError> {
        let invalid = || MemoryError::MapFile(io::ErrorKind::InvalidInput.into());
        // Pages behind the end of the file would be mapped as well, and kill the process on their first use.
        let file_len = file.metadata().map_err(MemoryError::MapFile)?.len();
        if offset.checked_add(len).is_none_or(|end| end > file_len) {
            return Err(MemoryError::ReadFile(io::ErrorKind::UnexpectedEof.into()));
        }
        let lead = (offset % PAGE_SIZE) as usize;
        let len = usize::try_from(len).map_err(|_| invalid())?;
        let mapped = lead.checked_add(len).ok_or_else(invalid)?;
        if len == 0 {
            return Ok(Self { start: std::ptr::null_mut(), mapped: 0, lead: 0, len: 0 });
        }
        let offset = libc::off_t::try_from(offset - lead as u64).map_err(|_| invalid())?;
        let flags = libc::MAP_PRIVATE | libc::MAP_POPULATE;
        // SAFETY: a new mapping; it replaces nothing.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), mapped, libc::PROT_READ, flags, file.as_raw_fd(), offset) };
        if start == libc::MAP_FAILED {
            return Err(MemoryError::MapFile(io::Error::last_os_error()));
        }
        Ok(Self { start, mapped, lead, len })
    }

    fn bytes(&self) -> &[u8] {
        if self.len == 0 {
            return &[];
        }
        // SAFETY: the bytes lie in the mapping, which lives as long as `self`. It is private and read-only; that nobody
        // truncates the file is the caller's promise.
        unsafe { std::slice::from_raw_parts(self.start.cast::<u8>().add(self.lead), self.len) }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        if self.mapped > 0 {
            // SAFETY: this is the whole of the mapping, and no borrow of it is left.
            unsafe { libc::munmap(self.start, self.mapped) };
        }
    }
}

fn advise_large_pages(start: *mut u8, len: usize) {
    let page = PAGE_SIZE as usize;
    let lead = start.addr() % page;
    // SAFETY: the pages belong to guest memory, and the advice changes nothing that can be seen. A host without large pages
    // does not take it.
    unsafe { libc::madvise(start.sub(lead).cast(), (lead + len).next_multiple_of(page), libc::MADV_HUGEPAGE) };
}

/// Keeps what is in files already out of core dumps. The kernel no longer takes the zeros behind a file and the RAM next to
/// them for one mapping then, so that `/proc/PID/smaps` tells which is which.
fn leave_out_of_dumps(memory: &GuestMemory, range: &Range<u64>) {
    for slice in memory.get_slices(GuestAddress(range.start), (range.end - range.start) as usize).flatten() {
        // SAFETY: the range is a mapping of guest memory, and the advice changes nothing that can be seen.
        unsafe { libc::madvise(slice.ptr_guard_mut().as_ptr().cast(), slice.len(), libc::MADV_DONTDUMP) };
    }
}

/// Maps pages of `file` over guest memory. Both places are multiples of the page size; the rest of the last page, if it is the
/// file's last, reads as zeros.
fn map_file(memory: &GuestMemory, at: u64, file: &File, offset: u64, len: u64) -> Result<(), MemoryError> {
    let out_of_range = MemoryError::OutOfRange { start: at, end: at + len };
    let Ok(len) = usize::try_from(len) else { return Err(out_of_range) };
    let Ok(offset) = libc::off_t::try_from(offset) else {
        return Err(MemoryError::MapFile(io::ErrorKind::InvalidInput.into()));
    };
    // Pages behind the end of the file would be mapped as well, and kill the VM on their first use.
    let file_len = file.metadata().map_err(MemoryError::MapFile)?.len();
    if (offset as u64).checked_add(len as u64).is_none_or(|end| end > file_len) {
        return Err(MemoryError::ReadFile(io::ErrorKind::UnexpectedEof.into()));
    }
    let Ok(slice) = memory.get_slice(GuestAddress(at), len) else { return Err(out_of_range) };
    let host = slice.ptr_guard_mut().as_ptr();
    // SAFETY: the range lies in one region of guest memory, which is a private mapping that nothing but raw and volatile
    // accesses refer to; replacing part of it keeps it readable and writable throughout.
    let mapped = unsafe {
        libc::mmap(
            host.cast(),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
            file.as_raw_fd(),
            offset,
        )
    };
    if mapped == libc::MAP_FAILED { Err(MemoryError::MapFile(io::Error::last_os_error())) } else { Ok(()) }
}

/// Reads a piece of `file` into RAM.
fn read_file(memory: &GuestMemory, mut at: u64, file: &File, mut offset: u64, len: u64) -> Result<(), MemoryError> {
    use std::os::unix::fs::FileExt;

    let mut buffer = vec![0; usize::try_from(len.min(128 * 1024)).unwrap_or(0)];
    let end = at + len;
    while at < end {
        let part = usize::try_from(end - at).map_or(buffer.len(), |rest| rest.min(buffer.len()));
        file.read_exact_at(&mut buffer[..part], offset).map_err(MemoryError::ReadFile)?;
        memory
            .write_slice(&buffer[..part], GuestAddress(at))
            .map_err(|_| MemoryError::OutOfRange { start: at, end })?;
        at += part as u64;
        offset += part as u64;
    }
    Ok(())
}

/// Bytes of guest RAM that are in the host's memory, pages of files in its page cache included. Of `ram`, all of it; persistent
/// memory is the page cache's own.
///
/// # Errors
///
/// When the kernel refuses to tell.
pub fn resident_bytes(memory: &GuestMemory, ram: &[Range<u64>]) -> io::Result<u64> {
    let page = PAGE_SIZE as usize;
    let mut pages = vec![0u8; RESIDENCY_BATCH];
    let mut resident = 0u64;
    let is_ram = |region: &&GuestRegionMmap| ram.iter().any(|range| range.contains(&region.start_addr().0));
    for region in memory.iter().filter(is_ram) {
        let host = region.as_ptr();
        let len = usize::try_from(region.len()).map_err(io::Error::other)?;
        for start in (0..len).step_by(RESIDENCY_BATCH * page) {
            let part = (len - start).min(RESIDENCY_BATCH * page);
            let batch = &mut pages[..part.div_ceil(page)];
            // SAFETY: the range lies in the region's mapping, and `batch` has a byte for each of its pages.
            let result = unsafe { libc::mincore(host.add(start).cast(), part, batch.as_mut_ptr()) };
            if result != 0 {
                return Err(io::Error::last_os_error());
            }
            resident += batch.iter().map(|state| u64::from(state & 1)).sum::<u64>();
        }
    }
    Ok(resident * PAGE_SIZE)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn read(memory: &GuestMemory, at: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        memory.read_slice(&mut data, GuestAddress(at)).unwrap();
        data
    }

    fn pattern(len: usize) -> (File, Vec<u8>) {
        let bytes: Vec<u8> = (0..len).map(|i| (i * 7 + i / 4096) as u8).collect();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        (file, bytes)
    }

    #[test]
    fn a_file_appears_at_its_place_and_nothing_around_it_changes() {
        let (memory, copy) = (allocate(1 << 20).unwrap(), allocate(1 << 20).unwrap());
        let (file, bytes) = pattern(20_000);
        // Alike in both (mapped with edges), not alike (copied), and within a page.
        for (at, offset, len) in [(0x1_0123, 0x123, 15_000), (0x2_0000, 5, 9_000), (0x3_0010, 0x1010, 100)] {
            place_file(&memory, at, &file, offset as u64, len as u64).unwrap();
            assert_eq!(read(&memory, at, len), bytes[offset..offset + len]);
            assert_eq!(read(&memory, at - 8, 8), [0; 8]);
            assert_eq!(read(&memory, at + len as u64, 8), [0; 8]);
            copy_file(&copy, at, &file, offset as u64, len as u64).unwrap();
            assert_eq!(read(&copy, 0, 1 << 20), read(&memory, 0, 1 << 20));
        }
    }

    #[test]
    fn writing_to_a_placed_file_leaves_the_file_alone() {
        let memory = allocate(1 << 20).unwrap();
        let (file, bytes) = pattern(8192);
        place_file(&memory, 0x1000, &file, 0, 8192).unwrap();
        memory.write_slice(&[0xaa; 4096], GuestAddress(0x1000)).unwrap();
        let again = allocate(1 << 20).unwrap();
        place_file(&again, 0, &file, 0, 8192).unwrap();
        assert_eq!(read(&again, 0, 8192), bytes);
    }

    #[test]
    fn a_file_that_is_too_short_or_has_no_room_is_refused() {
        let memory = allocate(1 << 20).unwrap();
        let (file, _) = pattern(8192);
        assert!(matches!(place_file(&memory, 0, &file, 0, 12288), Err(MemoryError::ReadFile(_))));
        assert!(matches!(place_file(&memory, 0xf_f000, &file, 0, 8192), Err(MemoryError::OutOfRange { .. })));
        assert!(matches!(place_file(&memory, u64::MAX, &file, 0, 8192), Err(MemoryError::OutOfRange { .. })));
        assert!(matches!(copy_file(&memory, 0, &file, 0, 12288), Err(MemoryError::ReadFile(_))));
        assert!(matches!(copy_file(&memory, 0xf_f000, &file, 0, 8192), Err(MemoryError::OutOfRange { .. })));
        assert!(copy_file(&memory, 0, &file, 8192, 0).is_ok());
    }

    #[test]
    fn files_lie_behind_ram_as_they_are_and_stay_it() {
        let (first, bytes) = pattern(20_000);
        let (second, _) = pattern(1);
        let (memory, places) = allocate_with_pmem(1 << 20, &[&first, &second]).unwrap();
        assert_eq!(places, layout::pmem(1 << 20, &[20_000, 1]));
        assert_eq!(read(&memory, places[0].start, 20_000), bytes);
        assert_eq!(read(&memory, places[0].start + 20_000, (2 << 20) - 20_000), vec![0; (2 << 20) - 20_000]);
        assert_eq!(read(&memory, places[1].start, 2), [0, 0]);

        memory.write_slice(&[0xaa; 8192], GuestAddress(places[0].start)).unwrap();
        let (again, places) = allocate_with_pmem(1 << 20, &[&first]).unwrap();
        assert_eq!(read(&again, places[0].start, 20_000), bytes);
    }

    #[test]
    fn only_touched_memory_is_resident() {
        let memory = allocate(4 << 30).unwrap();
        memory.write_obj(1u8, GuestAddress(5 << 12)).unwrap();
        memory.write_obj(1u8, GuestAddress(4 << 30)).unwrap();
        let resident = resident_bytes(&memory, &layout::ram(4 << 30)).unwrap();
        assert!((8192..4 << 20).contains(&resident), "{resident}");
    }
}
