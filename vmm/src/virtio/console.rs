//! The console device (virtio 1.3, section 5.3) with its one port, `hvc0` in the guest.
//!
//! Output never waits: what the host's end cannot take at once is dropped, so that a guest can always go on and a
//! reader that stopped costs nothing. Input is read only while the driver has buffers for it.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::epoll::EventSet;

use super::device::{ActivateError, Activation, DeviceKind, DeviceState, RestoreError, VirtioDevice};
use super::queue::{Chain, VirtQueue};
use crate::event_loop::{EventHandler, EventLoop, Registration, Watcher};

/// `receiveq` of port 0 and `transmitq` of port 0 (section 5.3.2).
const QUEUE_SIZES: [u16; 2] = [64, 64];
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;

/// What the loop reports.
const TAG_RECEIVE: u32 = 0;
const TAG_TRANSMIT: u32 = 1;
const TAG_INPUT: u32 = 2;

/// Most bytes written at once: what a pipe that is writable at all takes without blocking (`PIPE_BUF`).
const WRITE_BYTES: usize = 4096;
/// Most bytes of one buffer from the guest that are looked at; Linux sends at most a page.
const MAX_OUTPUT_BYTES: usize = 64 * 1024;
/// Buffers served before other devices get their turn.
const BATCH: usize = 32;

/// The device.
pub struct Console {
    event_loop: Arc<EventLoop>,
    output: Arc<File>,
    input: Option<Arc<File>>,
    completed: Arc<AtomicU64>,
    active: Option<(Arc<Mutex<Worker>>, Registration)>,
}

struct Worker {
    receive: VirtQueue,
    transmit: VirtQueue,
    output: Arc<File>,
    input: Option<Arc<File>>,
    /// Whether the loop reports input.
    watching_input: bool,
    completed: Arc<AtomicU64>,
}

impl Console {
    /// A device served by `event_loop`. Neither file need be non-blocking.
    #[must_use]
    pub fn new(event_loop: Arc<EventLoop>, output: File, input: Option<File>) -> Self {
        Self {
            event_loop,
            output: Arc::new(output),
            input: input.map(Arc::new),
            completed: Arc::default(),
            active: None,
        }
    }
}

impl VirtioDevice for Console {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Console
    }

    fn features(&self) -> u64 {
        // One port of no particular size.
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        // Section 5.3.4: every field belongs to a feature that is not offered.
        data.fill(0);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let worker = Worker {
            receive: activation.take_queue(RECEIVE)?,
            transmit: activation.take_queue(TRANSMIT)?,
            output: self.output.clone(),
            input: self.input.clone(),
            watching_input: false,
            completed: self.completed.clone(),
        };
        let kicks =
            [(worker.receive.kick().as_raw_fd(), TAG_RECEIVE), (worker.transmit.kick().as_raw_fd(), TAG_TRANSMIT)];
        let worker = Arc::new(Mutex::new(worker));
        let registration = self.event_loop.add(worker.clone());
        for (kick, tag) in kicks {
            registration
                .watcher()
                .watch(kick, tag, EventSet::IN)
                .map_err(|source| ActivateError::Host { step: "cannot watch the queues", source })?;
        }
        {
            let mut worker = worker.lock().unwrap_or_else(PoisonError::into_inner);
            worker.transmit();
            worker.watch_input(registration.watcher(), true);
        }
        self.active = Some((worker, registration));
        Ok(())
    }

    fn deactivate(&mut self) {
        if let Some((worker, registration)) = self.active.take() {
            let mut worker = worker.lock().unwrap_or_else(PoisonError::into_inner);
            let watcher = registration.watcher().clone();
            worker.watch_input(&watcher, false);
            watcher.forget(worker.receive.kick().as_raw_fd());
            watcher.forget(worker.transmit.kick().as_raw_fd());
            // The registration waits for the worker, so let go of it first.
            drop(worker);
            drop(registration);
        }
    }

    fn save(&self) -> DeviceState {
        let queues = match &self.active {
            Some((worker, _)) => {
                let worker = worker.lock().unwrap_or_else(PoisonError::into_inner);
                vec![Some(worker.receive.state()), Some(worker.transmit.state())]
            }
            None => vec![None, None],
        };
        DeviceState { queues, private: Vec::new() }
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        if state.private.is_empty() { Ok(()) } else { Err(RestoreError::Damaged(DeviceKind::Console)) }
    }

    fn completed(&self) -> u64 {
        self.completed.load(Ordering::Relaxed)
    }
}

impl EventHandler for Worker {
    fn ready(&mut self, tag: u32, _events: EventSet, watcher: &Watcher) {
        match tag {
            TAG_TRANSMIT => {
                self.transmit.clear_kick();
                self.transmit();
            }
            TAG_RECEIVE => {
                self.receive.clear_kick();
                self.watch_input(watcher, true);
            }
            _ => self.receive(watcher),
        }
    }
}

impl Worker {
    /// Prints what the guest sent.
    fn transmit(&mut self) {
        for served in 0.. {
            if served == BATCH {
                let _ = self.transmit.kick().write(1);
                break;
            }
            let Some(chain) = self.transmit.pop() else { break };
            print(&self.output, &chain);
            self.transmit.push(chain.head(), 0);
            self.completed.fetch_add(1, Ordering::Relaxed);
        }
        self.transmit.notify();
    }

    /// Hands input to the guest, one read at a time. Without a buffer for it, stops to watch for more.
    fn receive(&mut self, watcher: &Watcher) {
        let Some(input) = self.input.clone() else { return };
        let Some(chain) = self.receive.pop() else {
            self.watch_input(watcher, false);
            return;
        };
        let mut data = [0; 1024];
        let room = chain.writable_len().min(data.len());
        match (&*input).read(&mut data[..room]) {
            Ok(len) if len > 0 => {
                let len = chain.write_at(0, &data[..len]);
                // At most 1,024.
                self.receive.push(chain.head(), len as u32);
                self.receive.notify();
                self.completed.fetch_add(1, Ordering::Relaxed);
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                self.receive.undo_pop();
            }
            // The end of input, or no buffer worth the name: no more of it.
            _ => {
                self.receive.undo_pop();
                self.watch_input(watcher, false);
                self.input = None;
            }
        }
    }

    fn watch_input(&mut self, watcher: &Watcher, on: bool) {
        let Some(input) = &self.input else { return };
        if on == self.watching_input {
            return;
        }
        if !on {
            watcher.forget(input.as_raw_fd());
        } else if watcher.watch(input.as_raw_fd(), TAG_INPUT, EventSet::IN).is_err() {
            // A file that cannot be waited for, like /dev/null, has nothing to type.
            self.input = None;
            return;
        }
        self.watching_input = on;
    }
}

/// Writes a buffer of the guest to `output` as far as that takes it at once.
fn print(output: &File, chain: &Chain) {
    let mut offset = 0;
    while offset < chain.readable_len().min(MAX_OUTPUT_BYTES) && is_writable(output.as_raw_fd()) {
        let parts = chain.readable_iovecs(offset, WRITE_BYTES);
        // At most 1,024 segments (`MAX_SEGMENTS`).
        let count = parts.len() as libc::c_int;
        // SAFETY: the parts lie in guest memory, which the chain keeps mapped.
        let written = unsafe { libc::writev(output.as_raw_fd(), parts.as_ptr(), count) };
        match usize::try_from(written) {
            Ok(written) if written > 0 => offset += written,
            _ => break,
        }
    }
}

fn is_writable(fd: RawFd) -> bool {
    let mut poll = libc::pollfd { fd, events: libc::POLLOUT, revents: 0 };
    // SAFETY: `poll` is one valid entry.
    let ready = unsafe { libc::poll(&raw mut poll, 1, 0) };
    ready == 1 && poll.revents & libc::POLLOUT != 0 && poll.revents & (libc::POLLERR | libc::POLLNVAL) == 0
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;

    use vm_memory::{Bytes, GuestAddress};

    use super::super::testing::{DriverQueue, FakeInterrupt, activation, memory};
    use super::*;

    const BUFFERS: u64 = 0x4_0000;

    struct Bench {
        memory: super::super::device::GuestMemory,
        receive: DriverQueue,
        transmit: DriverQueue,
        host: UnixStream,
        event_loop: Arc<EventLoop>,
        console: Console,
        interrupt: Arc<FakeInterrupt>,
    }

    fn bench() -> Bench {
        let memory = memory(0x8_0000);
        let (host, console) = UnixStream::pair().unwrap();
        let input = File::from(OwnedFd::from(console.try_clone().unwrap()));
        let event_loop = EventLoop::new().unwrap();
        let console = Console::new(event_loop.clone(), File::from(OwnedFd::from(console)), Some(input));
        let (receive, transmit) = (DriverQueue::new(&memory, 0x1_0000, 64), DriverQueue::new(&memory, 0x2_0000, 64));
        Bench { memory, receive, transmit, host, event_loop, console, interrupt: Arc::default() }
    }

    impl Bench {
        fn activate(&mut self) {
            let queues = [&self.receive, &self.transmit];
            self.console.activate(activation(&self.memory, 0, &self.interrupt, &queues)).unwrap();
        }
    }

    #[test]
    fn output_reaches_the_host_in_order() {
        let mut b = bench();
        b.memory.write_slice(b"hello world", GuestAddress(BUFFERS)).unwrap();
        b.transmit.add(&[(BUFFERS, 6, false), (BUFFERS + 6, 3, false)]);
        b.transmit.add(&[(BUFFERS + 9, 2, false)]);
        b.activate();
        let mut text = [0; 11];
        b.host.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"hello world");
        assert_eq!(b.console.completed(), 2);
    }

    #[test]
    fn output_that_nobody_reads_is_dropped_and_the_guest_goes_on() {
        let mut b = bench();
        b.activate();
        let worker = b.console.active.as_ref().unwrap().0.clone();
        for _ in 0..200 {
            let head = b.transmit.add(&[(BUFFERS, 0x1_0000, false)]);
            worker.lock().unwrap().transmit();
            assert_eq!(b.transmit.take_used(), Some((head, 0)));
        }
    }

    #[test]
    fn input_reaches_the_guest_when_it_has_a_buffer() {
        let mut b = bench();
        b.activate();
        let runner = b.event_loop.clone();
        let thread = std::thread::spawn(move || runner.run().unwrap());
        b.host.write_all(b"typed").unwrap();
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert_eq!(b.receive.take_used(), None);
        let head = b.receive.add(&[(BUFFERS, 16, true)]);
        b.receive.kick.write(1).unwrap();
        let used = (0..500).find_map(|_| {
            std::thread::sleep(std::time::Duration::from_millis(10));
            b.receive.take_used()
        });
        assert_eq!(used, Some((head, 5)));
        let mut text = [0; 5];
        b.memory.read_slice(&mut text, GuestAddress(BUFFERS)).unwrap();
        assert_eq!(&text, b"typed");
        b.event_loop.stop();
        thread.join().unwrap();
    }
}
