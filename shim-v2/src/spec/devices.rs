//! Block devices: in the guest each is a disk with a number of its own, and the host's numbers mean something else there.

use std::os::unix::fs::{FileTypeExt, MetadataExt};

use hull_sandbox::disks::{GuestDevice, HostDevice};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, Mount, Spec};

use crate::error::{Error, Result};

/// What a device of the host is in the guest.
pub(crate) type Numbers = [(HostDevice, GuestDevice)];

/// The block devices that a container asks for. A privileged one is given all that the host has without having asked, each at its path
/// on the host: those are taken out.
///
/// # Errors
///
/// Names a device whose number is none.
pub(crate) fn take_block_devices(spec: &mut Spec) -> Result<Vec<HostDevice>> {
    let Some(linux) = spec.linux_mut() else { return Ok(Vec::new()) };
    let privileged = linux.masked_paths().as_ref().is_none_or(Vec::is_empty);
    let rules = linux.resources().as_ref().and_then(|resources| resources.devices().clone()).unwrap_or_default();
    let mut wanted = Vec::new();
    let mut kept = Vec::new();
    for device in linux.devices().iter().flatten() {
        if device.typ() == LinuxDeviceType::B {
            let (major, minor) = number(device)?;
            if privileged && is_the_hosts(device, major, minor) {
                continue;
            }
            let host = HostDevice { major, minor, read_only: !may_write(&rules, device) };
            if !wanted.contains(&host) {
                wanted.push(host);
            }
        }
        kept.push(device.clone());
    }
    if linux.devices().is_some() {
        linux.set_devices(Some(kept));
    }
    Ok(wanted)
}

fn number(device: &LinuxDevice) -> Result<(u32, u32)> {
    match (u32::try_from(device.major()), u32::try_from(device.minor())) {
        (Ok(major), Ok(minor)) => Ok((major, minor)),
        _ => Err(Error::Invalid(format!("the block device {} has no number", device.path().display()))),
    }
}

fn is_the_hosts(device: &LinuxDevice, major: u32, minor: u32) -> bool {
    std::fs::metadata(device.path()).is_ok_and(|metadata| {
        metadata.file_type().is_block_device()
            && (rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev())) == (major, minor)
    })
}

/// Whether a rule for this very device, or for all, lets the container write to it.
fn may_write(rules: &[LinuxDeviceCgroup], device: &LinuxDevice) -> bool {
    let number = |number: Option<i64>| number.filter(|number| *number >= 0);
    let fits = |rule: &&LinuxDeviceCgroup| {
        matches!(rule.typ(), None | Some(LinuxDeviceType::A | LinuxDeviceType::B))
            && number(rule.major()).is_none_or(|major| major == device.major())
            && number(rule.minor()).is_none_or(|minor| minor == device.minor())
    };
    let access = |rule: &LinuxDeviceCgroup| rule.access().clone().unwrap_or_default();
    // The last word on writing counts.
    let last = rules.iter().rev().filter(fits).find(|rule| access(rule).is_empty() || access(rule).contains('w'));
    last.is_some_and(LinuxDeviceCgroup::allow)
}

/// Gives the container's block devices, and the rules for them, the guest's numbers.
pub(crate) fn renumber(spec: &mut Spec, numbers: &Numbers) {
    let mut bound = Vec::new();
    let Some(linux) = spec.linux_mut() else { return };
    if let Some(devices) = linux.devices_mut() {
        // The container's root is the host's by virtio-fs, and the VMM has no right to make nodes there.
        devices.retain(|device| {
            let guest = guest_number(numbers, (Some(device.major()), Some(device.minor())));
            match guest.filter(|_| device.typ() == LinuxDeviceType::B && !device.path().starts_with("/dev")) {
                Some(guest) => bound.push((guest.path.clone(), device.path().clone())),
                None => return true,
            }
            false
        });
        for device in devices.iter_mut().filter(|device| device.typ() == LinuxDeviceType::B) {
            let number = (Some(device.major()), Some(device.minor()));
            if let Some(guest) = guest_number(numbers, number) {
                device.set_major(guest.major.into()).set_minor(guest.minor.into());
            }
        }
    }
    if let Some(rules) = linux.resources_mut().as_mut().and_then(|resources| resources.devices_mut().as_mut()) {
        renumber_rules(rules, numbers);
    }
    let mounts = bound.into_iter().map(|(node, path)| {
        let mut mount = Mount::default();
        mount.set_typ(Some("bind".into())).set_source(Some(node.into())).set_destination(path);
        mount.set_options(Some(vec!["bind".into(), "rw".into()]));
        mount
    });
    let mounts: Vec<Mount> = spec.mounts().iter().flatten().cloned().chain(mounts).collect();
    spec.set_mounts(Some(mounts));
}

/// Gives rules the guest's numbers. Those for other block devices of the host go: in the guest their numbers are other devices'.
pub(crate) fn renumber_rules(rules: &mut Vec<LinuxDeviceCgroup>, numbers: &Numbers) {
    rules.retain_mut(|rule| {
        let is_numbered = [rule.major(), rule.minor()].into_iter().flatten().any(|number| number >= 0);
        if rule.typ() != Some(LinuxDeviceType::B) || !is_numbered {
            return true;
        }
        let Some(guest) = guest_number(numbers, (rule.major(), rule.minor())) else { return false };
        rule.set_major(Some(guest.major.into())).set_minor(Some(guest.minor.into()));
        true
    });
}

fn guest_number(numbers: &Numbers, (major, minor): (Option<i64>, Option<i64>)) -> Option<&GuestDevice> {
    let is_it = |host: &HostDevice| (Some(host.major.into()), Some(host.minor.into())) == (major, minor);
    numbers.iter().find(|(host, _)| is_it(host)).map(|(_, guest)| guest)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn spec(masked: &Value, devices: &Value, rules: &Value) -> Spec {
        let spec = json!({ "ociVersion": "1.1.0", "linux": {
            "maskedPaths": masked, "devices": devices, "resources": { "devices": rules },
        } });
        serde_json::from_value(spec).unwrap()
    }

    fn disk() -> Value {
        json!({ "path": "/dev/xvda", "type": "b", "major": 7, "minor": 3 })
    }

    fn rules(access: &str) -> Value {
        json!([
            { "allow": false, "access": "rwm" },
            { "allow": true, "type": "b", "major": 7, "minor": 3, "access": access },
            { "allow": true, "type": "b", "major": 8, "minor": 1, "access": "rwm" },
            { "allow": true, "type": "c", "major": 7, "minor": 3, "access": "r" },
        ])
    }

    #[test]
    fn a_device_is_as_writable_as_its_rules_say() {
        for (access, read_only) in [("rwm", false), ("rw", false), ("r", true), ("mr", true)] {
            let mut spec = spec(&json!(["/proc/kcore"]), &json!([disk()]), &rules(access));
            let taken = take_block_devices(&mut spec).unwrap();
            assert_eq!(taken, [HostDevice { major: 7, minor: 3, read_only }], "{access}");
        }
        // What is not allowed at all cannot be written either.
        let mut spec = spec(&json!(["/proc/kcore"]), &json!([disk()]), &json!([]));
        assert!(take_block_devices(&mut spec).unwrap()[0].read_only);
    }

    #[test]
    fn devices_and_rules_get_the_guests_numbers_and_others_go() {
        let mut spec = spec(&json!(["/proc/kcore"]), &json!([disk()]), &rules("rwm"));
        let host = take_block_devices(&mut spec).unwrap()[0];
        renumber(&mut spec, &[(host, GuestDevice { path: "/dev/vdb".into(), major: 253, minor: 16 })]);
        let spec = serde_json::to_value(spec).unwrap();
        assert_eq!(spec["linux"]["devices"][0]["path"], "/dev/xvda");
        assert_eq!(
            (&spec["linux"]["devices"][0]["major"], &spec["linux"]["devices"][0]["minor"]),
            (&json!(253), &json!(16))
        );
        let rules = spec["linux"]["resources"]["devices"].as_array().unwrap();
        let numbers: Vec<_> = rules.iter().map(|rule| (&rule["type"], &rule["major"], &rule["minor"])).collect();
        assert_eq!(numbers.len(), 3);
        assert_eq!(numbers[1], (&json!("b"), &json!(253), &json!(16)));
        assert_eq!(numbers[2], (&json!("c"), &json!(7), &json!(3)));
    }

    #[test]
    fn a_path_outside_of_dev_is_a_mount_of_the_guests_node() {
        let mut disk = disk();
        disk["path"] = json!("/srv/disk");
        let mut spec = spec(&json!(["/proc/kcore"]), &json!([disk]), &rules("rwm"));
        let host = take_block_devices(&mut spec).unwrap()[0];
        renumber(&mut spec, &[(host, GuestDevice { path: "/dev/vdb".into(), major: 253, minor: 16 })]);
        let spec = serde_json::to_value(spec).unwrap();
        assert_eq!(spec["linux"]["devices"], json!([]));
        let mount = &spec["mounts"][0];
        assert_eq!((&mount["source"], &mount["destination"]), (&json!("/dev/vdb"), &json!("/srv/disk")));
    }

    #[test]
    fn a_privileged_container_keeps_what_is_not_simply_the_hosts() {
        let mut spec = spec(&json!([]), &json!([disk()]), &json!([{ "allow": true, "access": "rwm" }]));
        // No device of the host is at that path with that number.
        let taken = take_block_devices(&mut spec).unwrap();
        assert_eq!(taken, [HostDevice { major: 7, minor: 3, read_only: false }]);
        let mut negative = disk();
        negative["major"] = json!(-1);
        let mut spec = self::spec(&json!([]), &json!([negative]), &json!([]));
        assert!(take_block_devices(&mut spec).unwrap_err().to_string().contains("/dev/xvda"));
    }
}
