//! What the kernel finds in memory when it is entered in 64-bit mode (Documentation/arch/x86/boot.rst, "64-bit boot
//! protocol"): its parameters, its command line, page tables and a descriptor table.

use std::ops::Range;

use hull_vmm_api::config::MAX_CMDLINE_BYTES;
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout;
use crate::virtio::device::GuestMemory;

/// `setup_header.boot_flag`.
const BOOT_FLAG: u16 = 0xaa55;
/// `setup_header.header`: "HdrS".
const HEADER_MAGIC: u32 = 0x5372_6448;
/// `setup_header.type_of_loader` of a loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
/// `setup_header.loadflags`, `LOADED_HIGH`.
const LOADED_HIGH: u8 = 1;

/// Types of `e820` entries (ACPI 6.5, section 15.1).
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
const E820_ACPI: u32 = 3;

/// Bits of page-table entries (AMD64 manual, volume 2, section 5.4): present, writable, page size.
const PRESENT_WRITABLE: u64 = 0b11;
const LARGE_PAGE: u64 = 1 << 7;
const LARGE_PAGE_SIZE: u64 = 2 << 20;

/// Descriptors at the selectors that the boot protocol asks for: flat 64-bit code at 0x10, flat data at 0x18, and a
/// task state segment at 0x20, without which Intel processors do not enter a guest.
pub(super) const GDT: [u64; 5] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x008f_8b00_0000_ffff];

/// Why the boot parameters could not be written.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The command line is too long for the kernel.
    #[error("the kernel command line has {0} bytes; at most {max} fit", max = MAX_CMDLINE_BYTES - 1)]
    CmdlineTooLong(usize),
    /// Guest memory is too small for it, which the configuration's limits rule out.
    #[error("cannot write the boot parameters: {0}")]
    Memory(#[from] GuestMemoryError),
}

/// Writes everything that the boot processor's registers (see [`super::registers`]) refer to. `ram` is all of the guest's RAM.
///
/// # Errors
///
/// When the command line is too long.
pub fn write_boot_structures(
    memory: &GuestMemory,
    ram: &[Range<u64>],
    cmdline: &str,
    initrd: Option<&Range<u64>>,
    rsdp: u64,
) -> Result<(), BootError> {
    if cmdline.len() >= MAX_CMDLINE_BYTES {
        return Err(BootError::CmdlineTooLong(cmdline.len()));
    }
    memory.write_slice(cmdline.as_bytes(), GuestAddress(layout::CMDLINE))?;
    memory.write_obj(0u8, GuestAddress(layout::CMDLINE + cmdline.len() as u64))?;
    memory.write_obj(zero_page(ram, cmdline, initrd, rsdp), GuestAddress(layout::BOOT_PARAMS))?;
    for (index, descriptor) in (0..).zip(GDT) {
        memory.write_obj(descriptor, GuestAddress(layout::GDT + 8 * index))?;
    }
    write_page_tables(memory)?;
    Ok(())
}

/// Maps the first GiB to itself, where all that the kernel's first instructions touch must lie; the kernel builds its
/// own tables from there.
fn write_page_tables(memory: &GuestMemory) -> Result<(), GuestMemoryError> {
    memory.write_obj(layout::PDPT | PRESENT_WRITABLE, GuestAddress(layout::PML4))?;
    memory.write_obj(layout::PAGE_DIRECTORY | PRESENT_WRITABLE, GuestAddress(layout::PDPT))?;
    let mut directory = [0u8; 4096];
    for (index, entry) in (0..).zip(directory.chunks_exact_mut(8)) {
        entry.copy_from_slice(&((index * LARGE_PAGE_SIZE) | LARGE_PAGE | PRESENT_WRITABLE).to_le_bytes());
    }
    memory.write_slice(&directory, GuestAddress(layout::PAGE_DIRECTORY))
}

fn zero_page(ram: &[Range<u64>], cmdline: &str, initrd: Option<&Range<u64>>, rsdp: u64) -> boot_params {
    let mut params = boot_params::default();
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER_MAGIC;
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.loadflags = LOADED_HIGH;
    params.hdr.kernel_alignment = 1 << 24;
    // The casts keep what is known to be below 4 GiB.
    params.hdr.cmd_line_ptr = layout::CMDLINE as u32;
    params.hdr.cmdline_size = cmdline.len() as u32;
    if let Some(initrd) = initrd {
        params.hdr.ramdisk_image = initrd.start as u32;
        params.hdr.ramdisk_size = (initrd.end - initrd.start) as u32;
    }
    params.acpi_rsdp_addr = rsdp;
    let map = e820_map(ram);
    params.e820_entries = map.len() as u8;
    params.e820_table[..map.len()].copy_from_slice(&map);
    params
}

/// What lies where, for the kernel's memory management. What has no entry does not exist for it.
fn e820_map(ram: &[Range<u64>]) -> Vec<boot_e820_entry> {
    let entry = |range: Range<u64>, type_| boot_e820_entry { addr: range.start, size: range.end - range.start, type_ };
    let mut map = vec![
        entry(layout::LOW_RAM, E820_RAM),
        entry(layout::VM_GENERATION_ID..layout::ACPI_TABLES.start, E820_RESERVED),
        entry(layout::ACPI_TABLES, E820_ACPI),
    ];
    for range in ram {
        map.push(entry(range.start.max(layout::HIGH_RAM_START)..range.end, E820_RAM));
    }
    map.push(entry(layout::PCI_ECAM, E820_RESERVED));
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::allocate;

    #[test]
    fn the_kernel_finds_its_command_line_initrd_and_tables() {
        let memory = allocate(64 << 20).unwrap();
        write_boot_structures(&memory, &layout::ram(64 << 20), "quiet", Some(&(0x3f0_0000..0x3f0_0123)), 0x9_f000)
            .unwrap();
        let params: boot_params = memory.read_obj(GuestAddress(layout::BOOT_PARAMS)).unwrap();
        let mut text = [0xff; 6];
        memory.read_slice(&mut text, GuestAddress(u64::from(params.hdr.cmd_line_ptr))).unwrap();
        assert_eq!(&text, b"quiet\0");
        assert_eq!({ params.hdr.ramdisk_image }, 0x3f0_0000);
        assert_eq!({ params.hdr.ramdisk_size }, 0x123);
        assert_eq!({ params.acpi_rsdp_addr }, 0x9_f000);
    }

    #[test]
    fn the_memory_map_covers_all_ram_but_the_firmware_area() {
        let ram: Vec<_> = e820_map(&layout::ram(5 << 30))
            .iter()
            .filter(|entry| { entry.type_ } == E820_RAM)
            .map(|entry| (entry.addr, entry.addr + entry.size))
            .collect();
        assert_eq!(ram, [(0, 0x9_e000), (0x10_0000, 3 << 30), (4 << 30, 6 << 30)]);
    }

    #[test]
    fn a_command_line_that_does_not_fit_is_refused() {
        let memory = allocate(64 << 20).unwrap();
        let fits = "x".repeat(MAX_CMDLINE_BYTES - 1);
        write_boot_structures(&memory, &[], &fits, None, 0).unwrap();
        let error = write_boot_structures(&memory, &[], &(fits + "x"), None, 0).unwrap_err();
        assert!(matches!(error, BootError::CmdlineTooLong(MAX_CMDLINE_BYTES)));
    }
}
