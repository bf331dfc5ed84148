//! Persistent memory (virtio 1.3, section 5.19): tells the guest where a file lies in its physical memory.
//!
//! The file's pages are the device; this is what is left for registers and a queue. The guest's file system reads them
//! where they are (DAX), so all guests with the same file share one copy, in the host's page cache. The guest cannot write to
//! them (see [`crate::memory::allocate_with_pmem`]), so there is never anything to flush.

use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::epoll::EventSet;

use super::device::{
    ActivateError, Activation, DeviceKind, DeviceState, RestoreError, VirtioDevice, read_config_bytes,
};
use super::queue::{Chain, VirtQueue};
use crate::event_loop::{EventHandler, EventLoop, Registration, Watcher};

/// The one queue, `req_vq` (section 5.19.2).
const QUEUE_SIZES: [u16; 1] = [8];
/// `VIRTIO_PMEM_REQ_TYPE_FLUSH` (section 5.19.6), the only request there is.
const FLUSH: u32 = 0;
/// What a request is answered with (section 5.19.6): done, or not understood.
const DONE: u32 = 0;
const FAILED: u32 = u32::MAX;
/// Requests served before other devices get their turn.
const BATCH: usize = 8;

/// The device.
pub struct Pmem {
    event_loop: Arc<EventLoop>,
    /// `start` and `size` (section 5.19.4), in bytes.
    config: [u8; 16],
    completed: Arc<AtomicU64>,
    active: Option<(Arc<Mutex<Worker>>, Registration)>,
}

struct Worker {
    queue: VirtQueue,
    completed: Arc<AtomicU64>,
}

impl Pmem {
    /// A device whose memory is at `range`, served by `event_loop`.
    #[must_use]
    pub fn new(event_loop: Arc<EventLoop>, range: Range<u64>) -> Self {
        let mut config = [0; 16];
        config[..8].copy_from_slice(&range.start.to_le_bytes());
        config[8..].copy_from_slice(&(range.end - range.start).to_le_bytes());
        Self { event_loop, config, completed: Arc::default(), active: None }
    }
}

impl VirtioDevice for Pmem {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Pmem
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let queue = activation.take_queue(0)?;
        let kick = queue.kick().as_raw_fd();
        let worker = Arc::new(Mutex::new(Worker { queue, completed: self.completed.clone() }));
        let registration = self.event_loop.add(worker.clone());
        registration
            .watcher()
            .watch(kick, 0, EventSet::IN)
            .map_err(|source| ActivateError::Host { step: "cannot watch the queue", source })?;
        worker.lock().unwrap_or_else(PoisonError::into_inner).serve();
        self.active = Some((worker, registration));
        Ok(())
    }

    fn deactivate(&mut self) {
        if let Some((worker, registration)) = self.active.take() {
            let kick = worker.lock().unwrap_or_else(PoisonError::into_inner).queue.kick().as_raw_fd();
            registration.watcher().forget(kick);
        }
    }

    fn save(&self) -> DeviceState {
        let state =
            |(worker, _): &(Arc<Mutex<Worker>>, _)| worker.lock().unwrap_or_else(PoisonError::into_inner).queue.state();
        DeviceState { queues: vec![self.active.as_ref().map(state)], private: self.config.to_vec() }
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        // A guest finds its memory where it was.
        if state.private == self.config { Ok(()) } else { Err(RestoreError::Damaged(DeviceKind::Pmem)) }
    }

    fn completed(&self) -> u64 {
        self.completed.load(Ordering::Relaxed)
    }
}

impl EventHandler for Worker {
    fn ready(&mut self, _tag: u32, _events: EventSet, _watcher: &Watcher) {
        self.queue.clear_kick();
        self.serve();
    }
}

impl Worker {
    fn serve(&mut self) {
        for served in 0.. {
            if served == BATCH {
                // Come back after the others.
                let _ = self.queue.kick().write(1);
                break;
            }
            let Some(chain) = self.queue.pop() else { break };
            let len = answer(&chain);
            self.queue.push(chain.head(), len);
            self.completed.fetch_add(1, Ordering::Relaxed);
        }
        self.queue.notify();
    }
}

/// Answers one request; returns how much was written.
fn answer(chain: &Chain) -> u32 {
    // Everything is on the disk already: nothing is ever written.
    let result = if chain.read_obj::<u32>(0) == Some(FLUSH.to_le()) { DONE } else { FAILED };
    chain.write_at(0, &result.to_le_bytes()) as u32
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::super::testing::{DriverQueue, FakeInterrupt, activation, memory};
    use super::*;

    const RANGE: Range<u64> = 0x1_0000_0000..0x1_0060_0000;

    #[test]
    fn the_driver_finds_the_memory() {
        let pmem = Pmem::new(EventLoop::new().unwrap(), RANGE);
        let mut field = [0; 8];
        pmem.read_config(0, &mut field);
        assert_eq!(u64::from_le_bytes(field), RANGE.start);
        pmem.read_config(8, &mut field);
        assert_eq!(u64::from_le_bytes(field), RANGE.end - RANGE.start);
    }

    #[test]
    fn flushes_are_done_and_all_else_fails() {
        let memory = memory(0x4_0000);
        let interrupt = Arc::new(FakeInterrupt::default());
        let mut driver = DriverQueue::new(&memory, 0x1_0000, 16);
        memory.write_obj(7_u32, GuestAddress(0x2_0010)).unwrap();
        for (at, request) in [(0_u64, 0x2_0000), (1, 0x2_0010)] {
            memory.write_obj(0x55_u32, GuestAddress(0x3_0000 + 16 * at)).unwrap();
            driver.add(&[(request, 4, false), (0x3_0000 + 16 * at, 4, true)]);
        }
        // Too short to ask, without room for an answer, and with too much of it.
        driver.add(&[(0x2_0000, 2, false), (0x3_0020, 4, true)]);
        driver.add(&[(0x2_0000, 4, false)]);
        driver.add(&[(0x2_0000, 0x2_0000, false), (0x3_0030, 2, true)]);
        let mut pmem = Pmem::new(EventLoop::new().unwrap(), RANGE);
        pmem.activate(activation(&memory, 0, &interrupt, &[&driver])).unwrap();
        let written: Vec<u32> = std::iter::from_fn(|| driver.take_used()).map(|(_, len)| len).collect();
        assert_eq!(written, [4, 4, 4, 0, 2]);
        let answer = |at: u64| memory.read_obj::<u32>(GuestAddress(0x3_0000 + 16 * at)).unwrap();
        assert_eq!([answer(0), answer(1), answer(2)], [DONE, FAILED, FAILED]);
        assert_eq!(pmem.completed(), 5);
    }

    #[test]
    fn a_state_fits_the_same_place_only() {
        let event_loop = EventLoop::new().unwrap();
        let state = Pmem::new(event_loop.clone(), RANGE).save();
        assert!(Pmem::new(event_loop.clone(), RANGE).restore(&state).is_ok());
        assert!(Pmem::new(event_loop, RANGE.start..RANGE.end + 4096).restore(&state).is_err());
    }
}
