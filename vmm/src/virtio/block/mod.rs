//! The block device (virtio 1.3, section 5.2): a raw image or a block device of the host as the guest's disk.
//!
//! `request` says what a request means, `disk` does it on the host, whose blocks `geometry` knows, and a `worker` for each queue moves requests from
//! it to one of two engines: `uring`, or `threaded` where the host forbids io_uring. The device's threads live from `activate` or
//! `resume` to `deactivate` or `pause`; each hands its queue back when it ends, so a paused device has no thread and
//! nothing in flight.

mod disk;
mod geometry;
mod request;
mod threaded;
mod uring;
mod worker;

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vmm_sys_util::eventfd::EventFd;

use self::disk::Disk;
use self::request::{ID_BYTES, MAX_DISCARD_SECTORS, MAX_RANGES, MAX_ZEROES_SECTORS, SECTOR_BYTES};
use self::worker::{Running, Shared, Worker};
use super::device::{
    ActivateError, Activation, DeviceKind, DeviceState, Interrupt, ResizeError, RestoreError, VirtioDevice,
    read_config_bytes,
};

// Feature bits (section 5.2.3).
const VIRTIO_BLK_F_SIZE_MAX: u64 = 1 << 1;
const VIRTIO_BLK_F_SEG_MAX: u64 = 1 << 2;
const VIRTIO_BLK_F_RO: u64 = 1 << 5;
const VIRTIO_BLK_F_BLK_SIZE: u64 = 1 << 6;
const VIRTIO_BLK_F_FLUSH: u64 = 1 << 9;
const VIRTIO_BLK_F_TOPOLOGY: u64 = 1 << 10;
const VIRTIO_BLK_F_CONFIG_WCE: u64 = 1 << 11;
const VIRTIO_BLK_F_MQ: u64 = 1 << 12;
const VIRTIO_BLK_F_DISCARD: u64 = 1 << 13;
const VIRTIO_BLK_F_WRITE_ZEROES: u64 = 1 << 14;

/// Entries of a queue, each good for one request since drivers use indirect descriptors.
const QUEUE_SIZE: u16 = 256;
/// Most queues of a disk: with more CPUs, some share one.
pub const MAX_QUEUES: u8 = 8;
/// Most data segments of a request: the queue's size less header and status, so that it fits without indirection too.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Longest segment: far above what guests use, and a bound on one request.
const SIZE_MAX: u32 = 4 << 20;

/// Length of the configuration space, and where the driver writes the cache mode (section 5.2.4).
const CONFIG_BYTES: usize = 60;
const CONFIG_WRITEBACK: usize = 32;

const STATE_VERSION: u8 = 1;

/// Why a disk cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// The host does not tell what the file is.
    #[error("{step} on the disk failed: {source}")]
    Inspect {
        /// The call.
        step: &'static str,
        /// Why.
        source: io::Error,
    },
    /// Neither a file nor a block device.
    #[error("a disk must be a regular file or a block device")]
    NotADisk,
    /// Opened in a mode that does not suit.
    #[error("the disk is not open for reading and writing: open it so, or make it read-only")]
    Access,
    /// Opened with `O_DIRECT`, which the file system accepts but does not do.
    #[error(
        "the disk cannot be used past the host's page cache: its file system does not do that for this file; leave out O_DIRECT"
    )]
    NotDirect,
    /// Opened with `O_DIRECT`, whose blocks are too large for a guest.
    #[error(
        "the disk cannot be used past the host's page cache: that takes blocks of {logical} bytes and memory aligned to {memory}, \
         and a guest has no more than 4096; leave out O_DIRECT"
    )]
    Alignment {
        /// The blocks.
        logical: u32,
        /// The alignment of memory.
        memory: u32,
    },
    /// The serial number does not fit.
    #[error("a disk's serial number has at most {ID_BYTES} bytes; shorten it")]
    SerialTooLong,
    /// The process may open no more descriptors.
    #[error("no eventfd for the disk: {0}; raise the limit of open files")]
    EventFd(io::Error),
}

/// A virtio disk.
pub struct Block {
    name: String,
    shared: Arc<Shared>,
    queue_sizes: Vec<u16>,
    /// To tell the driver of a new size, while there is one.
    interrupt: Option<Arc<dyn Interrupt>>,
    run: Run,
}

enum Run {
    Inactive,
    Active(Running),
    Paused(Vec<Worker>),
}

impl Block {
    /// A disk backed by `file`, which is open for reading and, unless `read_only`, writing.
    ///
    /// # Errors
    ///
    /// When `file` is no disk or not open in the right mode, or `serial` is too long.
    pub fn new(id: &str, file: File, read_only: bool, serial: Option<&str>) -> Result<Self, BlockError> {
        Self::with_engine(id, file, read_only, serial, true)
    }

    /// Gives it a queue for each of this many CPUs, 1 to [`MAX_QUEUES`]. Before the transport has seen it.
    #[must_use]
    pub fn with_queues(mut self, cpus: u8) -> Self {
        self.queue_sizes = vec![QUEUE_SIZE; cpus.clamp(1, MAX_QUEUES).into()];
        self
    }

    fn with_engine(
        id: &str,
        file: File,
        read_only: bool,
        serial: Option<&str>,
        try_uring: bool,
    ) -> Result<Self, BlockError> {
        let disk = Disk::new(file, read_only)?;
        let mut padded = [0; ID_BYTES];
        let serial = serial.unwrap_or_default().as_bytes();
        padded.get_mut(..serial.len()).ok_or(BlockError::SerialTooLong)?.copy_from_slice(serial);
        let shared = Arc::new(Shared {
            disk,
            read_only,
            serial: padded,
            write_through: AtomicBool::new(false),
            completed: AtomicU64::new(0),
            try_uring,
            is_gone: false,
            stopping: AtomicBool::new(false),
            stop: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(BlockError::EventFd)?,
        });
        let name = format!("blk-{id}");
        Ok(Self { name, shared, queue_sizes: vec![QUEUE_SIZE], interrupt: None, run: Run::Inactive })
    }

    fn start(&mut self, workers: Vec<Worker>) -> io::Result<()> {
        self.run = Run::Active(Running::start(workers, &self.shared, &self.name)?);
        Ok(())
    }

    /// The configuration space (section 5.2.4).
    fn config(&self) -> [u8; CONFIG_BYTES] {
        let disk = &self.shared.disk;
        let geometry = disk.geometry();
        let mut space = [0; CONFIG_BYTES];
        let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &disk.capacity_sectors().to_le_bytes());
        put(8, &SIZE_MAX.to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &geometry.logical.to_le_bytes());
        put(24, &geometry.topology());
        put(CONFIG_WRITEBACK, &[u8::from(!self.shared.write_through.load(Ordering::Relaxed))]);
        put(34, &(self.queue_sizes.len() as u16).to_le_bytes());
        put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
        put(40, &MAX_RANGES.to_le_bytes());
        put(44, &(geometry.physical / SECTOR_BYTES as u32).to_le_bytes());
        put(48, &MAX_ZEROES_SECTORS.to_le_bytes());
        put(52, &MAX_RANGES.to_le_bytes());
        put(56, &[1]);
        space
    }
}

impl VirtioDevice for Block {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Block
    }

    fn features(&self) -> u64 {
        let always = VIRTIO_BLK_F_SIZE_MAX
            | VIRTIO_BLK_F_SEG_MAX
            | VIRTIO_BLK_F_BLK_SIZE
            | VIRTIO_BLK_F_FLUSH
            | VIRTIO_BLK_F_TOPOLOGY
            | VIRTIO_BLK_F_CONFIG_WCE
            | VIRTIO_BLK_F_MQ;
        let writable = VIRTIO_BLK_F_DISCARD | VIRTIO_BLK_F_WRITE_ZEROES;
        always | if self.shared.read_only { VIRTIO_BLK_F_RO } else { writable }
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn vector_per_queue(&self) -> bool {
        self.queue_sizes.len() > 1
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (Ok(CONFIG_WRITEBACK), [mode]) = (usize::try_from(offset), data) {
            self.shared.write_through.store(*mode == 0, Ordering::Relaxed);
        }
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let first = activation.take_queue(0)?;
        // The others only where the driver wants them.
        let others = (1..self.queue_sizes.len()).map(|index| activation.try_take_queue(index as u16));
        let queues = std::iter::once(Some(first)).chain(others).enumerate();
        let workers =
            queues.filter_map(|(index, queue)| Some(Worker { index, queue: queue?, shared: self.shared.clone() }));
        let workers = workers.collect();
        // Section 5.2.6.2: a driver that cannot flush and cannot set the mode must not have to.
        if activation.features & (VIRTIO_BLK_F_FLUSH | VIRTIO_BLK_F_CONFIG_WCE) == 0 {
            self.shared.write_through.store(true, Ordering::Relaxed);
        }
        self.start(workers).map_err(|source| ActivateError::Host { step: "starting the disk's threads", source })?;
        self.interrupt = Some(activation.interrupt);
        Ok(())
    }

    fn deactivate(&mut self) {
        if let Run::Active(running) = std::mem::replace(&mut self.run, Run::Inactive) {
            running.stop();
        }
        self.shared.write_through.store(false, Ordering::Relaxed);
        self.interrupt = None;
    }

    fn give_up(&mut self) -> bool {
        let Ok(gone) = self.shared.without_file() else { return false };
        let gone = Arc::new(gone);
        let hand_over = |workers: Vec<Worker>| {
            workers.into_iter().map(|worker| Worker { shared: gone.clone(), ..worker }).collect::<Vec<_>>()
        };
        match std::mem::replace(&mut self.run, Run::Inactive) {
            Run::Active(running) => {
                let workers = hand_over(running.stop());
                self.shared = gone.clone();
                self.start(workers).is_ok()
            }
            Run::Paused(workers) => {
                self.run = Run::Paused(hand_over(workers));
                self.shared = gone.clone();
                true
            }
            Run::Inactive => false,
        }
    }

    fn resize(&mut self) -> Result<u64, ResizeError> {
        let disk = &self.shared.disk;
        let (known, now) = (disk.capacity_sectors(), disk.measure());
        let now = now.map_err(|error| ResizeError::Unknown(error.to_string()))?;
        let bytes = |sectors: u64| sectors * SECTOR_BYTES;
        if now < known {
            return Err(ResizeError::Shrunk { now_bytes: bytes(now), known_bytes: bytes(known) });
        }
        if now > known {
            // Before the driver hears of it, which may be at once.
            disk.set_capacity_sectors(now);
            if let Some(interrupt) = &self.interrupt {
                interrupt.signal_config();
            }
        }
        Ok(bytes(now))
    }

    fn pause(&mut self) {
        match std::mem::replace(&mut self.run, Run::Inactive) {
            Run::Active(running) => self.run = Run::Paused(running.stop()),
            other => self.run = other,
        }
    }

    fn resume(&mut self) {
        match std::mem::replace(&mut self.run, Run::Inactive) {
            Run::Paused(workers) => {
                // Fails only where the host has no thread left; the guest then sees a disk that no longer answers.
                if let Err(error) = self.start(workers) {
                    crate::log::warn(format_args!("{}: no thread to resume with: {error}", self.name));
                }
            }
            other => self.run = other,
        }
    }

    fn save(&self) -> DeviceState {
        let mut queues = vec![None; self.queue_sizes.len()];
        if let Run::Paused(workers) = &self.run {
            for worker in workers {
                queues[worker.index] = Some(worker.queue.state());
            }
        }
        let write_through = self.shared.write_through.load(Ordering::Relaxed);
        DeviceState { queues, private: vec![STATE_VERSION, u8::from(write_through)] }
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        match state.private[..] {
            [STATE_VERSION, write_through @ (0 | 1)] => {
                self.shared.write_through.store(write_through == 1, Ordering::Relaxed);
                Ok(())
            }
            _ => Err(RestoreError::Damaged(DeviceKind::Block)),
        }
    }

    fn completed(&self) -> u64 {
        self.shared.completed.load(Ordering::Relaxed)
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.deactivate();
    }
}

#[cfg(test)]
mod tests;
