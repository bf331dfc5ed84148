//! The panic device: a port by which a kernel says that it panicked (QEMU's docs/specs/pvpanic.rst).

use std::sync::Arc;

use crate::arch::layout;
use crate::outcome::{Ending, Outcome};

/// Event: the guest panicked and goes no further.
const PANICKED: u8 = 1 << 0;
/// Event: the guest panicked and loads a crash kernel, which is not the VM's end.
const CRASH_LOADED: u8 = 1 << 1;
/// Event: the guest shuts down.
const SHUTDOWN: u8 = 1 << 2;

/// The device; it has no state.
pub struct PvPanic {
    ending: Arc<Ending>,
}

impl PvPanic {
    /// A device that ends the VM through `ending`.
    #[must_use]
    pub fn new(ending: Arc<Ending>) -> Self {
        Self { ending }
    }

    /// The guest writes `value` to `port`; false if that is not this device's.
    pub fn write(&self, port: u16, value: u8) -> bool {
        if port != layout::PORT_PVPANIC {
            return false;
        }
        if value & PANICKED != 0 {
            self.ending.end(Outcome::Panicked);
        } else if value & SHUTDOWN != 0 {
            self.ending.end(Outcome::PoweredOff);
        }
        true
    }

    /// The guest reads which events it may report; `None` if `port` is not this device's.
    #[must_use]
    pub fn read(&self, port: u16) -> Option<u8> {
        (port == layout::PORT_PVPANIC).then_some(PANICKED | CRASH_LOADED | SHUTDOWN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_final_panic_ends_the_vm() {
        for (value, outcome) in
            [(PANICKED, Some(Outcome::Panicked)), (CRASH_LOADED, None), (SHUTDOWN, Some(Outcome::PoweredOff))]
        {
            let ending = Arc::new(Ending::new().unwrap());
            assert!(PvPanic::new(ending.clone()).write(layout::PORT_PVPANIC, value));
            assert_eq!(ending.outcome(), outcome);
        }
    }
}
