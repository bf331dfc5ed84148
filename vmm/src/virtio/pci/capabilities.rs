//! Where in the function's BAR each structure lies, and the vendor capabilities that say so (virtio 1.3, section 4.1.4).
//!
//! All of a device's registers share one page, so that the guest maps little and the host's page tables stay small.

use std::ops::Range;

use crate::pci::config_space::ConfigSpace;

/// Vendor-specific capability.
const VENDOR_CAPABILITY_ID: u8 = 0x09;

/// `cfg_type` values.
const COMMON_CFG: u8 = 1;
const NOTIFY_CFG: u8 = 2;
const ISR_CFG: u8 = 3;
const DEVICE_CFG: u8 = 4;
const PCI_CFG: u8 = 5;

/// Common configuration structure.
pub const COMMON: Range<u64> = 0x000..0x040;
/// Interrupt status.
pub const ISR: Range<u64> = 0x040..0x044;
/// Device-specific configuration space.
pub const DEVICE: Range<u64> = 0x080..0x400;
/// Notification addresses, one for each queue.
pub const NOTIFY: Range<u64> = 0x400..0x800;
/// Distance of notification addresses.
pub const NOTIFY_MULTIPLIER: u32 = 4;
/// MSI-X table.
pub const MSIX_TABLE: Range<u64> = 0x800..0xc00;
/// MSI-X pending bits.
pub const MSIX_PENDING: Range<u64> = 0xc00..0xc08;

/// Most queues of a device: one notification address each.
pub const MAX_QUEUES: usize = ((NOTIFY.end - NOTIFY.start) / NOTIFY_MULTIPLIER as u64) as usize;
/// Most MSI-X vectors of a device.
pub const MAX_VECTORS: usize = ((MSIX_TABLE.end - MSIX_TABLE.start) / 16) as usize;

/// Where the capability that gives access to the BAR through configuration space lies (section 4.1.4.9).
#[derive(Clone, Copy, Debug)]
pub struct WindowCapability {
    at: usize,
}

/// Offsets in that capability: which BAR, where in it, how much, and the data.
const WINDOW_BAR: usize = 4;
const WINDOW_OFFSET: usize = 8;
const WINDOW_LENGTH: usize = 12;
const WINDOW_DATA: usize = 16;

/// Adds the vendor capabilities.
pub fn add(config: &mut ConfigSpace) -> WindowCapability {
    for (kind, range) in [(COMMON_CFG, COMMON), (ISR_CFG, ISR), (DEVICE_CFG, DEVICE)] {
        config.add_capability(VENDOR_CAPABILITY_ID, &body(kind, &range, &[]));
    }
    config.add_capability(VENDOR_CAPABILITY_ID, &body(NOTIFY_CFG, &NOTIFY, &NOTIFY_MULTIPLIER.to_le_bytes()));
    let at = config.add_capability(VENDOR_CAPABILITY_ID, &body(PCI_CFG, &(0..0), &[0; 4]));
    config.allow(at + WINDOW_BAR, &[0xff]);
    config.allow(at + WINDOW_OFFSET, &[0xff; 12]);
    WindowCapability { at }
}

/// `struct virtio_pci_cap` behind its first two bytes, with what `extra` adds to it.
fn body(kind: u8, range: &Range<u64>, extra: &[u8]) -> Vec<u8> {
    // Length of the whole capability, type, BAR 0, no identifier.
    let mut body = vec![16 + extra.len() as u8, kind, 0, 0, 0, 0];
    // Offsets and lengths are below 4 KiB.
    body.extend((range.start as u32).to_le_bytes());
    body.extend(((range.end - range.start) as u32).to_le_bytes());
    body.extend(extra);
    body
}

impl WindowCapability {
    /// If an access to configuration space at `at` is one to the window's data: where in BAR 0 it leads, and how much.
    #[must_use]
    pub fn target(self, config: &ConfigSpace, at: usize, len: usize) -> Option<(u64, usize)> {
        if at != self.at + WINDOW_DATA || config.u16_at(self.at + WINDOW_BAR) & 0xff != 0 {
            return None;
        }
        let offset = config.u32_at(self.at + WINDOW_OFFSET);
        let length = config.u32_at(self.at + WINDOW_LENGTH);
        // Section 4.1.4.9.1: the length is 1, 2 or 4, and the offset a multiple of it.
        let valid = matches!(length, 1 | 2 | 4) && offset.is_multiple_of(length) && length as usize <= len;
        valid.then_some((u64::from(offset), length as usize))
    }
}
