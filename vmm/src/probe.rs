//! What this host's kernel offers a VMM, found out by trying.
//!
//! Whether KVM runs guests on the processor cannot be read anywhere: a virtual machine may have a `/dev/kvm` that takes every
//! ioctl and interprets each guest instruction. So a tiny guest counts in a loop for a moment, and how far it came tells.

use std::fmt;
use std::time::{Duration, Instant};

use kvm_ioctls::Kvm;
use serde::Serialize;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

/// How long the guest may count.
const PATIENCE: Duration = Duration::from_millis(45);
/// How far the guest counts, two instructions at a time, before it halts.
const ROUNDS: u32 = 2_000_000;
/// Instructions that no interpreter gets done in that time (they do about 2 million a second), and any processor does, even one that is
/// itself software (the lab) and shared with others.
const LEAST_INSTRUCTIONS: u64 = 500_000;
/// Where the guest's one page of code is.
const CODE: GuestAddress = GuestAddress(0x1000);
const INSTRUCTIONS_A_ROUND: u64 = 2;

/// In 16-bit mode: `mov ecx, ROUNDS; again: dec ecx; jnz again; hlt`.
fn code() -> [u8; 11] {
    let [a, b, c, d] = ROUNDS.to_le_bytes();
    [0x66, 0xb9, a, b, c, d, 0x66, 0x49, 0x75, 0xfc, 0xf4]
}

/// What was found.
#[derive(Clone, Debug, Serialize)]
pub struct Probe {
    /// Whether KVM can be used.
    pub kvm: KvmKind,
    /// The same in words, with figures.
    pub detail: String,
    /// Whether an io_uring can be made.
    pub io_uring: bool,
}

/// What kind of KVM there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum KvmKind {
    /// Guests run on the processor.
    Hardware,
    /// Guests are interpreted.
    Emulated,
    /// There is none, or it may not be used.
    Missing,
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A structure of plain fields always serializes.
        f.write_str(&serde_json::to_string(self).unwrap_or_default())
    }
}

/// Tries everything; takes a few hundredths of a second.
#[must_use]
pub fn probe() -> Probe {
    let (kvm, detail) = match count() {
        Ok((done, time)) => {
            let speed = done / u64::try_from(time.as_micros()).unwrap_or(u64::MAX).max(1);
            if done >= LEAST_INSTRUCTIONS {
                (KvmKind::Hardware, format!("/dev/kvm runs {speed} million instructions/s"))
            } else {
                (KvmKind::Emulated, format!("/dev/kvm only emulates, {speed} million instructions/s"))
            }
        }
        Err(error) => (KvmKind::Missing, format!("/dev/kvm cannot be used: {error}")),
    };
    Probe { kvm, detail, io_uring: io_uring::IoUring::new(2).is_ok() }
}

/// Runs the counting guest; returns how many instructions it got done, in what time.
fn count() -> std::io::Result<(u64, Duration)> {
    extern "C" fn interrupt(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    register_signal_handler(SIGRTMIN(), interrupt).map_err(std::io::Error::from)?;

    let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(CODE, 0x1000)]).map_err(std::io::Error::other)?;
    memory.write_slice(&code(), CODE).map_err(std::io::Error::other)?;
    let vm = Kvm::new()?.create_vm()?;
    let region = kvm_bindings::kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: CODE.0,
        memory_size: 0x1000,
        userspace_addr: memory.get_host_address(CODE).map_err(std::io::Error::other)? as u64,
    };
    // SAFETY: the range is the whole of `memory`, which outlives `vm` and the vCPU's thread, joined below.
    unsafe { vm.set_user_memory_region(region)? };
    let mut vcpu = vm.create_vcpu(0)?;
    let mut sregs = vcpu.get_sregs()?;
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    // Until the guest has loaded the count, nothing is done.
    (regs.rip, regs.rcx, regs.rflags) = (CODE.0, u64::from(ROUNDS), 2);
    vcpu.set_regs(&regs)?;

    let started = Instant::now();
    let counter = std::thread::spawn(move || {
        // Returns when the guest halts, at a signal, or where an interpreter gives up: the count tells.
        let _ = vcpu.run();
        let time = started.elapsed();
        vcpu.get_regs().map(|regs| (regs.rcx, time))
    });
    while !counter.is_finished() {
        std::thread::sleep(Duration::from_millis(1));
        if started.elapsed() > PATIENCE {
            // Again and again, since a signal that comes just before KVM_RUN is lost.
            counter.kill(SIGRTMIN()).map_err(std::io::Error::from)?;
        }
    }
    let (left, time) = counter.join().map_err(|_| std::io::Error::other("the counting thread panicked"))??;
    let rounds = u64::from(ROUNDS).saturating_sub(left);
    Ok((rounds * INSTRUCTIONS_A_ROUND, time))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_with_kvm_is_never_called_one_without() {
        if std::fs::File::options().read(true).write(true).open("/dev/kvm").is_err() {
            eprintln!("skipped: no /dev/kvm");
            return;
        }
        let probe = probe();
        assert_ne!(probe.kvm, KvmKind::Missing, "{}", probe.detail);
    }

    #[test]
    fn the_answer_is_json() {
        let probe = Probe { kvm: KvmKind::Emulated, detail: "a \"b\"".into(), io_uring: true };
        assert_eq!(probe.to_string(), r#"{"kvm":"emulated","detail":"a \"b\"","io_uring":true}"#);
    }
}
