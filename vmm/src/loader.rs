//! Puts the kernel and the initial RAM file system where the guest finds them.
//!
//! What the guest writes to anyway is copied, the rest is mapped (see [`crate::memory`]).

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use linux_loader::elf;
use vm_memory::GuestMemory as _;

use crate::arch::layout::{self, PAGE_SIZE};
use crate::memory::{self, MemoryError};
use crate::virtio::device::GuestMemory;

/// Bytes of `e_ident` (System V ABI, "ELF identification") and their values for 64-bit little-endian files.
const EI_CLASS: usize = 4;
const ELFCLASS64: u8 = 2;
const EI_DATA: usize = 5;
const ELFDATA2LSB: u8 = 1;

/// `PF_X` and `PF_W` in a segment's flags.
const CHANGING_CODE: u32 = 1 | 2;

/// Most program headers that are looked at. A kernel has about five.
const MAX_PROGRAM_HEADERS: u16 = 64;

/// Why a kernel or initrd could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The kernel's header cannot be read.
    #[error("cannot read the kernel: {0}")]
    ReadKernel(io::Error),
    /// The kernel is in another format.
    #[error("the kernel is not a 64-bit x86 ELF executable ({0}); use an uncompressed vmlinux, not a bzImage")]
    NotElf(&'static str),
    /// A part of the kernel does not fit or cannot be mapped.
    #[error("cannot load the kernel: {0}")]
    PlaceKernel(MemoryError),
    /// The initrd's size cannot be found out, or it is empty.
    #[error("cannot read the initrd: {0}")]
    ReadInitrd(io::Error),
    /// The initrd does not fit beside the kernel.
    #[error("the initrd ({initrd_mib} MiB) does not fit in memory above the kernel; give the VM more memory")]
    NoRoomForInitrd {
        /// Its size, rounded up.
        initrd_mib: u64,
    },
    /// The initrd cannot be mapped.
    #[error("cannot load the initrd: {0}")]
    PlaceInitrd(MemoryError),
}

/// A kernel in guest memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// Where its execution starts.
    pub entry: u64,
    /// What it occupies, its zeroed data included.
    pub range: Range<u64>,
}

/// Loads an ELF kernel at the physical addresses that it was linked for.
///
/// # Errors
///
/// When it is not one, or does not fit.
pub fn load_kernel(memory: &GuestMemory, file: &File) -> Result<Kernel, LoadError> {
    let header: elf::Elf64_Ehdr = read_struct(file, 0)?;
    check_header(&header)?;
    let mut range: Option<Range<u64>> = None;
    for index in 0..header.e_phnum {
        let offset = u64::from(index) * size_of::<elf::Elf64_Phdr>() as u64;
        let offset = header.e_phoff.checked_add(offset).ok_or(LoadError::NotElf("its headers are out of place"))?;
        let segment: elf::Elf64_Phdr = read_struct(file, offset)?;
        if segment.p_type != elf::PT_LOAD || segment.p_memsz == 0 {
            continue;
        }
        let end = segment.p_paddr.checked_add(segment.p_memsz);
        let Some(end) =
            end.filter(|_| segment.p_filesz <= segment.p_memsz && segment.p_paddr >= layout::HIGH_RAM_START)
        else {
            return Err(LoadError::NotElf("a segment lies at an impossible address"));
        };
        if !memory.address_in_range(vm_memory::GuestAddress(end - 1)) {
            return Err(LoadError::PlaceKernel(MemoryError::OutOfRange { start: segment.p_paddr, end }));
        }
        // Constants are marked executable too, but nobody writes to them.
        let is_code =
            (segment.p_paddr..end).contains(&header.e_entry) || segment.p_flags & CHANGING_CODE == CHANGING_CODE;
        let place = if is_code { memory::copy_file } else { memory::place_file };
        place(memory, segment.p_paddr, file, segment.p_offset, segment.p_filesz).map_err(LoadError::PlaceKernel)?;
        range = Some(match range {
            Some(range) => range.start.min(segment.p_paddr)..range.end.max(end),
            None => segment.p_paddr..end,
        });
    }
    match range {
        Some(range) if range.contains(&header.e_entry) => Ok(Kernel { entry: header.e_entry, range }),
        _ => Err(LoadError::NotElf("its entry point is not in a loaded segment")),
    }
}

fn check_header(header: &elf::Elf64_Ehdr) -> Result<(), LoadError> {
    let ident = &header.e_ident;
    if ident[..4] != *b"\x7fELF" {
        return Err(LoadError::NotElf("it has no ELF signature"));
    }
    if ident[EI_CLASS] != ELFCLASS64 || ident[EI_DATA] != ELFDATA2LSB {
        return Err(LoadError::NotElf("it is not 64-bit little-endian"));
    }
    if header.e_machine != layout::ELF_MACHINE {
        return Err(LoadError::NotElf("it is for another processor"));
    }
    if usize::from(header.e_phentsize) != size_of::<elf::Elf64_Phdr>() || header.e_phnum > MAX_PROGRAM_HEADERS {
        return Err(LoadError::NotElf("its program headers are not usual"));
    }
    Ok(())
}

fn read_struct<T: vm_memory::ByteValued + Default>(file: &File, offset: u64) -> Result<T, LoadError> {
    let mut object = T::default();
    match file.read_exact_at(object.as_mut_slice(), offset) {
        Ok(()) => Ok(object),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(LoadError::NotElf("it is too short")),
        Err(error) => Err(LoadError::ReadKernel(error)),
    }
}

/// Loads an initrd as high below the hole as it fits, so that the kernel can give back what it took in one piece.
///
/// # Errors
///
/// When it cannot be read or does not fit above the kernel.
pub fn load_initrd(memory: &GuestMemory, file: &File, kernel: &Kernel) -> Result<Range<u64>, LoadError> {
    let len = file.metadata().map_err(LoadError::ReadInitrd)?.len();
    if len == 0 {
        return Err(LoadError::ReadInitrd(io::Error::other("it is empty, or not a regular file")));
    }
    let ram_end = memory.iter().map(|region| vm_memory::GuestMemoryRegion::last_addr(region).0 + 1);
    let low_end = ram_end.filter(|end| *end <= layout::HOLE.start).max().unwrap_or(0);
    let start = low_end.checked_sub(len).map(|start| start - start % PAGE_SIZE);
    let Some(start) = start.filter(|start| *start >= kernel.range.end) else {
        return Err(LoadError::NoRoomForInitrd { initrd_mib: len.div_ceil(1 << 20) });
    };
    memory::copy_file(memory, start, file, 0, len).map_err(LoadError::PlaceInitrd)?;
    Ok(start..start + len)
}
