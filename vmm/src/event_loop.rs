//! The event loop that devices without a thread of their own share.
//!
//! An [`EventLoop`] is a set of watched descriptors and the handlers that serve them, run by one thread. Any thread adds and
//! removes handlers. After [`Registration`] is dropped, its handler is not running and will not run again.
//!
//! Lock order: the handler table, or one handler; never both, and a handler may not add or remove handlers.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

/// Events taken from the kernel at once.
const BATCH: usize = 16;
/// Slot number of the loop's own wake-up descriptor.
const WAKE_SLOT: u32 = u32::MAX;

/// Serves descriptors that are ready. It must not block, and must bound its work per call so that others get their turn:
/// a descriptor that is still ready is reported again.
pub trait EventHandler: Send {
    /// The descriptor watched under `tag` is ready for `events` (level-triggered).
    fn ready(&mut self, tag: u32, events: EventSet, watcher: &Watcher);
}

/// A set of handlers and the thread that runs them.
pub struct EventLoop {
    epoll: Epoll,
    wake: EventFd,
    slots: Mutex<Vec<Slot>>,
    gate: Mutex<Gate>,
    gate_changed: Condvar,
}

#[derive(Default)]
struct Slot {
    /// Distinguishes successive users, so that an event of the last one does not reach the next.
    generation: u16,
    entry: Option<Entry>,
}

#[derive(Clone)]
struct Entry {
    handler: Arc<Mutex<dyn EventHandler>>,
    live: Arc<AtomicBool>,
    watcher: Watcher,
}

#[derive(Default)]
struct Gate {
    running: bool,
    pause_wanted: bool,
    parked: bool,
    stop: bool,
}

/// Watches and forgets descriptors for one handler.
#[derive(Clone)]
pub struct Watcher {
    event_loop: Arc<EventLoop>,
    slot: u16,
    generation: u16,
}

/// Keeps a handler on the loop; dropping it takes the handler off.
pub struct Registration {
    watcher: Watcher,
    live: Arc<AtomicBool>,
    handler: Arc<Mutex<dyn EventHandler>>,
}

/// Locks, whatever became of the last holder: state behind the locks here is valid between any two statements.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl EventLoop {
    /// An event loop that no thread runs yet.
    ///
    /// # Errors
    ///
    /// When the process may open no more descriptors.
    pub fn new() -> io::Result<Arc<Self>> {
        let epoll = Epoll::new()?;
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        epoll.ctl(
            ControlOperation::Add,
            wake.as_raw_fd(),
            EpollEvent::new(EventSet::IN, u64::from(WAKE_SLOT) << 32),
        )?;
        Ok(Arc::new(Self {
            epoll,
            wake,
            slots: Mutex::default(),
            gate: Mutex::default(),
            gate_changed: Condvar::new(),
        }))
    }

    /// Adds a handler; it watches nothing yet (see [`Registration::watcher`]).
    pub fn add<H: EventHandler + 'static>(self: &Arc<Self>, handler: Arc<Mutex<H>>) -> Registration {
        let mut slots = lock(&self.slots);
        let slot = slots.iter().position(|slot| slot.entry.is_none()).unwrap_or_else(|| {
            slots.push(Slot::default());
            slots.len() - 1
        });
        let generation = slots[slot].generation;
        #[expect(clippy::cast_possible_truncation, reason = "there are far fewer devices than 65,536")]
        let watcher = Watcher { event_loop: self.clone(), slot: slot as u16, generation };
        let live = Arc::new(AtomicBool::new(true));
        let handler: Arc<Mutex<dyn EventHandler>> = handler;
        slots[slot].entry = Some(Entry { handler: handler.clone(), live: live.clone(), watcher: watcher.clone() });
        Registration { watcher, live, handler }
    }

    /// Serves events until [`stop`](Self::stop).
    ///
    /// # Errors
    ///
    /// When the kernel refuses to wait, which it has no reason to.
    pub fn run(&self) -> io::Result<()> {
        let mut events = [EpollEvent::default(); BATCH];
        lock(&self.gate).running = true;
        loop {
            if !self.pass_gate() {
                return Ok(());
            }
            let count = match self.epoll.wait(-1, &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            for event in &events[..count] {
                self.dispatch(event);
            }
        }
    }

    /// Parks the loop: no handler runs from its return until [`resume`](Self::resume).
    pub fn pause(&self) {
        let mut gate = lock(&self.gate);
        gate.pause_wanted = true;
        let _ = self.wake.write(1);
        while gate.running && !gate.parked && !gate.stop {
            gate = self.gate_changed.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Lets a parked loop go on.
    pub fn resume(&self) {
        lock(&self.gate).pause_wanted = false;
        self.gate_changed.notify_all();
    }

    /// Makes [`run`](Self::run) return.
    pub fn stop(&self) {
        lock(&self.gate).stop = true;
        let _ = self.wake.write(1);
        self.gate_changed.notify_all();
    }

    /// Waits while the loop is to be parked; false when it is to stop.
    fn pass_gate(&self) -> bool {
        let mut gate = lock(&self.gate);
        while gate.pause_wanted && !gate.stop {
            gate.parked = true;
            self.gate_changed.notify_all();
            gate = self.gate_changed.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
        gate.parked = false;
        gate.running = !gate.stop;
        !gate.stop
    }

    fn dispatch(&self, event: &EpollEvent) {
        let data = event.data();
        if (data >> 32) as u32 == WAKE_SLOT {
            let _ = self.wake.read();
            return;
        }
        #[expect(clippy::cast_possible_truncation, reason = "takes the token apart")]
        let (slot, generation, tag) = ((data >> 48) as u16, (data >> 32) as u16, data as u32);
        let entry = {
            let slots = lock(&self.slots);
            let Some(slot) = slots.get(usize::from(slot)).filter(|slot| slot.generation == generation) else { return };
            let Some(entry) = &slot.entry else { return };
            entry.clone()
        };
        let mut handler = lock(&entry.handler);
        // Asked under the handler's lock: whoever took it off waits for that lock before it goes on.
        if entry.live.load(Ordering::Acquire) {
            handler.ready(tag, event.event_set(), &entry.watcher);
        }
    }
}

impl Watcher {
    /// Starts to report `fd` under `tag`.
    ///
    /// # Errors
    ///
    /// When `fd` cannot be polled or is watched already.
    pub fn watch(&self, fd: RawFd, tag: u32, events: EventSet) -> io::Result<()> {
        self.event_loop.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, self.token(tag)))
    }

    /// Changes what `fd` is reported for; nothing but errors if `events` is empty.
    ///
    /// # Errors
    ///
    /// When `fd` is not watched.
    pub fn rewatch(&self, fd: RawFd, tag: u32, events: EventSet) -> io::Result<()> {
        self.event_loop.epoll.ctl(ControlOperation::Modify, fd, EpollEvent::new(events, self.token(tag)))
    }

    /// Stops to report `fd`. To be called before it is closed if a duplicate of it lives on.
    pub fn forget(&self, fd: RawFd) {
        // Not being watched is no error.
        let _ = self.event_loop.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
    }

    fn token(&self, tag: u32) -> u64 {
        u64::from(self.slot) << 48 | u64::from(self.generation) << 32 | u64::from(tag)
    }
}

impl Registration {
    /// To watch descriptors for the handler from outside it.
    #[must_use]
    pub fn watcher(&self) -> &Watcher {
        &self.watcher
    }
}

impl Drop for Registration {
    /// Returns when the handler does not run and will not run again. Its descriptors are the owner's to forget or
    /// close. Must not be called by the handler itself.
    fn drop(&mut self) {
        {
            let mut slots = lock(&self.watcher.event_loop.slots);
            let slot = &mut slots[usize::from(self.watcher.slot)];
            slot.entry = None;
            slot.generation = slot.generation.wrapping_add(1);
        }
        let _running = lock(&self.handler);
        self.live.store(false, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    use super::*;

    struct Echo {
        source: EventFd,
        seen: mpsc::Sender<u32>,
    }

    impl EventHandler for Echo {
        fn ready(&mut self, tag: u32, events: EventSet, _watcher: &Watcher) {
            assert!(events.contains(EventSet::IN));
            self.source.read().unwrap();
            self.seen.send(tag).unwrap();
        }
    }

    struct Bench {
        event_loop: Arc<EventLoop>,
        source: EventFd,
        seen: mpsc::Receiver<u32>,
        registration: Option<Registration>,
        thread: Option<thread::JoinHandle<()>>,
    }

    fn bench() -> Bench {
        let event_loop = EventLoop::new().unwrap();
        let source = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let (sender, seen) = mpsc::channel();
        let echo = Echo { source: source.try_clone().unwrap(), seen: sender };
        let registration = event_loop.add(Arc::new(Mutex::new(echo)));
        registration.watcher().watch(source.as_raw_fd(), 7, EventSet::IN).unwrap();
        let runner = event_loop.clone();
        let thread = thread::spawn(move || runner.run().unwrap());
        Bench { event_loop, source, seen, registration: Some(registration), thread: Some(thread) }
    }

    impl Drop for Bench {
        fn drop(&mut self) {
            self.event_loop.stop();
            self.thread.take().unwrap().join().unwrap();
        }
    }

    const SOON: Duration = Duration::from_millis(50);
    const LONG: Duration = Duration::from_secs(10);

    #[test]
    fn a_ready_descriptor_reaches_its_handler() {
        let b = bench();
        b.source.write(1).unwrap();
        assert_eq!(b.seen.recv_timeout(LONG), Ok(7));
    }

    #[test]
    fn a_paused_loop_serves_nothing_until_it_resumes() {
        let b = bench();
        b.event_loop.pause();
        b.source.write(1).unwrap();
        assert_eq!(b.seen.recv_timeout(SOON), Err(mpsc::RecvTimeoutError::Timeout));
        b.event_loop.resume();
        assert_eq!(b.seen.recv_timeout(LONG), Ok(7));
    }

    #[test]
    fn a_handler_that_was_taken_off_hears_nothing() {
        let mut b = bench();
        b.registration = None;
        b.source.write(1).unwrap();
        assert!(b.seen.recv_timeout(SOON).is_err());
    }

    #[test]
    fn a_loop_that_never_ran_can_be_paused() {
        let event_loop = EventLoop::new().unwrap();
        event_loop.pause();
        event_loop.resume();
    }
}
