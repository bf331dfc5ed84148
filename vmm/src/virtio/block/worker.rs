//! The threads that serve a disk's queues, one each: what both of their engines share, and their start and stop.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::EventFd;

use super::super::queue::{Chain, VirtQueue};
use super::disk::Disk;
use super::request::{ID_BYTES, Limits, Request, SECTOR_BYTES, Status};
use super::{threaded, uring};

/// Room for the calls below plus what signal handlers take.
const STACK_BYTES: usize = 128 << 10;

/// What the device and its worker both see.
pub(super) struct Shared {
    pub(super) disk: Disk,
    pub(super) read_only: bool,
    pub(super) serial: [u8; ID_BYTES],
    /// Whether a write is complete only once it is on stable storage.
    pub(super) write_through: AtomicBool,
    pub(super) completed: AtomicU64,
    /// Whether to use io_uring where the host lets it.
    pub(super) try_uring: bool,
    /// Whether the file is no longer there, and each request is an error.
    pub(super) is_gone: bool,
    /// Whether the workers are to end, for those at work: a guest that refills its queue fast enough keeps them from ever waiting.
    pub(super) stopping: AtomicBool,
    /// Readable when the workers are to end, for those that wait.
    pub(super) stop: EventFd,
}

/// The owner of an active queue.
pub(super) struct Worker {
    /// The queue's number.
    pub(super) index: usize,
    pub(super) queue: VirtQueue,
    pub(super) shared: Arc<Shared>,
}

/// The workers at work.
pub(super) struct Running {
    threads: Vec<JoinHandle<Worker>>,
    shared: Arc<Shared>,
}

impl Shared {
    /// The same without the file.
    pub(super) fn without_file(&self) -> io::Result<Self> {
        Ok(Self {
            disk: self.disk.without_file()?,
            read_only: self.read_only,
            serial: self.serial,
            write_through: AtomicBool::new(self.write_through.load(Ordering::Relaxed)),
            completed: AtomicU64::new(self.completed.load(Ordering::Relaxed)),
            try_uring: false,
            is_gone: true,
            stopping: AtomicBool::new(false),
            stop: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
        })
    }

    /// What a request may touch as things stand.
    fn limits(&self) -> Limits {
        let geometry = self.disk.geometry();
        let block = geometry.direct.map_or(SECTOR_BYTES, |_| u64::from(geometry.logical));
        Limits {
            capacity_sectors: self.disk.capacity_sectors(),
            block_sectors: block / SECTOR_BYTES,
            read_only: self.read_only,
        }
    }
}

impl Worker {
    fn start(self, name: &str) -> io::Result<JoinHandle<Self>> {
        let name = if self.index == 0 { name.to_owned() } else { format!("{name}.{}", self.index) };
        std::thread::Builder::new().name(name).stack_size(STACK_BYTES).spawn(|| self.run())
    }

    fn run(mut self) -> Self {
        without_size_signal();
        let engine = if self.shared.try_uring { uring::Engine::new(&self.shared.disk) } else { None };
        match engine {
            Some(engine) => engine.run(&mut self),
            None => threaded::run(&mut self),
        }
        self
    }

    /// The next request that is not answered already; none when it is time to stop.
    pub(super) fn next(&mut self) -> Option<(Chain, Request)> {
        while !self.shared.stopping.load(Ordering::Acquire) {
            let chain = self.queue.pop()?;
            if chain.writable_len() == 0 {
                // Nowhere to put a status: all that can be done is to give the buffer back.
                self.queue.push(chain.head(), 0);
                continue;
            }
            if self.shared.is_gone {
                self.finish(&chain, 0, Status::IoError);
                continue;
            }
            match Request::parse(&chain, &self.shared.limits()) {
                Ok(request) => return Some((chain, request)),
                Err(status) => self.finish(&chain, 0, status),
            }
        }
        None
    }

    /// Does what needs no engine: short, or rare.
    pub(super) fn perform(&mut self, chain: &Chain, request: &Request) {
        let disk = &self.shared.disk;
        let (written, result) = match request {
            Request::GetId => {
                let room = (chain.writable_len() - 1).min(ID_BYTES);
                (chain.write_at(0, &self.shared.serial[..room]), Ok(()))
            }
            Request::Discard(ranges) => (0, ranges.iter().try_for_each(|range| disk.discard(*range))),
            Request::WriteZeroes(ranges) => (0, ranges.iter().try_for_each(|range| disk.write_zeroes(*range))),
            Request::Flush => (0, disk.flush()),
            // The engines leave to this what is empty, and what the host does not take as the guest has it.
            &Request::Read { offset, len } => {
                let put = |at, data: &[u8]| _ = chain.write_at(at, data);
                let result = disk.read_aside(offset, len, put);
                (if result.is_ok() { len } else { 0 }, result)
            }
            &Request::Write { offset, len } => {
                let get = |at, data: &mut [u8]| _ = chain.read_at(Request::WRITE_DATA + at, data);
                (0, disk.write_aside(offset, len, self.write_through(), get))
            }
        };
        let durable = match (&result, request) {
            (Ok(()), Request::WriteZeroes(_)) if self.write_through() => disk.flush(),
            _ => Ok(()),
        };
        self.finish(chain, written, status_of(result.and(durable)));
    }

    pub(super) fn write_through(&self) -> bool {
        self.shared.write_through.load(Ordering::Relaxed)
    }

    /// Answers a request that put `written` bytes of data before the status.
    pub(super) fn finish(&mut self, chain: &Chain, written: usize, status: Status) {
        chain.write_at(chain.writable_len() - 1, &[status as u8]);
        self.queue.push(chain.head(), u32::try_from(written + 1).unwrap_or(u32::MAX));
        self.shared.completed.fetch_add(1, Ordering::Relaxed);
    }
}

impl Running {
    /// Starts to serve all of a disk's queues, or none.
    pub(super) fn start(workers: Vec<Worker>, shared: &Arc<Shared>, name: &str) -> io::Result<Self> {
        let mut running = Self { threads: Vec::new(), shared: shared.clone() };
        for worker in workers {
            match worker.start(name) {
                Ok(thread) => running.threads.push(thread),
                Err(error) => {
                    running.stop();
                    return Err(error);
                }
            }
        }
        Ok(running)
    }

    /// Ends the threads once nothing is in flight, and gives back their workers but for those that died.
    pub(super) fn stop(self) -> Vec<Worker> {
        self.shared.stopping.store(true, Ordering::Release);
        let _ = self.shared.stop.write(1);
        let workers = self.threads.into_iter().filter_map(|thread| thread.join().ok()).collect();
        let _ = self.shared.stop.read();
        self.shared.stopping.store(false, Ordering::Release);
        workers
    }
}

/// Spares the calling thread the signal that a write beyond the process's file size limit brings: an error will do.
fn without_size_signal() {
    // SAFETY: the signal set lives here; affects this thread alone.
    unsafe {
        let mut signals = std::mem::zeroed();
        libc::sigemptyset(&raw mut signals);
        libc::sigaddset(&raw mut signals, libc::SIGXFSZ);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const signals, std::ptr::null_mut());
    }
}

/// The status for what the host said.
pub(super) fn status_of(result: io::Result<()>) -> Status {
    match result {
        Ok(()) => Status::Ok,
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Status::Unsupported,
        Err(_) => Status::IoError,
    }
}
