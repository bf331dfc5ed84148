//! Block devices: in the guest each is a disk with a number of its own, and the host's numbers mean something else there.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use hull_sandbox::disks::{GuestDevice, HostDevice};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, Spec};

use crate::error::{Error, Result};

/// What a device of the host is in the guest.
pub(crate) type Numbers = [(HostDevice, GuestDevice)];

/// Devices that every container has without asking.
const USUAL: [&str; 6] = ["/dev/full", "/dev/null", "/dev/random", "/dev/tty", "/dev/urandom", "/dev/zero"];

/// The block devices that a container asks for. Those that it is given only because it is given all of the host's are taken out: each of
/// them comes once, at its path on the host. One that is asked for as well comes twice where that is its path in the container too.
///
/// # Errors
///
/// Names a device whose number is none.
pub(crate) fn take_block_devices(spec: &mut Spec) -> Result<Vec<HostDevice>> {
    let Some(linux) = spec.linux_mut() else { return Ok(Vec::new()) };
    let Some(devices) = linux.devices() else { return Ok(Vec::new()) };
    let has_all = has_all_of_the_hosts(devices);
    let rules = linux.resources().as_ref().and_then(|resources| resources.devices().clone()).unwrap_or_default();
    let mut wanted = Vec::new();
    let mut kept: Vec<LinuxDevice> = Vec::new();
    for (index, device) in devices.iter().enumerate() {
        let is_again = |other: &LinuxDevice| other.path() == device.path();
        // The first counts, as with runc.
        if kept.iter().any(is_again) {
            continue;
        }
        if device.typ() == LinuxDeviceType::B {
            let (major, minor) = number(device)?;
            if has_all && is_the_hosts(device, major, minor) && !devices[index + 1..].iter().any(is_again) {
                continue;
            }
            let host = HostDevice { major, minor, read_only: !may_write(&rules, device) };
            if !wanted.contains(&host) {
                wanted.push(host);
            }
        }
        kept.push(device.clone());
    }
    linux.set_devices(Some(kept));
    Ok(wanted)
}

/// Whether these have all of the host's among them, which a privileged container is given unless containerd is told not to. Nothing else in
/// a specification says so.
fn has_all_of_the_hosts(devices: &[LinuxDevice]) -> bool {
    USUAL.iter().all(|usual| devices.iter().any(|device| device.path() == Path::new(usual)))
}

fn number(device: &LinuxDevice) -> Result<(u32, u32)> {
    match (u32::try_from(device.major()), u32::try_from(device.minor())) {
        (Ok(major), Ok(minor)) => Ok((major, minor)),
        _ => Err(Error::Invalid(format!("the block device {} has no number", device.path().display()))),
    }
}

/// Whether the host has a device's node, and no link to it, at the device's path.
fn is_the_hosts(device: &LinuxDevice, major: u32, minor: u32) -> bool {
    std::fs::symlink_metadata(device.path()).is_ok_and(|metadata| {
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
    let Some(linux) = spec.linux_mut() else { return };
    for device in linux.devices_mut().iter_mut().flatten().filter(|device| device.typ() == LinuxDeviceType::B) {
        let number = (Some(device.major()), Some(device.minor()));
        if let Some(guest) = guest_number(numbers, number) {
            device.set_major(guest.major.into()).set_minor(guest.minor.into());
        }
    }
    if let Some(rules) = linux.resources_mut().as_mut().and_then(|resources| resources.devices_mut().as_mut()) {
        renumber_rules(rules, numbers);
    }
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

    /// Some block device of the machine that the test runs on, as containerd finds it.
    fn of_this_machine() -> Option<LinuxDevice> {
        let nodes = std::fs::read_dir("/dev").ok()?.flatten();
        nodes.filter(|node| node.file_type().is_ok_and(|kind| kind.is_block_device())).find_map(|node| {
            let number = node.metadata().ok()?.rdev();
            let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
            serde_json::from_value(json!({ "path": node.path(), "type": "b", "major": major, "minor": minor })).ok()
        })
    }

    /// What is taken of these devices, and the paths of those that stay, of a container that has nothing masked.
    fn taken(devices: impl IntoIterator<Item = Value>) -> (usize, Vec<String>) {
        let devices = Value::Array(devices.into_iter().collect());
        let mut spec = spec(&json!([]), &devices, &json!([{ "allow": true, "access": "rwm" }]));
        let taken = take_block_devices(&mut spec).unwrap();
        let kept = spec.linux().as_ref().unwrap().devices().as_ref().unwrap();
        (taken.len(), kept.iter().map(|device| device.path().display().to_string()).collect())
    }

    fn usual() -> impl Iterator<Item = Value> {
        USUAL.iter().map(|path| json!({ "path": path, "type": "c", "major": 1, "minor": 3 }))
    }

    #[test]
    fn of_all_the_hosts_devices_a_container_keeps_the_block_devices_that_it_asked_for() {
        let Some(host) = of_this_machine() else {
            eprintln!("skipped: this machine has no block device");
            return;
        };
        let path = host.path().display().to_string();
        let host = serde_json::to_value(host).unwrap();
        // It alone is what was asked for, with or without its path changed.
        assert_eq!(taken([host.clone()]), (1, vec![path.clone()]));
        let mut elsewhere = host.clone();
        elsewhere["path"] = json!("/dev/xvda");
        let only_usual: Vec<String> = USUAL.map(str::to_owned).into();
        let with = |path: &str| [&[path.to_owned()], &only_usual[..]].concat();
        // All are the host's.
        assert_eq!(taken(usual().chain([host.clone()])), (0, only_usual.clone()));
        // It is asked for as well, at another path or at its own.
        assert_eq!(taken([elsewhere].into_iter().chain(usual()).chain([host.clone()])), (1, with("/dev/xvda")));
        assert_eq!(taken([host.clone()].into_iter().chain(usual()).chain([host])), (1, with(&path)));
    }

    #[test]
    fn a_character_device_that_comes_twice_is_made_once() {
        let fuse = json!({ "path": "/dev/fuse", "type": "c", "major": 10, "minor": 229 });
        assert_eq!(taken([fuse.clone(), fuse]), (0, vec!["/dev/fuse".to_owned()]));
    }

    #[test]
    fn a_device_without_a_number_is_named() {
        let mut negative = disk();
        negative["major"] = json!(-1);
        let mut spec = spec(&json!([]), &json!([negative]), &json!([]));
        assert!(take_block_devices(&mut spec).unwrap_err().to_string().contains("/dev/xvda"));
    }
}
