//! Threads that wait for what somebody outside the guest has locked.
//!
//! A thread waits in one system call, on a descriptor of its own for the owner's open file, so that the lock stays with the
//! owner once it is had. It is ended by putting another file in that descriptor's place and then sending a signal: a call
//! that has begun ends at the signal, and one that has not finds nothing to lock.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::thread::JoinHandleExt;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, Once, PoisonError};
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use super::super::host::Host;
use super::Token;
use super::ranges::{Kind, Range};

/// Threads of a share that wait at once. Who finds none looks again and again.
const MAX_THREADS: usize = 8;
/// One system call and a message.
const STACK_BYTES: usize = 64 << 10;

/// What to wait for.
#[derive(Clone, Copy)]
pub(super) enum Wanted {
    Bytes(Range, Kind),
    Whole(Kind),
}

/// A wait that is over: the lock was had, if without an error.
pub(super) type Report = (Token, io::Result<()>);

/// The descriptor that a thread waits with, until it is done.
type Door = Arc<Mutex<Option<OwnedFd>>>;

struct Thread {
    token: Token,
    door: Door,
    handle: JoinHandle<()>,
}

/// The threads.
pub(super) struct Waits {
    host: Host,
    threads: Vec<Thread>,
    sender: Sender<Report>,
    receiver: Receiver<Report>,
    /// Made readable with each report.
    wake: Arc<EventFd>,
}

impl Waits {
    pub(super) fn new(host: Host, wake: Arc<EventFd>) -> Self {
        let (sender, receiver) = channel();
        Self { host, threads: Vec::new(), sender, receiver, wake }
    }

    /// Has a thread wait with `file`, which is its own; returns whether there was one left.
    pub(super) fn start(&mut self, token: Token, file: OwnedFd, wanted: Wanted) -> bool {
        if self.threads.len() >= MAX_THREADS {
            return false;
        }
        handle_signal();
        let (host, sender, wake) = (self.host, self.sender.clone(), self.wake.clone());
        let fd = file.as_raw_fd();
        let door: Door = Arc::new(Mutex::new(Some(file)));
        let own = door.clone();
        let work = move || {
            let result = wait(host, fd, wanted);
            // Before the report: the owner may have let go of the file, and then this keeps it locked.
            drop(own.lock().unwrap_or_else(PoisonError::into_inner).take());
            let _ = sender.send((token, result));
            let _ = wake.write(1);
        };
        match std::thread::Builder::new().name("fs-lock".to_owned()).stack_size(STACK_BYTES).spawn(work) {
            Ok(handle) => self.threads.push(Thread { token, door, handle }),
            Err(_) => return false,
        }
        true
    }

    /// Ends a wait. It still reports, and may have got the lock.
    pub(super) fn end(&self, token: Token) {
        if let Some(thread) = self.threads.iter().find(|thread| thread.token == token) {
            self.interrupt(thread);
        }
    }

    fn interrupt(&self, thread: &Thread) {
        let door = thread.door.lock().unwrap_or_else(PoisonError::into_inner);
        // Else it is done, and its descriptor's number may be somebody else's.
        let Some(file) = &*door else { return };
        if let Err(error) = self.host.blunt(file.as_raw_fd()) {
            crate::log::warn(format_args!("a wait for a lock cannot be ended: {error}"));
        }
        // SAFETY: the thread is not joined, and has not got past the door. The signal has a handler.
        unsafe { libc::pthread_kill(thread.handle.as_pthread_t(), signal()) };
    }

    /// Ends all waits. None of them reports.
    pub(super) fn clear(&mut self) {
        for thread in &self.threads {
            self.interrupt(thread);
        }
        self.threads.clear();
        (self.sender, self.receiver) = channel();
    }

    /// A wait that is over since the last call.
    pub(super) fn report(&mut self) -> Option<Report> {
        let (token, result) = self.receiver.try_recv().ok()?;
        self.threads.retain(|thread| thread.token != token);
        Some((token, result))
    }

    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        self.threads.len()
    }
}

fn wait(host: Host, fd: RawFd, wanted: Wanted) -> io::Result<()> {
    match wanted {
        Wanted::Bytes(range, kind) => host.wait_for_lock(fd, range, kind),
        Wanted::Whole(kind) => host.lock_whole(fd, Some(kind), true),
    }
}

/// Not the one that virtual CPUs are interrupted with.
fn signal() -> libc::c_int {
    SIGRTMIN() + 1
}

/// Makes the signal end a system call and nothing else.
fn handle_signal() {
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        if let Err(error) = register_signal_handler(signal(), nothing) {
            crate::log::warn(format_args!("waits for locks cannot be ended: {error}"));
        }
    });
}
