//! What else can be mounted in a container: memory, images, disks, and volumes with other caching.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use fixture::{Hull, Said, busybox, hull};

/// Runs a shell script in the small image with these options.
fn with(options: &[&str], script: &str) -> Said {
    let image = busybox();
    let end = [image.as_str(), "sh", "-c", script];
    Hull::new(["run", "--rm", "--memory", "128"].iter().chain(options).chain(&end)).run()
}

#[test]
fn a_tmpfs_is_memory_of_the_guest_with_the_size_and_mode_it_was_given() {
    let show = "stat -c '%a' /t; grep ' /t ' /proc/mounts | cut -d' ' -f3; df -k /t | tail -1 | awk '{print $2}'";
    assert_eq!(with(&["--tmpfs", "/t:size=1m,mode=1770"], show).ok(), "1770\ntmpfs\n1024");
    let mount = ["--mount", "type=tmpfs,dst=/t,tmpfs-size=2m,tmpfs-mode=700"];
    assert_eq!(with(&mount, show).ok(), "700\ntmpfs\n2048");
    let full =
        "dd if=/dev/zero of=/t/x bs=1k count=2000 2>/dev/null; echo $?; cp /bin/busybox /t/b 2>/dev/null; /t/b true";
    let said = with(&["--tmpfs", "/t:size=1m"], full);
    assert_eq!((said.text().trim(), said.code), ("1", 126), "full, and not to be executed: {}", said.stderr);
}

#[test]
fn shared_memory_has_the_size_it_was_given() {
    let size = "df -k /dev/shm | tail -1 | awk '{print $2}'";
    assert_eq!(with(&[], size).ok(), "65536");
    assert_eq!(with(&["--shm-size", "3m"], size).ok(), "3072");
    assert_eq!(with(&["--shm-size", "3m", "--tmpfs", "/dev/shm:size=1m"], size).ok(), "1024");
}

#[test]
fn limits_hold_for_the_program_and_for_exec() {
    let show = "ulimit -Sn; ulimit -Hn; ulimit -c";
    let limits = ["--ulimit", "nofile=100:200", "--ulimit", "core=0"];
    assert_eq!(with(&limits, show).ok(), "100\n200\n0");
    let image = busybox();
    let container = fixture::Detached::start(["--memory", "128", "--ulimit", "nofile=64:128", &image, "sleep", "1000"]);
    assert_eq!(container.exec(["sh", "-c", "ulimit -Sn; ulimit -Hn"]).run().ok(), "64\n128");
}

#[test]
fn an_image_is_mounted_without_being_changed() {
    let mount = format!("type=image,src={},dst=/i", busybox());
    let script = "/i/bin/busybox echo runs; touch /i/x 2>/dev/null || echo refused";
    assert_eq!(with(&["--mount", &mount], script).ok(), "runs\nrefused");
}

#[test]
fn volumes_work_with_every_caching_at_once() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let volumes = ["never", "auto", "always"].map(|caching| {
        let source = dir.path().join(caching);
        fs::create_dir(&source).unwrap();
        fs::write(source.join("from-host"), caching).unwrap();
        format!("{}:/{caching}:cache={caching}", source.display())
    });
    let options: Vec<&str> = volumes.iter().flat_map(|volume| ["-v", volume]).collect();
    let script = "for c in never auto always; do cat /$c/from-host; echo; echo $c >/$c/from-guest; done";
    assert_eq!(with(&options, script).ok(), "never\nauto\nalways");
    for caching in ["never", "auto", "always"] {
        let written = fs::read_to_string(dir.path().join(caching).join("from-guest")).unwrap();
        assert_eq!(written.trim(), caching);
    }
    let read_only = format!("{}:/v:ro,cache=never", dir.path().display());
    assert_eq!(with(&["-v", &read_only], "touch /v/x 2>/dev/null || echo refused").ok(), "refused");
}

#[test]
fn what_the_host_changes_is_seen_at_once_without_a_cache() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(dir.path().join("value"), "0").unwrap();
    let volume = format!("{}:/v:cache=never", dir.path().display());
    let container = fixture::Detached::start(["--memory", "128", "-v", &volume, &busybox(), "sleep", "1000"]);
    let mut seen = Vec::new();
    for value in 1..4 {
        // Of another length each time, so that a stale size would show.
        fs::write(dir.path().join("value"), "x".repeat(value)).unwrap();
        seen.push(container.exec(["cat", "/v/value"]).run().ok());
    }
    assert_eq!(seen, ["x", "xx", "xxx"]);
}

/// A sparse disk image with an ext4 file system that holds `file`.
fn disk() -> tempfile::TempDir {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    fs::create_dir(dir.path().join("root")).unwrap();
    fs::write(dir.path().join("root/file"), "on the disk").unwrap();
    fs::File::create(dir.path().join("disk.img")).unwrap().set_len(8 << 20).unwrap();
    let [root, image] = ["root", "disk.img"].map(|name| dir.path().join(name));
    let made = Command::new("mkfs.ext4").args(["-q", "-F", "-d"]).args([root, image]).status().unwrap();
    assert!(made.success());
    dir
}

#[test]
fn a_disk_is_a_device_in_the_container_and_can_be_read_only() {
    let dir = disk();
    let image = dir.path().join("disk.img");
    let size = "[ -b /dev/vda ] && wc -c </dev/vda";
    let path = image.to_str().unwrap();
    assert_eq!(with(&["--disk", path], size).ok(), "8388608");
    let write = "dd if=/dev/zero of=/dev/vda bs=512 count=1 conv=fsync 2>/dev/null || echo refused";
    assert_eq!(with(&["--disk", &format!("{path}:ro")], write).ok(), "refused");
    assert_eq!(with(&["--disk", path], "printf mark | dd of=/dev/vda conv=notrunc,fsync 2>/dev/null").ok(), "");
    assert_eq!(&fs::read(&image).unwrap()[..4], b"mark");
    // Without disks there is nothing to open.
    assert_eq!(with(&[], "ls /dev | grep -c ^vd || :").ok(), "0");
}

#[test]
fn a_disk_is_mounted_where_it_is_wanted_and_keeps_what_is_written() {
    let dir = disk();
    let path = dir.path().join("disk.img");
    let mount = format!("type=disk,src={},dst=/data", path.display());
    assert_eq!(with(&["--mount", &mount], "cat /data/file; echo new >/data/new").ok(), "on the disk");
    assert_eq!(
        with(&["--mount", &format!("{mount},ro")], "cat /data/new; touch /data/x 2>&1 | grep -c Read-only").ok(),
        "new\n1"
    );
}

#[test]
fn what_cannot_be_mounted_is_one_line() {
    let image = busybox();
    for (option, value, words) in [
        ("-v", "/var/tmp:/v:cache=sometimes", "never, auto or always"),
        ("--mount", "type=volume,src=a,dst=/a", "no type of mount"),
        ("--mount", "type=image,src=no-such-image,dst=/a", "no image"),
        ("--tmpfs", "/t:size=much", "no size"),
        ("--disk", "/no/such/disk", "cannot be used"),
    ] {
        hull(["run", "--rm", option, value, &image, "true"]).run().failed(&[words]);
    }
}
