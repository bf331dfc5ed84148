//! What cannot be: one line that names cause and remedy, status 125, nothing left behind.

use std::fs;
use std::path::Path;

use fixture::{busybox, hull};

#[test]
fn no_image() {
    hull(["run", "--rm"]).run().failed(&["no image", "--rootfs"]);
    hull(["run", "--rm", "no-such-image", "true"]).run().failed(&["no-such-image"]);
    hull(["run", "--rm", "/no/such/layout", "true"]).run().failed(&["/no/such/layout"]);
}

#[test]
fn sizes_that_cannot_be() {
    let image = busybox();
    for (option, value, words) in [
        ("--cpus", "0", ["CPUs", "1 to 64"]),
        ("--cpus", "1000", ["CPUs", "1 to 64"]),
        ("--memory", "1", ["memory", "64 MiB"]),
        ("--memory", "99999999", ["memory", "ask for less"]),
    ] {
        hull(["run", "--rm", option, value, &image, "true"]).run().failed(&words);
    }
}

#[test]
fn a_missing_command() {
    hull(["run", "--rm", "--memory", "128", &busybox(), "no-such-command"]).run().failed(&["no-such-command"]);
}

#[test]
fn an_unknown_user() {
    hull(["run", "--rm", "-u", "nobody-knows", &busybox(), "true"]).run().failed(&["nobody-knows"]);
}

#[test]
fn a_missing_volume_source() {
    hull(["run", "--rm", "-v", "/no/such/dir:/v", &busybox(), "true"]).run().failed(&["/no/such/dir"]);
}

#[test]
fn a_name_in_use() {
    let first = fixture::Detached::start(["--name", "taken", "--memory", "128", &busybox(), "sleep", "1000"]);
    hull(["run", "--rm", "--name", "taken", &busybox(), "true"]).run().failed(&["taken", "in use"]);
    drop(first);
}

#[test]
fn a_socket_path_too_long() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let state = dir.path().join("s".repeat(90));
    hull(["run", "--rm", &busybox(), "true"]).env("HULL_STATE_DIR", &state).run().failed(&["socket", "107"]);
    assert!(is_empty(&state));
}

#[test]
fn a_guest_that_never_answers() {
    let said = hull([
        "run",
        "--rm",
        "--memory",
        "128",
        "--boot-timeout",
        "3",
        "--kernel-params",
        "rdinit=/nothing root=/dev/none rootwait",
        &busybox(),
        "true",
    ]);
    said.run().failed(&["did not answer within 3 s", "--boot-timeout"]);
}

#[test]
fn a_kernel_that_panics() {
    let said = hull(["run", "--rm", "--memory", "128", "--kernel-params", "init=/nothing", &busybox(), "true"]);
    said.run().failed(&["virtual machine", "panic"]);
}

#[test]
fn a_kernel_that_is_none() {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), "not a kernel").unwrap();
    hull(["run", "--rm", &busybox(), "true"]).env("HULL_KERNEL", file.path()).run().failed(&["kernel"]);
    hull(["run", "--rm", &busybox(), "true"])
        .env("HULL_KERNEL", "/no/kernel")
        .run()
        .failed(&["/no/kernel", "HULL_KERNEL"]);
}

#[test]
fn a_corrupt_layer() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let copy = dir.path().join("image");
    let copied = std::process::Command::new("cp").args(["-rL", &busybox(), copy.to_str().unwrap()]).status().unwrap();
    assert!(copied.success());
    let blobs = fs::read_dir(copy.join("blobs/sha256")).unwrap().map(|entry| entry.unwrap().path());
    let layer = blobs.max_by_key(|path| fs::metadata(path).unwrap().len()).unwrap();
    let mut bytes = fs::read(&layer).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&layer, bytes).unwrap();
    let data = dir.path().join("data");
    hull(["run", "--rm", copy.to_str().unwrap(), "true"]).env("HULL_DATA_DIR", &data).run().failed(&["layer sha256:"]);
    assert!(is_empty(&data.join("layers")));
}

#[test]
fn a_disk_that_fills_up_while_an_image_is_unpacked() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let data = dir.path().join("data");
    fs::create_dir(&data).unwrap();
    // What is left on the disk is looked at while it is still mounted.
    let setup = format!(
        "mount -t tmpfs -o size=1m none {data}
         status=0; \"$@\" || status=$?
         find {data} -mindepth 2 -not -name '.*' >{dir}/left
         exit $status",
        data = data.display(),
        dir = dir.path().display(),
    );
    let said = hull(["run", "--rm", &busybox(), "true"]).env("HULL_DATA_DIR", &data).after(&setup).run();
    said.failed(&["the disk is full", "use a larger disk"]);
    assert_eq!(fs::read_to_string(dir.path().join("left")).unwrap(), "");
}

#[test]
fn no_permission_on_kvm() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    // A device node on a file system on which nobody may open device nodes.
    let setup = format!(
        "mount -t tmpfs -o nodev none {dir}
         mknod {dir}/kvm c 10 232
         mount --bind {dir}/kvm /dev/kvm",
        dir = dir.path().display(),
    );
    let said = hull(["run", "--rm", "--memory", "128", &busybox(), "true"]).after(&setup).run();
    said.failed(&["/dev/kvm", "ermission denied", "group"]);
}

/// Whether a directory has nothing in it but locks, or is not there.
fn is_empty(dir: &Path) -> bool {
    let Ok(entries) = fs::read_dir(dir) else { return true };
    entries.map(|entry| entry.unwrap().file_name()).all(|name| name.to_string_lossy().starts_with('.'))
}
