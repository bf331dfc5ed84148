//! Every guest-physical address and port of the x86-64 board.
//!
//! ```text
//! 0x0000_0000 ┬ RAM
//!             │   0x0000_2000  boot_params          (read by the kernel once, then its own)
//!             │   0x0000_3000  command line, GDT
//!             │   0x0000_4000  page tables          (until the kernel has its own)
//! 0x0009_e000 ┼ VM generation ID                    (e820: reserved)
//! 0x0009_f000 ┼ ACPI tables                         (e820: ACPI data)
//! 0x000a_0000 ┼ RAM that nobody uses                (no e820 entry)
//! 0x0010_0000 ┼ RAM: kernel where it was linked to; initrd at the end of the RAM below 3 GiB
//! 0xc000_0000 ┼ hole
//!             │   0xc000_0000  PCI BARs
//!             │   0xe000_0000  PCI configuration space (ECAM)
//!             │   0xfec0_0000  I/O APIC             (with a debug console only)
//!             │   0xfee0_0000  local APICs
//!             │   0xfeff_c000  KVM's own pages      (Intel only)
//! 0x1_0000_0000 ┼ RAM beyond 3 GiB
//!               ┴ persistent memory, behind all RAM, on 2 MiB boundaries
//! ```

use std::ops::Range;

/// A page; everything here is laid out in them.
pub const PAGE_SIZE: u64 = 4096;

/// `EM_X86_64`: what `e_machine` of an ELF kernel for this board is.
pub const ELF_MACHINE: u16 = 62;

/// `struct boot_params`, the "zero page" (Documentation/arch/x86/zero-page.rst).
pub const BOOT_PARAMS: u64 = 0x2000;
/// The kernel's command line, up to [`hull_vmm_api::config::MAX_CMDLINE_BYTES`].
pub const CMDLINE: u64 = 0x3000;
/// The global descriptor table that the boot processor starts with, in the rest of the command line's page.
pub const GDT: u64 = 0x3f00;
/// Page-map level 4; the next lower tables follow, a page each.
pub const PML4: u64 = 0x4000;
/// Page-directory-pointer table, for the first 512 GiB.
pub const PDPT: u64 = 0x5000;
/// Page directory, for the first GiB in pages of 2 MiB.
pub const PAGE_DIRECTORY: u64 = 0x6000;

/// RAM that the kernel may use from the start on, below 640 KiB.
pub const LOW_RAM: Range<u64> = 0..VM_GENERATION_ID;
/// The page that holds the VM generation ID, with which a kernel notices that it was cloned.
pub const VM_GENERATION_ID: u64 = 0x9_e000;
/// ACPI tables: one page, for all that 64 processors need.
pub const ACPI_TABLES: Range<u64> = 0x9_f000..0xa_0000;
/// Where RAM goes on after what a PC has its video memory and firmware in.
pub const HIGH_RAM_START: u64 = 0x10_0000;

/// Where RAM below 4 GiB ends at most.
pub const HOLE: Range<u64> = 0xc000_0000..0x1_0000_0000;
/// Where PCI base address registers may point.
pub const PCI_BARS: Range<u64> = 0xc000_0000..0xe000_0000;
/// Configuration space of PCI bus 0, the only one: 256 functions of 4 KiB (PCI Express base specification 6.0,
/// section 7.2.2).
pub const PCI_ECAM: Range<u64> = 0xe000_0000..0xe010_0000;
/// The I/O APIC, where every PC has it.
pub const IO_APIC: u64 = 0xfec0_0000;
/// The local APICs, where every PC has them.
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// A page that KVM keeps an identity map in, for real mode on Intel processors without unrestricted guest.
pub const KVM_IDENTITY_MAP: u64 = 0xfeff_c000;
/// Three pages that KVM keeps a task state segment in, for the same.
pub const KVM_TSS: u64 = 0xfeff_d000;

/// The keyboard controller's command port; of it, only the reset pulse exists.
pub const PORT_I8042_COMMAND: u16 = 0x64;
/// The first 16550's eight registers (`ttyS0`), with a debug console only.
pub const PORT_SERIAL: Range<u16> = 0x3f8..0x400;
/// Interrupt line of the 16550.
pub const IRQ_SERIAL: u32 = 4;
/// The panic device (QEMU's docs/specs/pvpanic.rst).
pub const PORT_PVPANIC: u16 = 0x505;
/// ACPI sleep control register (ACPI 6.5, section 4.8.3.7); the sleep status register is the next port.
pub const PORT_SLEEP_CONTROL: u16 = 0x600;
/// ACPI sleep status register.
pub const PORT_SLEEP_STATUS: u16 = 0x601;
/// ACPI reset register (ACPI 6.5, section 4.8.3.6).
pub const PORT_RESET: u16 = 0x602;

/// GSIs that the I/O APIC owns; message-signalled interrupts are routed from the next on.
pub const IO_APIC_PINS: u32 = 24;

/// Where `size_bytes` of guest RAM lie: first up to the hole, then beyond it.
#[must_use]
pub fn ram(size_bytes: u64) -> Vec<Range<u64>> {
    let low = size_bytes.min(HOLE.start);
    let high = HOLE.end..HOLE.end + (size_bytes - low);
    [0..low, high].into_iter().filter(|range| !range.is_empty()).collect()
}

/// What Linux maps persistent memory in units of: a subsection of its memory map.
pub const PMEM_ALIGNMENT: u64 = 2 << 20;

/// Where pieces of persistent memory lie, one of at least each of these sizes, beside `size_bytes` of RAM.
#[must_use]
pub fn pmem(size_bytes: u64, sizes: &[u64]) -> Vec<Range<u64>> {
    let ram_end = ram(size_bytes).last().map_or(0, |range| range.end);
    let mut start = ram_end.max(HOLE.end).next_multiple_of(PMEM_ALIGNMENT);
    let mut place = |size: &u64| {
        let end = start.saturating_add(*size).checked_next_multiple_of(PMEM_ALIGNMENT).unwrap_or(u64::MAX);
        std::mem::replace(&mut start, end)..end
    };
    sizes.iter().map(&mut place).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_skips_the_hole_and_loses_nothing() {
        assert_eq!(ram(1 << 30), std::iter::once(0..1 << 30).collect::<Vec<_>>());
        assert_eq!(ram(3 << 30), std::iter::once(0..3 << 30).collect::<Vec<_>>());
        assert_eq!(ram((3 << 30) + 4096), [0..3 << 30, 4 << 30..(4 << 30) + 4096]);
        assert_eq!(ram(512 << 30).iter().map(|r| r.end - r.start).sum::<u64>(), 512 << 30);
    }

    #[test]
    fn persistent_memory_lies_behind_all_ram() {
        assert_eq!(
            pmem(128 << 20, &[1, 2 << 20]),
            [4 << 30..(4 << 30) + (2 << 20), (4 << 30) + (2 << 20)..(4 << 30) + (4 << 20)]
        );
        assert_eq!(pmem(4 << 30, &[3 << 20])[0].start, 5 << 30);
        assert_eq!(pmem((4 << 30) + (1 << 20), &[1])[0].start, (5 << 30) + (2 << 20));
        assert_eq!(pmem(1 << 30, &[u64::MAX])[0].end, u64::MAX);
    }

    #[test]
    fn boot_structures_do_not_overlap() {
        const { assert!(CMDLINE + hull_vmm_api::config::MAX_CMDLINE_BYTES as u64 <= GDT) };
        const { assert!(BOOT_PARAMS + PAGE_SIZE <= CMDLINE && GDT + 0x40 <= PML4) };
        const { assert!(PAGE_DIRECTORY + PAGE_SIZE <= VM_GENERATION_ID) };
        const { assert!(PCI_BARS.end <= PCI_ECAM.start && PCI_ECAM.end <= IO_APIC) };
    }
}
