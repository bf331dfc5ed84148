//! Builds a VM from its settings.

use std::sync::Arc;
use std::thread;

use hull_vmm_api::config::NetBackend;
use hull_vmm_api::exit::ExitCode;
use kvm_ioctls::Kvm;

use super::machine::{Machine, MachineError, Size};
use crate::arch::cpuid::CpuTopology;
use crate::arch::{acpi, boot, cpuid, layout, registers};
use crate::board::Board;
use crate::config::{DiskSettings, NetSettings, Settings, ShareSettings, VsockSettings};
use crate::event_loop::EventLoop;
use crate::kvm::{Interrupts, KvmError, Vm};
use crate::legacy::power::Power;
use crate::legacy::pvpanic::PvPanic;
use crate::legacy::serial::Serial;
use crate::loader::{self, LoadError};
use crate::log;
use crate::memory::{self, MemoryError};
use crate::outcome::{Ending, Outcome};
use crate::pci::root::PciRoot;
use crate::vcpu::{VcpuError, Vcpus};
use crate::virtio::balloon::Balloon;
use crate::virtio::block::Block;
use crate::virtio::console::Console;
use crate::virtio::device::VirtioDevice;
use crate::virtio::fs::Fs;
use crate::virtio::net::Net;
use crate::virtio::pmem::Pmem;
use crate::virtio::rng::Rng;
use crate::virtio::vsock::Vsock;

/// Stack of the thread that serves devices; only what is touched costs memory.
const DEVICE_STACK_BYTES: usize = 128 * 1024;

/// Why a VM could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Kernel or initrd.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// Boot parameters.
    #[error(transparent)]
    Boot(#[from] boot::BootError),
    /// ACPI tables.
    #[error(transparent)]
    Acpi(#[from] acpi::AcpiError),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// CPUID of a vCPU.
    #[error("cannot make up a vCPU's CPUID: {0}")]
    Cpuid(vmm_sys_util::fam::Error),
    /// State of a vCPU.
    #[error(transparent)]
    Registers(#[from] registers::RegisterError),
    /// Thread of a vCPU.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// A device.
    #[error(transparent)]
    Device(#[from] MachineError),
    /// A descriptor or thread of the VMM's own.
    #[error("cannot {step}: {source}")]
    Host {
        /// What failed, as an infinitive.
        step: &'static str,
        /// Why.
        source: std::io::Error,
    },
}

impl BuildError {
    /// The process's exit status for it.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Kvm(_) => ExitCode::NoKvm,
            Self::Load(_) => ExitCode::BadKernel,
            Self::Boot(_) => ExitCode::BadConfig,
            _ => ExitCode::Failed,
        }
    }
}

fn host(step: &'static str) -> impl Fn(std::io::Error) -> BuildError {
    move |source| BuildError::Host { step, source }
}

/// Builds the VM; its vCPUs wait for [`Machine::resume`].
///
/// # Errors
///
/// When any step fails; nothing is left then.
pub fn build(settings: Settings, kvm: &Kvm) -> Result<Machine, BuildError> {
    let ending = Arc::new(Ending::new().map_err(host("create an event descriptor"))?);
    let ram = layout::ram(settings.memory_mib << 20);
    let files: Vec<_> = settings.pmems.iter().map(|pmem| &pmem.file).collect();
    let (memory, pmem) = memory::allocate_with_pmem(settings.memory_mib << 20, &files)?;
    let interrupts = if settings.debug_console.is_some() { Interrupts::MessagesAndLines } else { Interrupts::Messages };
    let cpus = settings.cpus.max;
    let vm = Vm::new(kvm, memory.clone(), &pmem, interrupts, cpus)?;

    let kernel = loader::load_kernel(&memory, &settings.kernel)?;
    let initrd = settings.initrd.as_ref().map(|file| loader::load_initrd(&memory, file, &kernel)).transpose()?;
    let machine = acpi::Machine { cpus, io_apic: interrupts == Interrupts::MessagesAndLines };
    let rsdp = acpi::write_tables(&memory, machine)?;
    boot::write_boot_structures(&memory, &ram, &settings.cmdline, initrd.as_ref(), rsdp)?;

    let serial = match settings.debug_console {
        Some(output) => Some(Serial::new(output, vm.interrupt_line(layout::IRQ_SERIAL)?)),
        None => None,
    };
    let board = Arc::new(Board {
        pci: PciRoot::default(),
        power: Power::new(ending.clone()),
        panic: PvPanic::new(ending.clone()),
        serial,
    });
    let event_loop = EventLoop::new().map_err(host("create an event loop"))?;
    let size = Size { memory_mib: settings.memory_mib, cpus: settings.cpus.boot };
    let mut machine = Machine::new(vm, board, Vcpus::new()?, event_loop.clone(), ending, size);
    plug_devices(&mut machine, settings.console, settings.vsock)?;
    for (settings, range) in settings.pmems.into_iter().zip(pmem) {
        machine.plug(&settings.id, Box::new(Pmem::new(event_loop.clone(), range)))?;
    }
    for settings in settings.disks {
        machine.plug(&settings.id.clone(), disk(settings, size.cpus)?)?;
    }
    for settings in settings.shares {
        machine.plug(&settings.id.clone(), share(settings)?)?;
    }
    for settings in settings.nets {
        machine.plug(&settings.id.clone(), net(settings)?)?;
    }
    add_vcpus(&mut machine, cpus, kernel.entry)?;
    spawn_event_loop(&machine, event_loop)?;
    Ok(machine)
}

/// The devices that a VM has at most one of, in the order in which the guest meets them.
fn plug_devices(
    machine: &mut Machine,
    console: Option<(std::fs::File, Option<std::fs::File>)>,
    vsock: Option<VsockSettings>,
) -> Result<(), BuildError> {
    let event_loop = machine.event_loop().clone();
    if let Some((output, input)) = console {
        machine.plug("console", Box::new(Console::new(event_loop.clone(), output, input)))?;
    }
    machine.plug("rng", Box::new(Rng::new(event_loop.clone())))?;
    machine.plug("balloon", Box::new(Balloon::new(event_loop.clone())))?;
    if let Some(settings) = vsock {
        let vsock = Vsock::new(event_loop, settings).map_err(|source| MachineError::Device {
            id: "vsock".to_owned(),
            why: format!("cannot use the listening socket: {source}"),
        })?;
        machine.plug("vsock", Box::new(vsock))?;
    }
    Ok(())
}

/// Makes a disk for a guest with this many CPUs.
pub(super) fn disk(disk: DiskSettings, cpus: u8) -> Result<Box<dyn VirtioDevice>, MachineError> {
    let DiskSettings { id, file, read_only, serial } = disk;
    match Block::new(&id, file, read_only, serial.as_deref()) {
        Ok(block) => Ok(Box::new(block.with_queues(cpus))),
        Err(error) => Err(MachineError::Device { id, why: error.to_string() }),
    }
}

/// Makes a share.
pub(super) fn share(share: ShareSettings) -> Result<Box<dyn VirtioDevice>, MachineError> {
    let ShareSettings { id, root, tag, read_only, cache, private } = share;
    match Fs::new(&id, root, &tag, read_only, cache) {
        Ok(fs) => Ok(Box::new(fs.with_private(private))),
        Err(error) => Err(MachineError::Device { id, why: error.to_string() }),
    }
}

/// Makes a network interface.
pub(super) fn net(net: NetSettings) -> Result<Box<dyn VirtioDevice>, MachineError> {
    let NetSettings { id, backend, mut queues, mac, mtu, link_down } = net;
    let made = match (backend, queues.pop()) {
        // The configuration has exactly one.
        (NetBackend::Stream, Some(socket)) => Net::over_stream(&id, socket, mac.bytes(), mtu),
        (_, last) => Net::new(&id, queues.into_iter().chain(last).collect(), mac.bytes(), mtu),
    };
    let mut net = made.map_err(|error| MachineError::Device { id, why: error.to_string() })?;
    net.set_link(!link_down);
    Ok(Box::new(net))
}

fn add_vcpus(machine: &mut Machine, count: u8, entry: u64) -> Result<(), BuildError> {
    let mut tsc_khz = 0;
    for index in 0..count {
        let vcpu = machine.vm().create_vcpu(index)?;
        if index == 0 {
            // A host that does not know its TSC frequency leaves the guest to find it out.
            tsc_khz = vcpu.get_tsc_khz().unwrap_or(0);
        }
        let topology = CpuTopology { index, count, tsc_khz };
        let cpuid = cpuid::adapt(machine.vm().supported_cpuid(), topology).map_err(BuildError::Cpuid)?;
        vcpu.set_cpuid2(&cpuid).map_err(|source| registers::RegisterError { what: "CPUID", source })?;
        registers::set_up(&vcpu, (index == 0).then_some(entry))?;
        let (board, ending) = (machine.board().clone(), machine.ending().clone());
        machine.vcpus_mut().add(vcpu, board, ending)?;
    }
    Ok(())
}

fn spawn_event_loop(machine: &Machine, event_loop: Arc<EventLoop>) -> Result<(), BuildError> {
    let ending = machine.ending().clone();
    thread::Builder::new()
        .name("devices".to_owned())
        .stack_size(DEVICE_STACK_BYTES)
        .spawn(move || {
            if let Err(error) = event_loop.run() {
                log::warn(format_args!("the device thread failed: {error}"));
                ending.end(Outcome::Failed(format!("the device thread failed: {error}")));
            }
        })
        .map_err(host("start the device thread"))?;
    Ok(())
}
