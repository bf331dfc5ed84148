//! The engine for hosts with io_uring: many transfers in flight, and one system call that hands over new ones and waits
//! for the next completion, kick or order to stop.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};

use io_uring::types::{Fd, Fixed, FsyncFlags};
use io_uring::{IoUring, opcode, squeue};

use super::super::queue::Chain;
use super::disk::{Disk, advance};
use super::request::{Request, Status};
use super::worker::{Worker, status_of};

/// Most transfers in flight. What a queue of 256 holds beyond that waits in the queue, where it costs nothing.
const MAX_IN_FLIGHT: usize = 128;
/// Entries of the submission ring: all that may be in flight and the two polls, as a power of two.
const RING_ENTRIES: u32 = 256;

const KICK: u64 = u64::MAX;
const STOP: u64 = u64::MAX - 1;
/// The disk, in the ring's table of files.
const DISK: Fixed = Fixed(0);

/// Whether making a ring failed, so that the next disk need not try.
static FORBIDDEN: AtomicBool = AtomicBool::new(false);

/// Whether the host was found to have or allow no rings.
#[cfg(test)]
pub(super) fn forbidden() -> bool {
    FORBIDDEN.load(Ordering::Relaxed)
}

/// A ring and what is in flight on it.
pub(super) struct Engine {
    ring: IoUring,
    slots: Vec<Option<Transfer>>,
    in_flight: usize,
    kick_watched: bool,
    stop_watched: bool,
}

struct Transfer {
    chain: Chain,
    kind: Kind,
    /// Alive until the completion, and unmoved: the kernel may read it late.
    iovecs: Vec<libc::iovec>,
    first: usize,
    offset: u64,
    len: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Flush,
}

impl Engine {
    /// A ring for `disk`, to be used by the calling thread alone; `None` where the host has or allows none.
    pub(super) fn new(disk: &Disk) -> Option<Self> {
        if FORBIDDEN.load(Ordering::Relaxed) {
            return None;
        }
        // The newer set-up saves interrupting this thread for completions; kernels before 6.1 do not know it.
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .build(RING_ENTRIES)
            .or_else(|_| IoUring::new(RING_ENTRIES))
            .and_then(|ring| {
                // Without these a ring may drop completions or read an `iovec` list after its call.
                if !ring.params().is_feature_nodrop() || !ring.params().is_feature_submit_stable() {
                    return Err(io::ErrorKind::Unsupported.into());
                }
                ring.submitter().register_files(&[disk.fd()])?;
                Ok(ring)
            });
        let Ok(ring) = ring else {
            FORBIDDEN.store(true, Ordering::Relaxed);
            return None;
        };
        Some(Self { ring, slots: Vec::new(), in_flight: 0, kick_watched: false, stop_watched: false })
    }

    /// Serves until the worker is told to stop and nothing is in flight.
    pub(super) fn run(mut self, worker: &mut Worker) {
        let mut stopping = false;
        loop {
            if !stopping {
                self.take_requests(worker);
                self.watch(worker);
            } else if self.in_flight == 0 {
                return;
            }
            worker.queue.notify();
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EBUSY | libc::EAGAIN)) => {}
                // The ring itself broke: an invariant of this file, not something that a guest can cause.
                Err(error) => panic!("io_uring_enter: {error}"),
            }
            while let Some((token, result)) = self.completion() {
                match token {
                    KICK => {
                        self.kick_watched = false;
                        worker.queue.clear_kick();
                    }
                    STOP => stopping = true,
                    slot => self.complete(worker, slot as usize, result),
                }
            }
        }
    }

    fn completion(&mut self) -> Option<(u64, i32)> {
        self.ring.completion().next().map(|entry| (entry.user_data(), entry.result()))
    }

    fn take_requests(&mut self, worker: &mut Worker) {
        while self.in_flight < MAX_IN_FLIGHT {
            let Some((chain, request)) = worker.next() else { return };
            let iovecs = request.iovecs(&chain);
            let takes = !iovecs.is_empty() && worker.shared.disk.geometry().takes(&iovecs);
            let (kind, offset, len) = match request {
                Request::Read { offset, len } if takes => (Kind::Read, offset, len),
                Request::Write { offset, len } if takes => (Kind::Write, offset, len),
                Request::Flush => (Kind::Flush, 0, 0),
                request => {
                    worker.perform(&chain, &request);
                    continue;
                }
            };
            let slot = self.slots.iter().position(Option::is_none).unwrap_or_else(|| {
                self.slots.push(None);
                self.slots.len() - 1
            });
            self.slots[slot] = Some(Transfer { chain, kind, iovecs, first: 0, offset, len });
            self.in_flight += 1;
            self.submit(worker, slot);
        }
    }

    /// Queues what is left to do for a slot.
    fn submit(&mut self, worker: &Worker, slot: usize) {
        let Some(transfer) = &self.slots[slot] else { return };
        let iovecs = &transfer.iovecs[transfer.first..];
        let (list, count) = (iovecs.as_ptr(), iovecs.len() as u32);
        let entry = match transfer.kind {
            Kind::Read => opcode::Readv::new(DISK, list, count).offset(transfer.offset).build(),
            Kind::Write => {
                let flags = if worker.write_through() { libc::RWF_DSYNC } else { 0 };
                opcode::Writev::new(DISK, list, count).offset(transfer.offset).rw_flags(flags).build()
            }
            Kind::Flush => opcode::Fsync::new(DISK).flags(FsyncFlags::DATASYNC).build(),
        };
        self.push(&entry.user_data(slot as u64));
    }

    /// Has the ring report the next kick and the order to stop.
    fn watch(&mut self, worker: &Worker) {
        let readable = libc::POLLIN as u32;
        // With all slots taken there is no use in knowing that there is more.
        if !self.kick_watched && self.in_flight < MAX_IN_FLIGHT {
            self.kick_watched = true;
            let kick = Fd(worker.queue.kick().as_raw_fd());
            self.push(&opcode::PollAdd::new(kick, readable).build().user_data(KICK));
        }
        if !self.stop_watched {
            self.stop_watched = true;
            let stop = Fd(worker.shared.stop.as_raw_fd());
            self.push(&opcode::PollAdd::new(stop, readable).build().user_data(STOP));
        }
    }

    fn push(&mut self, entry: &squeue::Entry) {
        // SAFETY: what the entry points to is guest memory, kept mapped by the transfer's chain, and the transfer's own
        // list; both stay in their slot until the completion, and `run` does not return before.
        while unsafe { self.ring.submission().push(entry) }.is_err() {
            // Full, which takes more entries than there are slots; handing them over makes room.
            let _ = self.ring.submit();
        }
    }

    /// Goes on with, or answers, the transfer in `slot`, for which the host said `result`.
    fn complete(&mut self, worker: &mut Worker, slot: usize, result: i32) {
        let Some(transfer) = self.slots.get_mut(slot).and_then(Option::as_mut) else { return };
        let done = match usize::try_from(result) {
            Err(_) if matches!(-result, libc::EINTR | libc::EAGAIN) => {
                self.submit(worker, slot);
                return;
            }
            Err(_) => Err(io::Error::from_raw_os_error(-result)),
            // The end of a file that became shorter, or a disk that takes no more.
            Ok(0) if transfer.kind != Kind::Flush => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(done) => {
                transfer.first += advance(&mut transfer.iovecs[transfer.first..], done);
                transfer.offset += done as u64;
                if transfer.first < transfer.iovecs.len() {
                    self.submit(worker, slot);
                    return;
                }
                Ok(())
            }
        };
        let written = if done.is_ok() && transfer.kind == Kind::Read { transfer.len } else { 0 };
        let status = status_of(done);
        debug_assert!(status != Status::Ok || transfer.first == transfer.iovecs.len());
        if let Some(transfer) = self.slots[slot].take() {
            self.in_flight -= 1;
            worker.finish(&transfer.chain, written, status);
        }
    }
}
