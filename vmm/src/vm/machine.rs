//! The VM, and what can be done to it while it lives.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hull_vmm_api::config::{DiskConfig, NetConfig, ShareConfig};
use hull_vmm_api::control::{Counters, Device, State, Status};

use crate::arch::layout;
use crate::board::Board;
use crate::config::{ConfigError, Opener, RESERVED_IDS};
use crate::event_loop::EventLoop;
use crate::kvm::Vm;
use crate::memory;
use crate::outcome::Ending;
use crate::pci::root::Address;
use crate::vcpu::Vcpus;
use crate::virtio::device::{ResizeError, VirtioDevice};
use crate::virtio::pci::function::VirtioPci;

/// Why something could not be done to a VM. Nothing has changed then.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The device's configuration is not acceptable.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// There is a device of that name.
    #[error("there is a device named \"{0}\" already")]
    NameTaken(String),
    /// There is no device of that name.
    #[error("there is no device named \"{0}\"")]
    NoSuchDevice(String),
    /// A device that every VM keeps.
    #[error("the device \"{0}\" cannot be removed")]
    NotRemovable(String),
    /// A disk that does not take over its new size.
    #[error("the disk \"{id}\" keeps its size: {source}")]
    Resize {
        /// Its name.
        id: String,
        /// Why.
        source: ResizeError,
    },
    /// It has no link that could be up or down.
    #[error("\"{0}\" is no network interface; name one")]
    NoInterface(String),
    /// All places on the bus are taken.
    #[error("the PCI bus is full; remove a device first")]
    BusFull,
    /// The device cannot be made.
    #[error("cannot make the device \"{id}\": {why}")]
    Device {
        /// Its name.
        id: String,
        /// What failed.
        why: String,
    },
}

/// One device of the VM.
struct Entry {
    id: String,
    function: Arc<Mutex<VirtioPci>>,
}

impl Entry {
    fn lock(&self) -> MutexGuard<'_, VirtioPci> {
        self.function.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A VM that was built. The main thread's.
pub struct Machine {
    vm: Arc<Vm>,
    board: Arc<Board>,
    vcpus: Vcpus,
    event_loop: Arc<EventLoop>,
    /// In the order of their places on the bus.
    devices: Vec<Entry>,
    /// Those that were removed before their drivers had let go of them, and stay on the bus until then.
    leaving: Vec<Entry>,
    ending: Arc<Ending>,
    state: State,
    size: Size,
}

/// What of the machine's size its devices go by.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// CPUs that the guest starts with.
    pub cpus: u8,
}

impl Machine {
    /// A machine without devices and vCPUs, paused.
    #[must_use]
    pub fn new(
        vm: Arc<Vm>,
        board: Arc<Board>,
        vcpus: Vcpus,
        event_loop: Arc<EventLoop>,
        ending: Arc<Ending>,
        size: Size,
    ) -> Self {
        Self {
            vm,
            board,
            vcpus,
            event_loop,
            devices: Vec::new(),
            leaving: Vec::new(),
            ending,
            state: State::Paused,
            size,
        }
    }

    /// How and when the VM ends.
    #[must_use]
    pub fn ending(&self) -> &Arc<Ending> {
        &self.ending
    }

    /// The loop that serves devices without a thread of their own.
    #[must_use]
    pub fn event_loop(&self) -> &Arc<EventLoop> {
        &self.event_loop
    }

    /// The vCPUs, to add the next.
    pub fn vcpus_mut(&mut self) -> &mut Vcpus {
        &mut self.vcpus
    }

    /// The VM in KVM.
    #[must_use]
    pub fn vm(&self) -> &Arc<Vm> {
        &self.vm
    }

    /// The board.
    #[must_use]
    pub fn board(&self) -> &Arc<Board> {
        &self.board
    }

    /// Puts a device at the next free place of the bus.
    ///
    /// # Errors
    ///
    /// When there is none, or the process may open no more descriptors.
    pub fn plug(&mut self, id: &str, device: Box<dyn VirtioDevice>) -> Result<Address, MachineError> {
        self.clear_places();
        let address = self.board.pci.free_address().ok_or(MachineError::BusFull)?;
        let platform = Arc::new(self.vm.clone());
        let function = VirtioPci::new(id, address, device, platform, self.vm.memory().clone())
            .map_err(|error| MachineError::Device { id: id.to_owned(), why: error.to_string() })?;
        let function = Arc::new(Mutex::new(function));
        self.board.pci.insert(address, function.clone());
        let at = self.devices.partition_point(|entry| entry.lock().address() < address);
        self.devices.insert(at, Entry { id: id.to_owned(), function });
        Ok(address)
    }

    /// Adds a disk; the guest finds it when it rescans the bus.
    ///
    /// # Errors
    ///
    /// When it is not acceptable or there is no room for it.
    pub fn add_disk(&mut self, disk: DiskConfig, opener: &mut Opener) -> Result<Address, MachineError> {
        self.check_name(&disk.id)?;
        let disk = opener.disk("disk", disk)?;
        let id = disk.id.clone();
        self.plug(&id, super::build::disk(disk, self.size.cpus)?)
    }

    /// Adds a share; the guest finds it when it rescans the bus.
    ///
    /// # Errors
    ///
    /// When it is not acceptable or there is no room for it.
    pub fn add_share(&mut self, share: ShareConfig, opener: &mut Opener) -> Result<Address, MachineError> {
        self.check_name(&share.id)?;
        let share = opener.share("share", share)?;
        let id = share.id.clone();
        self.plug(&id, super::build::share(share)?)
    }

    /// Adds a network interface; the guest finds it when it rescans the bus.
    ///
    /// # Errors
    ///
    /// When it is not acceptable or there is no room for it.
    pub fn add_net(&mut self, net: NetConfig, opener: &mut Opener) -> Result<Address, MachineError> {
        self.check_name(&net.id)?;
        let net = opener.net("net", net)?;
        let id = net.id.clone();
        self.plug(&id, super::build::net(net)?)
    }

    /// Takes a disk, share or network interface off the bus. A disk that its driver has not let go of stays there until it has, without its
    /// file.
    ///
    /// # Errors
    ///
    /// When there is none of that name.
    pub fn remove_device(&mut self, id: &str) -> Result<(), MachineError> {
        if RESERVED_IDS.contains(&id) {
            return Err(MachineError::NotRemovable(id.to_owned()));
        }
        let Some(at) = self.devices.iter().position(|entry| entry.id == id) else {
            return Err(MachineError::NoSuchDevice(id.to_owned()));
        };
        self.clear_places();
        let entry = self.devices.remove(at);
        if entry.lock().give_up() {
            // Without it the driver would wait for ever: for what it has asked for, and for its reset to be done.
            self.leaving.push(entry);
            return Ok(());
        }
        let address = entry.lock().address();
        self.board.pci.remove(address);
        // A vCPU may hold the function a moment longer; the device stops now.
        entry.lock().shut_down();
        Ok(())
    }

    /// Takes off the bus those that were removed and that their drivers have let go of by now: the guest looks at the bus again when
    /// something comes to it.
    fn clear_places(&mut self) {
        let board = &self.board;
        self.leaving.retain(|entry| {
            let (is_active, address) = {
                let function = entry.lock();
                (function.is_active(), function.address())
            };
            if !is_active {
                board.pci.remove(address);
            }
            is_active
        });
    }

    /// Has a disk take over the size that its file or device has now; returns it in bytes. The guest is told.
    ///
    /// # Errors
    ///
    /// When there is none of that name, it is no disk, or it would shrink.
    pub fn resize_disk(&mut self, id: &str) -> Result<u64, MachineError> {
        self.device(id)?.lock().resize().map_err(|source| MachineError::Resize { id: id.to_owned(), source })
    }

    /// Has the guest see an interface's link come up or go down.
    ///
    /// # Errors
    ///
    /// When there is no device of that name, or it is no interface.
    pub fn set_link(&mut self, id: &str, up: bool) -> Result<(), MachineError> {
        if self.device(id)?.lock().set_link(up) { Ok(()) } else { Err(MachineError::NoInterface(id.to_owned())) }
    }

    fn device(&self, id: &str) -> Result<&Entry, MachineError> {
        self.devices.iter().find(|entry| entry.id == id).ok_or_else(|| MachineError::NoSuchDevice(id.to_owned()))
    }

    fn check_name(&self, id: &str) -> Result<(), MachineError> {
        match self.devices.iter().any(|entry| entry.id == id) {
            true => Err(MachineError::NameTaken(id.to_owned())),
            false => Ok(()),
        }
    }

    /// Stops vCPUs and devices: guest memory does not change until [`resume`](Self::resume).
    pub fn pause(&mut self) {
        if self.state == State::Running {
            self.vcpus.pause();
            self.event_loop.pause();
            for entry in self.devices.iter().chain(&self.leaving) {
                entry.lock().pause();
            }
            self.state = State::Paused;
        }
    }

    /// Lets devices and vCPUs go on.
    pub fn resume(&mut self) {
        if self.state == State::Paused {
            for entry in self.devices.iter().chain(&self.leaving) {
                entry.lock().resume();
            }
            self.event_loop.resume();
            self.vcpus.resume();
            self.state = State::Running;
        }
    }

    /// The VM as it stands.
    #[must_use]
    pub fn status(&self) -> Status {
        let device = |entry: &Entry| {
            let function = entry.lock();
            Device {
                id: entry.id.clone(),
                kind: function.device().kind().name().to_owned(),
                pci_address: function.address().to_string(),
            }
        };
        Status {
            state: self.state,
            // At most `MAX_CPUS`.
            cpus: self.vcpus.count() as u8,
            memory_mib: self.size.memory_mib,
            devices: self.devices.iter().map(device).collect(),
        }
    }

    /// What the VM has done since it started.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let devices: BTreeMap<_, _> =
            self.devices.iter().map(|entry| (entry.id.clone(), entry.lock().device().completed())).collect();
        let details = self
            .devices
            .iter()
            .map(|entry| (entry.id.clone(), entry.lock().device().counters()))
            .filter(|(_, counters)| !counters.is_empty())
            .map(|(id, counters)| (id, counters.into_iter().map(|(name, count)| (name.to_owned(), count)).collect()))
            .collect();
        // The kernel has no reason to refuse the question; if it does, nothing is known.
        let guest_resident_bytes =
            memory::resident_bytes(self.vm.memory(), &layout::ram(self.size.memory_mib << 20)).unwrap_or(0);
        Counters { exits: self.vcpus.exits(), devices, details, guest_resident_bytes }
    }
}
