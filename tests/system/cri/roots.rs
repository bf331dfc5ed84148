//! Pods whose containers have roots on disks, by the snapshotter blockfile.

use fixture::cri::api::Mount;
use fixture::cri::{Container, Pod, eventually};

const HANDLER: &str = "kata-blockfile";

#[test]
fn a_container_with_a_root_on_a_disk_is_as_any_other() {
    let pod = Pod::start(HANDLER, |_| {});
    let volume = tempfile::tempdir_in("/var/tmp").unwrap();
    std::fs::write(volume.path().join("file"), "of the node\n").unwrap();
    let one = pod.run("one", "echo out; exec sleep 1000", |config| {
        let mut mount = Mount::new();
        mount.host_path = volume.path().to_str().unwrap().to_owned();
        mount.container_path = "/volume".to_owned();
        config.mounts.push(mount);
    });
    one.logs("stdout F out");
    let mounts = one.exec("grep ' / ' /proc/mounts");
    assert!(mounts.starts_with("/dev/vd") && mounts.contains(" / ext4 rw"), "{mounts}");
    // What is bound into it comes from the share all the same.
    assert_eq!(one.exec("cat /volume/file; hostname"), "of the node\nthe-pod");
    one.exec("echo changed >/file");
    let two = pod.run("two", "exec sleep 1000", |_| {});
    assert_eq!(two.exec("cat /file 2>/dev/null || echo none"), "none");
    assert_eq!(disks(&two), 2);
    // With its container a disk goes.
    one.stop(0);
    one.remove();
    eventually("the disk of the one that went is gone", || match disks(&two) {
        1 => Ok(()),
        count => Err(format!("{count} disks")),
    });
    let again = pod.run("one", "exec sleep 1000", |_| {});
    assert_eq!(again.exec("cat /file 2>/dev/null || echo none"), "none");
    pod.end();
}

/// How many disks the guest has.
fn disks(container: &Container) -> usize {
    container.exec("ls /sys/block | grep -c ^vd || true").parse().unwrap()
}
