//! What CPUID tells the guest: what KVM supports on this host, with the topology of this VM.
//!
//! The guest has one package with one thread per core; APIC identifiers count from 0. Sources: Intel SDM volume 2A,
//! CPUID; AMD APM volume 3, appendix E; Documentation/virt/kvm/x86/cpuid.rst.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Leaf 1, ECX: the guest may sleep until its TSC reaches a value. KVM has it, but leaves it to the VMM to say so.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1, ECX: software runs under a hypervisor.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: the count of logical processors in EBX is valid.
const HTT: u32 = 1 << 28;
/// Leaf 6, EAX: the APIC timer never stops, so that the guest needs no other one to wake up from sleep.
const ARAT: u32 = 1 << 2;
/// Leaf 0x8000_0001, ECX: counters of the core and of last-level cache and data fabric (AMD).
const PERFORMANCE_COUNTERS: u32 = 1 << 23 | 1 << 24 | 1 << 28;
/// Leaf 0x4000_0000: first of KVM's own leaves; its EAX is the last.
const HYPERVISOR_BASE: u32 = 0x4000_0000;
/// The leaf by which hypervisors tell the frequencies of TSC and APIC timer, in kHz.
const HYPERVISOR_TIMING: u32 = 0x4000_0010;
/// The rate at which KVM runs the APIC timer (`APIC_BUS_FREQUENCY`).
const APIC_BUS_KHZ: u32 = 1_000_000;

/// What a guest needs to know of one virtual CPU.
#[derive(Clone, Copy, Debug)]
pub struct CpuTopology {
    /// Its index and APIC identifier.
    pub index: u8,
    /// CPUs that the VM has, parked ones included.
    pub count: u8,
    /// TSC frequency, or 0 if KVM does not tell.
    pub tsc_khz: u32,
}

impl CpuTopology {
    /// Bits of an APIC identifier that tell cores apart.
    fn core_bits(self) -> u32 {
        u8::BITS - (self.count - 1).leading_zeros()
    }

    fn id(self) -> u32 {
        u32::from(self.index)
    }

    fn last(self) -> u32 {
        u32::from(self.count) - 1
    }
}

/// Makes what KVM supports (`KVM_GET_SUPPORTED_CPUID`) into what one vCPU has.
pub fn adapt(supported: &CpuId, cpu: CpuTopology) -> Result<CpuId, vmm_sys_util::fam::Error> {
    let mut entries: Vec<kvm_cpuid_entry2> =
        supported.as_slice().iter().filter(|entry| !is_topology(entry.function)).copied().collect();
    let (mut last_basic, mut amd) = (0, false);
    for entry in &mut entries {
        match entry.function {
            0 => {
                last_basic = entry.eax;
                // "AuthenticAMD" or "HygonGenuine".
                amd = matches!(entry.ebx, 0x6874_7541 | 0x6f67_7948);
            }
            _ => adapt_entry(entry, cpu),
        }
    }
    if last_basic >= 0xb {
        entries.extend(extended_topology(0xb, cpu));
    }
    if last_basic >= 0x1f {
        entries.extend(extended_topology(0x1f, cpu));
    }
    if amd {
        entries.push(kvm_cpuid_entry2 { function: 0x8000_001e, eax: cpu.id(), ebx: cpu.id(), ..Default::default() });
    }
    if cpu.tsc_khz != 0 {
        entries.push(kvm_cpuid_entry2 {
            function: HYPERVISOR_TIMING,
            eax: cpu.tsc_khz,
            ebx: APIC_BUS_KHZ,
            ..Default::default()
        });
    }
    CpuId::from_entries(&entries)
}

/// Leaves that are written anew, because the host's own say nothing of the VM: extended topology of Intel and AMD.
fn is_topology(function: u32) -> bool {
    matches!(function, 0xb | 0x1f | 0x8000_001e | 0x8000_0026 | HYPERVISOR_TIMING)
}

fn adapt_entry(entry: &mut kvm_cpuid_entry2, cpu: CpuTopology) {
    match entry.function {
        1 => {
            entry.ecx |= TSC_DEADLINE | HYPERVISOR;
            entry.edx |= HTT;
            entry.ebx = entry.ebx & 0xffff | u32::from(cpu.count) << 16 | cpu.id() << 24;
        }
        // Deterministic cache parameters (Intel): level 1 and 2 belong to a core, level 3 to the package.
        4 if entry.eax & 0x1f != 0 => {
            let sharing = if entry.eax >> 5 & 7 >= 3 { cpu.last() } else { 0 };
            entry.eax = entry.eax & 0x3fff | sharing << 14 | cpu.last() << 26;
        }
        6 => entry.eax |= ARAT,
        // Performance counters: not virtualized, so that a guest cannot watch its neighbours through them.
        0xa => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        HYPERVISOR_BASE if cpu.tsc_khz != 0 => entry.eax = entry.eax.max(HYPERVISOR_TIMING),
        0x8000_0001 => entry.ecx &= !PERFORMANCE_COUNTERS,
        // Cores in the package, and bits of the identifier for them.
        0x8000_0008 => entry.ecx = cpu.core_bits() << 12 | cpu.last(),
        // Cache properties (AMD).
        0x8000_001d if entry.eax & 0x1f != 0 => {
            let sharing = if entry.eax >> 5 & 7 >= 3 { cpu.last() } else { 0 };
            entry.eax = entry.eax & !(0xfff << 14) | sharing << 14;
        }
        // Performance monitoring version 2 (AMD).
        0x8000_0022 => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        _ => {}
    }
}

/// Leaf 0xB and its successor: the levels of the topology, from the thread up (Intel SDM volume 3A, section 10.9.1).
fn extended_topology(function: u32, cpu: CpuTopology) -> [kvm_cpuid_entry2; 3] {
    const THREADS: u32 = 1 << 8;
    const CORES: u32 = 2 << 8;
    let level = |index, eax, ebx, kind| kvm_cpuid_entry2 {
        function,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax,
        ebx,
        ecx: kind | index,
        edx: cpu.id(),
        ..Default::default()
    };
    [level(0, 0, 1, THREADS), level(1, cpu.core_bits(), u32::from(cpu.count), CORES), level(2, 0, 0, 0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, eax: u32, ebx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, eax, ebx, ..Default::default() }
    }

    fn adapted(index: u8, count: u8) -> Vec<kvm_cpuid_entry2> {
        let host = [
            entry(0, 0x1f, 0x6874_7541),
            entry(1, 0x00a2_0f12, 0x0c10_0800),
            entry(0xb, 1, 2),
            entry(0x4000_0000, 0x4000_0001, 0),
            entry(0x8000_0008, 0x3030, 0),
            entry(0x8000_001d, 0x0001_4163, 0),
        ];
        let supported = CpuId::from_entries(&host).unwrap();
        adapt(&supported, CpuTopology { index, count, tsc_khz: 2_000_000 }).unwrap().as_slice().to_vec()
    }

    fn find(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        let mut found = entries.iter().filter(|e| e.function == function && e.index == index);
        let entry = *found.next().unwrap();
        assert!(found.next().is_none(), "leaf {function:#x} twice");
        entry
    }

    #[test]
    fn each_cpu_has_its_own_identifier_in_every_leaf() {
        let entries = adapted(5, 6);
        assert_eq!(find(&entries, 1, 0).ebx, 5 << 24 | 6 << 16 | 0x0800);
        for leaf in [0xb, 0x1f] {
            assert_eq!(find(&entries, leaf, 0).edx, 5);
            let cores = find(&entries, leaf, 1);
            assert_eq!((cores.eax, cores.ebx, cores.ecx, cores.edx), (3, 6, 0x201, 5));
            assert_eq!(find(&entries, leaf, 2).ecx, 2);
        }
        assert_eq!(find(&entries, 0x8000_001e, 0).eax, 5);
        assert_eq!(find(&entries, 0x8000_0008, 0).ecx, 3 << 12 | 5);
    }

    #[test]
    fn the_last_level_cache_is_shared_by_all() {
        assert_eq!(find(&adapted(0, 4), 0x8000_001d, 0).eax >> 14 & 0xfff, 3);
    }

    #[test]
    fn the_guest_learns_its_frequencies_and_that_it_is_one() {
        let entries = adapted(0, 1);
        assert_eq!(find(&entries, 0x4000_0000, 0).eax, 0x4000_0010);
        assert_eq!(find(&entries, 0x4000_0010, 0).eax, 2_000_000);
        assert_eq!(find(&entries, 1, 0).ecx, TSC_DEADLINE | HYPERVISOR);
    }
}
