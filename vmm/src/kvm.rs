//! The VM as KVM has it: memory slots, interrupt routes, notification addresses, virtual CPUs.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::FromRawFd;
use std::os::fd::{IntoRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_CAP_SPLIT_IRQCHIP, KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC,
    KVM_MAX_CPUID_ENTRIES, KVM_MEM_READONLY, KvmIrqRouting, kvm_enable_cap, kvm_irq_routing_entry,
    kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_irqchip, kvm_irq_routing_msi, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VcpuFd, VmFd};
use vm_memory::{GuestMemory as _, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::arch::layout;
use crate::pci::msix::{MsiMessage, MsiPort};
use crate::pci::platform::Platform;
use crate::virtio::device::GuestMemory;

/// What Hull cannot do without, and what to call it. All of it is in every KVM since Linux 4.13.
const REQUIRED: [(Cap, &str); 10] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::ReadonlyMem, "KVM_CAP_READONLY_MEM"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::TscDeadlineTimer, "KVM_CAP_TSC_DEADLINE_TIMER"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// Why KVM could not be used.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// The device node cannot be opened.
    #[error("cannot open /dev/kvm: {0}; {hint}", hint = open_hint(.0))]
    Open(io::Error),
    /// Another interface version than the one that has been stable since 2007.
    #[error("this is not KVM, or one with interface version {0} where {KVM_API_VERSION} is needed")]
    Version(i32),
    /// An old or foreign KVM.
    #[error("the host's KVM lacks {0}; Linux 4.13 or newer has it")]
    Capability(&'static str),
    /// More vCPUs than the host lets a VM have.
    #[error("the host's KVM runs at most {limit} vCPUs in a VM; {wanted} were asked for")]
    TooManyCpus {
        /// What the configuration wants.
        wanted: u8,
        /// What there is.
        limit: usize,
    },
    /// A step of making the VM failed.
    #[error("cannot {step}: {source}")]
    Setup {
        /// What failed, as an infinitive.
        step: &'static str,
        /// KVM's answer.
        source: kvm_ioctls::Error,
    },
}

fn open_hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => "load the module kvm_amd or kvm_intel, and enable virtualization in the firmware",
        io::ErrorKind::PermissionDenied => "add the user to the group that owns it, usually \"kvm\"",
        _ => "is virtualization enabled in the firmware?",
    }
}

fn setup(step: &'static str) -> impl Fn(kvm_ioctls::Error) -> KvmError {
    move |source| KvmError::Setup { step, source }
}

/// Opens `/dev/kvm`, or takes over a descriptor of it.
///
/// # Errors
///
/// When it is missing, may not be used, or lacks what Hull needs.
pub fn open(inherited: Option<OwnedFd>) -> Result<Kvm, KvmError> {
    let file = match inherited {
        Some(fd) => File::from(fd),
        None => File::options().read(true).write(true).open("/dev/kvm").map_err(KvmError::Open)?,
    };
    // SAFETY: the descriptor is owned and given away here; that it is KVM's is checked next.
    let kvm = unsafe { Kvm::from_raw_fd(file.into_raw_fd()) };
    match kvm.get_api_version() {
        version if version == KVM_API_VERSION as i32 => {}
        version => return Err(KvmError::Version(version)),
    }
    match REQUIRED.iter().find(|(capability, _)| !kvm.check_extension(*capability)) {
        Some((_, name)) => Err(KvmError::Capability(name)),
        None => Ok(kvm),
    }
}

/// How the VM's interrupts are delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interrupts {
    /// Local APICs in the kernel and nothing else: all interrupts are message-signalled.
    Messages,
    /// The kernel's I/O APIC (and the 8259 that comes with it) as well, for devices with an interrupt line.
    MessagesAndLines,
}

/// A VM. Any thread may use it.
pub struct Vm {
    fd: VmFd,
    supported_cpuid: CpuId,
    memory: GuestMemory,
    interrupts: Interrupts,
    routes: Mutex<Routes>,
}

/// The routing table of the kernel, which is only ever replaced whole.
#[derive(Default)]
struct Routes {
    /// By `gsi - IO_APIC_PINS`.
    messages: Vec<Slot>,
}

#[derive(Clone, Copy)]
enum Slot {
    Free,
    Taken(Option<MsiMessage>),
}

impl Vm {
    /// Makes a VM with guest memory in place, of which the guest may only read the regions in `read_only`.
    ///
    /// # Errors
    ///
    /// When KVM refuses a step.
    pub fn new(
        kvm: &Kvm,
        memory: GuestMemory,
        read_only: &[Range<u64>],
        interrupts: Interrupts,
        cpus: u8,
    ) -> Result<Arc<Self>, KvmError> {
        let limit = kvm.get_max_vcpus();
        if usize::from(cpus) > limit {
            return Err(KvmError::TooManyCpus { wanted: cpus, limit });
        }
        let supported_cpuid =
            kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(setup("read KVM's CPUID leaves"))?;
        let fd = loop {
            match kvm.create_vm() {
                // A signal that came meanwhile; KVM does not restart the call.
                Err(error) if error.errno() == libc::EINTR => {}
                result => break result.map_err(setup("create a VM"))?,
            }
        };
        let vm = Self { fd, supported_cpuid, memory, interrupts, routes: Mutex::default() };
        vm.map_memory(read_only)?;
        vm.fd.set_identity_map_address(layout::KVM_IDENTITY_MAP).map_err(setup("place KVM's identity map"))?;
        // The address is below 4 GiB.
        vm.fd.set_tss_address(layout::KVM_TSS as usize).map_err(setup("place KVM's task state segment"))?;
        vm.create_interrupt_controllers()?;
        Ok(Arc::new(vm))
    }

    fn map_memory(&self, read_only: &[Range<u64>]) -> Result<(), KvmError> {
        for (slot, region) in (0..).zip(self.memory.iter()) {
            let is_read_only = read_only.iter().any(|range| range.contains(&region.start_addr().0));
            let region = kvm_userspace_memory_region {
                slot,
                flags: if is_read_only { KVM_MEM_READONLY } else { 0 },
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the region is a mapping of that size, and `self.memory` keeps it as long as the VM exists.
            unsafe { self.fd.set_user_memory_region(region) }.map_err(setup("give guest memory to KVM"))?;
        }
        Ok(())
    }

    fn create_interrupt_controllers(&self) -> Result<(), KvmError> {
        match self.interrupts {
            Interrupts::Messages => {
                let mut capability = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
                capability.args[0] = u64::from(layout::IO_APIC_PINS);
                self.fd.enable_cap(&capability).map_err(setup("create the local APICs"))
            }
            Interrupts::MessagesAndLines => {
                self.fd.create_irq_chip().map_err(setup("create the interrupt controllers"))
            }
        }
    }

    /// What CPUID can be made to say (`KVM_GET_SUPPORTED_CPUID`).
    #[must_use]
    pub fn supported_cpuid(&self) -> &CpuId {
        &self.supported_cpuid
    }

    /// Guest memory.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Makes a virtual CPU; number 0 is the boot processor.
    ///
    /// # Errors
    ///
    /// When KVM refuses.
    pub fn create_vcpu(&self, index: u8) -> Result<VcpuFd, KvmError> {
        self.fd.create_vcpu(u64::from(index)).map_err(setup("create a virtual CPU"))
    }

    /// An event that raises an interrupt line of the I/O APIC.
    ///
    /// # Errors
    ///
    /// When KVM refuses.
    pub fn interrupt_line(&self, line: u32) -> Result<Arc<EventFd>, KvmError> {
        let step = "connect an interrupt line";
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
            .map_err(|error| setup(step)(kvm_ioctls::Error::new(error.raw_os_error().unwrap_or(libc::EIO))))?;
        self.fd.register_irqfd(&event, line).map_err(setup(step))?;
        Ok(Arc::new(event))
    }

    fn with_routes<T>(&self, change: impl FnOnce(&mut Routes) -> T) -> T {
        change(&mut self.routes.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn install(&self, routes: &Routes) -> Result<(), kvm_ioctls::Error> {
        let mut entries = Vec::with_capacity(routes.messages.len() + layout::IO_APIC_PINS as usize);
        if self.interrupts == Interrupts::MessagesAndLines {
            entries.extend((0..layout::IO_APIC_PINS).map(line_route));
        }
        for (gsi, slot) in (layout::IO_APIC_PINS..).zip(&routes.messages) {
            if let Slot::Taken(Some(message)) = slot {
                entries.push(message_route(gsi, *message));
            }
        }
        let table = KvmIrqRouting::from_entries(&entries).map_err(|_| kvm_ioctls::Error::new(libc::ENOSPC))?;
        self.fd.set_gsi_routing(&table)
    }
}

fn line_route(pin: u32) -> kvm_irq_routing_entry {
    kvm_irq_routing_entry {
        gsi: pin,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            irqchip: kvm_irq_routing_irqchip { irqchip: KVM_IRQCHIP_IOAPIC, pin },
        },
        ..Default::default()
    }
}

fn message_route(gsi: u32, message: MsiMessage) -> kvm_irq_routing_entry {
    let mut msi = kvm_irq_routing_msi { data: message.data, ..Default::default() };
    // Takes the address apart.
    msi.address_lo = message.address as u32;
    msi.address_hi = (message.address >> 32) as u32;
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 { msi },
        ..Default::default()
    }
}

/// One message-signalled interrupt: a route in the kernel and the event that takes it.
struct IrqFd {
    vm: Arc<Vm>,
    gsi: u32,
    event: EventFd,
    /// Whether the event was given to KVM, which happens with the first route.
    registered: Mutex<bool>,
}

impl MsiPort for IrqFd {
    fn connect(&self, message: MsiMessage) -> io::Result<()> {
        let index = (self.gsi - layout::IO_APIC_PINS) as usize;
        self.vm.with_routes(|routes| {
            routes.messages[index] = Slot::Taken(Some(message));
            self.vm.install(routes)
        })?;
        let mut registered = self.registered.lock().unwrap_or_else(PoisonError::into_inner);
        if !*registered {
            self.vm.fd.register_irqfd(&self.event, self.gsi)?;
            *registered = true;
        }
        Ok(())
    }

    fn fire(&self) {
        // Only a full counter could fail, and KVM empties it.
        let _ = self.event.write(1);
    }
}

impl Drop for IrqFd {
    fn drop(&mut self) {
        let _ = self.vm.fd.unregister_irqfd(&self.event, self.gsi);
        let index = (self.gsi - layout::IO_APIC_PINS) as usize;
        // The route goes with the next change of the table; without its event it has no effect.
        self.vm.with_routes(|routes| routes.messages[index] = Slot::Free);
    }
}

impl Platform for Arc<Vm> {
    fn msi_port(&self) -> io::Result<Box<dyn MsiPort>> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let index = self.with_routes(|routes| {
            let free = routes.messages.iter().position(|slot| matches!(slot, Slot::Free));
            let index = free.unwrap_or(routes.messages.len());
            routes.messages.resize(routes.messages.len().max(index + 1), Slot::Free);
            routes.messages[index] = Slot::Taken(None);
            index
        });
        let gsi = layout::IO_APIC_PINS + u32::try_from(index).map_err(io::Error::other)?;
        Ok(Box::new(IrqFd { vm: self.clone(), gsi, event, registered: Mutex::new(false) }))
    }

    fn attach_notification(&self, address: u64, event: &EventFd) -> io::Result<()> {
        // Without a length and a value to match, KVM need not decode the instruction that writes.
        Ok(self.fd.register_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)?)
    }

    fn detach_notification(&self, address: u64, event: &EventFd) {
        let _ = self.fd.unregister_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch);
    }
}
