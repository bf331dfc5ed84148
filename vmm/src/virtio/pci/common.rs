//! The common configuration structure (virtio 1.3, section 4.1.4.3): what the driver negotiates and where its queues lie.
//!
//! This is only state; what a write entails beyond it (activation, reset) is returned as an [`Effect`] for the function
//! to carry out.

use std::sync::Arc;

use virtio_queue::{Queue, QueueT};

use super::signals::{NEEDS_RESET, Signals};

/// Device status bits (section 2.1).
pub mod status {
    /// The driver found the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// The driver knows how to drive it.
    pub const DRIVER: u8 = 2;
    /// The driver is ready.
    pub const DRIVER_OK: u8 = 4;
    /// The driver accepts the features it wrote.
    pub const FEATURES_OK: u8 = 8;
    /// The driver gave up.
    pub const FAILED: u8 = 128;
}

/// Feature bits of the transport (section 6).
pub mod feature {
    /// Descriptors may refer to tables of descriptors.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// Both sides say how far the other may go before it notifies.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// Not a legacy device.
    pub const VERSION_1: u64 = 1 << 32;
}

/// What the transport itself offers.
pub const TRANSPORT_FEATURES: u64 = feature::INDIRECT_DESC | feature::EVENT_IDX | feature::VERSION_1;

/// What the function has to do after a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// The driver is ready: start the device.
    Activate,
    /// The driver reset the device: stop it.
    Reset,
}

/// The structure's state.
pub struct Common {
    offered: u64,
    accepted: u64,
    device_feature_select: u32,
    driver_feature_select: u32,
    queue_select: u16,
    queues: Vec<Queue>,
    signals: Arc<Signals>,
}

impl Common {
    /// As after power-on, for a device that offers `features` beside the transport's own.
    ///
    /// # Panics
    ///
    /// When a queue's size is not a power of two, which is a mistake of the program.
    #[must_use]
    pub fn new(features: u64, queue_sizes: &[u16], signals: Arc<Signals>) -> Self {
        let queue = |&size| Queue::new(size).expect("queue sizes are powers of two");
        Self {
            offered: features | TRANSPORT_FEATURES,
            accepted: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            queue_select: 0,
            queues: queue_sizes.iter().map(queue).collect(),
            signals,
        }
    }

    /// The features that both sides agreed on.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.accepted
    }

    /// The queues, as the driver configured them so far.
    #[must_use]
    pub fn queues(&self) -> &[Queue] {
        &self.queues
    }

    /// The guest reads `data` at `offset`. Fields are read whole; anything else reads as zero.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let queue = self.queues.get(usize::from(self.queue_select));
        let address = |get: fn(&Queue) -> u64| queue.map_or(0, get);
        let value = match (offset, data.len()) {
            (0x00, 4) => u64::from(self.device_feature_select),
            (0x04, 4) => u64::from(half(self.offered, self.device_feature_select)),
            (0x08, 4) => u64::from(self.driver_feature_select),
            (0x0c, 4) => u64::from(half(self.accepted, self.driver_feature_select)),
            (0x10, 2) => u64::from(self.signals.config_vector()),
            (0x12, 2) => self.queues.len() as u64,
            (0x14, 1) => u64::from(self.signals.status()),
            (0x15, 1) => u64::from(self.signals.generation()),
            (0x16, 2) => u64::from(self.queue_select),
            (0x18, 2) => queue.map_or(0, |queue| u64::from(queue.size())),
            (0x1a, 2) => u64::from(self.signals.queue_vector(usize::from(self.queue_select))),
            (0x1c, 2) => queue.map_or(0, |queue| u64::from(queue.ready())),
            // queue_notify_off: each queue at its index.
            (0x1e, 2) => queue.map_or(0, |_| u64::from(self.queue_select)),
            (0x20, 4 | 8) => address(Queue::desc_table),
            (0x24, 4) => address(Queue::desc_table) >> 32,
            (0x28, 4 | 8) => address(Queue::avail_ring),
            (0x2c, 4) => address(Queue::avail_ring) >> 32,
            (0x30, 4 | 8) => address(Queue::used_ring),
            (0x34, 4) => address(Queue::used_ring) >> 32,
            _ => 0,
        };
        let bytes = value.to_le_bytes();
        let len = data.len().min(bytes.len());
        data[..len].copy_from_slice(&bytes[..len]);
    }

    /// The guest writes `data` at `offset`. Fields are written whole; anything else is ignored.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        let mut bytes = [0; 8];
        let Some(target) = bytes.get_mut(..data.len()) else { return Effect::None };
        target.copy_from_slice(data);
        let value = u64::from_le_bytes(bytes);
        let (low, short) = (value as u32, value as u16);
        match (offset, data.len()) {
            (0x00, 4) => self.device_feature_select = low,
            (0x08, 4) => self.driver_feature_select = low,
            (0x0c, 4) => self.write_features(low),
            (0x10, 2) => self.signals.set_config_vector(short),
            (0x14, 1) => return self.write_status(value as u8),
            (0x16, 2) => self.queue_select = short,
            (0x1a, 2) => self.signals.set_queue_vector(usize::from(self.queue_select), short),
            (0x18..=0x37, _) => self.write_queue(offset, data.len(), value),
            _ => {}
        }
        Effect::None
    }

    fn write_features(&mut self, value: u32) {
        // Section 2.2: features are settled with FEATURES_OK.
        if self.signals.status() & status::FEATURES_OK == 0 {
            match self.driver_feature_select {
                0 => self.accepted = self.accepted & !0xffff_ffff | u64::from(value),
                1 => self.accepted = self.accepted & 0xffff_ffff | u64::from(value) << 32,
                _ => {}
            }
        }
    }

    /// Where the selected queue lies. Fixed once the driver is ready (section 4.1.4.3.2) or the queue enabled; what
    /// breaks an alignment rule is ignored.
    fn write_queue(&mut self, offset: u64, len: usize, value: u64) {
        let settled = self.signals.status() & status::DRIVER_OK != 0;
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else { return };
        if settled || queue.ready() {
            return;
        }
        let (low, high) = (Some(value as u32), Some((value >> 32) as u32));
        match (offset, len) {
            (0x18, 2) => {
                // A size that is no power of two leaves the queue as it is.
                let _ = queue.try_set_size(value as u16);
            }
            (0x1c, 2) => queue.set_ready(value == 1),
            (0x20, 4) => queue.set_desc_table_address(low, None),
            (0x20, 8) => queue.set_desc_table_address(low, high),
            (0x24, 4) => queue.set_desc_table_address(None, low),
            (0x28, 4) => queue.set_avail_ring_address(low, None),
            (0x28, 8) => queue.set_avail_ring_address(low, high),
            (0x2c, 4) => queue.set_avail_ring_address(None, low),
            (0x30, 4) => queue.set_used_ring_address(low, None),
            (0x30, 8) => queue.set_used_ring_address(low, high),
            (0x34, 4) => queue.set_used_ring_address(None, low),
            _ => {}
        }
    }

    fn write_status(&mut self, value: u8) -> Effect {
        if value == 0 {
            self.reset();
            return Effect::Reset;
        }
        let before = self.signals.status();
        // Section 2.1.1: the driver does not clear bits, and does not set the device's own.
        let mut added = value & !before & !NEEDS_RESET;
        if added & status::FEATURES_OK != 0 && !self.features_are_acceptable() {
            added &= !status::FEATURES_OK;
        }
        let ready = added & status::DRIVER_OK != 0;
        if ready && before & status::FEATURES_OK == 0 {
            // A driver that skips the negotiation gets nothing.
            added &= !status::DRIVER_OK;
        }
        self.signals.add_status(added);
        if added & status::DRIVER_OK != 0 && before & (NEEDS_RESET | status::FAILED) == 0 {
            Effect::Activate
        } else {
            Effect::None
        }
    }

    fn features_are_acceptable(&self) -> bool {
        self.accepted & !self.offered == 0 && self.accepted & feature::VERSION_1 != 0
    }

    fn reset(&mut self) {
        self.accepted = 0;
        self.device_feature_select = 0;
        self.driver_feature_select = 0;
        self.queue_select = 0;
        for queue in &mut self.queues {
            queue.reset();
        }
        self.signals.reset();
    }
}

fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}
