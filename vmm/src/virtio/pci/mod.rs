//! Virtio over PCI (virtio 1.3, section 4.1), modern devices only.
//!
//! * [`capabilities`] tells the driver where in the BAR which structure lies.
//! * [`common`] is the state that the common configuration structure shows: status, features, queues.
//! * [`signals`] is how the device interrupts its driver.
//! * [`function`] is the PCI function: it owns the device and ties the rest together.

pub mod capabilities;
pub mod common;
pub mod function;
pub mod signals;
#[cfg(test)]
mod tests;
