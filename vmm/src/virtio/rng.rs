//! The entropy device (virtio 1.3, section 5.4): fills the driver's buffers from the host's random number generator.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::epoll::EventSet;

use super::device::{ActivateError, Activation, DeviceKind, DeviceState, RestoreError, VirtioDevice};
use super::queue::{Chain, VirtQueue};
use crate::event_loop::{EventHandler, EventLoop, Registration, Watcher};

/// The one queue, `requestq`.
const QUEUE_SIZES: [u16; 1] = [8];
/// Most bytes given to one request. Linux asks for 64; more would only let a guest keep the host busy.
const MAX_REQUEST_BYTES: usize = 4096;
/// Requests served before other devices get their turn.
const BATCH: usize = 8;

/// The device.
pub struct Rng {
    event_loop: Arc<EventLoop>,
    completed: Arc<AtomicU64>,
    active: Option<(Arc<Mutex<Worker>>, Registration)>,
}

struct Worker {
    queue: VirtQueue,
    completed: Arc<AtomicU64>,
}

impl Rng {
    /// A device served by `event_loop`.
    #[must_use]
    pub fn new(event_loop: Arc<EventLoop>) -> Self {
        Self { event_loop, completed: Arc::default(), active: None }
    }
}

impl VirtioDevice for Rng {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Rng
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        // Section 5.4.4: there is none.
        data.fill(0);
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
        DeviceState { queues: vec![self.active.as_ref().map(state)], private: Vec::new() }
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        if state.private.is_empty() { Ok(()) } else { Err(RestoreError::Damaged(DeviceKind::Rng)) }
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
            match fill(&chain) {
                Ok(len) => self.queue.push(chain.head(), len),
                Err(error) => {
                    self.queue.fail(&format!("the host has no random numbers: {error}"));
                    break;
                }
            }
            self.completed.fetch_add(1, Ordering::Relaxed);
        }
        self.queue.notify();
    }
}

/// Fills the chain's first segment, which is all that the device owes its driver (section 5.4.6.1).
fn fill(chain: &Chain) -> io::Result<u32> {
    let Some(buffer) = chain.writable_iovecs(0, MAX_REQUEST_BYTES).first().copied() else { return Ok(0) };
    // SAFETY: the segment lies in guest memory, which the chain keeps mapped.
    let len = unsafe { libc::getrandom(buffer.iov_base, buffer.iov_len, 0) };
    u32::try_from(len).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::super::testing::{DriverQueue, FakeInterrupt, activation, memory};
    use super::*;

    #[test]
    fn a_request_is_filled_with_random_bytes() {
        let memory = memory(0x4_0000);
        let interrupt = Arc::new(FakeInterrupt::default());
        let mut driver = DriverQueue::new(&memory, 0x1_0000, 8);
        let head = driver.add(&[(0x2_0000, 64, true)]);
        let mut rng = Rng::new(EventLoop::new().unwrap());
        rng.activate(activation(&memory, 0, &interrupt, &[&driver])).unwrap();
        assert_eq!(driver.take_used(), Some((head, 64)));
        let mut bytes = [0; 64];
        memory.read_slice(&mut bytes, GuestAddress(0x2_0000)).unwrap();
        assert_ne!(bytes, [0; 64]);
        assert_eq!(*interrupt.queues.lock().unwrap(), [0]);
        assert_eq!(rng.completed(), 1);
    }

    #[test]
    fn requests_are_capped_and_readable_ones_get_nothing() {
        let memory = memory(0x4_0000);
        let interrupt = Arc::new(FakeInterrupt::default());
        let mut driver = DriverQueue::new(&memory, 0x1_0000, 8);
        let readable = driver.add(&[(0x2_0000, 64, false)]);
        let huge = driver.add(&[(0x2_0000, 0x2_0000, true)]);
        let mut rng = Rng::new(EventLoop::new().unwrap());
        rng.activate(activation(&memory, 0, &interrupt, &[&driver])).unwrap();
        assert_eq!(driver.take_used(), Some((readable, 0)));
        assert_eq!(driver.take_used(), Some((huge, MAX_REQUEST_BYTES as u32)));
    }
}
