//! The transport against a device that only records, on a machine that only records.

use std::io;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use vmm_sys_util::eventfd::EventFd;

use super::capabilities;
use super::common::feature;
use super::function::VirtioPci;
use crate::pci::msix::{MsiMessage, MsiPort};
use crate::pci::platform::Platform;
use crate::pci::root::{Address, PciFunction};
use crate::virtio::device::{ActivateError, Activation, DeviceKind, DeviceState, RestoreError, VirtioDevice};
use crate::virtio::testing::memory;

/// What happened, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Happened {
    Attached(u64),
    Detached(u64),
    Routed(MsiMessage),
    Fired,
    Activated { features: u64, queues: Vec<bool> },
    Deactivated,
    ConfigWritten(u64, Vec<u8>),
}

#[derive(Clone, Default)]
struct Record(Arc<Mutex<Vec<Happened>>>);

impl Record {
    fn note(&self, what: Happened) {
        self.0.lock().unwrap().push(what);
    }

    fn take(&self) -> Vec<Happened> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl MsiPort for Record {
    fn connect(&self, message: MsiMessage) -> io::Result<()> {
        self.note(Happened::Routed(message));
        Ok(())
    }

    fn fire(&self) {
        self.note(Happened::Fired);
    }
}

impl Platform for Record {
    fn msi_port(&self) -> io::Result<Box<dyn MsiPort>> {
        Ok(Box::new(self.clone()))
    }

    fn attach_notification(&self, address: u64, _event: &EventFd) -> io::Result<()> {
        self.note(Happened::Attached(address));
        Ok(())
    }

    fn detach_notification(&self, address: u64, _event: &EventFd) {
        self.note(Happened::Detached(address));
    }
}

struct FakeDevice {
    record: Record,
    refuses: bool,
    active: Option<Activation>,
}

impl VirtioDevice for FakeDevice {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Console
    }

    fn features(&self) -> u64 {
        0b101
    }

    fn queue_sizes(&self) -> &[u16] {
        &[16, 8]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(offset as u8);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.record.note(Happened::ConfigWritten(offset, data.to_vec()));
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        assert!(self.active.is_none(), "activated twice in a row");
        if self.refuses {
            return Err(ActivateError::MissingQueue(1));
        }
        let queues = (0..2).map(|index| activation.try_take_queue(index).is_some()).collect();
        self.record.note(Happened::Activated { features: activation.features, queues });
        self.active = Some(activation);
        Ok(())
    }

    fn deactivate(&mut self) {
        if self.active.take().is_some() {
            self.record.note(Happened::Deactivated);
        }
    }

    fn save(&self) -> DeviceState {
        DeviceState::default()
    }

    fn restore(&mut self, _state: &DeviceState) -> Result<(), RestoreError> {
        Ok(())
    }

    fn completed(&self) -> u64 {
        0
    }
}

const BAR: u64 = 0xc100_0000;
const COMMAND: usize = 4;
const BAR0: usize = 0x10;
const MSIX: usize = 0x98;

struct Bench {
    function: VirtioPci,
    record: Record,
}

impl Bench {
    fn new() -> Self {
        Self::with(false)
    }

    fn with(refuses: bool) -> Self {
        let record = Record::default();
        let device = FakeDevice { record: record.clone(), refuses, active: None };
        let platform = Arc::new(record.clone());
        let function =
            VirtioPci::new("fake", Address { device: 1 }, Box::new(device), platform, memory(0x10_0000)).unwrap();
        let mut bench = Self { function, record };
        bench.function.write_config(BAR0, &(BAR as u32).to_le_bytes());
        bench.function.write_config(COMMAND, &6u16.to_le_bytes());
        bench
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.function.write_bar(offset, data);
    }

    fn read<const LEN: usize>(&mut self, offset: u64) -> [u8; LEN] {
        let mut data = [0; LEN];
        self.function.read_bar(offset, &mut data);
        data
    }

    fn set_status(&mut self, status: u8) -> u8 {
        self.write(0x14, &[status]);
        self.read::<1>(0x14)[0]
    }

    fn accept_features(&mut self, features: u64) {
        for half in 0..2u32 {
            self.write(0x08, &half.to_le_bytes());
            self.write(0x0c, &((features >> (32 * half)) as u32).to_le_bytes());
        }
    }

    fn enable_queue(&mut self, index: u16) {
        self.write(0x16, &index.to_le_bytes());
        for (offset, address) in [(0x20, 0x1000u64), (0x28, 0x2000), (0x30, 0x3000)] {
            self.write(offset, &(address + u64::from(index) * 0x4000).to_le_bytes());
        }
        self.write(0x1c, &1u16.to_le_bytes());
    }

    fn start(&mut self) {
        self.set_status(3);
        self.accept_features(feature::VERSION_1 | 1);
        assert_eq!(self.set_status(0xb), 0xb);
        self.enable_queue(0);
        assert_eq!(self.set_status(0xf), 0xf);
    }
}

#[test]
fn a_driver_that_does_it_right_gets_a_device() {
    let mut b = Bench::new();
    b.start();
    let notify = BAR + capabilities::NOTIFY.start;
    assert_eq!(
        b.record.take(),
        [
            Happened::Activated { features: feature::VERSION_1 | 1, queues: vec![true, false] },
            Happened::Attached(notify)
        ]
    );
    assert_eq!(b.set_status(0), 0);
    assert_eq!(b.record.take(), [Happened::Deactivated, Happened::Detached(notify)]);
    b.start();
}

#[test]
fn features_that_were_not_offered_or_are_missing_are_not_accepted() {
    for features in [feature::VERSION_1 | 2, 1, feature::VERSION_1 | 1 << 63] {
        let mut b = Bench::new();
        b.set_status(3);
        b.accept_features(features);
        assert_eq!(b.set_status(0xb), 3);
        // And without them, no device.
        assert_eq!(b.set_status(0xf) & 4, 0);
        assert_eq!(b.record.take(), []);
    }
}

#[test]
fn a_device_that_cannot_start_asks_for_a_reset() {
    let mut b = Bench::with(true);
    b.set_status(3);
    b.accept_features(feature::VERSION_1);
    b.set_status(0xb);
    b.enable_queue(0);
    assert_eq!(b.set_status(0xf), 0x4f);
    assert_eq!(b.set_status(0), 0);
}

#[test]
fn queues_are_fixed_once_the_driver_is_ready() {
    let mut b = Bench::new();
    b.start();
    b.write(0x16, &0u16.to_le_bytes());
    b.write(0x18, &4u16.to_le_bytes());
    b.write(0x20, &0x9000u64.to_le_bytes());
    assert_eq!(b.read(0x18), 16u16.to_le_bytes());
    assert_eq!(b.read(0x20), 0x1000u64.to_le_bytes());
    // Sizes are powers of two up to the offered one, and queues that do not exist have none.
    b.write(0x16, &1u16.to_le_bytes());
    assert_eq!(b.read(0x18), 8u16.to_le_bytes());
    b.write(0x16, &2u16.to_le_bytes());
    assert_eq!(b.read(0x18), [0; 2]);
}

#[test]
fn notifications_move_with_the_bar() {
    let mut b = Bench::new();
    b.start();
    b.record.take();
    let notify = capabilities::NOTIFY.start;
    b.function.write_config(COMMAND, &4u16.to_le_bytes());
    b.function.write_config(BAR0, &0xc200_0000u32.to_le_bytes());
    b.function.write_config(COMMAND, &6u16.to_le_bytes());
    assert_eq!(b.record.take(), [Happened::Detached(BAR + notify), Happened::Attached(0xc200_0000 + notify)]);
}

#[test]
fn the_window_in_configuration_space_leads_to_the_bar() {
    let mut b = Bench::new();
    // The fifth capability; its data is at offset 16.
    let window = 0x84;
    b.function.write_config(window + 8, &0x84u32.to_le_bytes());
    b.function.write_config(window + 12, &4u32.to_le_bytes());
    b.function.write_config(window + 16, &7u32.to_le_bytes());
    assert_eq!(b.record.take(), [Happened::ConfigWritten(4, vec![7, 0, 0, 0])]);
    let mut data = [0; 4];
    b.function.read_config(window + 16, &mut data);
    assert_eq!(data, [4; 4]);
    // Odd places and sizes lead nowhere.
    b.function.write_config(window + 12, &3u32.to_le_bytes());
    b.function.write_config(window + 16, &7u32.to_le_bytes());
    assert_eq!(b.record.take(), []);
}

#[test]
fn vectors_that_do_not_exist_read_back_as_none() {
    let mut b = Bench::new();
    b.write(0x10, &1u16.to_le_bytes());
    assert_eq!(b.read(0x10), 1u16.to_le_bytes());
    b.write(0x10, &2u16.to_le_bytes());
    assert_eq!(b.read(0x10), [0xff; 2]);
}

proptest! {
    /// Any accesses, to anywhere: nothing breaks, and the device is started and stopped in turn.
    #[test]
    fn any_accesses_leave_the_function_sound(
        accesses in prop::collection::vec(
            (any::<bool>(), 0u64..0x1000, prop::sample::select(vec![1usize, 2, 4, 8]), any::<u64>()), 0..200
        ),
        status in prop::collection::vec(any::<u8>(), 0..20),
    ) {
        let mut b = Bench::new();
        b.start();
        let mut status = status.into_iter();
        for (bar, offset, len, value) in accesses {
            let bytes = &value.to_le_bytes()[..len];
            if bar {
                b.function.write_bar(offset, bytes);
                b.function.read_bar(offset, &mut vec![0; len]);
            } else {
                b.function.write_config(offset as usize % 0x120, bytes);
                b.function.read_config(offset as usize % 0x120, &mut vec![0; len]);
            }
            if value % 8 == 0 && let Some(status) = status.next() {
                b.set_status(status);
            }
        }
        b.function.write_config(MSIX + 2, &0u16.to_le_bytes());
        b.set_status(0);
        let mut active = false;
        for event in b.record.take() {
            match event {
                Happened::Activated { .. } => {
                    prop_assert!(!active);
                    active = true;
                }
                Happened::Deactivated => {
                    prop_assert!(active);
                    active = false;
                }
                _ => {}
            }
        }
        prop_assert!(!active);
    }
}
