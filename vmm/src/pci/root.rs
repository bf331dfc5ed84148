//! The PCI bus: finds the function that an address belongs to.
//!
//! vCPUs ask on every exit, so a look-up takes no lock of a function: where the BARs point is kept beside them. Lock
//! order: the slots, then one function.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};

use crate::arch::layout;

/// Device numbers on a bus.
pub const SLOTS: usize = 32;
/// A BAR that decodes nothing.
const NOWHERE: u64 = u64::MAX;

/// A function with one BAR in memory space.
pub trait PciFunction: Send {
    /// The guest reads configuration space.
    fn read_config(&mut self, at: usize, data: &mut [u8]);
    /// The guest writes configuration space.
    fn write_config(&mut self, at: usize, data: &[u8]);
    /// Where the BAR points; `None` while the function does not answer to memory accesses.
    fn bar(&self) -> Option<u64>;
    /// The guest reads `offset` of the BAR.
    fn read_bar(&mut self, offset: u64, data: &mut [u8]);
    /// The guest writes `offset` of the BAR.
    fn write_bar(&mut self, offset: u64, data: &[u8]);
}

/// Bytes that the BAR of each function occupies.
pub const BAR_SIZE: u64 = 0x1000;

/// A place on the bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Address {
    /// Device number.
    pub device: u8,
}

impl Address {
    /// Where a function at this place has its BAR until the guest moves it.
    #[must_use]
    pub fn initial_bar(self) -> u64 {
        layout::PCI_BARS.start + u64::from(self.device) * BAR_SIZE
    }
}

impl fmt::Display for Address {
    /// As Linux writes it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "0000:00:{:02x}.0", self.device)
    }
}

struct Slot {
    function: Arc<Mutex<dyn PciFunction>>,
    bar: AtomicU64,
}

/// The bus.
#[derive(Default)]
pub struct PciRoot {
    slots: RwLock<[Option<Slot>; SLOTS]>,
}

fn lock(function: &Mutex<dyn PciFunction>) -> MutexGuard<'_, dyn PciFunction + 'static> {
    function.lock().unwrap_or_else(PoisonError::into_inner)
}

impl PciRoot {
    fn slots(&self) -> RwLockReadGuard<'_, [Option<Slot>; SLOTS]> {
        self.slots.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first free place. Device number 0 stays free: it is the host bridge's by custom.
    #[must_use]
    pub fn free_address(&self) -> Option<Address> {
        let slots = self.slots();
        (1..SLOTS).find(|&device| slots[device].is_none()).map(|device| Address { device: device as u8 })
    }

    /// Puts a function at a free place.
    pub fn insert(&self, address: Address, function: Arc<Mutex<dyn PciFunction>>) {
        let bar = AtomicU64::new(lock(&function).bar().unwrap_or(NOWHERE));
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        slots[usize::from(address.device) % SLOTS] = Some(Slot { function, bar });
    }

    /// Takes a function off the bus.
    pub fn remove(&self, address: Address) {
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        slots[usize::from(address.device) % SLOTS] = None;
    }

    /// The guest reads `data` at `offset` of the bus's configuration space. Where nothing is, all bits are set.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let (device, function, at) = split(offset);
        if function != 0 {
            return;
        }
        if let Some(slot) = self.slots().get(device).and_then(Option::as_ref) {
            lock(&slot.function).read_config(at, data);
        }
    }

    /// The guest writes `data` at `offset` of the bus's configuration space.
    pub fn write_config(&self, offset: u64, data: &[u8]) {
        let (device, function, at) = split(offset);
        if function != 0 {
            return;
        }
        if let Some(slot) = self.slots().get(device).and_then(Option::as_ref) {
            let mut function = lock(&slot.function);
            function.write_config(at, data);
            slot.bar.store(function.bar().unwrap_or(NOWHERE), Ordering::Release);
        }
    }

    /// The guest reads `data` at a memory address; false if no BAR covers it.
    pub fn read_memory(&self, address: u64, data: &mut [u8]) -> bool {
        self.at_bar(address, |function, offset| function.read_bar(offset, data))
    }

    /// The guest writes `data` at a memory address; false if no BAR covers it.
    pub fn write_memory(&self, address: u64, data: &[u8]) -> bool {
        self.at_bar(address, |function, offset| function.write_bar(offset, data))
    }

    fn at_bar(&self, address: u64, access: impl FnOnce(&mut dyn PciFunction, u64)) -> bool {
        let slots = self.slots();
        for slot in slots.iter().flatten() {
            let bar = slot.bar.load(Ordering::Acquire);
            if bar != NOWHERE && address.wrapping_sub(bar) < BAR_SIZE {
                access(&mut *lock(&slot.function), address - bar);
                return true;
            }
        }
        false
    }
}

/// Device, function and register of an offset in the bus's configuration space (PCI Express base specification 6.0,
/// section 7.2.2).
fn split(offset: u64) -> (usize, u64, usize) {
    ((offset >> 15) as usize, offset >> 12 & 7, (offset & 0xfff) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Fake {
        bar: Option<u64>,
        written: Vec<(u64, u8)>,
    }

    impl PciFunction for Fake {
        fn read_config(&mut self, at: usize, data: &mut [u8]) {
            data.fill(at as u8);
        }

        fn write_config(&mut self, _at: usize, data: &[u8]) {
            self.bar = Some(u64::from(data[0]) << 12);
        }

        fn bar(&self) -> Option<u64> {
            self.bar
        }

        fn read_bar(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }

        fn write_bar(&mut self, offset: u64, data: &[u8]) {
            self.written.push((offset, data[0]));
        }
    }

    #[test]
    fn configuration_space_leads_to_the_device() {
        let root = PciRoot::default();
        root.insert(Address { device: 3 }, Arc::new(Mutex::new(Fake::default())));
        let mut data = [0];
        for (offset, value) in
            [(3 << 15 | 0x2c, 0x2c), (3 << 15 | 1 << 12 | 0x2c, 0xff), (0, 0xff), (4 << 15, 0xff), (u64::MAX, 0xff)]
        {
            root.read_config(offset, &mut data);
            assert_eq!(data[0], value, "{offset:#x}");
        }
    }

    #[test]
    fn a_bar_is_found_where_the_guest_put_it() {
        let root = PciRoot::default();
        let fake = Arc::new(Mutex::new(Fake::default()));
        root.insert(Address { device: 1 }, fake.clone());
        assert!(!root.write_memory(0x5000, &[1]));
        assert!(!root.write_memory(u64::MAX, &[1]));
        root.write_config(1 << 15, &[5]);
        assert!(root.write_memory(0x5123, &[1]));
        assert!(!root.write_memory(0x6000, &[1]));
        root.write_config(1 << 15, &[6]);
        assert!(!root.write_memory(0x5123, &[1]));
        assert!(root.write_memory(0x6fff, &[2]));
        assert_eq!(fake.lock().unwrap().written, [(0x123, 1), (0xfff, 2)]);
        root.remove(Address { device: 1 });
        assert!(!root.read_memory(0x6000, &mut [0]));
    }

    #[test]
    fn free_places_start_behind_the_host_bridge_and_run_out() {
        let root = PciRoot::default();
        for device in 1..32 {
            let address = root.free_address().unwrap();
            assert_eq!(address, Address { device });
            root.insert(address, Arc::new(Mutex::new(Fake::default())));
        }
        assert_eq!(root.free_address(), None);
        assert_eq!(Address { device: 31 }.to_string(), "0000:00:1f.0");
    }
}
