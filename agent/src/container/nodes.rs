//! Devices of a container at paths outside of `/dev`. libcontainer makes none there, and in a root that is the host's by virtio-fs nobody
//! can make one. So each is a bind mount of the guest's own node.

use std::path::{Path, PathBuf};

use oci_spec::runtime::{Linux, LinuxDevice, LinuxDeviceType, Mount};

use crate::error::{Error, Result};

/// Where the kernel tells its devices by their numbers.
pub(super) const NUMBERS: &str = "/sys/dev";

/// Takes the devices outside of `/dev` out of a specification, and answers the mounts in their place. `numbers` is [`NUMBERS`].
///
/// # Errors
///
/// Names a device that the guest does not have.
pub(super) fn bind(linux: &mut Linux, numbers: &Path) -> Result<Vec<Mount>> {
    let Some(devices) = linux.devices_mut() else { return Ok(Vec::new()) };
    let (inside, outside) = devices.drain(..).partition(|device| device.path().starts_with("/dev"));
    *devices = inside;
    outside.iter().map(|device| bound(device, numbers)).collect()
}

fn bound(device: &LinuxDevice, numbers: &Path) -> Result<Mount> {
    let node = node(device, numbers).ok_or_else(|| {
        let (path, major, minor) = (device.path().display(), device.major(), device.minor());
        Error::invalid("linux.devices", format!("{path}: the guest has no device with the number {major}:{minor}"))
    })?;
    let mut mount = Mount::default();
    mount.set_typ(Some("bind".into())).set_source(Some(node)).set_destination(device.path().clone());
    mount.set_options(Some(vec!["bind".into(), "rw".into()]));
    Ok(mount)
}

/// The guest's node for a device.
fn node(device: &LinuxDevice, numbers: &Path) -> Option<PathBuf> {
    let kind = match device.typ() {
        LinuxDeviceType::B => "block",
        LinuxDeviceType::C | LinuxDeviceType::U => "char",
        _ => return None,
    };
    let event = numbers.join(kind).join(format!("{}:{}/uevent", device.major(), device.minor()));
    let event = std::fs::read_to_string(event).ok()?;
    event.lines().find_map(|line| line.strip_prefix("DEVNAME=")).map(|name| Path::new("/dev").join(name))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn linux(devices: &Value) -> Linux {
        serde_json::from_value(json!({ "devices": devices })).unwrap()
    }

    #[test]
    fn a_device_outside_of_dev_is_a_mount_of_the_guests_node() {
        let numbers = tempfile::tempdir().unwrap();
        for (number, name) in [("block/253:16", "vdb"), ("char/10:200", "net/tun")] {
            let known = numbers.path().join(number);
            std::fs::create_dir_all(&known).unwrap();
            std::fs::write(known.join("uevent"), format!("MAJOR=1\nDEVNAME={name}\nDEVMODE=0666\n")).unwrap();
        }
        let mut linux = linux(&json!([
            { "path": "/srv/disk", "type": "b", "major": 253, "minor": 16 },
            { "path": "/dev/own", "type": "c", "major": 1, "minor": 3 },
            { "path": "/device/tun", "type": "c", "major": 10, "minor": 200 },
        ]));
        let mounts = serde_json::to_value(bind(&mut linux, numbers.path()).unwrap()).unwrap();
        let mount = |source: &str, destination: &str| json!({ "type": "bind", "source": source, "destination": destination, "options": ["bind", "rw"] });
        assert_eq!(mounts, json!([mount("/dev/vdb", "/srv/disk"), mount("/dev/net/tun", "/device/tun")]));
        let kept = linux.devices().as_ref().unwrap();
        assert_eq!(kept.iter().map(LinuxDevice::path).collect::<Vec<_>>(), [Path::new("/dev/own")]);
    }

    #[test]
    fn one_that_the_guest_does_not_have_is_named() {
        let numbers = tempfile::tempdir().unwrap();
        for kind in ["b", "c", "p"] {
            let mut linux = linux(&json!([{ "path": "/x", "type": kind, "major": 5, "minor": 7 }]));
            let error = bind(&mut linux, numbers.path()).unwrap_err().to_string();
            assert!(error.contains("/x") && error.contains("5:7"), "{error}");
        }
    }
}
