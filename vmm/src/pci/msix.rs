//! MSI-X (PCI local bus specification 3.0, section 6.8.2): a table of messages in the function's memory, each of which
//! can be masked, and the interrupts behind them.
//!
//! Devices fire vectors from any thread while vCPUs change the table. What both touch is in [`Vectors`], without locks;
//! an interrupt that meets a mask stays pending until the mask is lifted.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Capability identifier.
pub const CAPABILITY_ID: u8 = 0x11;
/// Offset of the message control register in the capability.
pub const CONTROL: usize = 2;
/// Message control: MSI-X is on.
pub const CONTROL_ENABLE: u16 = 1 << 15;
/// Message control: all vectors are masked.
pub const CONTROL_MASK_ALL: u16 = 1 << 14;
/// Bytes of a table entry: address, data, vector control.
const ENTRY_SIZE: usize = 16;
/// Vector control: masked.
const ENTRY_MASKED: u32 = 1;

/// A memory write that is an interrupt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MsiMessage {
    /// Where it goes: which processors.
    pub address: u64,
    /// What it says: which of their vectors.
    pub data: u32,
}

/// One interrupt of the machine.
pub trait MsiPort: Send + Sync {
    /// Makes [`fire`](Self::fire) deliver `message` from now on.
    ///
    /// # Errors
    ///
    /// When the host has no room for it.
    fn connect(&self, message: MsiMessage) -> io::Result<()>;

    /// Delivers the message. Any thread, without blocking.
    fn fire(&self);
}

/// The interrupts behind a table, as devices use them.
pub struct Vectors(Box<[Vector]>);

struct Vector {
    port: Box<dyn MsiPort>,
    open: AtomicBool,
    pending: AtomicBool,
}

impl Vectors {
    /// Fires a vector, or notes that it is due if it is masked. A vector that does not exist is ignored.
    pub fn fire(&self, vector: u16) {
        let Some(vector) = self.0.get(usize::from(vector)) else { return };
        if vector.open.load(Ordering::SeqCst) {
            vector.port.fire();
            return;
        }
        vector.pending.store(true, Ordering::SeqCst);
        // The mask may have been lifted in between, before the note could be seen.
        if vector.open.load(Ordering::SeqCst) {
            vector.fire_if_pending();
        }
    }

    /// Vectors in the table.
    #[must_use]
    pub fn count(&self) -> u16 {
        self.0.len() as u16
    }
}

impl Vector {
    fn fire_if_pending(&self) {
        if self.pending.swap(false, Ordering::SeqCst) {
            self.port.fire();
        }
    }
}

/// What the guest has written of one entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The message.
    pub message: MsiMessage,
    /// Vector control.
    pub control: u32,
    /// The message that the port was last connected to.
    connected: Option<MsiMessage>,
}

/// The table and its state.
pub struct Msix {
    entries: Vec<Entry>,
    control: u16,
    vectors: Arc<Vectors>,
}

impl Msix {
    /// A table with an entry for each port; all are masked and MSI-X is off.
    #[must_use]
    pub fn new(ports: Vec<Box<dyn MsiPort>>) -> Self {
        let entry = Entry { message: MsiMessage::default(), control: ENTRY_MASKED, connected: None };
        let entries = vec![entry; ports.len()];
        let vector = |port| Vector { port, open: AtomicBool::new(false), pending: AtomicBool::new(false) };
        Self { entries, control: 0, vectors: Arc::new(Vectors(ports.into_iter().map(vector).collect())) }
    }

    /// The devices' side.
    #[must_use]
    pub fn vectors(&self) -> &Arc<Vectors> {
        &self.vectors
    }

    /// The capability's body: table and pending bits at these offsets of BAR 0.
    #[must_use]
    pub fn capability(&self, table_offset: u32, pending_offset: u32) -> [u8; 10] {
        let mut body = [0; 10];
        body[..2].copy_from_slice(&(self.vectors.count() - 1).to_le_bytes());
        body[2..6].copy_from_slice(&table_offset.to_le_bytes());
        body[6..].copy_from_slice(&pending_offset.to_le_bytes());
        body
    }

    /// The guest changed message control.
    pub fn set_control(&mut self, control: u16) {
        if control != self.control {
            self.control = control;
            for index in 0..self.entries.len() {
                self.update(index);
            }
        }
    }

    /// The guest reads `data` at `offset` of the table.
    pub fn read_table(&self, offset: usize, data: &mut [u8]) {
        data.fill(0);
        let Some(entry) = self.entries.get(offset / ENTRY_SIZE) else { return };
        let mut bytes = [0; ENTRY_SIZE];
        bytes[..8].copy_from_slice(&entry.message.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&entry.message.data.to_le_bytes());
        bytes[12..].copy_from_slice(&entry.control.to_le_bytes());
        let bytes = &bytes[offset % ENTRY_SIZE..];
        let len = data.len().min(bytes.len());
        data[..len].copy_from_slice(&bytes[..len]);
    }

    /// The guest writes `data` at `offset` of the table: aligned halves of 4 bytes, one or two; all else is undefined
    /// (section 6.8.2) and ignored.
    pub fn write_table(&mut self, offset: usize, data: &[u8]) {
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len()) {
            return;
        }
        let index = offset / ENTRY_SIZE;
        let Some(entry) = self.entries.get_mut(index) else { return };
        for (half, value) in (offset % ENTRY_SIZE / 4..).zip(data.chunks_exact(4)) {
            let value = u32::from_le_bytes([value[0], value[1], value[2], value[3]]);
            match half {
                0 => entry.message.address = entry.message.address & !0xffff_ffff | u64::from(value & !0b11),
                1 => entry.message.address = entry.message.address & 0xffff_ffff | u64::from(value) << 32,
                2 => entry.message.data = value,
                _ => entry.control = value & ENTRY_MASKED,
            }
        }
        self.update(index);
    }

    /// The guest reads `data` at `offset` of the pending bits.
    pub fn read_pending(&self, offset: usize, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            let first = (offset + index) * 8;
            let vectors = self.vectors.0.iter().skip(first).take(8);
            *byte = (0..)
                .zip(vectors)
                .fold(0, |bits, (bit, vector)| bits | u8::from(vector.pending.load(Ordering::SeqCst)) << bit);
        }
    }

    /// Brings a vector in line with its entry and message control. Routes change only when a vector opens with another
    /// message than before: each change costs the host a system call and the guest a stop.
    fn update(&mut self, index: usize) {
        let (entry, vector) = (&mut self.entries[index], &self.vectors.0[index]);
        let on = self.control & (CONTROL_ENABLE | CONTROL_MASK_ALL) == CONTROL_ENABLE;
        if !on || entry.control & ENTRY_MASKED != 0 {
            vector.open.store(false, Ordering::SeqCst);
            return;
        }
        if entry.connected != Some(entry.message) {
            if let Err(error) = vector.port.connect(entry.message) {
                crate::log::warn(format_args!("cannot route an interrupt: {error}"));
                return;
            }
            entry.connected = Some(entry.message);
        }
        vector.open.store(true, Ordering::SeqCst);
        vector.fire_if_pending();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Clone, Default)]
    struct FakePort(Arc<Mutex<Vec<Option<MsiMessage>>>>);

    impl MsiPort for FakePort {
        fn connect(&self, message: MsiMessage) -> io::Result<()> {
            self.0.lock().unwrap().push(Some(message));
            Ok(())
        }

        fn fire(&self) {
            self.0.lock().unwrap().push(None);
        }
    }

    const MESSAGE: MsiMessage = MsiMessage { address: 0xfee0_1000, data: 0x41 };

    fn table() -> (Msix, FakePort) {
        let port = FakePort::default();
        (Msix::new(vec![Box::new(FakePort::default()), Box::new(port.clone())]), port)
    }

    fn set_entry(msix: &mut Msix, message: MsiMessage, control: u32) {
        msix.write_table(16, &message.address.to_le_bytes());
        msix.write_table(24, &message.data.to_le_bytes());
        msix.write_table(28, &control.to_le_bytes());
    }

    #[test]
    fn an_open_vector_fires_its_message() {
        let (mut msix, port) = table();
        msix.set_control(CONTROL_ENABLE);
        set_entry(&mut msix, MESSAGE, 0);
        msix.vectors().fire(1);
        assert_eq!(*port.0.lock().unwrap(), [Some(MESSAGE), None]);
    }

    #[test]
    fn a_masked_vector_stays_pending_until_unmasked() {
        let (mut msix, port) = table();
        msix.set_control(CONTROL_ENABLE | CONTROL_MASK_ALL);
        set_entry(&mut msix, MESSAGE, 0);
        msix.vectors().fire(1);
        let mut pending = [0; 8];
        msix.read_pending(0, &mut pending);
        assert_eq!(pending[0], 0b10);
        assert_eq!(*port.0.lock().unwrap(), []);
        msix.set_control(CONTROL_ENABLE);
        assert_eq!(*port.0.lock().unwrap(), [Some(MESSAGE), None]);
        msix.read_pending(0, &mut pending);
        assert_eq!(pending[0], 0);
    }

    #[test]
    fn unmasking_with_the_same_message_changes_no_route() {
        let (mut msix, port) = table();
        msix.set_control(CONTROL_ENABLE);
        set_entry(&mut msix, MESSAGE, 0);
        for _ in 0..10 {
            set_entry(&mut msix, MESSAGE, 1);
            set_entry(&mut msix, MESSAGE, 0);
        }
        assert_eq!(*port.0.lock().unwrap(), [Some(MESSAGE)]);
    }

    #[test]
    fn the_table_reads_back_and_odd_accesses_do_nothing() {
        let (mut msix, _) = table();
        set_entry(&mut msix, MESSAGE, 1);
        msix.write_table(17, &[0xff; 4]);
        msix.write_table(16, &[0xff; 2]);
        msix.write_table(32, &[0xff; 8]);
        msix.write_table(usize::MAX - 7, &[0xff; 8]);
        let mut address = [0; 8];
        msix.read_table(16, &mut address);
        assert_eq!(u64::from_le_bytes(address), MESSAGE.address);
        let mut rest = [0; 8];
        msix.read_table(24, &mut rest);
        assert_eq!(rest, [0x41, 0, 0, 0, 1, 0, 0, 0]);
        msix.read_table(usize::MAX, &mut rest);
        assert_eq!(rest, [0; 8]);
    }

    #[test]
    fn a_vector_that_does_not_exist_is_ignored() {
        let (msix, _) = table();
        msix.vectors().fire(2);
        msix.vectors().fire(0xffff);
    }
}
