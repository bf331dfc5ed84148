//! What every virtio device is, whatever bus it sits on.
//!
//! The transport owns the device and calls it; a device never calls the transport, only the [`Interrupt`] that it was
//! handed. Its life, as the driver (virtio 1.3, section 3.1) and the VM drive it:
//!
//! ```text
//!            restore?                     activate                      pause
//!   made ──────────────▶ configured ──────────────────▶ active ◀─────────────────▶ paused
//!     └──────────────────▲        ◀──────────────────┘   │       resume             │
//!                        │          deactivate           │                          │
//!                        └───────────────────────────────┴──────── deactivate ──────┘
//! ```
//!
//! **Threads.** All methods but those of the worker run with the transport's lock held: on a vCPU thread when the
//! driver writes a register, on the main thread for pause, save, restore, removal. What serves the queues is the
//! device's choice: a handler on the shared event loop ([`crate::event_loop::EventLoop`], given to the device when it
//! is made) for devices whose work never blocks, or a thread of its own, started by `activate` and joined by
//! `deactivate`. Lock order: transport, then the device's worker; a worker must never wait for the transport.

use std::fmt;
use std::sync::Arc;

use vm_memory::GuestMemoryMmap;

use super::queue::VirtQueue;

/// Guest memory as devices see it.
pub type GuestMemory = Arc<GuestMemoryMmap>;

/// Device types (virtio 1.3, section 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum DeviceKind {
    /// Section 5.1.
    Net = 1,
    /// Section 5.2.
    Block = 2,
    /// Section 5.3.
    Console = 3,
    /// Section 5.4.
    Rng = 4,
    /// Section 5.5.
    Balloon = 5,
    /// Section 5.10.
    Vsock = 19,
    /// Section 5.11.
    Fs = 26,
    /// Section 5.19.
    Pmem = 27,
}

impl DeviceKind {
    /// The name that the control protocol uses.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Net => "net",
            Self::Block => "block",
            Self::Console => "console",
            Self::Rng => "rng",
            Self::Balloon => "balloon",
            Self::Vsock => "vsock",
            Self::Fs => "fs",
            Self::Pmem => "pmem",
        }
    }
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How a device reaches its driver. Callable from any thread, never blocks.
pub trait Interrupt: Send + Sync {
    /// Buffers of this queue were used (virtio 1.3, section 2.3).
    fn signal_queue(&self, queue: u16);
    /// The configuration space changed.
    fn signal_config(&self);
    /// The driver broke the rules and the device stops: sets `DEVICE_NEEDS_RESET` (virtio 1.3, section 2.1.1) and
    /// logs the reason, at a limited rate.
    fn needs_reset(&self, reason: &str);
}

/// What a device gets when its driver has set `DRIVER_OK`.
pub struct Activation {
    /// Feature bits that both sides agreed on, a subset of what [`VirtioDevice::features`] and the transport offered.
    pub features: u64,
    /// Guest memory.
    pub memory: GuestMemory,
    /// For configuration changes; each queue has its own way to signal.
    pub interrupt: Arc<dyn Interrupt>,
    queues: Vec<Option<VirtQueue>>,
}

impl Activation {
    /// Bundles what the transport has; `queues[i]` is `None` if the driver did not enable queue `i`.
    #[must_use]
    pub fn new(
        features: u64,
        memory: GuestMemory,
        interrupt: Arc<dyn Interrupt>,
        queues: Vec<Option<VirtQueue>>,
    ) -> Self {
        Self { features, memory, interrupt, queues }
    }

    /// The queue at `index`, which the device cannot do without.
    ///
    /// # Errors
    ///
    /// When the driver did not enable it.
    pub fn take_queue(&mut self, index: u16) -> Result<VirtQueue, ActivateError> {
        self.try_take_queue(index).ok_or(ActivateError::MissingQueue(index))
    }

    /// The queue at `index`, if the driver enabled it.
    pub fn try_take_queue(&mut self, index: u16) -> Option<VirtQueue> {
        self.queues.get_mut(usize::from(index)).and_then(Option::take)
    }
}

/// Why a device could not start. The transport answers with `DEVICE_NEEDS_RESET`.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The driver went on without a queue that the device needs.
    #[error("the driver did not enable queue {0}")]
    MissingQueue(u16),
    /// The device could not be set up on the host.
    #[error("{step}: {source}")]
    Host {
        /// What failed.
        step: &'static str,
        /// Why.
        source: std::io::Error,
    },
}

/// What a paused device is restored from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceState {
    /// The ring positions of each queue that was active, by queue index.
    pub queues: Vec<Option<virtio_queue::QueueState>>,
    /// The device's own state, in a form that only it reads.
    pub private: Vec<u8>,
}

/// Why a device could not be restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The private state does not parse.
    #[error("the saved state of the {0} device is damaged or of another version")]
    Damaged(DeviceKind),
}

/// Why a device did not take over its new size.
#[derive(Debug, thiserror::Error)]
pub enum ResizeError {
    /// It is no disk.
    #[error("it has no size that could change; only a disk has one")]
    NoSize,
    /// The host does not tell.
    #[error("{0}")]
    Unknown(String),
    /// What the guest has of it would be gone.
    #[error(
        "its file or device has {now_bytes} bytes, fewer than the {known_bytes} that the guest knows, and a disk in use cannot shrink; \
         make it as long as it was"
    )]
    Shrunk {
        /// As the host says.
        now_bytes: u64,
        /// As the guest knows it.
        known_bytes: u64,
    },
}

/// A virtio device.
pub trait VirtioDevice: Send {
    /// Its type. Any time.
    fn kind(&self) -> DeviceKind;

    /// Device-specific feature bits that it offers (bits 0 to 23 and 50 to 127 of virtio 1.3, section 2.2; here the
    /// low 64). The transport adds what it implements itself: `VERSION_1`, `EVENT_IDX`, `INDIRECT_DESC`. Any time;
    /// always the same.
    fn features(&self) -> u64;

    /// The largest size of each queue, powers of two. Any time; always the same length.
    fn queue_sizes(&self) -> &[u16];

    /// Whether each queue deserves an MSI-X vector of its own. Otherwise all queues share one, which saves exits while
    /// the driver sets up: right for all but devices whose queues work in parallel. Any time; always the same.
    fn vector_per_queue(&self) -> bool {
        false
    }

    /// Reads the configuration space at `offset` into `data`; what lies beyond the space reads as zero. Any time.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes `data` to the configuration space at `offset`; what cannot be written is ignored. Any time.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// Starts to serve the queues. After it was made or `deactivate`d, never twice in a row. Buffers may already be
    /// available and their notification already past: look at each queue once.
    ///
    /// # Errors
    ///
    /// The device is then as if `deactivate`d.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Stops to serve the queues and forgets them: the driver reset the device, or it leaves the bus. Returns once
    /// nothing touches guest memory any more. Any time, also when not active (then it does nothing).
    fn deactivate(&mut self);

    /// Gives up what it has of the host while its driver has not let go of it: from now on it answers each request with an error. False if it
    /// cannot, or does not serve its queues. Any time.
    fn give_up(&mut self) -> bool {
        false
    }

    /// Looks at how large the device's file is now, tells the driver if that is more than before, and returns the size in bytes.
    /// Any time.
    ///
    /// # Errors
    ///
    /// When it is less than before, or the device has no size. Nothing has changed then.
    fn resize(&mut self) -> Result<u64, ResizeError> {
        Err(ResizeError::NoSize)
    }

    /// Says whether the device's link is up, and tells the driver if that is news; false if the device has none. Any time.
    fn set_link(&mut self, _up: bool) -> bool {
        false
    }

    /// Finishes what is in flight, writes back what the host would lose, and leaves guest memory alone from its return
    /// until `resume`. Kicks that arrive meanwhile are kept. Only with all vCPUs stopped; any device state.
    ///
    /// A device that does all its work on the shared event loop need not implement it: the loop is parked first.
    fn pause(&mut self) {}

    /// Goes on after `pause`.
    fn resume(&mut self) {}

    /// What a copy of this device needs to go on. Only between `pause` and `resume`.
    fn save(&self) -> DeviceState;

    /// Takes over what [`save`](Self::save) returned from a device of the same configuration. Once, after the device
    /// was made and before `activate`; the queues in it come back through `activate`.
    ///
    /// # Errors
    ///
    /// The device must then be thrown away.
    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError>;

    /// Requests or packets completed since the start. Any time.
    fn completed(&self) -> u64;

    /// What else the device counts since the start, by name. Any time; always the same names.
    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}

/// Copies from a configuration space held as bytes, as [`VirtioDevice::read_config`] is to answer.
pub fn read_config_bytes(space: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let Ok(start) = usize::try_from(offset) else { return };
    let Some(rest) = space.get(start..) else { return };
    let len = rest.len().min(data.len());
    data[..len].copy_from_slice(&rest[..len]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn config_reads_beyond_the_space_are_zero() {
        let space = [1, 2, 3];
        let mut data = [0xff; 4];
        read_config_bytes(&space, 1, &mut data);
        assert_eq!(data, [2, 3, 0, 0]);
        for offset in [3, 4, u64::MAX] {
            data.fill(0xff);
            read_config_bytes(&space, offset, &mut data);
            assert_eq!(data, [0; 4]);
        }
    }
}
