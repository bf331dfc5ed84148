//! The state in which virtual processors start.
//!
//! The boot processor starts in 64-bit mode at the kernel's entry point (Documentation/arch/x86/boot.rst, "64-bit boot
//! protocol"); the others wait in KVM for the boot processor's start-up interrupt, as after power-on.

use kvm_bindings::{Msrs, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;

use super::{boot, layout};

const CR0_PE: u64 = 1 << 0;
const CR0_MP: u64 = 1 << 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_WP: u64 = 1 << 16;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of the flags is always set; interrupts are off.
const RFLAGS: u64 = 1 << 1;

/// `IA32_MISC_ENABLE`; bit 0: fast string operations.
const MSR_MISC_ENABLE: u32 = 0x1a0;
/// `IA32_MTRR_DEF_TYPE`; bit 11: enabled; type 6: write-back. Linux takes memory for uncached without it.
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

/// Offsets of `LVT LINT0` and `LINT1` in the local APIC's page, and the delivery modes that the MultiProcessor
/// specification (appendix E) has firmware leave there: external interrupts and NMI.
const APIC_LVT_LINT0: usize = 0x350;
const APIC_LVT_LINT1: usize = 0x360;
const APIC_MODE_EXTINT: u32 = 7 << 8;
const APIC_MODE_NMI: u32 = 4 << 8;

/// Why a processor's state could not be set.
#[derive(Debug, thiserror::Error)]
#[error("cannot set the {what} of a virtual CPU: {source}")]
pub struct RegisterError {
    /// Which part of the state.
    pub what: &'static str,
    /// KVM's answer.
    pub source: kvm_ioctls::Error,
}

fn step(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> RegisterError {
    move |source| RegisterError { what, source }
}

/// Puts a processor that was just made into its first state. `entry` is given for the boot processor.
///
/// # Errors
///
/// When KVM refuses.
pub fn set_up(vcpu: &VcpuFd, entry: Option<u64>) -> Result<(), RegisterError> {
    set_msrs(vcpu)?;
    set_local_interrupts(vcpu)?;
    if let Some(entry) = entry {
        let regs = kvm_regs { rip: entry, rsi: layout::BOOT_PARAMS, rflags: RFLAGS, ..Default::default() };
        vcpu.set_regs(&regs).map_err(step("general registers"))?;
        let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
        vcpu.set_fpu(&fpu).map_err(step("FPU"))?;
        enter_long_mode(vcpu)?;
    }
    Ok(())
}

fn set_msrs(vcpu: &VcpuFd) -> Result<(), RegisterError> {
    let entries = [
        kvm_msr_entry { index: MSR_MISC_ENABLE, data: 1, ..Default::default() },
        kvm_msr_entry { index: MSR_MTRR_DEF_TYPE, data: MTRR_ENABLED_WRITE_BACK, ..Default::default() },
    ];
    let what = "model-specific registers";
    let failed = |errno| RegisterError { what, source: kvm_ioctls::Error::new(errno) };
    let msrs = Msrs::from_entries(&entries).map_err(|_| failed(libc::ENOMEM))?;
    match vcpu.set_msrs(&msrs).map_err(step(what))? {
        count if count == entries.len() => Ok(()),
        _ => Err(failed(libc::EINVAL)),
    }
}

fn set_local_interrupts(vcpu: &VcpuFd) -> Result<(), RegisterError> {
    let mut apic = vcpu.get_lapic().map_err(step("local APIC"))?;
    for (offset, mode) in [(APIC_LVT_LINT0, APIC_MODE_EXTINT), (APIC_LVT_LINT1, APIC_MODE_NMI)] {
        for (byte, value) in apic.regs[offset..offset + 4].iter_mut().zip(mode.to_le_bytes()) {
            *byte = value as std::ffi::c_char;
        }
    }
    vcpu.set_lapic(&apic).map_err(step("local APIC"))
}

fn enter_long_mode(vcpu: &VcpuFd) -> Result<(), RegisterError> {
    let mut sregs = vcpu.get_sregs().map_err(step("segments"))?;
    let data = segment(3);
    sregs.cs = segment(2);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = segment(4);
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = (size_of_val(&boot::GDT) - 1) as u16;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_PG;
    sregs.cr3 = layout::PML4;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
    vcpu.set_sregs(&sregs).map_err(step("segments"))
}

/// The segment register that loading selector `8 * index` gives (AMD64 manual, volume 2, section 4.7).
fn segment(index: u16) -> kvm_segment {
    let descriptor = boot::GDT[usize::from(index)];
    let bits = |shift: u32, width: u32| (descriptor >> shift & ((1 << width) - 1)) as u8;
    let granular = bits(55, 1) == 1;
    let limit = (descriptor & 0xffff | descriptor >> 32 & 0xf_0000) as u32;
    kvm_segment {
        base: 0,
        limit: if granular { limit << 12 | 0xfff } else { limit },
        selector: index * 8,
        type_: bits(40, 4),
        s: bits(44, 1),
        dpl: bits(45, 2),
        present: bits(47, 1),
        l: bits(53, 1),
        db: bits(54, 1),
        g: bits(55, 1),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_are_what_the_boot_protocol_asks_for() {
        let code = segment(2);
        assert_eq!((code.selector, code.type_, code.s, code.present, code.l, code.db), (0x10, 0xb, 1, 1, 1, 0));
        let data = segment(3);
        assert_eq!((data.selector, data.type_, data.s, data.present, data.l, data.db), (0x18, 0x3, 1, 1, 0, 1));
        assert_eq!((data.limit, data.g), (0xffff_ffff, 1));
        let tss = segment(4);
        assert_eq!((tss.type_, tss.s), (0xb, 0));
    }
}
