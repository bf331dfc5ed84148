//! The main thread: waits for whatever concerns the VM as a whole and acts on it. No other thread changes the VM.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::control::{Client, Verdict};
use super::machine::Machine;
use crate::log;
use crate::outcome::Outcome;

/// Clients of the control socket at a time. Each may make the VMM hold a line of 64 KiB and some descriptors.
const MAX_CLIENTS: usize = 16;

/// What is waited for.
const TAG_ENDING: u64 = 0;
const TAG_SIGNAL: u64 = 1;
const TAG_LIFELINE: u64 = 2;
const TAG_LISTENER: u64 = 3;
const FIRST_CLIENT: u64 = 4;

/// What the caller holds the other ends of.
#[derive(Default)]
pub struct Tethers {
    /// Listening control socket.
    pub control: Option<UnixListener>,
    /// A pipe that the caller keeps open as long as it lives.
    pub lifeline: Option<File>,
}

/// Signals that stop the VM, from now on for [`run`] alone to take. Before any thread is started.
///
/// # Errors
///
/// When the kernel refuses.
pub fn block_signals() -> io::Result<OwnedFd> {
    // SAFETY: an all-zero signal set is valid, and is made empty next.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` is a valid signal set throughout, and no descriptor is passed for reuse.
    let fd = unsafe {
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGTERM);
        libc::sigaddset(&raw mut set, libc::SIGINT);
        if libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
        libc::signalfd(-1, &raw const set, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC)
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Lets the VM run, and serves it until it ends.
///
/// # Errors
///
/// When the kernel refuses to wait, which it has no reason to.
pub fn run(machine: &mut Machine, signals: &OwnedFd, tethers: Tethers) -> io::Result<Outcome> {
    let mut driver = Driver { epoll: Epoll::new()?, clients: HashMap::new(), next_client: FIRST_CLIENT };
    driver.watch(machine.ending().decided().as_raw_fd(), TAG_ENDING)?;
    driver.watch(signals.as_raw_fd(), TAG_SIGNAL)?;
    if let Some(lifeline) = &tethers.lifeline {
        driver.watch(lifeline.as_raw_fd(), TAG_LIFELINE)?;
    }
    if let Some(listener) = &tethers.control {
        listener.set_nonblocking(true)?;
        driver.watch(listener.as_raw_fd(), TAG_LISTENER)?;
    }
    machine.resume();
    let outcome = driver.serve(machine, &tethers)?;
    // What the guest gave the devices is written back, unless there is no time for it.
    if outcome.is_orderly() {
        machine.pause();
    }
    Ok(outcome)
}

struct Driver {
    epoll: Epoll,
    clients: HashMap<u64, Client>,
    next_client: u64,
}

impl Driver {
    fn watch(&self, fd: RawFd, tag: u64) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, tag))
    }

    fn serve(&mut self, machine: &mut Machine, tethers: &Tethers) -> io::Result<Outcome> {
        let mut events = [EpollEvent::default(); 8];
        loop {
            let count = match self.epoll.wait(-1, &mut events) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                result => result?,
            };
            for event in &events[..count] {
                match event.data() {
                    TAG_ENDING => {}
                    TAG_SIGNAL => machine.ending().end(Outcome::Stopped),
                    // Nothing is ever written to it; it only ends.
                    TAG_LIFELINE => return Ok(Outcome::Orphaned),
                    TAG_LISTENER => self.accept(tethers),
                    client => self.serve_client(client, machine),
                }
            }
            if let Some(outcome) = machine.ending().outcome() {
                return Ok(outcome);
            }
        }
    }

    fn accept(&mut self, tethers: &Tethers) {
        let Some(Ok((stream, _))) = tethers.control.as_ref().map(UnixListener::accept) else { return };
        if self.clients.len() >= MAX_CLIENTS {
            // The client finds its connection closed.
            return;
        }
        let tag = self.next_client;
        self.next_client += 1;
        let fd = stream.as_raw_fd();
        match Client::new(stream).and_then(|client| self.watch(fd, tag).map(|()| client)) {
            Ok(client) => drop(self.clients.insert(tag, client)),
            Err(error) => log::warn(format_args!("cannot serve a client of the control socket: {error}")),
        }
    }

    fn serve_client(&mut self, tag: u64, machine: &mut Machine) {
        let Some(client) = self.clients.get_mut(&tag) else { return };
        if client.serve(machine) == Verdict::Gone {
            // Closing the stream takes it off the epoll set.
            self.clients.remove(&tag);
        }
    }
}
