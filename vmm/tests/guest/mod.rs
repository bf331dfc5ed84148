//! A guest that does what a test tells it: a few instructions that carry out a list of steps, packed into an ELF file that
//! the VMM boots like a kernel.
//!
//! It needs nothing that a host without hardware virtualization could not emulate, so the tests run on any `/dev/kvm`.

use std::fs::File;
use std::io::Write;
use std::sync::Arc;

use hull_vmm::config::Settings;
use hull_vmm::outcome::Outcome;
use hull_vmm::vm::machine::Machine;
use hull_vmm::vm::{build, driver};
use hull_vmm_api::config::CpusConfig;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Where the guest is loaded.
pub(crate) const LOAD_ADDRESS: u64 = 0x100_0000;
/// The interrupt vector that the guest handles.
pub(crate) const VECTOR: u8 = 0x41;
/// Guest memory that tests may use for what they like.
pub(crate) const SCRATCH: u64 = 0x20_0000;
/// Where [`Step::Count`] counts.
pub(crate) const COUNTER: u64 = SCRATCH + 0xf000;

/// Where the guest makes its interrupt descriptor table and the register that points at it.
const IDT: u64 = 0x1_0000;
const IDT_POINTER: u64 = 0x1_1000;
/// A page directory for the fourth GiB, where devices are.
const DEVICE_DIRECTORY: u64 = 0x1_2000;
/// A page-directory-pointer table and a page directory for memory above 512 GiB.
const HIGH_POINTERS: u64 = 0x1_3000;
const HIGH_DIRECTORY: u64 = 0x1_4000;
const STACK_END: u64 = 0x1_8000;
/// Where the guest notes the address of the step behind the one that failed.
const FAILED_AT: u64 = 0x1_9000;

core::arch::global_asm!(
    ".pushsection .rodata",
    ".globl hull_guest_start, hull_guest_end, hull_guest_handler",
    "hull_guest_start:",
    "  mov esp, {stack}",
    "  lea rsi, [rip + hull_guest_end]",
    "2: mov rax, [rsi]",
    "  mov rdi, [rsi + 8]",
    "  mov rdx, [rsi + 16]",
    "  add rsi, 24",
    "  cmp al, 1",
    "  je 11f",
    "  cmp al, 2",
    "  je 12f",
    "  cmp al, 3",
    "  je 13f",
    "  cmp al, 4",
    "  je 14f",
    "  cmp al, 5",
    "  je 15f",
    "  cmp al, 6",
    "  je 16f",
    "  cmp al, 7",
    "  je 17f",
    "  cmp al, 8",
    "  je 18f",
    "  cmp al, 9",
    "  je 19f",
    "  cmp al, 10",
    "  je 20f",
    "  cmp al, 11",
    "  je 21f",
    "  cmp al, 12",
    "  je 22f",
    "  cmp al, 13",
    "  je 23f",
    // What comes behind the last step, or an expectation that is not met: ask for a reset.
    "9: mov edi, {failed_at}",
    "  mov [rdi], rsi",
    "  mov dx, 0x602",
    "  mov al, 1",
    "  out dx, al",
    "  hlt",
    "11: mov [rdi], dl",
    "  jmp 2b",
    "12: mov [rdi], dx",
    "  jmp 2b",
    "13: mov [rdi], edx",
    "  jmp 2b",
    "14: mov [rdi], rdx",
    "  jmp 2b",
    "15: mov al, [rdi]",
    "  cmp al, dl",
    "  jne 9b",
    "  jmp 2b",
    "16: mov ax, [rdi]",
    "  cmp ax, dx",
    "  jne 9b",
    "  jmp 2b",
    "17: mov eax, [rdi]",
    "  cmp eax, edx",
    "  jne 9b",
    "  jmp 2b",
    "18: mov al, dl",
    "  mov edx, edi",
    "  out dx, al",
    "  jmp 2b",
    "19: mov ecx, edx",
    "  mov edx, edi",
    "  in al, dx",
    "  cmp al, cl",
    "  jne 9b",
    "  jmp 2b",
    // Wait for the interrupt. The handler does not return but comes to 2b.
    "20: sti",
    "  hlt",
    "  jmp 20b",
    "21: lidt [rdi]",
    "  jmp 2b",
    "22: ud2",
    // Count until the end of time.
    "23: inc qword ptr [rdi]",
    "  jmp 23b",
    "hull_guest_handler:",
    "  mov esp, {stack}",
    "  mov eax, 0xfee000b0",
    "  mov dword ptr [rax], 0",
    "  jmp 2b",
    ".balign 8",
    "hull_guest_end:",
    ".popsection",
    stack = const STACK_END,
    failed_at = const FAILED_AT,
);

unsafe extern "C" {
    static hull_guest_start: u8;
    static hull_guest_end: u8;
    static hull_guest_handler: u8;
}

/// What the guest does.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Step {
    /// Writes memory or a register of a device.
    Write8(u64, u8),
    /// The same, 16 bits.
    Write16(u64, u16),
    /// The same, 32 bits.
    Write32(u64, u32),
    /// The same, 64 bits.
    Write64(u64, u64),
    /// Reads, and resets the VM if something else comes.
    Expect8(u64, u8),
    /// The same, 16 bits.
    Expect16(u64, u16),
    /// The same, 32 bits.
    Expect32(u64, u32),
    /// Writes a port.
    Out(u16, u8),
    /// Reads a port, and resets the VM if something else comes.
    In(u16, u8),
    /// Sleeps until interrupt [`VECTOR`] comes.
    WaitForInterrupt,
    /// Loads the interrupt descriptor table register.
    LoadIdt(u64),
    /// Does what no processor can.
    Undefined,
    /// Counts up a word of memory for ever.
    Count(u64),
}

impl Step {
    fn encode(self) -> [u64; 3] {
        match self {
            Self::Write8(at, value) => [1, at, value.into()],
            Self::Write16(at, value) => [2, at, value.into()],
            Self::Write32(at, value) => [3, at, value.into()],
            Self::Write64(at, value) => [4, at, value],
            Self::Expect8(at, value) => [5, at, value.into()],
            Self::Expect16(at, value) => [6, at, value.into()],
            Self::Expect32(at, value) => [7, at, value.into()],
            Self::Out(port, value) => [8, port.into(), value.into()],
            Self::In(port, value) => [9, port.into(), value.into()],
            Self::WaitForInterrupt => [10, 0, 0],
            Self::LoadIdt(at) => [11, at, 0],
            Self::Undefined => [12, 0, 0],
            Self::Count(at) => [13, at, 0],
        }
    }
}

/// The step that powers off: a test that comes to it has passed.
pub(crate) const POWER_OFF: Step = Step::Out(0x600, 5 << 2 | 1 << 5);

/// Maps the pages of 2 MiB that hold these addresses of the fourth GiB; the VMM's tables have only the first.
pub(crate) fn map_devices(addresses: &[u64]) -> Vec<Step> {
    const PAGE: u64 = 2 << 20;
    const GIB: u64 = 1 << 30;
    let mut steps: Vec<_> = addresses
        .iter()
        .map(|address| {
            let index = address % GIB / PAGE;
            Step::Write64(DEVICE_DIRECTORY + 8 * index, address & !(PAGE - 1) | 0x83)
        })
        .collect();
    // The page-directory-pointer table is where the VMM put it.
    steps.push(Step::Write64(0x5000 + 8 * 3, DEVICE_DIRECTORY | 3));
    steps
}

/// Maps the 2 MiB page that holds `address`, from 512 GiB on, which is where the table of the VMM ends.
pub(crate) fn map_high(address: u64) -> Vec<Step> {
    let index = |shift: u32| 8 * (address >> shift & 0x1ff);
    // The fourth-level table is where the VMM put it.
    vec![
        Step::Write64(0x4000 + index(39), HIGH_POINTERS | 3),
        Step::Write64(HIGH_POINTERS + index(30), HIGH_DIRECTORY | 3),
        Step::Write64(HIGH_DIRECTORY + index(21), address & !((2 << 20) - 1) | 0x83),
    ]
}

/// Handles interrupt [`VECTOR`], with the local APIC on.
pub(crate) fn handle_interrupts() -> Vec<Step> {
    // SAFETY: only the addresses of the symbols are taken; both are in one section.
    let offset = unsafe { (&raw const hull_guest_handler).offset_from(&raw const hull_guest_start) };
    let handler = LOAD_ADDRESS + offset as u64;
    let entry = IDT + 16 * u64::from(VECTOR);
    vec![
        // Interrupt gate, present, code selector 0x10.
        Step::Write64(entry, handler & 0xffff | 0x10 << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48),
        Step::Write64(entry + 8, handler >> 32),
        Step::Write16(IDT_POINTER, 0xfff),
        Step::Write64(IDT_POINTER + 2, IDT),
        Step::LoadIdt(IDT_POINTER),
        // Spurious interrupt vector register: APIC on.
        Step::Write32(0xfee0_00f0, 0x1ff),
    ]
}

/// The guest as an ELF executable.
fn kernel(steps: &[Step]) -> File {
    // SAFETY: the two symbols enclose the guest's instructions, which are never written.
    let code = unsafe {
        let start = &raw const hull_guest_start;
        std::slice::from_raw_parts(start, (&raw const hull_guest_end).offset_from(start) as usize)
    };
    let mut body = code.to_vec();
    for step in steps {
        body.extend(step.encode().into_iter().flat_map(u64::to_le_bytes));
    }
    body.extend([0; 8]);
    let mut elf = Vec::new();
    elf.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    elf.extend([2u16, 62].into_iter().flat_map(u16::to_le_bytes));
    elf.extend(1u32.to_le_bytes());
    elf.extend([LOAD_ADDRESS, 64, 0].into_iter().flat_map(u64::to_le_bytes));
    elf.extend(0u32.to_le_bytes());
    elf.extend([64u16, 56, 1, 0, 0, 0].into_iter().flat_map(u16::to_le_bytes));
    elf.extend([1u32, 7].into_iter().flat_map(u32::to_le_bytes));
    let len = body.len() as u64;
    elf.extend([0x1000, LOAD_ADDRESS, LOAD_ADDRESS, len, len, 0x1000].into_iter().flat_map(u64::to_le_bytes));
    elf.resize(0x1000, 0);
    elf.extend(body);
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&elf).unwrap();
    file
}

/// Settings of a VM with one processor that carries out `steps`, and no devices but rng at 00:01.0 and the balloon at
/// 00:02.0.
pub(crate) fn settings(steps: &[Step]) -> Settings {
    Settings {
        cpus: CpusConfig { boot: 1, max: 1 },
        memory_mib: 64,
        kernel: kernel(steps),
        initrd: None,
        cmdline: String::new(),
        console: None,
        debug_console: None,
        vsock: None,
        disks: Vec::new(),
        nets: Vec::new(),
        pmems: Vec::new(),
        shares: Vec::new(),
    }
}

/// The index of the step whose expectation was not met, for messages.
pub(crate) fn failed_step(memory: &GuestMemoryMmap) -> u64 {
    // SAFETY: only the addresses of the symbols are taken; both are in one section.
    let code = unsafe { (&raw const hull_guest_end).offset_from(&raw const hull_guest_start) };
    let behind: u64 = memory.read_obj(GuestAddress(FAILED_AT)).unwrap();
    (behind.wrapping_sub(LOAD_ADDRESS + code as u64) / 24).wrapping_sub(1)
}

/// Builds a VM, unless this machine has no KVM: then says so and returns `None`.
pub(crate) fn machine(settings: Settings) -> Option<Machine> {
    match hull_vmm::kvm::open(None) {
        Ok(kvm) => Some(build::build(settings, &kvm).unwrap_or_else(|error| panic!("{error}"))),
        Err(hull_vmm::kvm::KvmError::Open(error)) => {
            eprintln!("skipped: /dev/kvm: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Runs a VM to its end, on which a test may wait for a minute at most.
pub(crate) fn run(mut machine: Machine) -> Outcome {
    let signals = driver::block_signals().unwrap();
    let ending = machine.ending().clone();
    let (done, watch) = std::sync::mpsc::channel::<()>();
    let watchdog = {
        let ending = Arc::clone(&ending);
        std::thread::spawn(move || {
            if watch.recv_timeout(std::time::Duration::from_secs(60)) == Err(std::sync::mpsc::RecvTimeoutError::Timeout)
            {
                ending.end(Outcome::Failed("the guest did not come to an end".to_owned()));
            }
        })
    };
    let outcome = driver::run(&mut machine, &signals, driver::Tethers::default()).unwrap();
    drop(done);
    watchdog.join().unwrap();
    outcome
}
