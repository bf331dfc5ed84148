//! Block devices that grow while a guest has them as disks.
//!
//! The kernel announces it to whoever listens (`KOBJ_CHANGE` of a block device), so nothing is polled, and without disks
//! nobody listens. What has changed is not looked at: the VMM looks at the device's size, and tells the guest if that is more.

use std::collections::HashMap;
use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::io::Errno;
use rustix::net::netlink::{KOBJECT_UEVENT, SocketAddrNetlink};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with};
use tokio::task::JoinHandle;

use crate::control::{Control, ControlError, Request, Response};

/// The kernel's own announcements; the other group is udev's.
const KERNEL: u32 = 1;
/// The kernel's limit for the variables is 2,048, and a path comes before them.
const ANNOUNCEMENT_BYTES: usize = 8192;

/// A device by its number.
type Number = (u32, u32);

/// Listens for as long as it lives, once there is a first device.
#[derive(Debug)]
pub(super) struct Growth {
    /// The VMM's control socket.
    control: PathBuf,
    /// The disks' names.
    watched: Watched,
    listening: Option<JoinHandle<()>>,
}

type Watched = Arc<Mutex<HashMap<String, Number>>>;

impl Growth {
    pub(super) fn new(control: PathBuf) -> Self {
        Self { control, watched: Watched::default(), listening: None }
    }

    /// Has the disk of this name grow with its device. Call it before the VMM looks at the device, in a tokio runtime.
    pub(super) fn watch(&mut self, id: &str, number: Number) {
        if self.listening.is_none() {
            match listen() {
                Ok(socket) => {
                    self.listening = Some(tokio::spawn(follow(socket, self.watched.clone(), self.control.clone())));
                }
                Err(error) => tracing::warn!("disks do not grow with their devices: {error}"),
            }
        }
        self.lock().insert(id.to_owned(), number);
    }

    pub(super) fn forget(&mut self, id: &str) {
        self.lock().remove(id);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Number>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Growth {
    fn drop(&mut self) {
        if let Some(listening) = &self.listening {
            listening.abort();
        }
    }
}

/// The type is that of other sockets with datagrams, since tokio has none for these, and receiving is the same for all.
fn listen() -> io::Result<tokio::net::UnixDatagram> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, Some(KOBJECT_UEVENT))?;
    bind(&socket, &SocketAddrNetlink::new(0, KERNEL))?;
    tokio::net::UnixDatagram::from_std(UnixDatagram::from(socket))
}

async fn follow(socket: tokio::net::UnixDatagram, watched: Watched, control: PathBuf) {
    let mut announcement = vec![0; ANNOUNCEMENT_BYTES];
    loop {
        let changed = match socket.recv(&mut announcement).await {
            Ok(len) => match changed_device(&announcement[..len]) {
                Some(number) => Some(number),
                None => continue,
            },
            // Some were lost: it may be any.
            Err(error) if error.raw_os_error() == Some(Errno::NOBUFS.raw_os_error()) => None,
            Err(error) => {
                tracing::warn!("disks do not grow with their devices any more: {error}");
                return;
            }
        };
        let disks: Vec<String> = {
            let watched = watched.lock().unwrap_or_else(PoisonError::into_inner);
            let is_meant = |number: &Number| changed.is_none_or(|changed| changed == *number);
            watched.iter().filter(|(_, number)| is_meant(number)).map(|(id, _)| id.clone()).collect()
        };
        for id in disks {
            let control = control.clone();
            let name = id.clone();
            let resized = tokio::task::spawn_blocking(move || resize(&control, id)).await;
            match resized.unwrap_or_else(|error| Err(ControlError::Connection(error.into()))) {
                Ok(response) => tracing::debug!("{name} after a change of its device: {response:?}"),
                // One that is on its way, or gone, or has shrunk.
                Err(error) => tracing::warn!("{name} does not change with its device: {error}"),
            }
        }
    }
}

fn resize(control: &Path, id: String) -> Result<Response, ControlError> {
    Control::connect(control)?.call(&Request::ResizeDisk { id })
}

/// The block device that an announcement says has changed.
fn changed_device(announcement: &[u8]) -> Option<Number> {
    let text = std::str::from_utf8(announcement).ok()?;
    let value = |name: &str| text.split('\0').find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    if value("ACTION") != Some("change") || value("SUBSYSTEM") != Some("block") {
        return None;
    }
    Some((value("MAJOR")?.parse().ok()?, value("MINOR")?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_of_block_devices_are_told_from_others() {
        let about = |action: &str, subsystem: &str| {
            format!(
                "{action}@/devices/virtual/block/loop3\0ACTION={action}\0DEVPATH=/x\0SUBSYSTEM={subsystem}\0RESIZE=1\0MAJOR=7\0MINOR=3\0"
            )
        };
        assert_eq!(changed_device(about("change", "block").as_bytes()), Some((7, 3)));
        for (action, subsystem) in [("add", "block"), ("remove", "block"), ("change", "net")] {
            assert_eq!(changed_device(about(action, subsystem).as_bytes()), None);
        }
        for text in [
            "",
            "change@/x\0ACTION=change\0SUBSYSTEM=block\0MAJOR=7\0",
            "ACTION=change\0SUBSYSTEM=block\0MAJOR=-1\0MINOR=x",
        ] {
            assert_eq!(changed_device(text.as_bytes()), None);
        }
    }

    #[tokio::test]
    async fn the_kernel_can_be_listened_to_and_a_vmm_that_is_gone_does_no_harm() {
        let mut growth = Growth::new("/no/such/socket".into());
        growth.watch("a", (7, 3));
        growth.watch("b", (7, 4));
        growth.forget("a");
        assert_eq!(growth.lock().len(), 1);
        assert!(growth.listening.as_ref().is_none_or(|task| !task.is_finished()));
    }
}
