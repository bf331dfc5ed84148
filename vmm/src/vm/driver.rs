//! The main thread: waits for whatever concerns the VM as a whole and acts on it. No other thread changes the VM.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::control::{Client, Verdict};
use super::machine::Machine;
use crate::log;
use crate::outcome::Outcome;

/// Clients of the control socket at a time. Each may make the VMM hold a line of 64 KiB and some descriptors.
const MAX_CLIENTS: usize = 16;
/// How long nobody new is listened to after a client could not be accepted, in milliseconds.
const RETRY_MS: i32 = 100;

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
    let mut driver = Driver::new()?;
    driver.watch(machine.ending().decided().as_raw_fd(), TAG_ENDING)?;
    driver.watch(signals.as_raw_fd(), TAG_SIGNAL)?;
    if let Some(lifeline) = &tethers.lifeline {
        driver.watch(lifeline.as_raw_fd(), TAG_LIFELINE)?;
    }
    if let Some(listener) = &tethers.control {
        listener.set_nonblocking(true)?;
        driver.listen(listener)?;
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
    /// A client could not be accepted, most likely for want of descriptors: the listener is not watched for a while, since it
    /// stays ready and would keep the thread busy.
    tired: bool,
    /// It was said that clients cannot be accepted.
    complained: bool,
}

impl Driver {
    fn new() -> io::Result<Self> {
        let (epoll, clients) = (Epoll::new()?, HashMap::new());
        Ok(Self { epoll, clients, next_client: FIRST_CLIENT, tired: false, complained: false })
    }

    fn watch(&self, fd: RawFd, tag: u64) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, tag))
    }

    fn listen(&mut self, listener: &UnixListener) -> io::Result<()> {
        self.watch(listener.as_raw_fd(), TAG_LISTENER)?;
        self.tired = false;
        Ok(())
    }

    fn serve(&mut self, machine: &mut Machine, tethers: &Tethers) -> io::Result<Outcome> {
        let mut events = [EpollEvent::default(); 8];
        loop {
            let count = self.wait(&mut events, tethers.control.as_ref())?;
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

    /// Waits for what there is to do; for nothing after the time for which the listener is not watched.
    fn wait(&mut self, events: &mut [EpollEvent], listener: Option<&UnixListener>) -> io::Result<usize> {
        loop {
            let count = match self.epoll.wait(if self.tired { RETRY_MS } else { -1 }, events) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                result => result?,
            };
            match listener {
                Some(listener) if self.tired && count == 0 => self.listen(listener)?,
                _ => return Ok(count),
            }
        }
    }

    fn accept(&mut self, tethers: &Tethers) {
        if let Some(listener) = &tethers.control {
            let accepted = listener.accept();
            self.admit(accepted.map(|(stream, _)| stream), listener);
        }
    }

    fn admit(&mut self, accepted: io::Result<UnixStream>, listener: &UnixListener) {
        let stream = match accepted {
            Ok(stream) => stream,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => return,
            Err(error) => return self.rest(&error, listener),
        };
        self.complained = false;
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

    /// Leaves the listener alone for a while.
    fn rest(&mut self, error: &io::Error, listener: &UnixListener) {
        if !std::mem::replace(&mut self.complained, true) {
            log::warn(format_args!("cannot accept clients of the control socket for now: {error}"));
        }
        self.tired = self.epoll.ctl(ControlOperation::Delete, listener.as_raw_fd(), EpollEvent::default()).is_ok();
    }

    fn serve_client(&mut self, tag: u64, machine: &mut Machine) {
        let Some(client) = self.clients.get_mut(&tag) else { return };
        if client.serve(machine) == Verdict::Gone {
            // Closing the stream takes it off the epoll set.
            self.clients.remove(&tag);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_for_whose_clients_there_is_no_descriptor_rests_for_a_while() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let mut driver = Driver::new().unwrap();
        driver.listen(&listener).unwrap();
        let mut events = [EpollEvent::default(); 8];
        let _client = UnixStream::connect(&path).unwrap();
        assert_eq!(driver.wait(&mut events, Some(&listener)).unwrap(), 1);
        driver.admit(Err(io::Error::from_raw_os_error(libc::EMFILE)), &listener);
        // The client is still there, and nothing says so.
        assert_eq!(driver.epoll.wait(0, &mut events).unwrap(), 0);
        // Nor is the listener forgotten.
        assert_eq!(driver.wait(&mut events, Some(&listener)).unwrap(), 1);
        assert_eq!(events[0].data(), TAG_LISTENER);
        driver.admit(listener.accept().map(|(stream, _)| stream), &listener);
        assert_eq!((driver.clients.len(), driver.tired), (1, false));
    }
}
