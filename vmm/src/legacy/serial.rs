//! The debug console: a 16550 (`vm_superio`) at the first serial port's place, one exit per character.

use std::fs::File;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use vm_superio::{Serial as Uart, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::arch::layout;

/// Raises the device's interrupt line.
pub struct Line(Arc<EventFd>);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Output that is lost, never waited for, while its file cannot take it.
struct Lossy(File);

impl Write for Lossy {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        // All bytes count as written: the guest must not be told of the host's troubles.
        let _ = self.0.write(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The device. Any vCPU may use it at any time.
pub struct Serial {
    uart: Mutex<Uart<Line, vm_superio::serial::NoEvents, Lossy>>,
}

impl Serial {
    /// A device that prints to `output` (which should not block) and signals `interrupt`.
    #[must_use]
    pub fn new(output: File, interrupt: Arc<EventFd>) -> Self {
        Self { uart: Mutex::new(Uart::new(Line(interrupt), Lossy(output))) }
    }

    /// The guest writes `value` to `port`; false if that is not this device's.
    pub fn write(&self, port: u16, value: u8) -> bool {
        let Some(register) = register(port) else { return false };
        // A full receive buffer is the guest's own doing and no concern of ours.
        let _ = self.uart.lock().unwrap_or_else(PoisonError::into_inner).write(register, value);
        true
    }

    /// The guest reads `port`; `None` if that is not this device's.
    #[must_use]
    pub fn read(&self, port: u16) -> Option<u8> {
        Some(self.uart.lock().unwrap_or_else(PoisonError::into_inner).read(register(port)?))
    }
}

/// The register at a port: at most 7.
fn register(port: u16) -> Option<u8> {
    layout::PORT_SERIAL.contains(&port).then(|| (port - layout::PORT_SERIAL.start) as u8)
}
