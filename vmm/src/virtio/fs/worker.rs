//! The thread that serves a share's queues.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::super::queue::VirtQueue;
use super::session::Session;

/// The deepest calls are those of fuse-backend-rs reading a message, with `PATH_MAX` on the heap.
const STACK_BYTES: usize = 128 << 10;
/// Answers held back at most for one interrupt, while there are more requests.
const BATCH: usize = 8;
/// An answer of this size is worth its own interrupt: the next may take as long as it did.
const LARGE_ANSWER: u32 = 64 << 10;
/// The queue for requests of high priority.
const HIPRIO: usize = 0;
/// Requests from one queue before the others are looked at.
const TURN: u64 = 64;
/// How often what was not used since the last time is given back.
const SWEEP_EVERY: Duration = Duration::from_secs(10);

/// What the device and its worker both see.
pub(super) struct Control {
    pub(super) completed: AtomicU64,
    stopping: AtomicBool,
    pub(super) wake: Arc<EventFd>,
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
        Ok(Self { completed: AtomicU64::new(0), stopping: AtomicBool::new(false), wake: Arc::new(wake) })
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
            if !failed && let Err(error) = self.run() {
                self.fail(&error);
            }
            self
        })?;
        // A thread that sends nothing has died.
        is_ready.recv().unwrap_or_else(|_| Err(io::ErrorKind::Other.into()))?;
        Ok(Running { thread, control })
    }

    fn run(&mut self) -> io::Result<()> {
        let epoll = self.watch()?;
        let mut events = [EpollEvent::default(); 4];
        // Buffers may be there already, their kicks past.
        let mut ready: Vec<usize> = (0..self.queues.len()).collect();
        let mut swept = Instant::now();
        let mut watching = None;
        loop {
            ready.retain(|index| self.take_turn(*index));
            let (look_within, descriptor) = self.look_at_waiting();
            if watching != descriptor
                && let Some(fd) = descriptor
            {
                add(&epoll, fd, self.queues.len() as u64 + 1)?;
                watching = descriptor;
            }
            if self.control.stopping.load(Ordering::Acquire) {
                return Ok(());
            }
            let mut busy = true;
            if swept.elapsed() >= SWEEP_EVERY {
                busy = self.session.share().state().sweep();
                swept = Instant::now();
            }
            let limit = match (ready.is_empty(), busy) {
                (false, _) => 0,
                (true, true) => SWEEP_EVERY.as_millis() as i32,
                (true, false) => -1,
            };
            let limit = match look_within {
                Some(within) if limit < 0 || limit > within => within,
                _ => limit,
            };
            let count = match epoll.wait(limit, &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                Err(error) => return Err(error),
            };
            for event in &events[..count] {
                let index = event.data() as usize;
                if index < self.queues.len() && !ready.contains(&index) {
                    ready.push(index);
                } else if index > self.queues.len() {
                    self.session.share().state().watches.set_ready();
                }
            }
        }
    }

    /// Answers those whose waiting is over; returns in how many milliseconds to look again, if that takes no event, and what else has events
    /// by now.
    fn look_at_waiting(&mut self) -> (Option<i32>, Option<RawFd>) {
        let mut state = self.session.share().state();
        state.look_at_locks();
        state.look_at_watches();
        let ended = state.locks.take_answers().into_iter().map(|(answer, error)| (answer, error, Vec::new()));
        let ended: Vec<_> = ended.chain(state.watches.take_answers()).collect();
        let (within, descriptor) = (state.locks.look_within(), state.watches.descriptor());
        drop(state);
        self.control.completed.fetch_add(ended.len() as u64, Ordering::Relaxed);
        for (answer, error, body) in ended {
            let Some(memory) = self.queues.first().map(VirtQueue::memory) else { break };
            let (index, head, written) = answer.write(memory, error, &body);
            if let Some(queue) = self.queues.get_mut(usize::from(index)) {
                queue.push(head, written);
                queue.notify();
            }
        }
        (within.map(|within| within.as_millis() as i32), descriptor)
    }

    fn fail(&mut self, error: &io::Error) {
        for queue in &mut self.queues {
            queue.fail(&format!("the share's thread cannot wait: {error}"));
        }
    }

    /// Watches the kicks and the order to stop. Edge-triggered: a wake-up costs no read.
    fn watch(&self) -> io::Result<Epoll> {
        let epoll = Epoll::new()?;
        let kicks = self.queues.iter().map(VirtQueue::kick);
        for (index, fd) in (0..).zip(kicks.chain([&*self.control.wake])) {
            add(&epoll, fd.as_raw_fd(), index)?;
        }
        Ok(epoll)
    }

    /// Serves one queue for a while; returns whether there may be more.
    fn take_turn(&mut self, index: usize) -> bool {
        let queue = &mut self.queues[index];
        let memory = queue.memory().clone();
        let (mut served, mut held_back) = (0, 0);
        let more = loop {
            if served == TURN || self.control.stopping.load(Ordering::Acquire) {
                break true;
            }
            let Some(chain) = queue.pop_raw() else {
                if index != HIPRIO {
                    self.session.share().state().locks.forget_early();
                }
                break false;
            };
            let head = chain.head_index();
            // Else it waits.
            let Some(written) = self.session.serve(&memory, index as u16, chain) else { continue };
            queue.push(head, written);
            served += 1;
            held_back += 1;
            if held_back >= BATCH || written >= LARGE_ANSWER {
                queue.notify();
                held_back = 0;
            }
        };
        if held_back > 0 {
            queue.notify();
        }
        self.control.completed.fetch_add(served, Ordering::Relaxed);
        more
    }
}

/// Has `epoll` tell once whenever `fd` becomes readable.
fn add(epoll: &Epoll, fd: RawFd, name: u64) -> io::Result<()> {
    epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, name))
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
