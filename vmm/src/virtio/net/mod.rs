//! The network device (virtio 1.3, section 5.1): an Ethernet interface whose other end is a tap of the host.
//!
//! `packet` says what a packet is and where it goes in guest memory, `control` what a driver may ask, `tap` is the
//! host's end, and `worker` moves packets: from tap to guest memory and back by one system call each, without a copy
//! of its own. A `stream` takes the tap's place where an unprivileged program carries the packets; there packets are copied.
//! There is a worker, a thread, for each queue pair. It lives from `activate` or `resume` to `deactivate` or `pause`; it
//! hands its queues back when it ends, so a paused device has no thread and holds no buffers.
//!
//! What the guest claims of a packet (checksum to be filled in, segments to be cut) goes to the host's kernel in the packet's
//! virtio header; the kernel reads that once and judges it. What the host may leave to the guest is set on the tap when the
//! driver has said what it takes.

mod control;
mod packet;
mod stream;
mod tap;
mod worker;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use self::packet::{Lent, Receiving};
use self::stream::Stream;
pub use self::tap::TapError;
use self::tap::{Queue, Tap};
use self::worker::{Counters, Pair, Running, Shared, Worker};
use super::device::{
    ActivateError, Activation, DeviceKind, DeviceState, Interrupt, RestoreError, VirtioDevice, read_config_bytes,
};

/// Feature bits (section 5.1.3).
mod feature {
    pub(super) const CSUM: u64 = 1 << 0;
    pub(super) const GUEST_CSUM: u64 = 1 << 1;
    pub(super) const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
    pub(super) const MTU: u64 = 1 << 3;
    pub(super) const MAC: u64 = 1 << 5;
    pub(super) const GUEST_TSO4: u64 = 1 << 7;
    pub(super) const GUEST_TSO6: u64 = 1 << 8;
    pub(super) const GUEST_ECN: u64 = 1 << 9;
    pub(super) const HOST_TSO4: u64 = 1 << 11;
    pub(super) const HOST_TSO6: u64 = 1 << 12;
    pub(super) const HOST_ECN: u64 = 1 << 13;
    pub(super) const MRG_RXBUF: u64 = 1 << 15;
    pub(super) const STATUS: u64 = 1 << 16;
    pub(super) const CTRL_VQ: u64 = 1 << 17;
    pub(super) const CTRL_RX: u64 = 1 << 18;
    pub(super) const CTRL_VLAN: u64 = 1 << 19;
    pub(super) const MQ: u64 = 1 << 22;
    pub(super) const CTRL_MAC_ADDR: u64 = 1 << 23;
    /// `GUEST_USO4` and `GUEST_USO6`.
    pub(super) const GUEST_USO: u64 = 0b11 << 54;
    pub(super) const HOST_USO: u64 = 1 << 56;
    /// All that the host may leave to the guest.
    pub(super) const ALL_GUEST_OFFLOADS: u64 = GUEST_CSUM | GUEST_SEGMENTS | GUEST_ECN;
    /// Packets longer than the interface's unit.
    pub(super) const GUEST_SEGMENTS: u64 = GUEST_TSO4 | GUEST_TSO6 | GUEST_USO;
}

/// Most queue pairs of a device: a thread each on the host, and one for each vCPU of most guests.
pub use hull_vmm_api::config::MAX_NET_QUEUES as MAX_PAIRS;

/// Entries of the queues for packets: enough for 64 KiB in buffers of a page or less, twice, while the driver refills.
const QUEUE_SIZE: u16 = 256;
/// Entries of the control queue; a driver waits for each answer.
const CONTROL_QUEUE_SIZE: u16 = 64;

/// `VIRTIO_NET_S_LINK_UP` (section 5.1.4).
const LINK_UP: u16 = 1;
/// Length of the configuration space up to the fields of features that are offered.
const CONFIG_BYTES: usize = 12;

const STATE_VERSION: u8 = 1;
/// Version, address, pairs in use, link, offloads.
const STATE_BYTES: usize = 1 + 6 + 2 + 1 + 8;

/// Why an interface cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// A descriptor is of no use.
    #[error("queue {index}: {source}")]
    Tap {
        /// Which of the descriptors.
        index: usize,
        /// What is wrong with it.
        source: TapError,
    },
    /// The process may open no more descriptors.
    #[error("no eventfd for the interface: {0}; raise the limit of open files")]
    EventFd(io::Error),
}

/// A virtio network interface.
pub struct Net {
    name: String,
    mtu: Option<u16>,
    /// The address that it has without the driver's doing.
    own_mac: [u8; 6],
    queue_sizes: Vec<u16>,
    shared: Arc<Shared>,
    /// Of a driver that wants to hear of the link.
    interrupt: Option<Arc<dyn Interrupt>>,
    /// What a restored device goes on with when it is activated.
    restored: Option<Restored>,
    run: Run,
}

/// What the driver had chosen when the state was saved.
#[derive(Clone, Copy)]
struct Restored {
    pairs: u16,
    offloads: u64,
}

enum Run {
    Inactive,
    Active(Vec<Running>),
    Paused(Vec<Worker>),
}

impl Net {
    /// An interface with this address, whose queue pairs are those of the descriptors, at least one. `mtu` is what
    /// the driver is told to be the largest unit.
    ///
    /// # Errors
    ///
    /// When a descriptor is not of a tap as it must be (see `tap`).
    pub fn new(id: &str, taps: Vec<OwnedFd>, mac: [u8; 6], mtu: Option<u16>) -> Result<Self, NetError> {
        let several = taps.len() > 1;
        let open = |(index, fd)| match Tap::new(fd, several) {
            Ok(tap) => Ok(Box::new(tap) as Box<dyn Queue>),
            Err(source) => Err(NetError::Tap { index, source }),
        };
        let queues = taps.into_iter().enumerate().map(open).collect::<Result<_, _>>()?;
        Self::with_queues(id, queues, mac, mtu).map_err(NetError::EventFd)
    }

    /// An interface with this address, whose packets go over a connected Unix stream socket.
    ///
    /// # Errors
    ///
    /// When the descriptor is no socket.
    pub fn over_stream(id: &str, socket: OwnedFd, mac: [u8; 6], mtu: Option<u16>) -> Result<Self, NetError> {
        let stream = Stream::new(socket).map_err(|source| NetError::Tap { index: 0, source })?;
        Self::with_queues(id, vec![Box::new(stream)], mac, mtu).map_err(NetError::EventFd)
    }

    fn with_queues(id: &str, queues: Vec<Box<dyn Queue>>, mac: [u8; 6], mtu: Option<u16>) -> io::Result<Self> {
        let pairs = queues.into_iter().map(Pair::new).collect::<io::Result<Vec<_>>>()?;
        // Receive and transmit of each pair, then the control queue (section 5.1.2).
        let mut queue_sizes = vec![QUEUE_SIZE; 2 * pairs.len()];
        queue_sizes.push(CONTROL_QUEUE_SIZE);
        let shared = Shared {
            active_pairs: AtomicU16::new(pairs.len() as u16),
            pairs,
            mac: Mutex::new(mac),
            offloads: AtomicU64::new(0),
            end_is_there: AtomicBool::new(true),
            link_up: AtomicBool::new(true),
            counters: Counters::default(),
        };
        shared.set_pairs(1);
        Ok(Self {
            name: format!("net-{id}"),
            mtu,
            own_mac: mac,
            queue_sizes,
            shared: Arc::new(shared),
            interrupt: None,
            restored: None,
            run: Run::Inactive,
        })
    }

    fn start(&mut self, workers: Vec<Worker>) -> io::Result<()> {
        let mut running = Vec::new();
        for worker in workers {
            // Names of threads have 15 bytes; the number goes last and may be cut.
            let name = format!("{}-{}", self.name, worker.index);
            match worker.start(&name) {
                Ok(started) => running.push(started),
                Err(error) => {
                    running.into_iter().for_each(|running| drop(running.stop()));
                    return Err(error);
                }
            }
        }
        self.run = Run::Active(running);
        Ok(())
    }

    /// The configuration space (section 5.1.4).
    fn config(&self) -> [u8; CONFIG_BYTES] {
        let mut space = [0; CONFIG_BYTES];
        let status = if self.shared.is_link_up() { LINK_UP } else { 0 };
        space[..6].copy_from_slice(&self.shared.mac());
        space[6..8].copy_from_slice(&status.to_le_bytes());
        space[8..10].copy_from_slice(&(self.shared.pairs.len() as u16).to_le_bytes());
        space[10..12].copy_from_slice(&self.mtu.unwrap_or(0).to_le_bytes());
        space
    }

    /// The workers for the pairs whose queues the driver enabled; those of the first are needed.
    fn workers(&self, activation: &mut Activation) -> Result<Vec<Worker>, ActivateError> {
        let features = activation.features;
        let pairs = if features & feature::MQ != 0 { self.shared.pairs.len() } else { 1 };
        let receiving = Receiving {
            mergeable: features & feature::MRG_RXBUF != 0,
            checksums: features & feature::GUEST_CSUM != 0,
            segments: features & feature::GUEST_SEGMENTS != 0,
            mtu: self.mtu,
        };
        let mut workers = Vec::new();
        for index in 0..pairs {
            // At most 2 * `MAX_PAIRS`.
            let (rx, tx) = (2 * index as u16, 2 * index as u16 + 1);
            let (rx, tx) = match index {
                0 => (activation.take_queue(rx)?, activation.take_queue(tx)?),
                _ => match (activation.try_take_queue(rx), activation.try_take_queue(tx)) {
                    (Some(rx), Some(tx)) => (rx, tx),
                    _ => break,
                },
            };
            let control = match index {
                0 if features & feature::CTRL_VQ != 0 => activation.try_take_queue(2 * pairs as u16),
                _ => None,
            };
            workers.push(Worker {
                index,
                rx,
                tx,
                control,
                lent: Lent::new(receiving),
                features,
                interrupt: activation.interrupt.clone(),
                shared: self.shared.clone(),
            });
        }
        Ok(workers)
    }

    fn stop(&mut self) -> Vec<Worker> {
        match std::mem::replace(&mut self.run, Run::Inactive) {
            Run::Active(running) => running.into_iter().filter_map(Running::stop).collect(),
            Run::Paused(workers) => workers,
            Run::Inactive => Vec::new(),
        }
    }
}

impl VirtioDevice for Net {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Net
    }

    fn features(&self) -> u64 {
        let always = feature::MAC
            | feature::MRG_RXBUF
            | feature::STATUS
            | feature::CTRL_VQ
            | feature::CTRL_RX
            | feature::CTRL_VLAN
            | feature::CTRL_MAC_ADDR;
        let mtu = if self.mtu.is_some() { feature::MTU } else { 0 };
        let pairs = if self.shared.pairs.len() > 1 { feature::MQ } else { 0 };
        always | mtu | pairs | self.shared.pairs[0].tap.features()
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn vector_per_queue(&self) -> bool {
        true
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config(), offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let refused = |step| ActivateError::Host { step, source: io::Error::other("the host refuses") };
        let workers = self.workers(&mut activation)?;
        let restored = self.restored.take();
        let offloads = restored.map_or(activation.features, |restored| restored.offloads);
        if !self.shared.set_offloads(offloads & activation.features) {
            return Err(refused("setting the interface's offloads"));
        }
        // Section 5.1.6.5.5: one pair, until the driver says otherwise.
        let pairs = restored.map_or(1, |restored| restored.pairs).min(workers.len() as u16);
        if !self.shared.set_pairs(pairs) {
            return Err(refused("switching the interface's queues"));
        }
        self.start(workers)
            .map_err(|source| ActivateError::Host { step: "starting the interface's thread", source })?;
        self.interrupt = (activation.features & feature::STATUS != 0).then_some(activation.interrupt);
        Ok(())
    }

    fn set_link(&mut self, up: bool) -> bool {
        let was_up = self.shared.is_link_up();
        self.shared.link_up.store(up, Ordering::Release);
        if self.shared.is_link_up() != was_up
            && let Some(interrupt) = &self.interrupt
        {
            interrupt.signal_config();
        }
        true
    }

    fn deactivate(&mut self) {
        self.stop();
        self.interrupt = None;
        *self.shared.mac.lock().unwrap_or_else(PoisonError::into_inner) = self.own_mac;
        self.restored = None;
    }

    fn pause(&mut self) {
        if let Run::Active(_) = self.run {
            self.run = Run::Paused(self.stop());
        }
    }

    fn resume(&mut self) {
        if let Run::Paused(_) = self.run {
            let workers = self.stop();
            // Fails only where the host has no thread left; the guest then has an interface on which nothing moves.
            if let Err(error) = self.start(workers) {
                crate::log::warn(format_args!("{}: no thread to resume with: {error}", self.name));
            }
        }
    }

    fn save(&self) -> DeviceState {
        let mut queues = vec![None; self.queue_sizes.len()];
        if let Run::Paused(workers) = &self.run {
            for queue in workers.iter().flat_map(|worker| [&worker.rx, &worker.tx].into_iter().chain(&worker.control)) {
                if let Some(slot) = queues.get_mut(usize::from(queue.index())) {
                    *slot = Some(queue.state());
                }
            }
        }
        let mut private = vec![STATE_VERSION];
        private.extend(self.shared.mac());
        private.extend(self.shared.active_pairs.load(Ordering::Relaxed).to_le_bytes());
        private.push(u8::from(self.shared.is_link_up()));
        private.extend(self.shared.offloads.load(Ordering::Relaxed).to_le_bytes());
        DeviceState { queues, private }
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let damaged = || RestoreError::Damaged(DeviceKind::Net);
        let private: &[u8; STATE_BYTES] = state.private.as_slice().try_into().map_err(|_| damaged())?;
        let (pairs, link) = (u16::from_le_bytes([private[7], private[8]]), private[9]);
        let there = pairs >= 1 && usize::from(pairs) <= self.shared.pairs.len();
        if private[0] != STATE_VERSION || !there || link > 1 {
            return Err(damaged());
        }
        let (mut mac, mut offloads) = ([0; 6], [0; 8]);
        mac.copy_from_slice(&private[1..7]);
        offloads.copy_from_slice(&private[10..]);
        *self.shared.mac.lock().unwrap_or_else(PoisonError::into_inner) = mac;
        // The link is that of the tap that the copy got, not of the one that was there.
        self.restored = Some(Restored { pairs, offloads: u64::from_le_bytes(offloads) });
        Ok(())
    }

    fn completed(&self) -> u64 {
        let counters = &self.shared.counters;
        counters.rx_packets.load(Ordering::Relaxed) + counters.tx_packets.load(Ordering::Relaxed)
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let Counters { rx_packets, rx_bytes, rx_dropped, tx_packets, tx_bytes, tx_dropped } = &self.shared.counters;
        [
            ("rx_packets", rx_packets),
            ("rx_bytes", rx_bytes),
            ("rx_dropped", rx_dropped),
            ("tx_packets", tx_packets),
            ("tx_bytes", tx_bytes),
            ("tx_dropped", tx_dropped),
        ]
        .map(|(name, counter)| (name, counter.load(Ordering::Relaxed)))
        .to_vec()
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        self.deactivate();
    }
}

#[cfg(test)]
mod tests;
