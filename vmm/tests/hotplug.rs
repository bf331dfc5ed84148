//! Devices come and go. A process of its own: what it holds is counted.

// Of the tiny guests' many steps one is used here.
#[allow(dead_code)]
mod guest;

use std::path::Path;
use std::time::{Duration, Instant};

use guest::{COUNTER, Step, machine, settings};
use hull_vmm::outcome::Outcome;
use hull_vmm::virtio::block::Block;
use hull_vmm::virtio::fs::Fs;
use hull_vmm::vm::machine::Machine;
use hull_vmm_api::config::CachePolicy;
use vm_memory::{Bytes, GuestAddress};

/// How often.
const TIMES: usize = 1000;

/// How many descriptors and threads this process has.
fn held() -> [usize; 2] {
    ["/proc/self/fd", "/proc/self/task"].map(|directory| Path::new(directory).read_dir().unwrap().count())
}

/// Puts a disk and a share on the bus and takes them off again; where they were.
fn come_and_go(machine: &mut Machine) -> [hull_vmm::pci::root::Address; 2] {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    let disk = Block::new("coming", file, false, None).unwrap();
    let root = std::fs::File::open("/").unwrap();
    let share = Fs::new("coming-too", root.into(), "tag", true, CachePolicy::Auto).unwrap();
    let addresses = [("coming", Box::new(disk) as _), ("coming-too", Box::new(share) as _)]
        .map(|(id, device)| machine.plug(id, device).unwrap());
    for id in ["coming-too", "coming"] {
        machine.remove_device(id).unwrap();
    }
    addresses
}

#[test]
fn devices_come_and_go_a_thousand_times_and_leave_nothing() {
    let Some(mut machine) = machine(settings(&[Step::Count(COUNTER)])) else { return };
    machine.resume();
    let places = come_and_go(&mut machine);
    // Once the guest runs, all threads do.
    let memory = machine.vm().memory().clone();
    let deadline = Instant::now() + Duration::from_secs(30);
    while memory.read_obj::<u64>(GuestAddress(COUNTER)).unwrap() == 0 {
        assert!(Instant::now() < deadline, "the guest does not run");
        std::thread::yield_now();
    }
    let before = held();
    for _ in 0..TIMES {
        assert_eq!(come_and_go(&mut machine), places);
    }
    assert_eq!(held(), before);
    machine.ending().end(Outcome::Killed);
}
