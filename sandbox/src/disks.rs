//! Block devices of the host that a sandbox's guest has as disks, put on its bus while it runs.
//!
//! Containers that use one device share one disk, and with it the guest's cache of it, unless one that writes comes after one that only
//! reads. The last of them that goes takes the disk
//! along: the guest lets go of it, the VMM takes it off the bus, and nobody has the host's device open any more.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use hull_protocol::agent::{AddDeviceRequest, RemoveDeviceRequest};
use hull_vmm_api::config::{DiskConfig, Resource};

use crate::agent::{Agent, AgentError, answer, long, short};
use crate::control::{Control, ControlError, Request, Response};

/// A block device of the host by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HostDevice {
    /// The device's major number.
    pub major: u32,
    /// The device's minor number.
    pub minor: u32,
    /// Whether the guest can write to it: enforced on the host.
    pub read_only: bool,
}

/// The number of a block device in the guest, as the guest says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestDevice {
    /// Its node in the guest.
    pub path: String,
    /// The device's major number.
    pub major: u32,
    /// The device's minor number.
    pub minor: u32,
}

impl std::fmt::Display for HostDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// A disk that did not come or go.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The host's device.
    #[error("the block device {device} cannot be opened: {source}; it must exist on the node")]
    Open {
        /// Which.
        device: HostDevice,
        /// Why not.
        source: io::Error,
    },
    /// The VMM.
    #[error("the block device {device} cannot be given to the guest: {source}")]
    Control {
        /// Which.
        device: HostDevice,
        /// Why not.
        source: ControlError,
    },
    /// The guest.
    #[error("the guest does not take the block device {device}: {source}")]
    Agent {
        /// Which.
        device: HostDevice,
        /// Why not.
        source: AgentError,
    },
}

/// The disks of a sandbox.
#[derive(Debug)]
pub struct Disks {
    control: PathBuf,
    /// How many there have been, for their names.
    made: u64,
    by_device: HashMap<HostDevice, Added>,
}

#[derive(Debug)]
struct Added {
    id: String,
    pci_address: String,
    guest: GuestDevice,
    /// The containers that use it.
    users: HashSet<String>,
}

impl Disks {
    /// No disks yet, of the VMM whose control socket is at `control`.
    #[must_use]
    pub fn new(control: PathBuf) -> Self {
        Self { control, made: 0, by_device: HashMap::new() }
    }

    /// Has a device in the guest for a container and says which one it is there.
    ///
    /// # Errors
    ///
    /// Fails where the host has no such block device, or VMM or guest refuse it.
    pub async fn add(&mut self, agent: &Agent, container: &str, device: HostDevice) -> Result<GuestDevice, DiskError> {
        // Who only reads is to see what others write, and two disks would have two caches in the guest.
        let writable = HostDevice { read_only: false, ..device };
        let known = if self.by_device.contains_key(&writable) { writable } else { device };
        if let Some(added) = self.by_device.get_mut(&known) {
            added.users.insert(container.to_owned());
            return Ok(added.guest.clone());
        }
        let (file, read_only) = open(device).map_err(|source| DiskError::Open { device, source })?;
        let id = format!("disk{}", self.made);
        self.made += 1;
        let disk = DiskConfig { id: id.clone(), file: Resource::Attached(0), read_only, serial: None };
        let failed = |source| DiskError::Control { device, source };
        let response = self.call(Request::AddDisk(disk), Some(file)).await.map_err(failed)?;
        let Response::Added { pci_address } = response else {
            let source = ControlError::Connection(io::ErrorKind::InvalidData.into());
            return Err(failed(source));
        };
        let request = AddDeviceRequest { pci_address: pci_address.clone(), ..Default::default() };
        let answered = answer("AddDevice", agent.sandbox.add_device(long(), &request).await);
        let guest = match answered {
            Ok(answer) => GuestDevice { path: answer.device_path, major: answer.major, minor: answer.minor },
            Err(source) => {
                self.take_off(agent, &id, pci_address).await;
                return Err(DiskError::Agent { device, source });
            }
        };
        let users = HashSet::from([container.to_owned()]);
        self.by_device.insert(device, Added { id, pci_address, guest: guest.clone(), users });
        Ok(guest)
    }

    /// The devices that a container uses, with what they are in the guest.
    #[must_use]
    pub fn of(&self, container: &str) -> Vec<(HostDevice, GuestDevice)> {
        let used = self.by_device.iter().filter(|(_, added)| added.users.contains(container));
        used.map(|(device, added)| (*device, added.guest.clone())).collect()
    }

    /// Lets go of a container's devices, and takes off the bus those that no other uses.
    pub async fn release(&mut self, agent: &Agent, container: &str) {
        let mut unused = Vec::new();
        for (device, added) in &mut self.by_device {
            if added.users.remove(container) && added.users.is_empty() {
                unused.push(*device);
            }
        }
        for device in unused {
            if let Some(added) = self.by_device.remove(&device) {
                self.take_off(agent, &added.id, added.pci_address).await;
            }
        }
    }

    /// Has the guest let go of a disk, and the VMM take it off the bus even if the guest does not: the node wants its device back.
    async fn take_off(&self, agent: &Agent, id: &str, pci_address: String) {
        let request = RemoveDeviceRequest { pci_address, ..Default::default() };
        match answer("RemoveDevice", agent.sandbox.remove_device(short(), &request).await) {
            Err(error) if !error.is_not_found() => tracing::warn!("the guest does not let go of {id}: {error}"),
            _ => {}
        }
        if let Err(error) = self.call(Request::RemoveDevice { id: id.to_owned() }, None).await {
            tracing::warn!("{id} cannot be taken off the bus: {error}");
        }
    }

    async fn call(&self, request: Request, file: Option<OwnedFd>) -> Result<Response, ControlError> {
        let control = self.control.clone();
        // The VMM answers soon, but this thread has others to serve.
        let called = tokio::task::spawn_blocking(move || {
            let mut control = Control::connect(&control)?;
            control.call_with(&request, file.as_slice())
        });
        called.await.map_err(|error| ControlError::Connection(error.into()))?
    }
}

/// Opens the node of a device: the kernel makes one for each, under a name that sysfs knows. Says too whether it can only be
/// read: one that is read-only itself may be opened for writing all the same, and each write would be an I/O error to the guest.
fn open(device: HostDevice) -> io::Result<(OwnedFd, bool)> {
    let uevent = std::fs::read_to_string(format!("/sys/dev/block/{device}/uevent"))?;
    let name = device_name(&uevent).ok_or(io::ErrorKind::NotFound)?;
    let is_read_only = std::fs::read_to_string(format!("/sys/dev/block/{device}/ro"))?.trim() != "0";
    let read_only = device.read_only || is_read_only;
    let file = File::options().read(true).write(!read_only).open(Path::new("/dev").join(name))?;
    let metadata = file.metadata()?;
    let number = metadata.rdev();
    let is_it = (rustix::fs::major(number), rustix::fs::minor(number)) == (device.major, device.minor);
    if !metadata.file_type().is_block_device() || !is_it {
        return Err(io::Error::new(io::ErrorKind::NotFound, format!("/dev/{name} is another device")));
    }
    Ok((file.into(), read_only))
}

fn device_name(uevent: &str) -> Option<&str> {
    let name = uevent.lines().find_map(|line| line.strip_prefix("DEVNAME="))?;
    (!name.is_empty() && !name.split('/').any(|part| part == "..")).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_named_by_the_kernel() {
        assert_eq!(device_name("MAJOR=7\nMINOR=0\nDEVNAME=loop0\nDEVTYPE=disk\n"), Some("loop0"));
        assert_eq!(device_name("DEVNAME=mapper/a\n"), Some("mapper/a"));
        for uevent in ["", "MAJOR=7\n", "DEVNAME=\n", "DEVNAME=../etc/passwd\n"] {
            assert_eq!(device_name(uevent), None);
        }
    }

    #[test]
    fn a_device_that_the_host_does_not_have_is_not_found() {
        let device = HostDevice { major: 4095, minor: 1_048_575, read_only: true };
        assert_eq!(open(device).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
