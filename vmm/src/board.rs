//! The board as a vCPU sees it: decodes ports and addresses that are not RAM.
//!
//! What nothing answers to reads as ones and ignores writes, as on a PC.

use crate::arch::layout;
use crate::legacy::power::Power;
use crate::legacy::pvpanic::PvPanic;
use crate::legacy::serial::Serial;
use crate::pci::root::PciRoot;

/// Who an access was for, as far as statistics distinguish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// A PCI function's configuration space.
    PciConfig,
    /// A PCI function's registers.
    PciBar,
    /// A device at an I/O port.
    Port,
    /// Nothing.
    Nobody,
}

/// All that is not processor or RAM. Any vCPU may use it at any time.
pub struct Board {
    /// The PCI bus.
    pub pci: PciRoot,
    /// Power-off and reset.
    pub power: Power,
    /// The panic device.
    pub panic: PvPanic,
    /// The debug console.
    pub serial: Option<Serial>,
}

impl Board {
    /// The guest reads `data` from a memory address.
    pub fn read_memory(&self, address: u64, data: &mut [u8]) -> Target {
        if layout::PCI_ECAM.contains(&address) {
            self.pci.read_config(address - layout::PCI_ECAM.start, data);
            return Target::PciConfig;
        }
        if self.pci.read_memory(address, data) {
            return Target::PciBar;
        }
        data.fill(0xff);
        Target::Nobody
    }

    /// The guest writes `data` to a memory address.
    pub fn write_memory(&self, address: u64, data: &[u8]) -> Target {
        if layout::PCI_ECAM.contains(&address) {
            self.pci.write_config(address - layout::PCI_ECAM.start, data);
            Target::PciConfig
        } else if self.pci.write_memory(address, data) {
            Target::PciBar
        } else {
            Target::Nobody
        }
    }

    /// The guest reads `data` from a port. All devices have registers of one byte.
    pub fn read_port(&self, port: u16, data: &mut [u8]) -> Target {
        data.fill(0xff);
        let [byte] = data else { return Target::Nobody };
        let serial = || self.serial.as_ref().and_then(|serial| serial.read(port));
        match self.power.read(port).or_else(|| self.panic.read(port)).or_else(serial) {
            Some(value) => {
                *byte = value;
                Target::Port
            }
            None => Target::Nobody,
        }
    }

    /// The guest writes `data` to a port.
    pub fn write_port(&self, port: u16, data: &[u8]) -> Target {
        let serial = |value| self.serial.as_ref().is_some_and(|serial| serial.write(port, value));
        match *data {
            [value] if self.power.write(port, value) || self.panic.write(port, value) || serial(value) => Target::Port,
            _ => Target::Nobody,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::outcome::{Ending, Outcome};

    #[test]
    fn what_nobody_answers_to_reads_as_ones() {
        let ending = Arc::new(Ending::new().unwrap());
        let board = Board {
            pci: PciRoot::default(),
            power: Power::new(ending.clone()),
            panic: PvPanic::new(ending.clone()),
            serial: None,
        };
        for port in [0x60, 0x64, 0x70, 0x3f8, 0xcf8, 0xffff] {
            let mut data = [0; 4];
            assert_eq!(board.read_port(port, &mut data), Target::Nobody);
            assert_eq!(data, [0xff; 4]);
        }
        let mut data = [0; 8];
        assert_eq!(board.read_memory(layout::IO_APIC, &mut data), Target::Nobody);
        assert_eq!(data, [0xff; 8]);
        assert_eq!(board.read_memory(layout::PCI_ECAM.start, &mut data), Target::PciConfig);
        assert_eq!(data, [0xff; 8]);
        assert_eq!(board.write_port(layout::PORT_I8042_COMMAND, &[0xfe]), Target::Port);
        assert_eq!(ending.outcome(), Some(Outcome::Reset));
    }
}
