//! Devices that come and go while the guest runs.
//!
//! The VMM puts a device on the PCI bus and the host asks for it here: the bus is scanned again, and then the kernel
//! is listened to (uevents over netlink) until the device can be used. Nothing is polled, except that a bus
//! on which the device is not seen at once is scanned again a little later.

use std::fmt;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use rustix::net::netlink::{KOBJECT_UEVENT, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recv, socket_with};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, timeout_at};

use crate::error::{Error, Result, Step};

const PCI_DEVICES: &str = "/sys/bus/pci/devices";
const PCI_RESCAN: &str = "/sys/bus/pci/rescan";

/// How long a device may take to appear and its driver to take it.
const APPEAR_TIMEOUT: Duration = Duration::from_secs(10);
/// When the bus is scanned again, if the device was not on it.
const RESCAN_INTERVAL: Duration = Duration::from_millis(50);
/// The group of the kernel's own uevents; group 2 is udev's.
const KERNEL_EVENTS: u32 = 1;

/// The address of a PCI function, such as 0000:00:05.0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PciAddress(String);

impl FromStr for PciAddress {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let hex = |part: &str, digits: usize| {
            part.len() == digits && part.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
        };
        let parts = || {
            let (domain, rest) = text.split_once(':')?;
            let (bus, rest) = rest.split_once(':')?;
            let (device, function) = rest.split_once('.')?;
            Some((domain, bus, device, function))
        };
        match parts() {
            Some((domain, bus, device, function))
                if hex(domain, 4) && hex(bus, 2) && hex(device, 2) && matches!(function.as_bytes(), [b'0'..=b'7']) =>
            {
                Ok(Self(text.to_owned()))
            }
            _ => Err(Error::invalid("pci_address", format!("{text:?} is not of the form 0000:00:05.0"))),
        }
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl PciAddress {
    fn directory(&self) -> PathBuf {
        Path::new(PCI_DEVICES).join(&self.0)
    }
}

/// Whether a device can be used, and as what.
#[derive(Debug, PartialEq, Eq)]
enum Presence {
    Absent,
    /// Seen on the bus; its driver is still at it.
    Waiting,
    /// Usable; a disk has a device node.
    Ready(Option<String>),
}

/// Scans for a device and waits until it can be used. Answers the path of its node, if it has one.
pub(crate) async fn add(address: &PciAddress) -> Result<Option<String>> {
    let uevents = Uevents::open().step("listen to the kernel's events")?;
    let deadline = Instant::now() + APPEAR_TIMEOUT;
    let mut scan_again = Instant::now();
    loop {
        if presence(&address.directory(), Path::new("/dev")) == Presence::Absent && scan_again <= Instant::now() {
            // Probing happens inside this write, which can take milliseconds.
            spawn_blocking(|| fs::write(PCI_RESCAN, "1")).await.step("scan the bus")?.step("scan the bus")?;
            scan_again = Instant::now() + RESCAN_INTERVAL;
        }
        let wake = match presence(&address.directory(), Path::new("/dev")) {
            Presence::Ready(node) => return Ok(node),
            Presence::Waiting => deadline,
            Presence::Absent => deadline.min(scan_again),
        };
        if timeout_at(wake, uevents.next()).await.is_err() && wake == deadline {
            return Err(Error::TimedOut(format!("wait for the device {address}")));
        }
    }
}

/// The device node of a disk, for which it waits.
pub(crate) async fn wait_for_block_device(address: &PciAddress) -> Result<String> {
    add(address).await?.ok_or_else(|| Error::invalid("pci_address", format!("{address} is not a disk")))
}

/// The number of a device node.
pub(crate) fn number(node: &str) -> Result<(u32, u32)> {
    let number = fs::metadata(node).step("look at the device's node")?.rdev();
    Ok((rustix::fs::major(number), rustix::fs::minor(number)))
}

/// Has the kernel let go of a device.
pub(crate) async fn remove(address: &PciAddress) -> Result<()> {
    let directory = address.directory();
    let missing = || Error::NotFound(format!("device {address}"));
    match spawn_blocking(move || fs::write(directory.join("remove"), "1")).await.step("remove the device")? {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(missing()),
        result => result.step("remove the device"),
    }
}

/// Looks at what a driver has made of a PCI device, by its directory in sysfs.
fn presence(directory: &Path, nodes: &Path) -> Presence {
    if !directory.exists() {
        return Presence::Absent;
    }
    let Some(virtio) = child(directory, "virtio") else {
        // Another vendor's device, passed through, is ready once a driver has it or there is none for it. A
        // virtio device (vendor 0x1af4) becomes one with a child of that name.
        let vendor = fs::read_to_string(directory.join("vendor")).unwrap_or_default();
        return if vendor.trim() == "0x1af4" { Presence::Waiting } else { Presence::Ready(None) };
    };
    if !virtio.join("driver").exists() {
        return Presence::Waiting;
    }
    // The type of a virtio device by its id: 2 is a disk (virtio 1.3, section 5).
    let is_disk = fs::read_to_string(virtio.join("device")).is_ok_and(|id| id.trim() == "0x0002");
    if !is_disk {
        return Presence::Ready(None);
    }
    let disk = child(&virtio.join("block"), "").and_then(|disk| Some(disk.file_name()?.to_str()?.to_owned()));
    match disk.map(|name| nodes.join(name)).filter(|node| node.exists()) {
        Some(node) => Presence::Ready(node.to_str().map(str::to_owned)),
        None => Presence::Waiting,
    }
}

/// The first entry of a directory whose name starts so.
fn child(directory: &Path, prefix: &str) -> Option<PathBuf> {
    fs::read_dir(directory)
        .ok()?
        .filter_map(io::Result::ok)
        .find(|entry| entry.file_name().to_str().is_some_and(|name| name.starts_with(prefix)))
        .map(|entry| entry.path())
}

/// The kernel's announcements of devices. Only that there was one counts here: what it says can be looked up.
struct Uevents(AsyncFd<OwnedFd>);

impl Uevents {
    fn open() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::NETLINK, SocketType::DGRAM, flags, Some(KOBJECT_UEVENT))?;
        bind(&socket, &SocketAddrNetlink::new(0, KERNEL_EVENTS))?;
        Ok(Self(crate::sys::watch(socket, Interest::READABLE)?))
    }

    async fn next(&self) {
        let received = self.0.async_io(Interest::READABLE, |socket| {
            let mut event = [0_u8; 4096];
            Ok(recv(socket, &mut event, RecvFlags::empty()).map(|_| ())?)
        });
        // An overrun is an event too: something happened, and a look follows.
        let _ = received.await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_cannot_leave_their_directory() {
        for good in ["0000:00:05.0", "0001:0a:1f.7"] {
            assert_eq!(PciAddress::from_str(good).unwrap().to_string(), good);
        }
        for bad in ["", "00:05.0", "0000:00:05.8", "0000:00:05.0/..", "../0000:00:05.0", "0000:0g:05.0", "0000:00:5.0"]
        {
            assert!(PciAddress::from_str(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_device_is_ready_when_its_driver_and_node_are_there() {
        let directory = tempfile::tempdir().unwrap();
        let (device, nodes) = (directory.path().join("0000:00:05.0"), directory.path().join("dev"));
        let look = || presence(&device, &nodes);
        assert_eq!(look(), Presence::Absent);
        fs::create_dir_all(&device).unwrap();
        fs::create_dir_all(&nodes).unwrap();
        fs::write(device.join("vendor"), "0x1af4\n").unwrap();
        assert_eq!(look(), Presence::Waiting);
        let virtio = device.join("virtio3");
        fs::create_dir_all(virtio.join("block/vdb")).unwrap();
        fs::write(virtio.join("device"), "0x0002\n").unwrap();
        assert_eq!(look(), Presence::Waiting);
        fs::create_dir(virtio.join("driver")).unwrap();
        assert_eq!(look(), Presence::Waiting);
        fs::write(nodes.join("vdb"), "").unwrap();
        assert_eq!(look(), Presence::Ready(nodes.join("vdb").to_str().map(str::to_owned)));
        fs::write(virtio.join("device"), "0x0001\n").unwrap();
        assert_eq!(look(), Presence::Ready(None));
        fs::write(device.join("vendor"), "0x10de\n").unwrap();
        fs::remove_dir_all(&virtio).unwrap();
        assert_eq!(look(), Presence::Ready(None));
    }
}
