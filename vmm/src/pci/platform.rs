//! What a PCI function needs of the machine that it sits in. KVM provides it; tests fake it.

use std::io;

use vmm_sys_util::eventfd::EventFd;

use super::msix::MsiPort;

/// The machine.
pub trait Platform: Send + Sync {
    /// A new message-signalled interrupt.
    ///
    /// # Errors
    ///
    /// When the host has no descriptor for it.
    fn msi_port(&self) -> io::Result<Box<dyn MsiPort>>;

    /// From now on a write of any size and value to `address` signals `event`, with no exit to the VMM.
    ///
    /// # Errors
    ///
    /// When the host refuses; writes then reach the function as others do.
    fn attach_notification(&self, address: u64, event: &EventFd) -> io::Result<()>;

    /// Undoes [`attach_notification`](Self::attach_notification).
    fn detach_notification(&self, address: u64, event: &EventFd);
}
