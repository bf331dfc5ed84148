//! The socket device (virtio 1.3, section 5.10): joins Unix sockets on the host to `AF_VSOCK` sockets in the guest.
//!
//! Host processes connect to one listening Unix socket and say which port of the guest they want (see
//! [`hull_vmm_api::config::VsockConfig`]). The guest may connect to the few ports that the configuration opens, once
//! each, and is refused everything else.
//!
//! * [`packet`] is the header on the wire.
//! * [`stream`] is one connection.
//! * [`mux`] joins all connections to the queues.
//!
//! The device never blocks and runs on the shared event loop. Connections do not survive a snapshot: a restored guest is
//! told so by an event.

pub mod mux;
pub mod packet;
pub mod stream;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::io;
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use self::mux::{GuestPorts, Mux, Queues};
use super::device::{
    ActivateError, Activation, DeviceKind, DeviceState, RestoreError, VirtioDevice, read_config_bytes,
};
use crate::config::VsockSettings;
use crate::event_loop::{EventLoop, Registration};

/// `rx`, `tx` and `event` (section 5.10.2).
const QUEUE_SIZES: [u16; 3] = [128, 128, 8];
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const EVENT: u16 = 2;

/// The device.
pub struct Vsock {
    event_loop: Arc<EventLoop>,
    guest_cid: u32,
    listener: Arc<UnixListener>,
    /// While the device is not active; then the worker has them.
    guest_ports: GuestPorts,
    completed: Arc<AtomicU64>,
    /// The guest believes in connections of a life before.
    restored: bool,
    active: Option<(Arc<Mutex<Mux>>, Registration)>,
}

impl Vsock {
    /// A device served by `event_loop`.
    ///
    /// # Errors
    ///
    /// When the listener is no socket.
    pub fn new(event_loop: Arc<EventLoop>, settings: VsockSettings) -> io::Result<Self> {
        settings.listener.set_nonblocking(true)?;
        Ok(Self {
            event_loop,
            guest_cid: settings.guest_cid,
            listener: Arc::new(settings.listener),
            guest_ports: settings.guest_ports.into_iter().collect::<HashMap<_, _>>(),
            completed: Arc::default(),
            restored: false,
            active: None,
        })
    }
}

fn lock(mux: &Mutex<Mux>) -> MutexGuard<'_, Mux> {
    mux.lock().unwrap_or_else(PoisonError::into_inner)
}

impl VirtioDevice for Vsock {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Vsock
    }

    fn features(&self) -> u64 {
        // Section 5.10.3: without any bit, the device has stream sockets.
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&u64::from(self.guest_cid).to_le_bytes(), offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let queues = Queues {
            receive: activation.take_queue(RECEIVE)?,
            transmit: activation.take_queue(TRANSMIT)?,
            event: activation.take_queue(EVENT)?,
        };
        let ports = std::mem::take(&mut self.guest_ports);
        let mux = Mux::new(queues, self.guest_cid, self.listener.clone(), ports, self.completed.clone());
        let mux = Arc::new(Mutex::new(mux));
        let registration = self.event_loop.add(mux.clone());
        {
            let mut mux = lock(&mux);
            if std::mem::take(&mut self.restored) {
                mux.send_transport_reset();
            }
            mux.start(registration.watcher())
                .map_err(|source| ActivateError::Host { step: "cannot watch the queues", source })?;
        }
        self.active = Some((mux, registration));
        Ok(())
    }

    fn deactivate(&mut self) {
        if let Some((mux, registration)) = self.active.take() {
            let mut worker = lock(&mux);
            worker.stop(registration.watcher());
            self.guest_ports = std::mem::take(&mut worker.guest_ports);
            // The registration waits for the worker, so let go of it first.
            drop(worker);
            drop(registration);
        }
    }

    fn save(&self) -> DeviceState {
        let queues = match &self.active {
            Some((mux, _)) => {
                let mux = lock(mux);
                let Queues { receive, transmit, event } = &mux.queues;
                vec![Some(receive.state()), Some(transmit.state()), Some(event.state())]
            }
            None => vec![None, None, None],
        };
        DeviceState { queues, private: Vec::new() }
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        if !state.private.is_empty() {
            return Err(RestoreError::Damaged(DeviceKind::Vsock));
        }
        self.restored = true;
        Ok(())
    }

    fn completed(&self) -> u64 {
        self.completed.load(Ordering::Relaxed)
    }
}
