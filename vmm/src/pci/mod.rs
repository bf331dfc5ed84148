//! The PCI bus (PCI local bus specification 3.0; configuration space by ECAM, PCI Express base specification 6.0): one
//! bus, up to 31 devices with one function each, interrupts by MSI-X only.

pub mod config_space;
pub mod msix;
pub mod platform;
pub mod root;
