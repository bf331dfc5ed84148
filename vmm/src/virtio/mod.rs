//! Virtio devices (virtio 1.3): what every device is ([`device`]), its queues ([`queue`]), the PCI transport ([`pci`])
//! and the devices themselves, one module each.
//!
//! A device knows nothing of PCI or KVM: the transport hands it its queues and an [`device::Interrupt`].

pub mod balloon;
pub mod block;
pub mod console;
pub mod device;
pub mod fs;
pub mod net;
pub mod pci;
pub mod pmem;
pub mod queue;
pub mod rng;
#[cfg(test)]
pub(crate) mod testing;
pub mod vsock;
