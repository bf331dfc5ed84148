//! Block devices in containers (`volumeDevices`).

use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};

use fixture::cri::api::{ContainerConfig, Device};
use fixture::cri::{Container, Pod, eventually, handler_and_runc, is_hull};
use fixture::netns::host;

/// A disk of the node's; gone when dropped.
struct Loop {
    node: String,
    image: tempfile::NamedTempFile,
}

impl Loop {
    fn new() -> Self {
        Self::with("")
    }

    /// One that was made with an option of losetup(8).
    fn with(option: &str) -> Self {
        let image = tempfile::NamedTempFile::new_in("/var/tmp").unwrap();
        image.as_file().set_len(4 << 20).unwrap();
        let node = host(&format!("losetup --find --show {option} {}", image.path().display())).trim().to_owned();
        Self { node, image }
    }

    /// What is on it at `offset`.
    fn read(&self, offset: u64) -> [u8; 8] {
        host(&format!("blockdev --flushbufs {}", self.node));
        let mut bytes = [0; 8];
        self.image.as_file().read_exact_at(&mut bytes, offset).unwrap();
        bytes
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = std::process::Command::new("losetup").args(["--detach", &self.node]).status();
    }
}

fn device(config: &mut ContainerConfig, host: &str, container: &str, permissions: &str) {
    let mut device = Device::new();
    (device.host_path, device.container_path) = (host.to_owned(), container.to_owned());
    permissions.clone_into(&mut device.permissions);
    config.devices.push(device);
}

#[test]
fn a_block_device_is_a_disk_of_the_guests_at_the_path_asked_for() {
    for handler in handler_and_runc() {
        let disk = Loop::new();
        let pod = Pod::start(handler, |_| {});
        let writer = pod.run("writer", "sleep 1000", |config| device(config, &disk.node, "/dev/data", "mrw"));
        assert_eq!(writer.exec("test -b /dev/data && blockdev --getsize64 /dev/data"), "4194304", "{handler}");
        writer.exec("printf inside01 | dd of=/dev/data bs=8 seek=512 conv=fsync 2>/dev/null");
        assert_eq!(&disk.read(4096), b"inside01", "{handler}");
        // Another container of the pod sees the same, at a path of its own, and may not write to it.
        let reader = pod.run("reader", "sleep 1000", |config| device(config, &disk.node, "/srv/disk", "mr"));
        assert_eq!(reader.exec("dd if=/srv/disk bs=8 skip=512 count=1 2>/dev/null"), "inside01", "{handler}");
        writer.exec("printf inside02 | dd of=/dev/data bs=8 seek=512 conv=fsync 2>/dev/null");
        assert_eq!(reader.exec("dd if=/srv/disk bs=8 skip=512 count=1 2>/dev/null"), "inside02", "{handler}");
        let refused = reader.try_exec("printf x >/srv/disk", 0).unwrap();
        assert!(refused.code != 0 && refused.stderr.contains("not permitted"), "{handler}: {refused:?}");
        // Nor is it there for a container that has not asked, even under the number that it has in the guest.
        let number = writer.exec("stat -c '%t %T' /dev/data");
        let [major, minor] = number.split(' ').collect::<Vec<_>>()[..] else { panic!("{number}") };
        let other = pod.run("other", "sleep 1000", |_| {});
        let script = format!("mknod /disk b $((0x{major})) $((0x{minor})) && head -c1 /disk");
        let refused = other.try_exec(&script, 0).unwrap();
        assert!(refused.code != 0 && refused.stderr.contains("not permitted"), "{handler}: {refused:?}");

        // It grows with the node's device, and who expands a volume tells nobody but the kernel.
        disk.image.as_file().set_len(8 << 20).unwrap();
        host(&format!("losetup --set-capacity {}", disk.node));
        eventually("the disk grows", || match writer.exec("blockdev --getsize64 /dev/data").as_str() {
            "8388608" => Ok(()),
            size => Err(format!("{handler}: it has {size} bytes")),
        });

        // With its last container the node has the disk back.
        for container in [writer, reader] {
            container.stop(0);
            container.remove();
        }
        eventually("nobody has the disk open", || match users_of(&disk.node) {
            0 => Ok(()),
            count => Err(format!("{count} have")),
        });
        let again = pod.run("again", "sleep 1000", |config| device(config, &disk.node, "/dev/data", "mr"));
        assert_eq!(again.exec("dd if=/dev/data bs=8 skip=512 count=1 2>/dev/null"), "inside02", "{handler}");
        one_that_comes_later_may_write(handler, &pod, &disk, &again);
        character_devices_are_where_they_are_asked_for(handler, &pod);
        pod.end();
    }
}

/// While one that only reads has the disk, which the guest cannot write to by then.
fn one_that_comes_later_may_write(handler: &str, pod: &Pod, disk: &Loop, reader: &Container) {
    let late = pod.run("late", "sleep 1000", |config| device(config, &disk.node, "/dev/data", "mrw"));
    late.exec("printf inside03 | dd of=/dev/data bs=8 seek=512 conv=fsync 2>/dev/null");
    assert_eq!(&disk.read(4096), b"inside03", "{handler}");
    // Who opens it anew sees that, and may still not write.
    assert_eq!(reader.exec("dd if=/dev/data bs=8 skip=512 count=1 2>/dev/null"), "inside03", "{handler}");
    let refused = reader.try_exec("printf x >/dev/data", 0).unwrap();
    assert!(refused.code != 0 && refused.stderr.contains("not permitted"), "{handler}: {refused:?}");
    // The end of the one that reads is none for the other.
    reader.stop(0);
    reader.remove();
    assert_eq!(late.exec("dd if=/dev/data bs=8 skip=512 count=1 2>/dev/null"), "inside03", "{handler}");
}

fn character_devices_are_where_they_are_asked_for(handler: &str, pod: &Pod) {
    let container = pod.run("characters", "sleep 1000", |config| {
        device(config, "/dev/net/tun", "/device/of/tun", "rwm");
        device(config, "/dev/fuse", "/dev/fuse", "r");
    });
    let script = "test -c /device/of/tun && (: <>/device/of/tun) && (: </dev/fuse) && stat -c '%t:%T' /device/of/tun";
    assert_eq!(container.exec(script), "a:c8", "{handler}");
    let refused = container.try_exec(": >/dev/fuse", 0).unwrap();
    assert!(refused.code != 0 && refused.stderr.contains("not permitted"), "{handler}: {refused:?}");
}

#[test]
fn a_block_device_that_is_read_only_stays_so_whatever_the_container_may() {
    for handler in handler_and_runc() {
        let disk = Loop::with("--read-only");
        let pod = Pod::start(handler, |config| {
            config.security().privileged = true;
        });
        // At the node's own path too, which for one that is privileged all of the node's devices are at.
        let same = disk.node.as_str();
        for (name, privileged, permissions, path) in
            [("plain", false, "mrw", same), ("privileged", true, "mrw", same), ("reader", true, "mr", "/dev/data")]
        {
            let container = pod.run(name, "sleep 1000", |config| {
                config.security().privileged = privileged;
                device(config, &disk.node, path, permissions);
                device(config, "/dev/fuse", "/dev/fuse", "rwm");
            });
            assert_eq!(container.exec(&format!("head -c 4194304 {path} | wc -c")), "4194304", "{handler}: {name}");
            if is_hull(handler) {
                assert_eq!(container.exec("find /dev -type b"), path, "{name}: of the node's it has this one alone");
            }
            // What a privileged container can do to have its way.
            let script = format!("blockdev --setrw {path} 2>/dev/null; printf inside | dd of={path} conv=fsync");
            let refused = container.try_exec(&script, 0).unwrap();
            assert!(
                ["not permitted", "Read-only", "denied"].iter().any(|word| refused.stderr.contains(word)),
                "{handler}: {name}: {refused:?}"
            );
            assert_eq!(disk.read(0), [0; 8], "{handler}: {name}");
        }
        pod.end();
    }
}

/// Descriptors of all processes that are a device.
fn users_of(node: &str) -> usize {
    let number = std::fs::metadata(node).unwrap().rdev();
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let descriptors = processes.filter_map(|process| std::fs::read_dir(process.path().join("fd")).ok());
    descriptors
        .flatten()
        .flatten()
        // By its number: what a VMM only reads it has through a mount that is nowhere, with another path.
        .filter(|fd| {
            std::fs::metadata(fd.path()).is_ok_and(|at| at.file_type().is_block_device() && at.rdev() == number)
        })
        .count()
}
