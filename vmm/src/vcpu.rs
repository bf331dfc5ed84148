//! Virtual CPUs: one thread each, which runs the guest until something is for the VMM to do.
//!
//! ```text
//! running ──kick──▶ parked ──release──▶ running        (pause, resume)
//!    └── outcome decided ──▶ thread ends
//! ```
//!
//! A thread is stopped by its `immediate_exit` flag, which makes the next `KVM_RUN` return, and a signal, which makes
//! the present one return. `KVM_RUN` thereby completes the access that it returned with last, so that a parked vCPU has
//! nothing half done.

use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;

use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::board::{Board, Target};
use crate::outcome::{Ending, Outcome};

/// Enough for the deepest call of an exit, with room to spare; only what is touched costs memory.
const STACK_BYTES: usize = 128 * 1024;
/// Offset of `immediate_exit` in `struct kvm_run` (Documentation/virt/kvm/api.rst, section 5).
const IMMEDIATE_EXIT: usize = 1;
/// `KVM_EXIT_INTERNAL_ERROR`: KVM met an instruction that it cannot emulate.
const SUBERROR_EMULATION: u32 = 1;

/// Why `KVM_RUN` returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Reason {
    /// Configuration space of the PCI bus was read.
    PciConfigRead,
    /// Configuration space of the PCI bus was written.
    PciConfigWrite,
    /// A register of a PCI function was read.
    PciBarRead,
    /// A register of a PCI function was written.
    PciBarWrite,
    /// A port that a device has was read.
    PortRead,
    /// A port that a device has was written.
    PortWrite,
    /// A port or address that no device has was read.
    UnclaimedRead,
    /// A port or address that no device has was written.
    UnclaimedWrite,
    /// The VMM wanted it.
    Interrupted,
    /// Anything else.
    Other,
}

impl Reason {
    /// All reasons with their names in the control protocol.
    const NAMES: [(Self, &'static str); 10] = [
        (Self::PciConfigRead, "pci_config_read"),
        (Self::PciConfigWrite, "pci_config_write"),
        (Self::PciBarRead, "pci_bar_read"),
        (Self::PciBarWrite, "pci_bar_write"),
        (Self::PortRead, "port_read"),
        (Self::PortWrite, "port_write"),
        (Self::UnclaimedRead, "unclaimed_read"),
        (Self::UnclaimedWrite, "unclaimed_write"),
        (Self::Interrupted, "interrupted"),
        (Self::Other, "other"),
    ];

    fn read_of(target: Target) -> Self {
        match target {
            Target::PciConfig => Self::PciConfigRead,
            Target::PciBar => Self::PciBarRead,
            Target::Port => Self::PortRead,
            Target::Nobody => Self::UnclaimedRead,
        }
    }

    fn write_of(target: Target) -> Self {
        match target {
            Target::PciConfig => Self::PciConfigWrite,
            Target::PciBar => Self::PciBarWrite,
            Target::Port => Self::PortWrite,
            Target::Nobody => Self::UnclaimedWrite,
        }
    }
}

/// Exits of one vCPU, by reason.
#[derive(Default)]
pub struct ExitCounters([AtomicU64; Reason::NAMES.len()]);

impl ExitCounters {
    fn count(&self, reason: Reason) {
        // One thread writes, so nothing is lost between load and store.
        let counter = &self.0[reason as usize];
        counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }

    /// Adds the counters to `sums`, by name; those that are zero are left out.
    pub fn add_to(&self, sums: &mut std::collections::BTreeMap<String, u64>) {
        for (reason, name) in Reason::NAMES {
            let count = self.0[reason as usize].load(Ordering::Relaxed);
            if count > 0 {
                *sums.entry(name.to_owned()).or_default() += count;
            }
        }
    }
}

/// Why a vCPU's thread could not be started.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// The page that KVM shares with the VMM cannot be mapped.
    #[error("cannot map the run state of a virtual CPU: {0}")]
    MapRun(io::Error),
    /// The signal handler cannot be installed.
    #[error("cannot install a signal handler: {0}")]
    Signal(vmm_sys_util::errno::Error),
    /// There is no room for another thread.
    #[error("cannot start a thread for a virtual CPU: {0}; the process limit may be too low (ulimit -u, pids.max)")]
    Spawn(io::Error),
}

/// The first byte range of `struct kvm_run`, mapped once more so that its lifetime does not depend on the vCPU's thread.
struct RunPage(NonNull<u8>);

// SAFETY: the page is only accessed through an atomic.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

/// Pages here are 4 KiB, and `immediate_exit` is in the first.
const RUN_PAGE_BYTES: usize = 4096;

impl RunPage {
    fn map(vcpu: &VcpuFd) -> io::Result<Self> {
        // SAFETY: a new mapping of a file; it replaces nothing.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                RUN_PAGE_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                0,
            )
        };
        if page == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        NonNull::new(page.cast()).map(Self).ok_or_else(io::Error::last_os_error)
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: the byte lies in the mapping, which lives as long as `self`; the kernel reads it as a byte too.
        unsafe { AtomicU8::from_ptr(self.0.as_ptr().add(IMMEDIATE_EXIT)) }
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: this is the whole of the mapping that `map` made, and nothing refers to it any more.
        unsafe { libc::munmap(self.0.as_ptr().cast(), RUN_PAGE_BYTES) };
    }
}

/// Where vCPUs wait: until the VM starts, and while it is paused.
struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

struct GateState {
    closed: bool,
    /// The VM goes away: nobody passes any more.
    abandoned: bool,
    waiting: usize,
}

struct Running {
    thread: thread::JoinHandle<()>,
    page: Arc<RunPage>,
    finished: Arc<AtomicBool>,
    counters: Arc<ExitCounters>,
}

/// All vCPUs of the VM. The main thread's.
pub struct Vcpus {
    gate: Arc<Gate>,
    running: Vec<Running>,
}

impl Vcpus {
    /// No vCPU yet. Those that are added wait for [`resume`](Self::resume).
    ///
    /// # Errors
    ///
    /// When the signal that interrupts them cannot be handled.
    pub fn new() -> Result<Self, VcpuError> {
        extern "C" fn interrupted(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
        register_signal_handler(SIGRTMIN(), interrupted).map_err(VcpuError::Signal)?;
        let state = Mutex::new(GateState { closed: true, abandoned: false, waiting: 0 });
        Ok(Self { gate: Arc::new(Gate { state, changed: Condvar::new() }), running: Vec::new() })
    }

    /// Starts the thread of the next vCPU.
    ///
    /// # Errors
    ///
    /// When the host refuses.
    pub fn add(&mut self, vcpu: VcpuFd, board: Arc<Board>, ending: Arc<Ending>) -> Result<(), VcpuError> {
        // At most `MAX_CPUS`.
        let index = self.running.len() as u8;
        let page = Arc::new(RunPage::map(&vcpu).map_err(VcpuError::MapRun)?);
        let counters = Arc::new(ExitCounters::default());
        let finished = Arc::new(AtomicBool::new(false));
        let mut worker = Worker {
            index,
            vcpu,
            page: page.clone(),
            gate: self.gate.clone(),
            board,
            ending,
            counters: counters.clone(),
        };
        let done = finished.clone();
        let thread = thread::Builder::new()
            .name(format!("vcpu{index}"))
            .stack_size(STACK_BYTES)
            .spawn(move || {
                worker.run();
                let _state = worker.gate.lock();
                done.store(true, Ordering::Release);
                worker.gate.changed.notify_all();
            })
            .map_err(VcpuError::Spawn)?;
        self.running.push(Running { thread, page, finished, counters });
        Ok(())
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.running.len()
    }

    /// Stops all vCPUs between two instructions, with no access of theirs half done.
    pub fn pause(&self) {
        self.gate.lock().closed = true;
        for running in &self.running {
            running.page.immediate_exit().store(1, Ordering::SeqCst);
        }
        self.interrupt();
        let mut state = self.gate.lock();
        while state.waiting + self.finished() < self.running.len() {
            state = self.gate.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Lets all vCPUs go on.
    pub fn resume(&self) {
        self.gate.lock().closed = false;
        self.gate.changed.notify_all();
    }

    /// The exits of all vCPUs.
    #[must_use]
    pub fn exits(&self) -> std::collections::BTreeMap<String, u64> {
        let mut sums = std::collections::BTreeMap::new();
        for running in &self.running {
            running.counters.add_to(&mut sums);
        }
        sums
    }

    fn finished(&self) -> usize {
        self.running.iter().filter(|running| running.finished.load(Ordering::Acquire)).count()
    }

    fn interrupt(&self) {
        use std::os::unix::thread::JoinHandleExt;
        for running in &self.running {
            // SAFETY: the thread is not joined before its handle is dropped, so that the identifier is good; a thread that
            // has ended is an error, which is fine.
            unsafe { libc::pthread_kill(running.thread.as_pthread_t(), SIGRTMIN()) };
        }
    }
}

impl Drop for Vcpus {
    /// Ends and joins the threads, wherever they are.
    fn drop(&mut self) {
        self.gate.lock().abandoned = true;
        self.gate.changed.notify_all();
        for running in &self.running {
            running.page.immediate_exit().store(1, Ordering::SeqCst);
        }
        self.interrupt();
        for running in self.running.drain(..) {
            let _ = running.thread.join();
        }
    }
}

impl Gate {
    fn lock(&self) -> std::sync::MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits while the gate is closed; false if there is nothing to come back to.
    fn pass(&self) -> bool {
        let mut state = self.lock();
        while state.closed && !state.abandoned {
            state.waiting += 1;
            self.changed.notify_all();
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.waiting -= 1;
        }
        !state.abandoned
    }
}

struct Worker {
    index: u8,
    vcpu: VcpuFd,
    page: Arc<RunPage>,
    gate: Arc<Gate>,
    board: Arc<Board>,
    ending: Arc<Ending>,
    counters: Arc<ExitCounters>,
}

impl Worker {
    fn run(&mut self) {
        let mut wanted = self.gate.pass();
        while wanted && !self.ending.is_decided() {
            let reason = self.run_once();
            self.counters.count(reason);
            if reason == Reason::Interrupted {
                wanted = self.gate.pass();
            }
        }
    }

    /// Runs the guest until the next exit and serves that.
    fn run_once(&mut self) -> Reason {
        let board = &self.board;
        match self.vcpu.run() {
            Ok(VcpuExit::MmioRead(address, data)) => Reason::read_of(board.read_memory(address, data)),
            Ok(VcpuExit::MmioWrite(address, data)) => Reason::write_of(board.write_memory(address, data)),
            Ok(VcpuExit::IoIn(port, data)) => Reason::read_of(board.read_port(port, data)),
            Ok(VcpuExit::IoOut(port, data)) => Reason::write_of(board.write_port(port, data)),
            Ok(VcpuExit::Shutdown) => {
                self.ending.end(Outcome::TripleFault { cpu: self.index });
                Reason::Other
            }
            Ok(VcpuExit::InternalError) => {
                let what = self.describe_internal_error();
                self.give_up(what)
            }
            Ok(VcpuExit::FailEntry(reason, _)) => {
                self.give_up(format!("entry to the guest failed, reason {reason:#x}"))
            }
            Ok(VcpuExit::SystemEvent(event, _)) => {
                let outcome = match event {
                    kvm_bindings::KVM_SYSTEM_EVENT_SHUTDOWN => Outcome::PoweredOff,
                    kvm_bindings::KVM_SYSTEM_EVENT_CRASH => Outcome::Panicked,
                    _ => Outcome::Reset,
                };
                self.ending.end(outcome);
                Reason::Other
            }
            Ok(VcpuExit::Hlt | VcpuExit::Intr | VcpuExit::IrqWindowOpen) => Reason::Other,
            Ok(VcpuExit::MemoryFault { gpa, .. }) => self.give_up(format!("a fault at guest address {gpa:#x}")),
            Ok(other) => {
                let what = format!("unexpected exit {other:?}");
                self.give_up(what)
            }
            Err(error) => match error.errno() {
                libc::EINTR => {
                    // Before the gate is looked at: whoever closes it sets the flag afterwards.
                    self.page.immediate_exit().store(0, Ordering::SeqCst);
                    Reason::Interrupted
                }
                // A processor that waits to be started has nothing to run yet.
                libc::EAGAIN => Reason::Interrupted,
                libc::EFAULT => {
                    self.give_up("guest memory cannot be accessed; was a mapped file truncated?".to_owned())
                }
                _ => self.give_up(error.to_string()),
            },
        }
    }

    fn give_up(&self, what: String) -> Reason {
        self.ending.end(Outcome::Kvm { cpu: self.index, what });
        Reason::Other
    }

    fn describe_internal_error(&mut self) -> String {
        let rip = self.vcpu.get_regs().map_or(0, |regs| regs.rip);
        // SAFETY: KVM fills this member of the union when it exits with an internal error, which it did.
        let internal = unsafe { self.vcpu.get_kvm_run().__bindgen_anon_1.internal };
        match internal.suberror {
            SUBERROR_EMULATION => format!("it cannot emulate the instruction at {rip:#x}"),
            other => format!("internal error {other} at {rip:#x}"),
        }
    }
}
