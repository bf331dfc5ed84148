//! Volumes of pods that are not simply directories of the node.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use fixture::cri::api::ContainerConfig;
use fixture::cri::{Container, Pod, handler_and_runc, handlers, is_hull};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// What containers see of the emptyDirs in memory of a pod.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    kind: String,
    owner: String,
    size_kib: String,
    through_part: String,
    in_part: String,
    too_much: bool,
    charged: bool,
    after_restart: String,
    read_only: bool,
    found: String,
}

#[test]
fn an_empty_dir_in_memory_is_a_tmpfs_of_the_guests_own() {
    let seen: Vec<Seen> = handler_and_runc().into_iter().map(in_memory).collect();
    for other in &seen[1..] {
        assert_eq!(seen[0], *other);
    }
}

fn in_memory(handler: &str) -> Seen {
    let pod = Pod::start(handler, |_| {});
    let cache = pod.memory_volume("cache", "4m");
    // As for a pod with an fsGroup.
    chown(&cache, Some(0), Some(1234)).unwrap();
    fs::set_permissions(&cache, fs::Permissions::from_mode(0o2770)).unwrap();
    let filled = pod.memory_volume("filled", "4m");
    fs::write(filled.join("before"), "from the node").unwrap();
    // The kubelet makes it before the container that wants it, which can be the first or a later one.
    let part = pod.part_of_volume(&cache, "a part/inner", "reader", 0);

    let writer = pod.run("writer", "sleep 1000", |config| {
        config.mount(&cache, "/cache", false);
        config.mount(&filled, "/filled", false);
    });
    let reader = pod.run("reader", "sleep 1000", |config| {
        config.mount(&part, "/part", false);
        config.mount(&cache, "/cache", true);
    });
    let late_part = pod.part_of_volume(&cache, "late", "late", 0);
    let late = pod.run("late", "sleep 1000", |config| config.mount(&late_part, "/part", false));

    let kind = writer.exec("grep ' /cache ' /proc/mounts | cut -d' ' -f3");
    let owner = writer.exec("stat -c '%a %u %g' /cache");
    let size_kib = writer.exec("df -k /cache | tail -1 | awk '{ print $2 }'");
    writer.exec("echo inside >'/cache/a part/inner/file'; echo later >/cache/late/file");
    let through_part = reader.exec("cat /part/file; cat '/cache/a part/inner/file'");
    late.exec("echo back >>/part/file");
    let in_part = writer.exec("cat /cache/late/file");
    let shmem = "awk '$1 == \"shmem\" { print $2 }' /sys/fs/cgroup/memory.stat";
    let before: u64 = writer.exec(shmem).parse().unwrap();
    writer.exec("dd if=/dev/zero of=/cache/large bs=64k count=32 2>/dev/null");
    let charged = writer.exec(shmem).parse::<u64>().unwrap() >= before + (2 << 20);
    let filling = writer.try_exec("dd if=/dev/zero of=/cache/too-large bs=64k count=64", 0).unwrap();
    let refused = reader.try_exec("echo mine >/cache/mine", 0).unwrap();
    let found = writer.exec("cat /filled/before; echo to the node >/filled/after");
    assert_eq!(fs::read_to_string(filled.join("after")).unwrap(), "to the node\n", "{handler}");
    writer.stop(0);
    writer.remove();
    let again = pod.run("again", "sleep 1000", |config| config.mount(&cache, "/cache", false));
    let after_restart = again.exec("ls /cache; cat /cache/late/file");

    assert_eq!(cache.join("late/file").exists(), !is_hull(handler), "{handler}: the guest's files are in the guest");
    pod.end();
    Seen {
        kind,
        owner,
        size_kib,
        through_part,
        in_part,
        too_much: filling.code != 0 && filling.stderr.contains("No space left"),
        charged,
        after_restart,
        read_only: refused.code != 0 && refused.stderr.contains("Read-only"),
        found,
    }
}

#[test]
fn a_part_of_a_volume_in_memory_does_not_lead_out_of_it() {
    for handler in fixture::cri::handlers() {
        let pod = Pod::start(handler, |_| {});
        let cache = pod.memory_volume("cache", "4m");
        let planter = pod.run("planter", "sleep 1000", |config| config.mount(&cache, "/cache", false));
        planter.exec("ln -s / /cache/escape");
        let part = pod.part_of_volume(&cache, "escape", "victim", 0);
        let refused = pod.try_run("victim", "sleep 1000", |config| config.mount(&part, "/part", false)).unwrap_err();
        assert!(refused.message().contains("escape"), "{handler}: {refused}");
        assert!(Path::new(&part).is_dir());
        pod.end();
    }
}

#[test]
fn a_read_only_volume_is_so_on_the_node_whatever_the_guest_does() {
    // Not with runc, whose privileged containers may do on the node what they like.
    let handler = handlers()[0];
    let pod = Pod::start(handler, |config| {
        config.linux.mut_or_insert_default().security_context.mut_or_insert_default().privileged = true;
    });
    let volume = tempfile::tempdir_in("/var/tmp").unwrap();
    let below = volume.path().join("below");
    fs::create_dir(&below).unwrap();
    mount(None::<&str>, &below, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
    let container = pod.run("root", "sleep 1000", |config| {
        config.mount(volume.path(), "/data", true);
        config.linux.mut_or_insert_default().security_context.mut_or_insert_default().privileged = true;
    });
    let script = "mount -o remount,bind,rw /data && echo as it wished; touch /data/file; touch /data/below/file";
    let said = container.try_exec(script, 0).unwrap();
    assert_eq!(said.stdout.trim(), "as it wished", "{}", said.stderr);
    assert_eq!(said.stderr.matches("Read-only file system").count(), 2, "{}", said.stderr);
    // Before the pod is looked for: the mount is not the pod's.
    umount2(&below, MntFlags::MNT_DETACH).unwrap();
    pod.end();
}

/// A directory of the node's of which a container has parts: a directory and a file by `subPath`, and the same file by itself.
struct Parts {
    whole: tempfile::TempDir,
    directory: PathBuf,
    file: PathBuf,
}

impl Parts {
    fn new(pod: &Pod) -> Self {
        let whole = tempfile::tempdir_in("/var/tmp").unwrap();
        fs::write(whole.path().join("file"), "old").unwrap();
        fs::write(whole.path().join("other"), "").unwrap();
        let directory = pod.part_of_volume(whole.path(), "a part/inner", "main", 1);
        let file = pod.part_of_volume(whole.path(), "file", "main", 2);
        Self { whole, directory, file }
    }

    fn mount(&self, config: &mut ContainerConfig) {
        config.mount(&self.directory, "/parts/directory", false);
        config.mount(&self.file, "/parts/file", false);
        config.mount(&self.whole.path().join("file"), "/parts/whole-file", false);
        config.mount(&self.whole.path().join("other"), "/parts/readonly", true);
    }

    fn are_seen_as_they_are(&self, handler: &str, container: &Container) {
        let whole = self.whole.path();
        container.exec("echo inside >/parts/directory/new");
        assert_eq!(fs::read_to_string(whole.join("a part/inner/new")).unwrap(), "inside\n", "{handler}");
        // Nothing of what is beside and above it.
        assert_eq!(
            container.exec("ls -A /parts/directory; ls -A /parts"),
            "new\ndirectory\nfile\nreadonly\nwhole-file"
        );
        assert_eq!(
            container.exec("cat /parts/file; echo new >/parts/file; cat /parts/whole-file"),
            "oldnew",
            "{handler}"
        );
        assert_eq!(fs::read_to_string(whole.join("file")).unwrap(), "new\n", "{handler}");
        let refused = container.try_exec("echo mine >/parts/readonly", 0).unwrap();
        assert!(refused.code != 0 && refused.stderr.contains("Read-only"), "{handler}: {refused:?}");
    }
}

/// How long a change on the node may take to be seen.
const A_SECOND: Duration = Duration::from_secs(1);

#[test]
fn directories_of_the_node_are_seen_as_they_are() {
    for handler in handler_and_runc() {
        println!("with {handler}");
        let node = tempfile::tempdir_in("/var/tmp").unwrap();
        let below = node.path().join("below");
        fs::create_dir(&below).unwrap();
        mount(None::<&str>, &below, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        let pod = Pod::start(handler, |_| {});
        let disk = pod.volume("kubernetes.io~empty-dir", "disk");
        let part = pod.part_of_volume(&disk, "a part/inner", "main", 0);
        let parts = Parts::new(&pod);
        let container = pod.run("main", "exec sleep 1000", |config| {
            config.mount(node.path(), "/node", false);
            config.mount(&disk, "/disk", false);
            config.mount(&part, "/part", false);
            config.mount(node.path(), "/readonly", true);
            parts.mount(config);
        });
        let refused = |path: &str| {
            let done = container.try_exec(&format!("echo mine >{path}"), 0).unwrap();
            done.code != 0 && done.stderr.contains("Read-only")
        };
        container.exec("echo here >/part/file; echo there >'/disk/a part/inner/other'");
        assert_eq!(container.exec("cat '/disk/a part/inner/file' /part/other"), "here\nthere", "{handler}");
        assert_eq!(fs::read_to_string(disk.join("a part/inner/file")).unwrap(), "here\n", "{handler}");

        assert!(refused("/readonly/file"), "{handler}");
        // Hull leaves it to the node what a guest may write, and that with all that is below.
        assert_eq!(refused("/readonly/below/file"), is_hull(handler), "{handler}");

        parts.are_seen_as_they_are(handler, &container);
        changes_of_the_node_are_seen_within_a_second(handler, node.path(), &container);
        umount2(&below, MntFlags::MNT_DETACH).unwrap();
        pod.end();
    }
}

fn changes_of_the_node_are_seen_within_a_second(handler: &str, node: &Path, container: &Container) {
    fs::write(node.join("changed"), "old").unwrap();
    fs::write(node.join("removed"), "").unwrap();
    let look = || container.exec("cd /node; cat changed; echo; ls");
    assert_eq!(look(), "old\nbelow\nchanged\nremoved", "{handler}");
    // As long as the old one, so that its size does not give it away.
    fs::write(node.join("changed"), "new").unwrap();
    fs::remove_file(node.join("removed")).unwrap();
    fs::write(node.join("added"), "").unwrap();
    std::thread::sleep(A_SECOND);
    assert_eq!(look(), "new\nadded\nbelow\nchanged", "{handler}");
    // Another in its place, as editors and deployments do.
    fs::write(node.join("another"), "two").unwrap();
    fs::rename(node.join("another"), node.join("changed")).unwrap();
    std::thread::sleep(A_SECOND);
    assert_eq!(look(), "two\nadded\nbelow\nchanged", "{handler}");
}
