//! Power-off and reset by the guest: the sleep control and reset registers of hardware-reduced ACPI (ACPI 6.5, sections
//! 4.8.3.6 and 4.8.3.7) and the keyboard controller's reset pulse, which kernels without ACPI fall back to.

use std::sync::Arc;

use crate::arch::layout;
use crate::outcome::{Ending, Outcome};

/// The value of the reset register that resets.
pub const RESET_VALUE: u8 = 1;
/// The type of sleep, as the DSDT's `\_S5` names it, that is power-off.
pub const SLEEP_TYPE_OFF: u8 = 5;

/// Sleep control register: `SLP_TYPx` at bit 2, three bits wide, and `SLP_EN`.
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 0b111;
const SLEEP_ENABLE: u8 = 1 << 5;
/// "Pulse output port, bit 0": the keyboard controller pulls the processor's reset line.
const I8042_PULSE_RESET: u8 = 0xfe;

/// The registers; they have no state.
pub struct Power {
    ending: Arc<Ending>,
}

impl Power {
    /// Registers that end the VM through `ending`.
    #[must_use]
    pub fn new(ending: Arc<Ending>) -> Self {
        Self { ending }
    }

    /// The guest writes `value` to one of the ports of this device; false for any other port.
    pub fn write(&self, port: u16, value: u8) -> bool {
        match port {
            layout::PORT_SLEEP_CONTROL => {
                if value & SLEEP_ENABLE != 0 && value >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK == SLEEP_TYPE_OFF {
                    self.ending.end(Outcome::PoweredOff);
                }
            }
            layout::PORT_RESET if value == RESET_VALUE => self.ending.end(Outcome::Reset),
            layout::PORT_I8042_COMMAND if value == I8042_PULSE_RESET => self.ending.end(Outcome::Reset),
            layout::PORT_SLEEP_STATUS | layout::PORT_RESET | layout::PORT_I8042_COMMAND => {}
            _ => return false,
        }
        true
    }

    /// The guest reads one of the ports of this device; `None` for any other port.
    #[must_use]
    pub fn read(&self, port: u16) -> Option<u8> {
        matches!(port, layout::PORT_SLEEP_CONTROL | layout::PORT_SLEEP_STATUS | layout::PORT_RESET).then_some(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome_of(port: u16, value: u8) -> Option<Outcome> {
        let ending = Arc::new(Ending::new().unwrap());
        Power::new(ending.clone()).write(port, value);
        ending.outcome()
    }

    #[test]
    fn entering_sleep_type_five_powers_off() {
        assert_eq!(outcome_of(layout::PORT_SLEEP_CONTROL, 5 << 2 | 1 << 5), Some(Outcome::PoweredOff));
        assert_eq!(outcome_of(layout::PORT_SLEEP_CONTROL, 5 << 2), None);
        assert_eq!(outcome_of(layout::PORT_SLEEP_CONTROL, 3 << 2 | 1 << 5), None);
    }

    #[test]
    fn both_reset_registers_reset() {
        assert_eq!(outcome_of(layout::PORT_RESET, RESET_VALUE), Some(Outcome::Reset));
        assert_eq!(outcome_of(layout::PORT_RESET, 0), None);
        assert_eq!(outcome_of(layout::PORT_I8042_COMMAND, 0xfe), Some(Outcome::Reset));
        assert_eq!(outcome_of(layout::PORT_I8042_COMMAND, 0xad), None);
    }
}
