//! The configuration space of a function with a type 0 header (PCI local bus specification 3.0, chapter 6): 256 bytes,
//! each bit of which the guest may or may not write. What lies beyond reads as ones, as if it did not exist.

/// Bytes of a function's own configuration space.
pub const SIZE: usize = 256;

/// Offsets in the header.
pub mod offset {
    /// Vendor and device identifiers.
    pub const IDS: usize = 0x00;
    /// Command register.
    pub const COMMAND: usize = 0x04;
    /// Status register.
    pub const STATUS: usize = 0x06;
    /// Revision and class code.
    pub const CLASS: usize = 0x08;
    /// First base address register.
    pub const BAR0: usize = 0x10;
    /// Subsystem identifiers.
    pub const SUBSYSTEM: usize = 0x2c;
    /// Where the list of capabilities starts.
    pub const CAPABILITIES: usize = 0x34;
    /// Where capabilities may lie.
    pub const FIRST_CAPABILITY: usize = 0x40;
}

/// Command register: the function answers to memory accesses.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// Command register: the function may access memory. Kept for the guest; devices do not ask.
const COMMAND_BUS_MASTER: u16 = 1 << 2;
/// Command register: interrupt lines are off. There are none.
const COMMAND_INTX_OFF: u16 = 1 << 10;
/// Status register: there is a list of capabilities.
const STATUS_CAPABILITIES: u16 = 1 << 4;
/// Base address register: 64 bits wide, in memory space.
const BAR_MEMORY_64: u32 = 0b100;

/// What a function is.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Class, subclass and interface.
    pub class: u32,
    /// Revision.
    pub revision: u8,
    /// Subsystem vendor.
    pub subsystem_vendor: u16,
    /// Subsystem.
    pub subsystem: u16,
}

/// A function's configuration space.
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    next_capability: usize,
    last_link: usize,
}

impl ConfigSpace {
    /// A space with a header and one 64-bit memory BAR of `bar_size` bytes (a power of two) that points at
    /// `bar_address`; memory decoding is off.
    #[must_use]
    pub fn new(identity: Identity, bar_address: u64, bar_size: u64) -> Self {
        let mut space = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            next_capability: offset::FIRST_CAPABILITY,
            last_link: offset::CAPABILITIES,
        };
        space.set(offset::IDS, &(u32::from(identity.device) << 16 | u32::from(identity.vendor)).to_le_bytes());
        space.set(offset::STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        space.set(offset::CLASS, &(identity.class << 8 | u32::from(identity.revision)).to_le_bytes());
        let subsystem = u32::from(identity.subsystem) << 16 | u32::from(identity.subsystem_vendor);
        space.set(offset::SUBSYSTEM, &subsystem.to_le_bytes());
        let command = COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_INTX_OFF;
        space.allow(offset::COMMAND, &command.to_le_bytes());
        space.set(offset::BAR0, &(bar_address | u64::from(BAR_MEMORY_64)).to_le_bytes());
        // The guest sizes a BAR by the bits that it cannot set (section 6.2.5.1).
        space.allow(offset::BAR0, &(!(bar_size - 1)).to_le_bytes());
        space
    }

    /// Appends a capability: `body` is what follows the identifier and the link. Returns its offset.
    ///
    /// # Panics
    ///
    /// When the capabilities outgrow the space, which is a mistake of the program.
    pub fn add_capability(&mut self, id: u8, body: &[u8]) -> usize {
        let at = self.next_capability;
        let end = at + 2 + body.len();
        assert!(end <= SIZE, "capabilities do not fit");
        self.bytes[at] = id;
        self.bytes[at + 2..end].copy_from_slice(body);
        self.bytes[self.last_link] = at as u8;
        self.last_link = at + 1;
        self.next_capability = end.next_multiple_of(4);
        at
    }

    /// Lets the guest change the bits of `mask` from `at` on.
    pub fn allow(&mut self, at: usize, mask: &[u8]) {
        self.writable[at..at + mask.len()].copy_from_slice(mask);
    }

    fn set(&mut self, at: usize, value: &[u8]) {
        self.bytes[at..at + value.len()].copy_from_slice(value);
    }

    /// The guest reads `data` at `at`.
    pub fn read(&self, at: usize, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = at.checked_add(index).and_then(|at| self.bytes.get(at)).copied().unwrap_or(0xff);
        }
    }

    /// The guest writes `data` at `at`; what it may not change stays.
    pub fn write(&mut self, at: usize, data: &[u8]) {
        let Some(bytes) = self.bytes.get_mut(at..) else { return };
        for ((byte, mask), value) in bytes.iter_mut().zip(&self.writable[at..]).zip(data) {
            *byte = *byte & !mask | value & mask;
        }
    }

    /// The 16 bits at `at`.
    #[must_use]
    pub fn u16_at(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    /// The 32 bits at `at`.
    #[must_use]
    pub fn u32_at(&self, at: usize) -> u32 {
        u32::from(self.u16_at(at)) | u32::from(self.u16_at(at + 2)) << 16
    }

    /// Where the BAR points, if the function answers to memory accesses.
    #[must_use]
    pub fn bar(&self) -> Option<u64> {
        let value = u64::from(self.u32_at(offset::BAR0)) | u64::from(self.u32_at(offset::BAR0 + 4)) << 32;
        (self.u16_at(offset::COMMAND) & COMMAND_MEMORY != 0).then_some(value & !0xf)
    }

    /// All bytes, for saving.
    #[must_use]
    pub fn bytes(&self) -> &[u8; SIZE] {
        &self.bytes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const IDENTITY: Identity = Identity {
        vendor: 0x1af4,
        device: 0x1044,
        class: 0xff_0000,
        revision: 1,
        subsystem_vendor: 0x1af4,
        subsystem: 0x1100,
    };

    fn space() -> ConfigSpace {
        ConfigSpace::new(IDENTITY, 0xc000_1000, 0x1000)
    }

    fn read_u32(space: &ConfigSpace, at: usize) -> u32 {
        let mut data = [0; 4];
        space.read(at, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn the_header_identifies_the_function() {
        let space = space();
        assert_eq!(read_u32(&space, 0), 0x1044_1af4);
        assert_eq!(read_u32(&space, 8), 0xff00_0001);
        assert_eq!(read_u32(&space, 0x2c), 0x1100_1af4);
        assert_eq!(read_u32(&space, 256), u32::MAX);
    }

    #[test]
    fn a_bar_is_sized_and_put_back() {
        let mut space = space();
        space.write(offset::BAR0, &u32::MAX.to_le_bytes());
        space.write(offset::BAR0 + 4, &u32::MAX.to_le_bytes());
        assert_eq!(read_u32(&space, offset::BAR0), 0xffff_f004);
        assert_eq!(read_u32(&space, offset::BAR0 + 4), u32::MAX);
        space.write(offset::BAR0, &0xc123_4000u32.to_le_bytes());
        space.write(offset::BAR0 + 4, &0u32.to_le_bytes());
        assert_eq!(space.bar(), None);
        space.write(offset::COMMAND, &COMMAND_MEMORY.to_le_bytes());
        assert_eq!(space.bar(), Some(0xc123_4000));
    }

    #[test]
    fn capabilities_form_a_list() {
        let mut space = space();
        let first = space.add_capability(0x11, &[0; 10]);
        let second = space.add_capability(9, &[0; 14]);
        assert_eq!((first, second), (0x40, 0x4c));
        assert_eq!(read_u32(&space, 0x34) & 0xff, 0x40);
        assert_eq!(read_u32(&space, first) & 0xffff, 0x4c11);
        assert_eq!(read_u32(&space, second) & 0xffff, 0x0009);
    }

    proptest! {
        #[test]
        fn a_guest_changes_only_what_it_may(
            writes in prop::collection::vec((0usize..0x1100, prop::collection::vec(any::<u8>(), 1..=8)), 0..64)
        ) {
            let mut space = space();
            space.add_capability(0x11, &[0x55; 10]);
            let before = *space.bytes();
            for (at, data) in writes {
                space.write(at, &data);
            }
            for (at, (now, then)) in space.bytes().iter().zip(before).enumerate() {
                prop_assert_eq!(now & !space.writable[at], then & !space.writable[at]);
            }
            prop_assert!(space.bar().is_none_or(|bar| bar % 0x1000 == 0));
        }

        #[test]
        fn reads_of_any_place_and_size_are_answered(at in any::<usize>(), len in 0usize..=8) {
            let mut data = vec![0; len];
            space().read(at, &mut data);
        }
    }
}
