//! How a device interrupts its driver over PCI: the vectors that the driver chose for each queue and for configuration
//! changes (virtio 1.3, section 4.1.5.1.2), the interrupt status and the device status.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, Ordering};

use crate::log;
use crate::pci::msix::Vectors;
use crate::virtio::device::Interrupt;

/// No vector (section 4.1.5.1.2).
pub const NO_VECTOR: u16 = 0xffff;
/// Interrupt status bits (section 4.1.4.5).
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;
/// `DEVICE_NEEDS_RESET` (section 2.1).
pub const NEEDS_RESET: u8 = 64;

/// What device threads and vCPUs share without locks.
pub struct Signals {
    name: String,
    vectors: Arc<Vectors>,
    config_vector: AtomicU16,
    queue_vectors: Box<[AtomicU16]>,
    isr: AtomicU8,
    status: AtomicU8,
    generation: AtomicU32,
}

impl Signals {
    /// For a device called `name` with this many queues.
    #[must_use]
    pub fn new(name: String, vectors: Arc<Vectors>, queues: usize) -> Self {
        Self {
            name,
            vectors,
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            isr: AtomicU8::new(0),
            status: AtomicU8::new(0),
            generation: AtomicU32::new(0),
        }
    }

    /// The device status.
    #[must_use]
    pub fn status(&self) -> u8 {
        self.status.load(Ordering::Acquire)
    }

    /// Adds bits to the device status.
    pub fn add_status(&self, bits: u8) {
        self.status.fetch_or(bits, Ordering::AcqRel);
    }

    /// Replaces the device status.
    pub fn set_status(&self, status: u8) {
        self.status.store(status, Ordering::Release);
    }

    /// Changes with every change of the configuration space (section 4.1.4.3.1).
    #[must_use]
    pub fn generation(&self) -> u8 {
        self.generation.load(Ordering::Acquire) as u8
    }

    /// Reads the interrupt status, which clears it (section 4.1.4.5).
    pub fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::AcqRel)
    }

    /// The vector for configuration changes.
    #[must_use]
    pub fn config_vector(&self) -> u16 {
        self.config_vector.load(Ordering::Acquire)
    }

    /// Chooses the vector for configuration changes; one that does not exist is none, and reads back so.
    pub fn set_config_vector(&self, vector: u16) {
        self.config_vector.store(self.existing(vector), Ordering::Release);
    }

    /// The vector of a queue.
    #[must_use]
    pub fn queue_vector(&self, queue: usize) -> u16 {
        self.queue_vectors.get(queue).map_or(NO_VECTOR, |vector| vector.load(Ordering::Acquire))
    }

    /// Chooses the vector of a queue; one that does not exist is none, and reads back so.
    pub fn set_queue_vector(&self, queue: usize, vector: u16) {
        if let Some(slot) = self.queue_vectors.get(queue) {
            slot.store(self.existing(vector), Ordering::Release);
        }
    }

    /// As after power-on.
    pub fn reset(&self) {
        for vector in self.queue_vectors.iter().chain([&self.config_vector]) {
            vector.store(NO_VECTOR, Ordering::Release);
        }
        self.isr.store(0, Ordering::Release);
        self.set_status(0);
    }

    fn existing(&self, vector: u16) -> u16 {
        if vector < self.vectors.count() { vector } else { NO_VECTOR }
    }
}

impl Interrupt for Signals {
    fn signal_queue(&self, queue: u16) {
        self.isr.fetch_or(ISR_QUEUE, Ordering::AcqRel);
        self.vectors.fire(self.queue_vector(usize::from(queue)));
    }

    fn signal_config(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.isr.fetch_or(ISR_CONFIG, Ordering::AcqRel);
        self.vectors.fire(self.config_vector());
    }

    fn needs_reset(&self, reason: &str) {
        self.add_status(NEEDS_RESET);
        log::warn(format_args!("device {} stopped until its driver resets it: {reason}", self.name));
        // Section 2.1.2: the driver is told by a configuration change.
        self.signal_config();
    }
}
