//! The thread that serves a share's queues.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

use super::super::queue::VirtQueue;
use super::session::Session;

/// The deepest calls are those of fuse-backend-rs reading a message, with `PATH_MAX` on the heap.
const STACK_BYTES: usize = 128 << 10;
/// Answers held back at most for one interrupt, while there are more requests.
const BATCH: usize = 8;
/// An answer of this size is worth its own interrupt: the next may take as long as it did.
const LARGE_ANSWER: u32 = 64 << 10;
/// Requests from one queue before the others are looked at.
const TURN: usize = 64;
/// After this long without a request, descriptors are given back.
const REST_AFTER: Duration = Duration::from_secs(10);

/// What the device and its worker both see.
pub(super) struct Control {
    pub(super) completed: AtomicU64,
    stopping: AtomicBool,
    wake: EventFd,
}

/// The owner of the active queues: first the one for requests of high priority, then those for all others.
pub(super) struct Worker {
    pub(super) queues: Vec<VirtQueue>,
    pub(super) session: Arc<Session>,
    pub(super) control: Arc<Control>,
}

/// A worker at work.
pub(super) struct Running {
    thread: JoinHandle<Worker>,
    control: Arc<Control>,
}

impl Control {
    pub(super) fn new() -> io::Result<Self> {
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        Ok(Self { completed: AtomicU64::new(0), stopping: AtomicBool::new(false), wake })
    }
}

impl Worker {
    /// Starts to serve, once the thread has become what it must be.
    pub(super) fn start(mut self, name: &str) -> io::Result<Running> {
        let control = self.control.clone();
        control.stopping.store(false, Ordering::Relaxed);
        let (ready, is_ready) = mpsc::sync_channel(1);
        let thread = std::thread::Builder::new().name(name.to_owned()).stack_size(STACK_BYTES).spawn(move || {
            let entered = self.session.share().state().enter_thread();
            let failed = entered.is_err();
            let _ = ready.send(entered);
            if !failed {
                self.run();
            }
            self
        })?;
        // A thread that sends nothing has died.
        is_ready.recv().unwrap_or_else(|_| Err(io::ErrorKind::Other.into()))?;
        Ok(Running { thread, control })
    }

    fn run(&mut self) {
        let mut rested = false;
        loop {
            let mut served = 0;
            for index in 0..self.queues.len() {
                served += self.take_turn(index);
            }
            if self.control.stopping.load(Ordering::Acquire) {
                return;
            }
            if served > 0 {
                rested = false;
                continue;
            }
            if !self.wait((!rested).then_some(REST_AFTER)) {
                self.session.share().state().rest();
                rested = true;
            }
        }
    }

    /// Serves one queue for a while; returns how many requests.
    fn take_turn(&mut self, index: usize) -> usize {
        let queue = &mut self.queues[index];
        queue.clear_kick();
        let memory = queue.memory().clone();
        let (mut served, mut held_back) = (0, 0);
        while served < TURN && !self.control.stopping.load(Ordering::Acquire) {
            let Some(chain) = queue.pop_raw() else { break };
            let head = chain.head_index();
            let written = self.session.serve(&memory, chain);
            queue.push(head, written);
            served += 1;
            held_back += 1;
            if held_back >= BATCH || written >= LARGE_ANSWER {
                queue.notify();
                held_back = 0;
            }
        }
        if held_back > 0 {
            queue.notify();
        }
        self.control.completed.fetch_add(served as u64, Ordering::Relaxed);
        served
    }

    /// Waits for a kick or an order; false when `limit` has passed without.
    fn wait(&self, limit: Option<Duration>) -> bool {
        let watch = |fd: RawFd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        let mut fds: Vec<_> = self.queues.iter().map(|queue| watch(queue.kick().as_raw_fd())).collect();
        fds.push(watch(self.control.wake.as_raw_fd()));
        let limit = limit.map_or(-1, |limit| limit.as_millis() as i32);
        // SAFETY: `fds` is an array of that length.
        let ready = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, limit) };
        // An interrupted call counts as a kick: there is no harm in looking.
        ready != 0
    }
}

impl Running {
    /// Ends the thread after the request that it is at; `None` if it died.
    pub(super) fn stop(self) -> Option<Worker> {
        self.control.stopping.store(true, Ordering::Release);
        let _ = self.control.wake.write(1);
        let worker = self.thread.join().ok();
        let _ = self.control.wake.read();
        worker
    }
}
