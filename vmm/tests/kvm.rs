//! The VMM under KVM, with tiny guests: any `/dev/kvm` will do.

mod guest;

use std::io::Write;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use guest::{
    COUNTER, POWER_OFF, SCRATCH, Step, VECTOR, failed_step, handle_interrupts, machine, map_devices, map_high, run,
    settings,
};
use hull_vmm::arch::layout;
use hull_vmm::config::{PmemSettings, Settings};
use hull_vmm::outcome::Outcome;
use hull_vmm_api::config::MAX_MEMORY_MIB;
use vm_memory::{Bytes, GuestAddress};

/// Runs a guest that carries out `steps`, unless this machine has no KVM.
fn assert_outcome(steps: &[Step], expected: &Outcome) {
    let Some(machine) = machine(settings(steps)) else { return };
    let memory = machine.vm().memory().clone();
    let outcome = run(machine);
    assert_eq!(outcome, *expected, "step {}", failed_step(&memory));
}

#[test]
fn powering_off_ends_the_vm() {
    assert_outcome(&[POWER_OFF], &Outcome::PoweredOff);
}

#[test]
fn both_ways_to_reset_end_the_vm() {
    assert_outcome(&[Step::Out(layout::PORT_RESET, 1)], &Outcome::Reset);
    assert_outcome(&[Step::Out(layout::PORT_I8042_COMMAND, 0xfe)], &Outcome::Reset);
}

#[test]
fn a_panic_is_told_from_a_reset() {
    assert_outcome(&[Step::In(layout::PORT_PVPANIC, 7), Step::Out(layout::PORT_PVPANIC, 1)], &Outcome::Panicked);
}

#[test]
fn a_triple_fault_ends_the_vm() {
    // With no interrupt table, an undefined instruction leads nowhere three times over.
    assert_outcome(&[Step::Undefined], &Outcome::TripleFault { cpu: 0 });
}

#[test]
fn memory_is_there_to_its_last_byte() {
    let last = (64 << 20) - 8;
    assert_outcome(
        &[
            Step::Write64(last, 0x1122_3344_5566_7788),
            Step::Expect32(last, 0x5566_7788),
            Step::Write64(SCRATCH, 7),
            Step::Expect32(SCRATCH, 7),
            POWER_OFF,
        ],
        &Outcome::PoweredOff,
    );
}

#[test]
fn as_much_memory_as_a_vm_can_have_is_there_to_its_last_byte() {
    let memory_mib = MAX_MEMORY_MIB;
    let last = layout::ram(memory_mib << 20).last().unwrap().end - 8;
    let mut steps = map_high(last);
    steps.extend([
        Step::Write64(last, 0x1122_3344_5566_7788),
        Step::Expect32(last + 4, 0x1122_3344),
        Step::Write64(SCRATCH, 7),
        Step::Expect32(last, 0x5566_7788),
        POWER_OFF,
    ]);
    let Some(machine) = machine(Settings { memory_mib, ..settings(&steps) }) else { return };
    let memory = machine.vm().memory().clone();
    let outcome = run(machine);
    assert_eq!(outcome, Outcome::PoweredOff, "step {}", failed_step(&memory));
}

#[test]
fn what_nobody_answers_to_reads_as_ones() {
    let mut steps = map_devices(&[0xd000_0000]);
    steps.extend([
        Step::Expect32(64 << 20, u32::MAX),
        Step::Expect32(0xd000_0000, u32::MAX),
        Step::Write32(0xd000_0000, 1),
        Step::Expect16(0xd000_0000, 0xffff),
        Step::In(0x70, 0xff),
        Step::In(0x3f8, 0xff),
        POWER_OFF,
    ]);
    assert_outcome(&steps, &Outcome::PoweredOff);
}

#[test]
fn an_expectation_that_is_not_met_fails_the_test() {
    assert_outcome(&[Step::Write8(SCRATCH, 1), Step::Expect8(SCRATCH, 2), POWER_OFF], &Outcome::Reset);
}

#[test]
fn persistent_memory_reads_as_its_file_and_stays_it() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&0x1122_3344_u32.to_le_bytes()).unwrap();
    let copy = file.try_clone().unwrap();
    // The fifth GiB is mapped as the others are, by a directory of its own.
    const DIRECTORY: u64 = SCRATCH + 0x4000;
    let at = layout::pmem(64 << 20, &[4])[0].start;
    let steps = [
        Step::Write64(layout::PDPT + 8 * 4, DIRECTORY | 0b11),
        Step::Write64(DIRECTORY, at | 0b1000_0011),
        Step::Expect32(at, 0x1122_3344),
        Step::Expect32(at + 4, 0),
        Step::Expect32(at + (2 << 20) - 4, 0),
        // As to a place where nobody is.
        Step::Write32(at, 7),
        Step::Expect32(at, 0x1122_3344),
        POWER_OFF,
    ];
    let mut settings = settings(&steps);
    settings.pmems = vec![PmemSettings { id: "image".to_owned(), file }];
    let Some(machine) = machine(settings) else { return };
    let memory = machine.vm().memory().clone();
    assert_eq!(run(machine), Outcome::PoweredOff, "step {}", failed_step(&memory));
    assert_eq!(copy.metadata().unwrap().len(), 4);
    let mut bytes = [0; 4];
    copy.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(u32::from_le_bytes(bytes), 0x1122_3344);
}

/// ECAM addresses of the rng device's configuration space, and of an empty place.
const RNG: u64 = layout::PCI_ECAM.start + (1 << 15);
const EMPTY: u64 = layout::PCI_ECAM.start + (20 << 15);
/// Where the guest puts its registers.
const BAR: u64 = 0xc020_0000;
const TABLE: u64 = BAR + 0x800;
const NOTIFY: u64 = BAR + 0x400;

/// Queue of 8 entries: descriptors, available ring, used ring, and a buffer.
const DESCRIPTORS: u64 = SCRATCH;
const AVAILABLE: u64 = SCRATCH + 0x1000;
const USED: u64 = SCRATCH + 0x2000;
const BUFFER: u64 = SCRATCH + 0x3000;

/// Finds the rng device, moves its BAR and brings it to `FEATURES_OK`.
fn negotiate() -> Vec<Step> {
    let mut steps = map_devices(&[RNG, EMPTY, BAR, 0xfee0_0000]);
    steps.extend([
        Step::Expect32(RNG, 0x1044_1af4),
        Step::Expect32(EMPTY, u32::MAX),
        Step::Write32(RNG + 0x10, BAR as u32),
        Step::Write32(RNG + 0x14, 0),
        // Memory space and bus master on.
        Step::Write16(RNG + 4, 6),
        Step::Write8(BAR + 0x14, 0),
        Step::Expect8(BAR + 0x14, 0),
        Step::Write8(BAR + 0x14, 3),
        // Offered: VERSION_1, and EVENT_IDX with INDIRECT_DESC; taken: the first.
        Step::Write32(BAR, 1),
        Step::Expect32(BAR + 4, 1),
        Step::Write32(BAR, 0),
        Step::Expect32(BAR + 4, 0x3000_0000),
        Step::Write32(BAR + 8, 1),
        Step::Write32(BAR + 0xc, 1),
        Step::Write8(BAR + 0x14, 0xb),
        Step::Expect8(BAR + 0x14, 0xb),
    ]);
    steps
}

/// Sets up the queue with a request in it, and interrupts.
fn set_up_queue() -> Vec<Step> {
    let mut steps = handle_interrupts();
    steps.extend([
        // MSI-X entry 1: to APIC 0, as VECTOR; then MSI-X on. The capability is the last, at 0x98.
        Step::Expect8(RNG + 0x98, 0x11),
        Step::Write32(TABLE + 16, 0xfee0_0000),
        Step::Write32(TABLE + 20, 0),
        Step::Write32(TABLE + 24, VECTOR.into()),
        Step::Write32(TABLE + 28, 0),
        Step::Write16(RNG + 0x9a, 0x8000),
        // Queue 0, vector 1.
        Step::Write16(BAR + 0x16, 0),
        Step::Expect16(BAR + 0x18, 8),
        Step::Write16(BAR + 0x1a, 1),
        Step::Expect16(BAR + 0x1a, 1),
        Step::Write64(BAR + 0x20, DESCRIPTORS),
        Step::Write32(BAR + 0x28, AVAILABLE as u32),
        Step::Write32(BAR + 0x2c, 0),
        Step::Write64(BAR + 0x30, USED),
        Step::Write16(BAR + 0x1c, 1),
        // A request for 64 bytes, which the device may write.
        Step::Write64(DESCRIPTORS, BUFFER),
        Step::Write64(DESCRIPTORS + 8, 64 | 2 << 32),
    ]);
    steps
}

#[test]
fn a_virtqueue_is_served_and_interrupts_the_guest() {
    let mut steps = negotiate();
    steps.extend(set_up_queue());
    steps.extend([
        Step::Write8(BAR + 0x14, 0xf),
        Step::Expect8(BAR + 0x14, 0xf),
        // Available from now on; the notification goes by ioeventfd, the answer by irqfd.
        Step::Write16(AVAILABLE + 2, 1),
        Step::Write16(NOTIFY, 0),
        Step::WaitForInterrupt,
        Step::Expect16(USED + 2, 1),
        Step::Expect32(USED + 8, 64),
        POWER_OFF,
    ]);
    let Some(machine) = machine(settings(&steps)) else { return };
    let memory = machine.vm().memory().clone();
    assert_eq!(
        run(machine),
        Outcome::PoweredOff,
        "step {}: {:?}",
        failed_step(&memory),
        steps.get(failed_step(&memory) as usize)
    );
    let mut bytes = [0; 64];
    memory.read_slice(&mut bytes, GuestAddress(BUFFER)).unwrap();
    assert_ne!(bytes, [0; 64]);
}

#[test]
fn a_ring_outside_memory_makes_the_device_ask_for_a_reset() {
    let mut steps = negotiate();
    steps.extend([
        Step::Write16(BAR + 0x16, 0),
        Step::Write64(BAR + 0x20, 1 << 40),
        Step::Write64(BAR + 0x28, AVAILABLE),
        Step::Write64(BAR + 0x30, USED),
        Step::Write16(BAR + 0x1c, 1),
        Step::Write8(BAR + 0x14, 0xf),
        // DEVICE_NEEDS_RESET.
        Step::Expect8(BAR + 0x14, 0x4f),
        Step::Write8(BAR + 0x14, 0),
        Step::Expect8(BAR + 0x14, 0),
        POWER_OFF,
    ]);
    assert_outcome(&steps, &Outcome::PoweredOff);
}

#[test]
fn a_paused_guest_stands_still() {
    let Some(mut machine) = machine(settings(&[Step::Count(COUNTER)])) else { return };
    let memory = machine.vm().memory().clone();
    let count = || memory.read_obj::<u64>(GuestAddress(COUNTER)).unwrap();
    let passes = |least: u64| {
        for _ in 0..1000 {
            if count() > least {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("the guest does not run");
    };
    machine.resume();
    passes(0);
    for _ in 0..20 {
        machine.pause();
        let stopped_at = count();
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(count(), stopped_at);
        machine.resume();
        passes(stopped_at);
    }
    assert!(machine.counters().exits["interrupted"] >= 20);
    machine.ending().end(Outcome::Killed);
}
