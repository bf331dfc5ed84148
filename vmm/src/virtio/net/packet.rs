//! What a packet is, without any input or output: how long one may be, and the buffers that the driver lent for those
//! to come (virtio 1.3, section 5.1.6).

use std::collections::VecDeque;

use super::super::queue::{Chain, MAX_SEGMENTS, VirtQueue};

/// Length of `struct virtio_net_hdr` without hash fields (section 5.1.6); `num_buffers` is in it since `VERSION_1`.
pub(super) const HEADER_BYTES: usize = 12;
/// Where its `flags` and `num_buffers` are.
const FLAGS_AT: usize = 0;
const NUM_BUFFERS_AT: usize = 10;
/// An Ethernet header.
pub(super) const ETHERNET_BYTES: usize = 14;
/// Two VLAN tags.
const TAG_BYTES: usize = 8;
/// The longest packet that the driver must be ready for when it takes segments (section 5.1.6.3.1), header included.
const LARGEST_BYTES: usize = 65_562;
/// The longest packet that is taken from a guest: the largest IP packet with tags. No interface has more to send.
const MAX_SENT_BYTES: usize = LARGEST_BYTES + TAG_BYTES;
/// Largest unit of an Ethernet without jumbo frames, which a guest without segments is ready for at least.
const DEFAULT_MTU: usize = 1500;

/// Why a packet of the guest's is not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// Not even the headers.
    TooShort,
    /// Longer than any packet.
    TooLong,
    /// A part of the chain is for the device to write.
    Writable,
}

/// Judges a chain of the transmit queue by its length alone: the host's kernel, which reads header and packet once,
/// judges what is in them.
pub(super) fn check_sent(chain: &Chain) -> Result<(), Refusal> {
    match chain.readable_len() {
        _ if chain.writable_len() > 0 => Err(Refusal::Writable),
        len if len < HEADER_BYTES + ETHERNET_BYTES => Err(Refusal::TooShort),
        len if len > MAX_SENT_BYTES => Err(Refusal::TooLong),
        _ => Ok(()),
    }
}

/// What the driver agreed to for packets that it receives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Receiving {
    /// A packet may lie in several buffers (`VIRTIO_NET_F_MRG_RXBUF`).
    pub(super) mergeable: bool,
    /// A packet may lack its checksum (`VIRTIO_NET_F_GUEST_CSUM`).
    pub(super) checksums: bool,
    /// A packet may be as long as segmentation allows.
    pub(super) segments: bool,
    /// The interface's largest unit, if it is told.
    pub(super) mtu: Option<u16>,
}

impl Receiving {
    /// The room that the longest packet takes.
    fn longest(self) -> usize {
        match self.segments {
            true => LARGEST_BYTES,
            false => HEADER_BYTES + ETHERNET_BYTES + TAG_BYTES + self.mtu.map_or(DEFAULT_MTU, usize::from),
        }
    }
}

/// Addresses in guest memory for `readv`.
struct Parts(Vec<libc::iovec>);

// SAFETY: the addresses lead into guest memory, which any thread may access; the chains beside them keep it mapped.
unsafe impl Send for Parts {}

/// What became of a packet that was read into lent buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Delivery {
    /// It is the driver's.
    Delivered,
    /// It did not fit; its buffers stay for the next.
    Dropped,
}

/// Buffers that the driver lent for packets to come, in their order: popped, not used yet.
pub(super) struct Lent {
    receiving: Receiving,
    /// Each with its number of segments.
    chains: VecDeque<(Chain, usize)>,
    /// The segments of all of them.
    parts: Parts,
    capacity: usize,
    /// For returning them; kept to save its memory.
    used: Vec<(u16, u32)>,
}

impl Lent {
    /// None yet.
    pub(super) fn new(receiving: Receiving) -> Self {
        Self { receiving, chains: VecDeque::new(), parts: Parts(Vec::new()), capacity: 0, used: Vec::new() }
    }

    /// Borrows from `queue` until the longest packet fits; false when the driver must lend more first.
    pub(super) fn fill(&mut self, queue: &mut VirtQueue) -> bool {
        while self.needs_more() {
            let Some(chain) = queue.pop() else {
                // A ring that is all here cannot give more. What does not fit is dropped then.
                return self.chains.len() == usize::from(queue.size());
            };
            if chain.writable_len() < HEADER_BYTES {
                // Section 5.1.6.3.1: the least that a buffer may have. It goes back as it came.
                queue.push(chain.head(), 0);
                continue;
            }
            let parts = chain.writable_iovecs(0, usize::MAX);
            if self.parts.0.len() + parts.len() > MAX_SEGMENTS {
                queue.undo_pop();
                return true;
            }
            self.capacity += chain.writable_len();
            self.chains.push_back((chain, parts.len()));
            self.parts.0.extend(parts);
        }
        true
    }

    fn needs_more(&self) -> bool {
        match self.receiving.mergeable {
            true => self.capacity < self.receiving.longest(),
            // One packet, one buffer.
            false => self.chains.is_empty(),
        }
    }

    /// Where the next packet goes.
    pub(super) fn parts(&self) -> &[libc::iovec] {
        &self.parts.0
    }

    /// Hands over a packet of `len` bytes, header included, that was read into [`parts`](Self::parts).
    pub(super) fn deliver(&mut self, queue: &mut VirtQueue, len: usize) -> Delivery {
        if len > self.capacity || len < HEADER_BYTES {
            return Delivery::Dropped;
        }
        let mut left = len;
        self.used.clear();
        for (chain, _) in &self.chains {
            let here = left.min(chain.writable_len());
            // At most `LARGEST_BYTES` or one chain's length, which descriptors of 32 bits add up to; a driver with a
            // buffer of more than 4 GiB in one chain gets no longer packets for it.
            self.used.push((chain.head(), u32::try_from(here).unwrap_or(u32::MAX)));
            left -= here;
            if left == 0 {
                break;
            }
        }
        self.complete_header();
        let count = self.used.len();
        queue.push_together(&self.used);
        let mut parts = 0;
        for (chain, segments) in self.chains.drain(..count) {
            self.capacity -= chain.writable_len();
            parts += segments;
        }
        self.parts.0.drain(..parts);
        Delivery::Delivered
    }

    /// What the host's kernel does not write, or may write though the driver did not ask for it (section 5.1.6.4.1).
    fn complete_header(&self) {
        let Some((first, _)) = self.chains.front() else { return };
        // At most `MAX_SEGMENTS`.
        first.write_at(NUM_BUFFERS_AT, &(self.used.len() as u16).to_le_bytes());
        if !self.receiving.checksums {
            first.write_at(FLAGS_AT, &[0]);
        }
    }

    /// Returns all buffers as if they had never been borrowed.
    pub(super) fn give_back(&mut self, queue: &mut VirtQueue) {
        for _ in self.chains.drain(..) {
            queue.undo_pop();
        }
        self.parts.0.clear();
        self.capacity = 0;
    }
}
