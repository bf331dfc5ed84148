//! The thread that serves a queue pair, and what all pairs of a device share.
//!
//! A worker sleeps in `poll` until there is something that it can do: a packet of the host's for which the driver has lent
//! buffers, a packet of the guest's, a command. What it cannot go on with (no buffers, a full host) it does not wait for
//! on the other side, so an idle guest wakes nobody.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::EventFd;

use super::super::device::Interrupt;
use super::super::queue::VirtQueue;
use super::control::{self, Command};
use super::packet::{Delivery, Lent, check_sent};
use super::{feature, tap};

/// Room for the calls below plus what signal handlers take.
const STACK_BYTES: usize = 128 << 10;
/// Packets moved in one direction before the other gets its turn and the driver is told: many enough that an interrupt
/// costs little for each, few enough that answers do not wait long.
const BATCH: usize = 64;

/// What a device counts.
#[derive(Default)]
pub(super) struct Counters {
    pub(super) rx_packets: AtomicU64,
    pub(super) rx_bytes: AtomicU64,
    pub(super) rx_dropped: AtomicU64,
    pub(super) tx_packets: AtomicU64,
    pub(super) tx_bytes: AtomicU64,
    pub(super) tx_dropped: AtomicU64,
}

fn count(counter: &AtomicU64, by: usize) {
    counter.fetch_add(by as u64, Ordering::Relaxed);
}

/// A queue pair as all of the device sees it.
pub(super) struct Pair {
    pub(super) tap: Box<dyn tap::Queue>,
    /// Wakes the pair's worker to look at the two flags.
    wake: EventFd,
    /// Whether the worker is to end.
    stop: AtomicBool,
    /// Whether driver and host use the pair (section 5.1.6.5.5).
    enabled: AtomicBool,
}

impl Pair {
    pub(super) fn new(tap: Box<dyn tap::Queue>) -> io::Result<Self> {
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        Ok(Self { tap, wake, stop: AtomicBool::new(false), enabled: AtomicBool::new(true) })
    }
}

/// What the device and its workers all see.
pub(super) struct Shared {
    pub(super) pairs: Vec<Pair>,
    pub(super) mac: Mutex<[u8; 6]>,
    /// Feature bits of what is left to the guest.
    pub(super) offloads: AtomicU64,
    /// Pairs in use.
    pub(super) active_pairs: AtomicU16,
    /// Whether the host's end of the link is there.
    pub(super) end_is_there: AtomicBool,
    /// Whether the link is up as far as the host's end knows.
    pub(super) link_up: AtomicBool,
    pub(super) counters: Counters,
}

impl Shared {
    /// Uses the first `count` pairs from now on; false where the host refuses.
    pub(super) fn set_pairs(&self, count: u16) -> bool {
        for (index, pair) in self.pairs.iter().enumerate() {
            let enabled = index < usize::from(count);
            if pair.enabled.load(Ordering::Acquire) == enabled {
                continue;
            }
            if let Err(error) = pair.tap.set_attached(enabled) {
                crate::log::warn(format_args!("a network queue cannot be switched: {error}"));
                return false;
            }
            pair.enabled.store(enabled, Ordering::Release);
            let _ = pair.wake.write(1);
        }
        self.active_pairs.store(count, Ordering::Relaxed);
        true
    }

    /// Leaves to the guest what these feature bits say; false where the host refuses.
    pub(super) fn set_offloads(&self, features: u64) -> bool {
        match self.pairs[0].tap.set_offloads(features) {
            Ok(()) => {
                self.offloads.store(features & feature::ALL_GUEST_OFFLOADS, Ordering::Relaxed);
                true
            }
            Err(error) => {
                crate::log::warn(format_args!("a network interface's offloads cannot be set: {error}"));
                false
            }
        }
    }

    /// What the driver is told of the link (section 5.1.4, `VIRTIO_NET_S_LINK_UP`).
    pub(super) fn is_link_up(&self) -> bool {
        self.end_is_there.load(Ordering::Acquire) && self.link_up.load(Ordering::Acquire)
    }

    pub(super) fn mac(&self) -> [u8; 6] {
        *self.mac.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The owner of a pair's active queues.
pub(super) struct Worker {
    pub(super) index: usize,
    pub(super) rx: VirtQueue,
    pub(super) tx: VirtQueue,
    /// The first pair's worker serves the control queue too.
    pub(super) control: Option<VirtQueue>,
    pub(super) lent: Lent,
    /// What the driver agreed to.
    pub(super) features: u64,
    pub(super) interrupt: Arc<dyn Interrupt>,
    pub(super) shared: Arc<Shared>,
}

/// A worker at work.
pub(super) struct Running {
    thread: JoinHandle<Worker>,
    shared: Arc<Shared>,
    index: usize,
}

/// What one direction waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wait {
    /// Nothing: there is more to do.
    Not,
    /// The driver's kick.
    Driver,
    /// The host.
    Host,
    /// Nothing that will come by itself: the host's end is gone.
    Forever,
}

impl Worker {
    /// Starts to serve.
    pub(super) fn start(self, name: &str) -> io::Result<Running> {
        let (shared, index) = (self.shared.clone(), self.index);
        let thread = std::thread::Builder::new().name(name.to_owned()).stack_size(STACK_BYTES).spawn(|| self.run())?;
        Ok(Running { thread, shared, index })
    }

    fn pair(&self) -> &Pair {
        &self.shared.pairs[self.index]
    }

    fn run(mut self) -> Self {
        let (mut receive, mut send) = (Wait::Not, Wait::Not);
        self.serve_control();
        while !self.pair().stop.load(Ordering::Acquire) {
            if receive == Wait::Not {
                receive = self.receive();
                self.rx.notify();
            }
            if send == Wait::Not {
                send = self.send();
                self.tx.notify();
            }
            if receive != Wait::Not && send != Wait::Not {
                self.wait(&mut receive, &mut send);
            }
        }
        self.lent.give_back(&mut self.rx);
        self.rx.notify();
        self.tx.notify();
        self
    }

    /// Moves packets from the host to the guest.
    fn receive(&mut self) -> Wait {
        if !self.pair().enabled.load(Ordering::Acquire) {
            return Wait::Forever;
        }
        let shared = self.shared.clone();
        let tap = &shared.pairs[self.index].tap;
        for _ in 0..BATCH {
            if !self.lent.fill(&mut self.rx) {
                return Wait::Driver;
            }
            // SAFETY: the lent chains keep their memory mapped, and it is the guest's, whom the read may disturb.
            match unsafe { tap.read(self.lent.parts()) } {
                Ok(len) => {
                    let counters = &self.shared.counters;
                    match self.lent.deliver(&mut self.rx, len) {
                        Delivery::Delivered => {
                            count(&counters.rx_packets, 1);
                            count(&counters.rx_bytes, len);
                        }
                        Delivery::Dropped => count(&counters.rx_dropped, 1),
                    }
                }
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return Wait::Host,
                    io::ErrorKind::Interrupted => {}
                    _ => return self.after(&error),
                },
            }
        }
        Wait::Not
    }

    /// Moves packets from the guest to the host, down to the last byte that the host takes now.
    fn send(&mut self) -> Wait {
        let wait = self.send_batch();
        match self.pair().tap.flush() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Wait::Host,
            // Where the host's end is gone, whoever reads from it sees to that.
            _ => wait,
        }
    }

    fn send_batch(&mut self) -> Wait {
        let shared = self.shared.clone();
        let tap = &shared.pairs[self.index].tap;
        for _ in 0..BATCH {
            let Some(chain) = self.tx.pop() else { return Wait::Driver };
            let len = chain.readable_len();
            let result = match check_sent(&chain) {
                Ok(()) => {
                    let parts = chain.readable_iovecs(0, len);
                    // SAFETY: the chain keeps its memory mapped.
                    unsafe { tap.write(&parts) }
                }
                Err(_) => Err(io::ErrorKind::InvalidInput.into()),
            };
            let counters = &self.shared.counters;
            match result {
                Ok(()) => {
                    count(&counters.tx_packets, 1);
                    count(&counters.tx_bytes, len);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.tx.undo_pop();
                    return Wait::Host;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                    self.tx.undo_pop();
                    continue;
                }
                // A packet that the host does not take is lost, as on any wire.
                Err(_) => count(&counters.tx_dropped, 1),
            }
            self.tx.push(chain.head(), 0);
        }
        Wait::Not
    }

    /// What to do after a read that failed.
    fn after(&mut self, error: &io::Error) -> Wait {
        match error.kind() {
            io::ErrorKind::ConnectionAborted => self.lose_link(),
            // Buffers that the kernel cannot write to, though they are the guest's memory: this read's packet is lost.
            _ => {
                count(&self.shared.counters.rx_dropped, 1);
                Wait::Host
            }
        }
    }

    /// Tells the driver that the cable is out (section 5.1.4, `VIRTIO_NET_S_LINK_UP`).
    fn lose_link(&self) -> Wait {
        if self.shared.end_is_there.swap(false, Ordering::AcqRel) && self.features & feature::STATUS != 0 {
            self.interrupt.signal_config();
        }
        Wait::Forever
    }

    fn serve_control(&mut self) {
        let Some(mut control) = self.control.take() else { return };
        control.clear_kick();
        for served in 0.. {
            if served == BATCH {
                // Come back after the packets.
                let _ = control.kick().write(1);
                break;
            }
            let Some(chain) = control.pop() else { break };
            let written = control::serve(&chain, |command| self.apply(command));
            control.push(chain.head(), written);
        }
        control.notify();
        self.control = Some(control);
    }

    fn apply(&self, command: Command) -> bool {
        let agreed = |feature| self.features & feature == feature;
        match command {
            Command::Filter => true,
            Command::SetMac(mac) => {
                // Bit 0 of the first byte is that of a group's address.
                let acceptable = agreed(feature::CTRL_MAC_ADDR) && mac[0] & 1 == 0 && mac != [0; 6];
                if acceptable {
                    *self.shared.mac.lock().unwrap_or_else(PoisonError::into_inner) = mac;
                }
                acceptable
            }
            Command::SetPairs(count) => {
                let there = count >= 1 && usize::from(count) <= self.shared.pairs.len();
                agreed(feature::MQ) && there && self.shared.set_pairs(count)
            }
            Command::SetOffloads(offloads) => {
                let allowed = self.features & feature::ALL_GUEST_OFFLOADS;
                agreed(feature::CTRL_GUEST_OFFLOADS) && offloads & !allowed == 0 && self.shared.set_offloads(offloads)
            }
        }
    }

    /// Sleeps until one of the directions can go on, or the worker is to look at its flags.
    fn wait(&mut self, receive: &mut Wait, send: &mut Wait) {
        const NOBODY: i32 = -1;
        let pair = self.pair();
        let wanted = |wait: Wait, on: Wait, fd: i32| if wait == on { fd } else { NOBODY };
        let mut tap_events = 0;
        tap_events |= if *receive == Wait::Host { libc::POLLIN } else { 0 };
        tap_events |= if *send == Wait::Host { libc::POLLOUT } else { 0 };
        let tap = if tap_events == 0 { NOBODY } else { pair.tap.fd() };
        let mut fds = [
            (pair.wake.as_raw_fd(), libc::POLLIN),
            (wanted(*receive, Wait::Driver, self.rx.kick().as_raw_fd()), libc::POLLIN),
            (wanted(*send, Wait::Driver, self.tx.kick().as_raw_fd()), libc::POLLIN),
            (self.control.as_ref().map_or(NOBODY, |control| control.kick().as_raw_fd()), libc::POLLIN),
            (tap, tap_events),
        ]
        .map(|(fd, events)| libc::pollfd { fd, events, revents: 0 });
        // SAFETY: `fds` is an array of that length. An interrupted call leaves no events, which does no harm.
        if unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, -1) } < 0 {
            return;
        }
        let [wake, rx_kick, tx_kick, control, tap] = fds.map(|fd| fd.revents);
        if wake != 0 {
            let _ = pair.wake.read();
            if *receive != Wait::Driver {
                *receive = Wait::Not;
            }
        }
        if rx_kick != 0 {
            self.rx.clear_kick();
            *receive = Wait::Not;
        }
        if tx_kick != 0 {
            self.tx.clear_kick();
            *send = Wait::Not;
        }
        if control != 0 {
            self.serve_control();
        }
        // An error shows as such when it is read or written again.
        let broken = tap & (libc::POLLERR | libc::POLLHUP | libc::POLLNVAL);
        if *receive == Wait::Host && tap & (libc::POLLIN | broken) != 0 {
            *receive = Wait::Not;
        }
        if *send == Wait::Host && tap & (libc::POLLOUT | broken) != 0 {
            *send = Wait::Not;
        }
    }
}

impl Running {
    /// Ends the thread; `None` if it died.
    pub(super) fn stop(self) -> Option<Worker> {
        let pair = &self.shared.pairs[self.index];
        pair.stop.store(true, Ordering::Release);
        let _ = pair.wake.write(1);
        let worker = self.thread.join().ok();
        pair.stop.store(false, Ordering::Release);
        let _ = pair.wake.read();
        worker
    }
}
