//! A virtio device as a PCI function: owns the device and carries out what its driver asks for.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::capabilities::{self, WindowCapability};
use super::common::{Common, Effect, feature};
use super::signals::Signals;
use crate::pci::config_space::{ConfigSpace, Identity};
use crate::pci::msix::{self, Msix};
use crate::pci::platform::Platform;
use crate::pci::root::{Address, BAR_SIZE, PciFunction};
use crate::virtio::device::{Activation, DeviceKind, GuestMemory, Interrupt, ResizeError, VirtioDevice};
use crate::virtio::queue::VirtQueue;

/// Vendor of all virtio devices; modern device identifiers start at this number (section 4.1.2).
const VENDOR: u16 = 0x1af4;
const MODERN_DEVICE_BASE: u16 = 0x1040;
/// A subsystem identifier that no transitional device has (section 4.1.2.1).
const SUBSYSTEM: u16 = 0x1100;
/// Revision of non-transitional devices.
const REVISION: u8 = 1;

/// The function.
pub struct VirtioPci {
    address: Address,
    device: Box<dyn VirtioDevice>,
    platform: Arc<dyn Platform>,
    memory: GuestMemory,
    config: ConfigSpace,
    msix: Msix,
    msix_capability: usize,
    window: WindowCapability,
    common: Common,
    signals: Arc<Signals>,
    /// The notification of each queue, while the device is active.
    kicks: Vec<Option<Arc<EventFd>>>,
    /// The BAR address at which the platform watches for notifications, while it does.
    attached_at: Option<u64>,
    active: bool,
}

impl VirtioPci {
    /// Puts `device`, called `name`, into a function at `address`.
    ///
    /// # Errors
    ///
    /// When the process may open no more descriptors.
    ///
    /// # Panics
    ///
    /// When the device has more queues than fit, which is a mistake of the program.
    pub fn new(
        name: &str,
        address: Address,
        device: Box<dyn VirtioDevice>,
        platform: Arc<dyn Platform>,
        memory: GuestMemory,
    ) -> io::Result<Self> {
        let queues = device.queue_sizes().len();
        assert!(queues <= capabilities::MAX_QUEUES, "a device with {queues} queues does not fit");
        // One vector for configuration changes, and one for all queues or for each.
        let vectors = if device.vector_per_queue() { queues + 1 } else { 2 }.min(capabilities::MAX_VECTORS);
        let ports = (0..vectors).map(|_| platform.msi_port()).collect::<io::Result<_>>()?;
        let msix = Msix::new(ports);
        let signals = Arc::new(Signals::new(name.to_owned(), msix.vectors().clone(), queues));
        let common = Common::new(device.features(), device.queue_sizes(), signals.clone());
        let mut config = ConfigSpace::new(identity(device.kind()), address.initial_bar(), BAR_SIZE);
        let window = capabilities::add(&mut config);
        // The offsets are below 4 KiB, and their low bits name BAR 0.
        let (table, pending) = (capabilities::MSIX_TABLE.start as u32, capabilities::MSIX_PENDING.start as u32);
        let msix_capability = config.add_capability(msix::CAPABILITY_ID, &msix.capability(table, pending));
        let control = msix::CONTROL_ENABLE | msix::CONTROL_MASK_ALL;
        config.allow(msix_capability + msix::CONTROL, &control.to_le_bytes());
        Ok(Self {
            address,
            device,
            platform,
            memory,
            config,
            msix,
            msix_capability,
            window,
            common,
            signals,
            kicks: Vec::new(),
            attached_at: None,
            active: false,
        })
    }

    /// Its place on the bus.
    #[must_use]
    pub fn address(&self) -> Address {
        self.address
    }

    /// The device in it.
    #[must_use]
    pub fn device(&self) -> &dyn VirtioDevice {
        &*self.device
    }

    /// Has the device take over the size that its file has now; returns it in bytes.
    ///
    /// # Errors
    ///
    /// When it has none, or fewer bytes than before.
    pub fn resize(&mut self) -> Result<u64, ResizeError> {
        self.device.resize()
    }

    /// Whether a driver has the device at work.
    #[must_use]
    pub fn is_active(&self) -> bool {
        self.active
    }

    /// Has a device that its driver has not let go of give up what it has of the host; false if its driver has, or the device cannot.
    pub fn give_up(&mut self) -> bool {
        self.active && self.device.give_up()
    }

    /// Says whether the device's link is up; false if it has none.
    pub fn set_link(&mut self, up: bool) -> bool {
        self.device.set_link(up)
    }

    /// Lets the device finish what it does and leave guest memory alone. Only with all vCPUs stopped.
    pub fn pause(&mut self) {
        self.device.pause();
    }

    /// Goes on after [`pause`](Self::pause).
    pub fn resume(&mut self) {
        self.device.resume();
    }

    /// Stops the device, as a reset by its driver does.
    pub fn shut_down(&mut self) {
        self.device.deactivate();
        self.detach();
        self.kicks.clear();
        self.active = false;
    }

    fn activate(&mut self) {
        if self.active {
            return;
        }
        let features = self.common.features();
        let interrupt: Arc<dyn Interrupt> = self.signals.clone();
        let result = self.make_queues(features).and_then(|queues| {
            let activation = Activation::new(features, self.memory.clone(), interrupt, queues);
            self.device.activate(activation).map_err(|error| error.to_string())
        });
        match result {
            Ok(()) => {
                self.active = true;
                self.attach();
            }
            Err(reason) => {
                self.kicks.clear();
                self.signals.needs_reset(&reason);
            }
        }
    }

    /// The queues that the driver enabled, and their notifications.
    fn make_queues(&mut self, features: u64) -> Result<Vec<Option<VirtQueue>>, String> {
        self.kicks.clear();
        let mut queues = Vec::with_capacity(self.common.queues().len());
        for (index, queue) in (0..).zip(self.common.queues()) {
            if !queue.ready() {
                self.kicks.push(None);
                queues.push(None);
                continue;
            }
            let mut queue = Queue::try_from(queue.state()).map_err(|error| error.to_string())?;
            queue.set_event_idx(features & feature::EVENT_IDX != 0);
            let kick = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(|error| error.to_string())?;
            let kick = Arc::new(kick);
            let queue = VirtQueue::new(index, queue, self.memory.clone(), kick.clone(), self.signals.clone())
                .map_err(|error| format!("queue {index}: {error}"))?;
            self.kicks.push(Some(kick));
            queues.push(Some(queue));
        }
        Ok(queues)
    }

    /// Lets the platform watch for notifications where the BAR points now.
    fn attach(&mut self) {
        let Some(bar) = self.config.bar() else { return };
        for (index, kick) in self.kicks.iter().enumerate() {
            let Some(kick) = kick else { continue };
            if let Err(error) = self.platform.attach_notification(notify_address(bar, index), kick) {
                crate::log::warn(format_args!(
                    "notifications of queue {index} of {} cost an exit each: {error} (fd {})",
                    self.address,
                    kick.as_raw_fd()
                ));
            }
        }
        self.attached_at = Some(bar);
    }

    fn detach(&mut self) {
        let Some(bar) = self.attached_at.take() else { return };
        for (index, kick) in self.kicks.iter().enumerate() {
            if let Some(kick) = kick {
                self.platform.detach_notification(notify_address(bar, index), kick);
            }
        }
    }
}

fn notify_address(bar: u64, queue: usize) -> u64 {
    bar + capabilities::NOTIFY.start + u64::from(capabilities::NOTIFY_MULTIPLIER) * queue as u64
}

fn identity(kind: DeviceKind) -> Identity {
    let class = match kind {
        // Ethernet; mass storage, other; simple communication, other; otherwise no class that fits.
        DeviceKind::Net => 0x02_0000,
        DeviceKind::Block | DeviceKind::Fs | DeviceKind::Pmem => 0x01_8000,
        DeviceKind::Console | DeviceKind::Vsock => 0x07_8000,
        DeviceKind::Rng | DeviceKind::Balloon => 0xff_0000,
    };
    Identity {
        vendor: VENDOR,
        device: MODERN_DEVICE_BASE + kind as u16,
        class,
        revision: REVISION,
        subsystem_vendor: VENDOR,
        subsystem: SUBSYSTEM,
    }
}

impl PciFunction for VirtioPci {
    fn read_config(&mut self, at: usize, data: &mut [u8]) {
        if let Some((offset, len)) = self.window.target(&self.config, at, data.len()) {
            data.fill(0);
            self.read_bar(offset, &mut data[..len]);
        } else {
            self.config.read(at, data);
        }
    }

    fn write_config(&mut self, at: usize, data: &[u8]) {
        self.config.write(at, data);
        if let Some((offset, len)) = self.window.target(&self.config, at, data.len()) {
            self.write_bar(offset, &data[..len]);
        }
        self.msix.set_control(self.config.u16_at(self.msix_capability + msix::CONTROL));
        if self.active && self.attached_at != self.config.bar() {
            self.detach();
            self.attach();
        }
    }

    fn bar(&self) -> Option<u64> {
        self.config.bar()
    }

    fn read_bar(&mut self, offset: u64, data: &mut [u8]) {
        if capabilities::COMMON.contains(&offset) {
            self.common.read(offset, data);
        } else if capabilities::ISR.contains(&offset) {
            data.fill(0);
            if let Some(first) = data.first_mut() {
                *first = self.signals.take_isr();
            }
        } else if capabilities::DEVICE.contains(&offset) {
            self.device.read_config(offset - capabilities::DEVICE.start, data);
        } else if capabilities::MSIX_TABLE.contains(&offset) {
            self.msix.read_table((offset - capabilities::MSIX_TABLE.start) as usize, data);
        } else if capabilities::MSIX_PENDING.contains(&offset) {
            self.msix.read_pending((offset - capabilities::MSIX_PENDING.start) as usize, data);
        } else {
            data.fill(0);
        }
    }

    fn write_bar(&mut self, offset: u64, data: &[u8]) {
        if capabilities::COMMON.contains(&offset) {
            match self.common.write(offset, data) {
                Effect::None => {}
                Effect::Activate => self.activate(),
                Effect::Reset => self.shut_down(),
            }
        } else if capabilities::DEVICE.contains(&offset) {
            self.device.write_config(offset - capabilities::DEVICE.start, data);
        } else if capabilities::NOTIFY.contains(&offset) {
            let queue = (offset - capabilities::NOTIFY.start) / u64::from(capabilities::NOTIFY_MULTIPLIER);
            if let Some(Some(kick)) = self.kicks.get(queue as usize) {
                // A full counter means that the device is due anyway.
                let _ = kick.write(1);
            }
        } else if capabilities::MSIX_TABLE.contains(&offset) {
            self.msix.write_table((offset - capabilities::MSIX_TABLE.start) as usize, data);
        }
    }
}

impl Drop for VirtioPci {
    fn drop(&mut self) {
        self.shut_down();
    }
}
