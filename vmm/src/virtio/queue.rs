//! A split virtqueue as a device uses it (virtio 1.3, section 2.7), with the guest as the adversary.
//!
//! [`VirtQueue`] joins the ring (`virtio_queue`), the notification from the driver and the one to it. A ring or a
//! chain that breaks the rules breaks the queue: it asks for a reset once and yields nothing from then on, so that devices
//! need no error handling of their own for it.
//!
//! [`Chain`] is one request: its descriptors, walked and checked once, resolved to host memory. The contents stay the
//! guest's to change at any time; a device copies a field once and judges the copy.

use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::bitmap::BS;
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemory as _, VolatileSlice};
use vmm_sys_util::eventfd::EventFd;

use super::device::{GuestMemory, Interrupt};

/// Most segments of a chain: the most that one `readv` takes (`IOV_MAX`). No supported driver comes near: Linux keeps
/// a chain shorter than the queue, and the longest queue here has 1,024 entries.
pub const MAX_SEGMENTS: usize = 1024;

/// A descriptor chain in the form that other crates' readers take.
pub type RawChain = DescriptorChain<GuestMemory>;

/// How a driver broke a queue.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum QueueError {
    /// The ring is not where the driver said, or its index ran ahead by more than its size.
    #[error("the ring is not valid")]
    Ring,
    /// A chain's next or indirect descriptor cannot be followed.
    #[error("a descriptor chain is broken or loops")]
    Chain,
    /// A chain has more than [`MAX_SEGMENTS`] segments.
    #[error("a descriptor chain has more than {MAX_SEGMENTS} segments")]
    TooManySegments,
    /// A segment does not lie in guest memory.
    #[error("a descriptor points outside guest memory")]
    Address,
    /// A segment that the device may read follows one that it may write (virtio 1.3, section 2.7.4.2).
    #[error("a descriptor chain has a readable segment after a writable one")]
    Order,
}

/// A stretch of guest memory, checked to lie in it, of a [`Chain`].
#[derive(Clone, Copy, Debug)]
struct Segment {
    host: *mut u8,
    len: usize,
}

/// One request from the driver: first what the device reads, then what it writes.
pub struct Chain {
    head: u16,
    segments: Vec<Segment>,
    readable_segments: usize,
    readable_len: usize,
    writable_len: usize,
    /// Keeps the mapping alive that the segments point into.
    _memory: GuestMemory,
}

// SAFETY: the pointers lead into guest memory, which `_memory` keeps mapped and which any thread may access.
unsafe impl Send for Chain {}

impl Chain {
    /// Walks `raw` and checks every descriptor of it.
    ///
    /// # Errors
    ///
    /// When the chain breaks a rule of the specification.
    pub fn new(raw: RawChain, memory: &GuestMemory) -> Result<Self, QueueError> {
        let head = raw.head_index();
        let mut segments = Vec::with_capacity(4);
        let (mut readable_segments, mut readable_len, mut writable_len) = (0, 0, 0);
        let mut unfinished = true;
        for descriptor in raw {
            // The iterator ends in silence at what it cannot follow; a last descriptor that promises more tells.
            unfinished = descriptor.has_next();
            let len = descriptor.len() as usize;
            if descriptor.is_write_only() {
                writable_len += len;
            } else if writable_len > 0 || segments.len() > readable_segments {
                return Err(QueueError::Order);
            } else {
                readable_len += len;
            }
            for slice in memory.get_slices(descriptor.addr(), len) {
                let slice = slice.map_err(|_| QueueError::Address)?;
                if segments.len() == MAX_SEGMENTS {
                    return Err(QueueError::TooManySegments);
                }
                segments.push(Segment { host: slice.ptr_guard_mut().as_ptr(), len: slice.len() });
                readable_segments += usize::from(!descriptor.is_write_only());
            }
        }
        if unfinished {
            return Err(QueueError::Chain);
        }
        Ok(Self { head, segments, readable_segments, readable_len, writable_len, _memory: memory.clone() })
    }

    /// The index that goes back to the driver when the chain is used.
    #[must_use]
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Bytes that the device may read.
    #[must_use]
    pub fn readable_len(&self) -> usize {
        self.readable_len
    }

    /// Bytes that the device may write.
    #[must_use]
    pub fn writable_len(&self) -> usize {
        self.writable_len
    }

    /// Copies out of the readable part from `offset` on; returns how much there was.
    pub fn read_at(&self, offset: usize, data: &mut [u8]) -> usize {
        let mut done = 0;
        for segment in cut(&self.segments[..self.readable_segments], offset, data.len()) {
            let slice = segment.volatile();
            slice.copy_to(&mut data[done..done + segment.len]);
            done += segment.len;
        }
        done
    }

    /// A structure from the readable part at `offset`, or `None` if it is not all there.
    #[must_use]
    pub fn read_obj<T: ByteValued + Default>(&self, offset: usize) -> Option<T> {
        let mut object = T::default();
        let bytes = object.as_mut_slice();
        (self.read_at(offset, bytes) == bytes.len()).then_some(object)
    }

    /// Copies into the writable part from `offset` on; returns how much there was room for.
    pub fn write_at(&self, offset: usize, data: &[u8]) -> usize {
        let mut done = 0;
        for segment in cut(&self.segments[self.readable_segments..], offset, data.len()) {
            let slice = segment.volatile();
            slice.copy_from(&data[done..done + segment.len]);
            done += segment.len;
        }
        done
    }

    /// The readable part from `offset` on, at most `len` bytes of it, for `writev` and its like. The pointers are
    /// good as long as the chain lives.
    #[must_use]
    pub fn readable_iovecs(&self, offset: usize, len: usize) -> Vec<libc::iovec> {
        iovecs(&self.segments[..self.readable_segments], offset, len)
    }

    /// The writable part from `offset` on, at most `len` bytes of it, for `readv` and its like. The pointers are
    /// good as long as the chain lives.
    #[must_use]
    pub fn writable_iovecs(&self, offset: usize, len: usize) -> Vec<libc::iovec> {
        iovecs(&self.segments[self.readable_segments..], offset, len)
    }
}

impl Segment {
    fn volatile(&self) -> VolatileSlice<'_, BS<'_, ()>> {
        // SAFETY: the segment was checked to lie in guest memory when its chain was made, and the chain keeps that mapped.
        unsafe { VolatileSlice::new(self.host, self.len) }
    }
}

/// What of `segments` lies in the `len` bytes from `offset` on.
fn cut(segments: &[Segment], mut offset: usize, mut len: usize) -> impl Iterator<Item = Segment> + '_ {
    segments.iter().filter_map(move |segment| {
        if offset >= segment.len {
            offset -= segment.len;
            return None;
        }
        let part = (segment.len - offset).min(len);
        if part == 0 {
            return None;
        }
        // SAFETY: `offset` is less than the segment's length.
        let host = unsafe { segment.host.add(offset) };
        offset = 0;
        len -= part;
        Some(Segment { host, len: part })
    })
}

fn iovecs(segments: &[Segment], offset: usize, len: usize) -> Vec<libc::iovec> {
    cut(segments, offset, len).map(|part| libc::iovec { iov_base: part.host.cast(), iov_len: part.len }).collect()
}

/// One active queue of a device.
pub struct VirtQueue {
    index: u16,
    queue: Queue,
    memory: GuestMemory,
    kick: Arc<EventFd>,
    interrupt: Arc<dyn Interrupt>,
    /// Where the used ring stood when the driver was last notified, or told not to be.
    notified: Wrapping<u16>,
    broken: bool,
}

/// Offset of the entries in a used ring, and the size of one (virtio 1.3, section 2.7.8).
const USED_ENTRIES: u64 = 4;
const USED_ENTRY_BYTES: u64 = 8;

impl VirtQueue {
    /// Joins a ring that the driver configured to its notifications.
    ///
    /// # Errors
    ///
    /// When the ring does not lie in guest memory.
    pub fn new(
        index: u16,
        queue: Queue,
        memory: GuestMemory,
        kick: Arc<EventFd>,
        interrupt: Arc<dyn Interrupt>,
    ) -> Result<Self, QueueError> {
        if !queue.is_valid(&*memory) {
            return Err(QueueError::Ring);
        }
        let notified = Wrapping(queue.next_used());
        Ok(Self { index, queue, memory, kick, interrupt, notified, broken: false })
    }

    /// Its place among the device's queues.
    #[must_use]
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Becomes readable when the driver has made buffers available. Non-blocking.
    #[must_use]
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// Guest memory.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Entries of the ring.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Whether the driver broke the queue; it yields nothing then.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Clears the notification. Call it when [`kick`](Self::kick) is readable, before taking chains.
    pub fn clear_kick(&self) {
        // Nothing to clear is no error: a kick may have been taken with an earlier one.
        let _ = self.kick.read();
    }

    /// The next request. `None` when there is none: the driver will then kick for the next one it adds.
    pub fn pop(&mut self) -> Option<Chain> {
        let raw = self.pop_raw()?;
        match Chain::new(raw, &self.memory) {
            Ok(chain) => Some(chain),
            Err(error) => {
                self.break_down(&error);
                None
            }
        }
    }

    /// The next request as a chain that is not checked yet, for readers that check by themselves.
    pub fn pop_raw(&mut self) -> Option<RawChain> {
        if self.broken {
            return None;
        }
        loop {
            let head = match self.queue.iter(self.memory.clone()) {
                Ok(mut heads) => heads.next(),
                Err(_) => {
                    self.break_down(&QueueError::Ring);
                    return None;
                }
            };
            if head.is_some() {
                return head;
            }
            // Empty: ask for a kick, and look again for what came before that was visible.
            match self.queue.enable_notification(&*self.memory) {
                Ok(true) => {}
                Ok(false) => return None,
                Err(_) => {
                    self.break_down(&QueueError::Ring);
                    return None;
                }
            }
        }
    }

    /// Puts back the chain that [`pop`](Self::pop) returned last.
    pub fn undo_pop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Returns a chain to the driver with the number of bytes written to it. [`notify`](Self::notify) later.
    pub fn push(&mut self, head: u16, written: u32) {
        if !self.broken && self.queue.add_used(&*self.memory, head, written).is_err() {
            self.break_down(&QueueError::Ring);
        }
    }

    /// Returns several chains so that the driver sees all of them or none: the parts of one packet (virtio 1.3, section
    /// 5.1.6.4). Each is a head and the number of bytes written; at most as many as the ring has entries.
    pub fn push_together(&mut self, chains: &[(u16, u32)]) {
        let Some((last, before)) = chains.split_last() else { return };
        if self.broken {
            return;
        }
        let mut next = Wrapping(self.queue.next_used());
        for &(head, written) in before {
            let slot = USED_ENTRIES + USED_ENTRY_BYTES * u64::from(next.0 % self.queue.size());
            // Head, then length, as one little-endian number.
            let entry = u64::from(head) | u64::from(written) << 32;
            let at = self.queue.used_ring().checked_add(slot).map(GuestAddress);
            if at.is_none_or(|at| self.memory.write_obj(entry.to_le(), at).is_err()) {
                self.break_down(&QueueError::Ring);
                return;
            }
            next += 1;
        }
        // The index, which is what the driver looks at, moves with the last one.
        self.queue.set_next_used(next.0);
        self.push(last.0, last.1);
    }

    /// Interrupts the driver if it wants to hear of what was pushed since the last call.
    pub fn notify(&mut self) {
        let next = Wrapping(self.queue.next_used());
        let pushed = next - std::mem::replace(&mut self.notified, next);
        if self.broken || pushed.0 == 0 {
            return;
        }
        match self.used_event() {
            // Section 2.7.7.2: the driver waits for the entry before the one it names to be passed.
            Some(event) if next - event - Wrapping(1) >= pushed => {}
            _ => self.interrupt.signal_queue(self.index),
        }
    }

    /// The entry of the used ring whose use the driver wants to hear of; `None` where it wants to hear of each.
    fn used_event(&self) -> Option<Wrapping<u16>> {
        if !self.queue.event_idx_enabled() {
            return None;
        }
        // What was pushed must be visible before the driver's wish is read: it looks once more after it has written that.
        fence(Ordering::SeqCst);
        let offset = 4 + 2 * u64::from(self.queue.size());
        let at = GuestAddress(self.queue.avail_ring().checked_add(offset)?);
        self.memory.load::<u16>(at, Ordering::Relaxed).ok().map(|event| Wrapping(u16::from_le(event)))
    }

    /// Where the ring stands, for [`VirtioDevice::save`](super::device::VirtioDevice::save).
    #[must_use]
    pub fn state(&self) -> QueueState {
        self.queue.state()
    }

    /// Gives up the queue because of what the driver did: nothing comes out of it until the driver resets the device.
    pub fn fail(&mut self, reason: &str) {
        if !self.broken {
            self.broken = true;
            self.interrupt.needs_reset(&format!("queue {}: {reason}", self.index));
        }
    }

    fn break_down(&mut self, error: &QueueError) {
        self.fail(&error.to_string());
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::super::testing::{DriverQueue, FakeInterrupt, INDIRECT, NEXT, WRITE, memory, write_descriptor};
    use super::*;

    const SIZE: u16 = 16;
    const BUFFERS: u64 = 0x2_0000;

    struct Bench {
        memory: GuestMemory,
        driver: DriverQueue,
        device: VirtQueue,
        interrupt: Arc<FakeInterrupt>,
    }

    fn bench() -> Bench {
        let memory = memory(0x4_0000);
        let driver = DriverQueue::new(&memory, 0x1_0000, SIZE);
        let interrupt = Arc::new(FakeInterrupt::default());
        let device = driver.device_end(3, interrupt.clone());
        Bench { memory, driver, device, interrupt }
    }

    fn assert_breaks(mut bench: Bench, error: &QueueError) {
        assert!(bench.device.pop().is_none());
        assert!(bench.device.is_broken());
        assert!(bench.device.pop().is_none());
        assert_eq!(*bench.interrupt.resets.lock().unwrap(), [format!("queue 3: {error}")]);
    }

    #[test]
    fn a_chain_is_read_and_written_across_segments() {
        let mut b = bench();
        b.memory.write_slice(b"hello world", vm_memory::GuestAddress(BUFFERS)).unwrap();
        let head = b.driver.add(&[
            (BUFFERS, 5, false),
            (BUFFERS + 5, 6, false),
            (BUFFERS + 0x100, 3, true),
            (BUFFERS + 0x200, 9, true),
        ]);
        let chain = b.device.pop().unwrap();
        assert_eq!((chain.readable_len(), chain.writable_len()), (11, 12));
        let mut text = [0; 20];
        assert_eq!(chain.read_at(3, &mut text), 8);
        assert_eq!(&text[..8], b"lo world");
        assert_eq!(chain.read_at(11, &mut text), 0);
        assert_eq!(chain.read_obj::<u64>(4), None);
        assert_eq!(chain.write_at(1, b"abcdef"), 6);
        assert_eq!(chain.write_at(10, b"abcdef"), 2);
        assert_eq!(chain.writable_iovecs(2, 5).iter().map(|v| v.iov_len).collect::<Vec<_>>(), [1, 4]);
        b.device.push(chain.head(), 7);
        b.device.notify();
        assert_eq!(b.driver.take_used(), Some((head, 7)));
        assert_eq!(*b.interrupt.queues.lock().unwrap(), [3]);
        let mut written = [0; 4];
        b.memory.read_slice(&mut written, vm_memory::GuestAddress(BUFFERS + 0x200)).unwrap();
        assert_eq!(&written, b"cdef");
    }

    #[test]
    fn an_indirect_chain_is_followed() {
        let mut b = bench();
        write_descriptor(&b.memory, BUFFERS, BUFFERS + 0x100, 16, NEXT, 1);
        write_descriptor(&b.memory, BUFFERS + 16, BUFFERS + 0x200, 32, WRITE, 0);
        b.driver.write_descriptor(0, BUFFERS, 32, INDIRECT, 0);
        b.driver.offer(0);
        let chain = b.device.pop().unwrap();
        assert_eq!((chain.head(), chain.readable_len(), chain.writable_len()), (0, 16, 32));
    }

    #[test]
    fn the_driver_is_not_interrupted_for_nothing() {
        let mut b = bench();
        b.device.notify();
        let head = b.driver.add(&[(BUFFERS, 8, true)]);
        assert!(b.device.pop().is_some());
        b.device.notify();
        assert!(b.interrupt.queues.lock().unwrap().is_empty());
        b.device.push(head, 0);
        b.device.notify();
        b.device.notify();
        assert_eq!(*b.interrupt.queues.lock().unwrap(), [3]);
    }

    #[test]
    fn the_parts_of_a_packet_are_used_together() {
        let mut b = bench();
        let heads: Vec<u16> = (0..3).map(|_| b.driver.add(&[(BUFFERS, 8, true)])).collect();
        while b.device.pop().is_some() {}
        b.device.push_together(&[]);
        b.device.notify();
        assert!(b.interrupt.queues.lock().unwrap().is_empty());
        b.device.push_together(&[(heads[0], 8), (heads[1], 8), (heads[2], 3)]);
        b.device.notify();
        assert_eq!([(); 3].map(|()| b.driver.take_used()), [Some((0, 8)), Some((1, 8)), Some((2, 3))]);
        assert_eq!(*b.interrupt.queues.lock().unwrap(), [3]);
    }

    #[test]
    fn with_event_indices_the_driver_says_when_it_wants_to_hear() {
        for (event, wanted) in [(0, true), (1, true), (2, true), (3, false), (u16::MAX, false)] {
            let mut b = bench();
            b.device.queue.set_event_idx(true);
            for _ in 0..3 {
                b.driver.add(&[(BUFFERS, 8, true)]);
            }
            while b.device.pop().is_some() {}
            b.driver.set_used_event(event);
            b.device.push_together(&[(0, 8), (1, 8), (2, 8)]);
            b.device.notify();
            assert_eq!(!b.interrupt.queues.lock().unwrap().is_empty(), wanted, "{event}");
        }
    }

    #[test]
    fn a_popped_chain_can_be_put_back() {
        let mut b = bench();
        let head = b.driver.add(&[(BUFFERS, 8, true)]);
        assert_eq!(b.device.pop().unwrap().head(), head);
        assert!(b.device.pop().is_none());
        b.device.undo_pop();
        assert_eq!(b.device.pop().unwrap().head(), head);
    }

    #[test]
    fn a_loop_of_descriptors_breaks_the_queue() {
        let mut b = bench();
        b.driver.write_descriptor(0, BUFFERS, 8, NEXT, 1);
        b.driver.write_descriptor(1, BUFFERS, 8, NEXT, 0);
        b.driver.offer(0);
        assert_breaks(b, &QueueError::Chain);
    }

    #[test]
    fn a_next_beyond_the_table_breaks_the_queue() {
        let mut b = bench();
        b.driver.write_descriptor(0, BUFFERS, 8, NEXT, SIZE);
        b.driver.offer(0);
        assert_breaks(b, &QueueError::Chain);
    }

    #[test]
    fn a_head_beyond_the_table_breaks_the_queue() {
        let mut b = bench();
        b.driver.offer(SIZE);
        assert_breaks(b, &QueueError::Chain);
    }

    #[test]
    fn an_indirect_table_of_odd_length_or_place_breaks_the_queue() {
        for (address, len) in [(BUFFERS, 17), (u64::MAX - 4, 16), (0x10_0000, 32), (BUFFERS, 0)] {
            let mut b = bench();
            b.driver.write_descriptor(0, address, len, INDIRECT, 0);
            b.driver.offer(0);
            assert_breaks(b, &QueueError::Chain);
        }
    }

    #[test]
    fn a_nested_indirect_table_breaks_the_queue() {
        let mut b = bench();
        write_descriptor(&b.memory, BUFFERS, BUFFERS, 16, INDIRECT, 0);
        b.driver.write_descriptor(0, BUFFERS, 16, INDIRECT, 0);
        b.driver.offer(0);
        assert_breaks(b, &QueueError::Chain);
    }

    #[test]
    fn a_huge_indirect_table_breaks_the_queue() {
        let mut b = bench();
        let entries = 4096;
        for i in 0..entries {
            let at = BUFFERS + 16 * u64::from(i);
            write_descriptor(&b.memory, at, BUFFERS, 1, NEXT, i + 1);
        }
        b.driver.write_descriptor(0, BUFFERS, u32::from(entries) * 16, INDIRECT, 0);
        b.driver.offer(0);
        assert_breaks(b, &QueueError::TooManySegments);
    }

    #[test]
    fn a_segment_outside_memory_breaks_the_queue() {
        for (address, len) in [(0x10_0000, 1), (0x3_ffff, 2), (u64::MAX, 2), (0, u32::MAX)] {
            let mut b = bench();
            b.driver.add(&[(address, len, true)]);
            assert_breaks(b, &QueueError::Address);
        }
    }

    #[test]
    fn readable_after_writable_breaks_the_queue() {
        let mut b = bench();
        b.driver.add(&[(BUFFERS, 8, true), (BUFFERS, 8, false)]);
        assert_breaks(b, &QueueError::Order);
    }

    #[test]
    fn an_index_that_ran_ahead_breaks_the_queue() {
        let b = bench();
        b.driver.set_available_index(SIZE + 1);
        assert_breaks(b, &QueueError::Ring);
    }

    #[test]
    fn a_head_that_was_never_taken_is_not_pushed() {
        let mut b = bench();
        b.device.push(SIZE, 0);
        assert!(b.device.is_broken());
        assert_eq!(b.driver.take_used(), None);
    }
}
