//! The driver's side of a queue, and an interrupt that only remembers, for tests of devices.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use virtio_queue::{Queue, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::device::{Activation, GuestMemory, Interrupt};
use super::queue::VirtQueue;

/// `VIRTQ_DESC_F_NEXT` (virtio 1.3, section 2.7.5).
pub(crate) const NEXT: u16 = 1;
/// `VIRTQ_DESC_F_WRITE`.
pub(crate) const WRITE: u16 = 2;
/// `VIRTQ_DESC_F_INDIRECT`.
pub(crate) const INDIRECT: u16 = 4;

/// Guest memory of `size` bytes at address 0.
pub(crate) fn memory(size: usize) -> GuestMemory {
    Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size)]).unwrap())
}

/// Remembers what a device signalled.
#[derive(Default)]
pub(crate) struct FakeInterrupt {
    pub(crate) queues: Mutex<Vec<u16>>,
    pub(crate) configs: Mutex<u32>,
    pub(crate) resets: Mutex<Vec<String>>,
}

impl Interrupt for FakeInterrupt {
    fn signal_queue(&self, queue: u16) {
        self.queues.lock().unwrap().push(queue);
    }

    fn signal_config(&self) {
        *self.configs.lock().unwrap() += 1;
    }

    fn needs_reset(&self, reason: &str) {
        self.resets.lock().unwrap().push(reason.to_owned());
    }
}

/// A queue as a driver, well-behaved or not, sees it. Lies in the 64 KiB from `base` on.
pub(crate) struct DriverQueue {
    memory: GuestMemory,
    base: u64,
    size: u16,
    next_descriptor: u16,
    available: u16,
    used: u16,
    pub(crate) kick: Arc<EventFd>,
}

impl DriverQueue {
    pub(crate) fn new(memory: &GuestMemory, base: u64, size: u16) -> Self {
        let kick = Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        Self { memory: memory.clone(), base, size, next_descriptor: 0, available: 0, used: 0, kick }
    }

    fn available_ring(&self) -> u64 {
        self.base + 0x8000
    }

    fn used_ring(&self) -> u64 {
        self.base + 0xc000
    }

    /// The device's end of it.
    pub(crate) fn device_end(&self, index: u16, interrupt: Arc<dyn Interrupt>) -> VirtQueue {
        let mut queue = Queue::new(self.size).unwrap();
        queue.try_set_desc_table_address(GuestAddress(self.base)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(self.available_ring())).unwrap();
        queue.try_set_used_ring_address(GuestAddress(self.used_ring())).unwrap();
        queue.set_ready(true);
        VirtQueue::new(index, queue, self.memory.clone(), self.kick.clone(), interrupt).unwrap()
    }

    /// The device's end of it in a copy of a VM that was saved.
    pub(crate) fn restored_end(&self, index: u16, interrupt: Arc<dyn Interrupt>, state: &QueueState) -> VirtQueue {
        let queue = Queue::try_from(*state).unwrap();
        VirtQueue::new(index, queue, self.memory.clone(), self.kick.clone(), interrupt).unwrap()
    }

    /// Writes one descriptor as it is, without making it available.
    pub(crate) fn write_descriptor(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        write_descriptor(&self.memory, self.base + 16 * u64::from(index), address, len, flags, next);
    }

    /// Makes the chain at `head` available.
    pub(crate) fn offer(&mut self, head: u16) {
        let slot = self.available_ring() + 4 + 2 * u64::from(self.available % self.size);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.available = self.available.wrapping_add(1);
        self.set_available_index(self.available);
    }

    /// Sets the index of the available ring, to any value.
    pub(crate) fn set_available_index(&self, index: u16) {
        self.memory.write_obj(index, GuestAddress(self.available_ring() + 2)).unwrap();
    }

    /// Names the entry of the used ring whose use the driver wants to hear of.
    pub(crate) fn set_used_event(&self, event: u16) {
        self.memory.write_obj(event, GuestAddress(self.available_ring() + 4 + 2 * u64::from(self.size))).unwrap();
    }

    /// Adds a chain of `(address, length, device may write)` segments and makes it available; returns its head.
    pub(crate) fn add(&mut self, segments: &[(u64, u32, bool)]) -> u16 {
        let head = self.next_descriptor;
        for (i, &(address, len, write)) in segments.iter().enumerate() {
            let index = self.next_descriptor;
            let next = (index + 1) % self.size;
            let more = if i + 1 < segments.len() { NEXT } else { 0 };
            self.write_descriptor(index, address, len, more | if write { WRITE } else { 0 }, next);
            self.next_descriptor = next;
        }
        self.offer(head);
        head
    }

    /// Goes on to offer the chain at `head`, as fast as the device takes it, and to kick.
    pub(crate) fn flood(&self, head: u16) -> Flood {
        let ring = self.available_ring();
        for slot in 0..u64::from(self.size) {
            self.memory.write_obj(head, GuestAddress(ring + 4 + 2 * slot)).unwrap();
        }
        let stop = Arc::new(AtomicBool::new(false));
        let (memory, kick, is_over) = (self.memory.clone(), self.kick.clone(), stop.clone());
        let (used, available, ahead) = (GuestAddress(self.used_ring() + 2), GuestAddress(ring + 2), self.size / 2);
        let thread = std::thread::spawn(move || {
            let mut last = None;
            while !is_over.load(Ordering::Relaxed) {
                let used: u16 = memory.read_obj(used).unwrap();
                memory.write_obj(used.wrapping_add(ahead), available).unwrap();
                if last.replace(used) == Some(used) {
                    let _ = kick.write(1);
                }
            }
        });
        Flood { stop, thread }
    }

    /// The next used chain: its head and the bytes that the device says it wrote.
    pub(crate) fn take_used(&mut self) -> Option<(u16, u32)> {
        let index: u16 = self.memory.read_obj(GuestAddress(self.used_ring() + 2)).unwrap();
        if index == self.used {
            return None;
        }
        let slot = self.used_ring() + 4 + 8 * u64::from(self.used % self.size);
        self.used = self.used.wrapping_add(1);
        let head: u32 = self.memory.read_obj(GuestAddress(slot)).unwrap();
        let len: u32 = self.memory.read_obj(GuestAddress(slot + 4)).unwrap();
        Some((u16::try_from(head).unwrap(), len))
    }
}

/// A driver that refills its queue without end.
pub(crate) struct Flood {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Flood {
    /// What `action` comes to in the meantime, after which the flood is over. Panics where it takes ten seconds.
    pub(crate) fn during<T: Send + 'static>(self, action: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, is_done) = mpsc::channel();
        let action = std::thread::spawn(move || done.send(action()));
        let result = is_done.recv_timeout(Duration::from_secs(10));
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap();
        let _ = action.join().unwrap();
        result.expect("it waits for the driver to stop")
    }
}

/// Writes a descriptor anywhere, for indirect tables.
pub(crate) fn write_descriptor(memory: &GuestMemory, at: u64, address: u64, len: u32, flags: u16, next: u16) {
    memory.write_obj(address, GuestAddress(at)).unwrap();
    memory.write_obj(len, GuestAddress(at + 8)).unwrap();
    memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
    memory.write_obj(next, GuestAddress(at + 14)).unwrap();
}

/// An activation with these queues, in order.
pub(crate) fn activation(
    memory: &GuestMemory,
    features: u64,
    interrupt: &Arc<FakeInterrupt>,
    queues: &[&DriverQueue],
) -> Activation {
    let ends = (0..)
        .zip(queues)
        .map(|(index, queue)| Some(queue.device_end(index, interrupt.clone() as Arc<dyn Interrupt>)))
        .collect();
    Activation::new(features, memory.clone(), interrupt.clone(), ends)
}
