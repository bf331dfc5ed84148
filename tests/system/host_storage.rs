//! What the host's storage does to a guest: when it is full, fails, shrinks, is exchanged under a volume, and when nobody uses it.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use fixture::devices::{Loop, Mapped};
use fixture::netns::{Netns, host};
use fixture::{Detached, busybox, debian, shell};
use rustix::fs::{CWD, RenameFlags, renameat_with};

/// `try` says what became of a command: `done`, or why not. `soon` tries until it works: a share gives up a file's room when the guest has let
/// go of it, which it says after the call that removed it.
const PRELUDE: &str = "
try() { if said=$(\"$@\" 2>&1 >/dev/null); then echo done; else echo \"${said##*: }\"; fi; }
soon() { tries=0; until \"$@\" 2>/dev/null || [ $tries = 300 ]; do tries=$((tries + 1)); sleep 0.1; done; try \"$@\"; }
";

fn try_in(container: &Detached, user: &str, script: &str) -> Vec<String> {
    let said = container.exec(["-u", user, "sh", "-c", &format!("{PRELUDE}{script}")]).run().ok();
    said.lines().map(str::to_owned).collect()
}

fn directory() -> tempfile::TempDir {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
    dir
}

/// A small ext4 file system of the host, on a device that can be made to fail; gone when dropped.
struct Storage {
    device: Mapped,
    /// Where it is mounted, and below that the file that it is on.
    dir: tempfile::TempDir,
}

impl Storage {
    /// What user 1000 may have of it.
    const QUOTA_KIB: u64 = 512;

    fn new() -> Self {
        let dir = directory();
        let image = dir.path().join("image");
        // Without a journal nothing but what a test asks for is written, and a failure does not make the whole of it read-only.
        shell(&format!(
            "truncate -s 8M {0} && mkfs.ext4 -q -b 4096 -m 0 -O ^has_journal,quota -E quotatype=usrquota {0}",
            image.display()
        ));
        let name = dir.path().file_name().unwrap().to_str().unwrap().trim_start_matches('.');
        let device = Mapped::new(format!("hull-{name}"), Loop::new(image.display()));
        let storage = Self { device, dir };
        let (device, place) = (storage.device.path(), storage.path());
        shell(&format!("mkdir {0} && mount -o noatime,usrquota {device} {0}", place.display()));
        // quotactl(2): Q_SETQUOTA of users, with the blocks' hard limit alone (QIF_BLIMITS).
        let program = "import ctypes, struct, sys\n\
                       limits = struct.pack(\"<8QI4x\", int(sys.argv[2]), 0, 0, 0, 0, 0, 0, 0, 1)\n\
                       libc = ctypes.CDLL(None, use_errno=True)\n\
                       if libc.quotactl(0x80000800, sys.argv[1].encode(), 1000, limits): sys.exit(ctypes.get_errno())";
        shell(&format!("python3 -c '{program}' {device} {}", Self::QUOTA_KIB));
        storage
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("mounted")
    }

    /// Has the host read these files from the device again.
    fn forget<const N: usize>(&self, files: [&Path; N]) {
        shell(&format!("sync -f {}", self.path().display()));
        for file in files {
            shell(&format!("dd if={} of=/dev/null iflag=nocache count=0 2>/dev/null", file.display()));
        }
    }
}

impl Drop for Storage {
    fn drop(&mut self) {
        let umount = format!("umount {0} || umount -l {0}", self.path().display());
        let _ = Command::new("sh").args(["-c", &umount]).status();
    }
}

#[test]
fn a_full_or_failing_host_is_told_to_programs_as_such_until_it_is_over() {
    let (storage, other) = (Storage::new(), directory());
    let (share, disk) = (storage.path().join("share"), storage.path().join("disk"));
    fs::create_dir(&share).unwrap();
    fs::set_permissions(&share, Permissions::from_mode(0o777)).unwrap();
    fs::write(share.join("cold"), "x".repeat(4096)).unwrap();
    fs::write(share.join("warm"), "x".repeat(4096)).unwrap();
    fs::File::create(&disk).unwrap().set_len(4 << 20).unwrap();
    let [volume, elsewhere] =
        [(&*share, "/v"), (other.path(), "/other")].map(|(from, to)| format!("{}:{to}", from.display()));
    let container = Detached::start([
        "--memory",
        "128",
        "-v",
        &volume,
        "-v",
        &elsewhere,
        "--disk",
        disk.to_str().unwrap(),
        &busybox(),
        "sleep",
        "1000",
    ]);
    a_full_file_system(&container, &disk);
    a_quota(&container);
    a_failing_device(&container, &storage, &share.join("cold"), &disk);
}

fn a_full_file_system(container: &Detached, disk: &Path) {
    let said = try_in(
        container,
        "0",
        "try dd if=/dev/zero of=/v/full bs=64k count=200 status=none
         try fallocate -l 16777216 /v/more
         try mkdir /v/directory
         try dd if=/dev/zero of=/dev/vda bs=64k count=16 conv=fsync status=none
         try dd if=/dev/zero of=/v/warm bs=4k count=1 conv=notrunc,fsync status=none
         try dd if=/dev/zero of=/other/file bs=4k count=1 conv=fsync status=none",
    );
    let full = "No space left on device";
    // A virtio disk has no other error than this.
    assert_eq!(said, [full, full, full, "Input/output error", "done", "done"]);
    let said = try_in(
        container,
        "0",
        "rm -f /v/full /v/more
         soon dd if=/dev/zero of=/v/fits bs=64k count=16 conv=fsync status=none
         yes | try dd of=/dev/vda bs=64k count=16 iflag=fullblock conv=fsync status=none
         try mkdir /v/directory; rm -r /v/directory /v/fits",
    );
    assert_eq!(said, ["done", "done", "done"]);
    let content = fs::read(disk).unwrap();
    assert!(content[..1 << 20].chunks(2).all(|line| line == b"y\n"), "what was written is not on the disk");
}

fn a_quota(container: &Detached) {
    let said = try_in(
        container,
        "1000:1000",
        "try dd if=/dev/zero of=/v/much bs=64k count=16 status=none
         rm /v/much
         soon dd if=/dev/zero of=/v/little bs=64k count=4 conv=fsync status=none
         try fallocate -l 1048576 /v/little
         rm /v/little",
    );
    let exceeded = "Disk quota exceeded";
    assert_eq!(said, [exceeded, "done", exceeded]);
}

fn a_failing_device(container: &Detached, storage: &Storage, cold: &Path, disk: &Path) {
    let script = "try cat /v/cold
                  try dd if=/dev/zero of=/v/warm bs=4k count=1 conv=notrunc,fsync status=none
                  try dd if=/dev/vda of=/dev/null bs=4k count=1 status=none
                  try dd if=/dev/zero of=/dev/vda bs=4k count=1 conv=fsync status=none
                  try dd if=/dev/zero of=/other/file bs=4k count=1 conv=fsync status=none";
    storage.forget([cold, disk]);
    storage.device.fail();
    let failed = "Input/output error";
    assert_eq!(try_in(container, "0", script), [failed, failed, failed, failed, "done"]);
    storage.device.mend();
    assert_eq!(try_in(container, "0", script), ["done"; 5]);
}

/// A file of this many MiB that says nothing.
fn random(dir: &Path, name: &str, mib: usize) -> PathBuf {
    let path = dir.join(name);
    shell(&format!("dd if=/dev/urandom of={} bs=1M count={mib} conv=fsync 2>/dev/null", path.display()));
    path
}

#[test]
fn a_disk_gives_back_what_is_discarded_and_fails_only_where_its_file_was_cut() {
    const MIB: usize = 1 << 20;
    let dir = directory();
    let files = ["discarded", "punched", "zeroed", "fixed", "cut"].map(|name| random(dir.path(), name, 2));
    let before = files.each_ref().map(|path| fs::read(path).unwrap());
    let [discarded, punched, zeroed, fixed, cut] = files.each_ref().map(|path| path.to_str().unwrap());
    let container = Detached::start([
        "--memory",
        "256",
        "--disk",
        &format!("{discarded}:serial=serial-7"),
        "--disk",
        punched,
        "--disk",
        zeroed,
        "--disk",
        &format!("{fixed}:ro"),
        "--disk",
        cut,
        &debian(),
        "sleep",
        "1000",
    ]);
    let said = try_in(
        &container,
        "0",
        "cat /sys/block/vda/serial /sys/block/vdb/serial; echo
         try blkdiscard -l 1MiB /dev/vda
         try fallocate -p -l 1MiB /dev/vdb
         try blkdiscard -z -l 1MiB /dev/vdc
         try blkdiscard -l 1MiB /dev/vdd | grep -c done
         for disk in vda vdb vdc; do cmp -n 1048576 /dev/$disk /dev/zero && echo zeroes; done",
    );
    assert_eq!(said, ["serial-7", "done", "done", "done", "0", "zeroes", "zeroes", "zeroes"]);
    for (path, before) in files.iter().zip(&before).take(3) {
        let after = fs::read(path).unwrap();
        assert!(after[..MIB].iter().all(|byte| *byte == 0) && after[MIB..] == before[MIB..], "{}", path.display());
    }
    assert!(fs::read(&files[3]).unwrap() == before[3], "a read-only disk has changed");
    let kib = files.each_ref().map(|path| fs::metadata(path).unwrap().blocks() / 2);
    assert!(kib[0] < 1100 && kib[1] < 1100 && kib[2] > 2000 && kib[3] > 2000, "{kib:?} KiB are used");

    shell(&format!("truncate -s 1M {cut}"));
    let said = try_in(
        &container,
        "0",
        "try dd if=/dev/vde of=/dev/null bs=4k count=1 skip=300 status=none
         try dd if=/dev/vde of=/dev/null bs=4k count=256 status=none
         try dd if=/dev/vda of=/dev/null bs=64k status=none
         try dd if=/dev/vda of=/dev/vde bs=4k count=1 seek=300 conv=fsync status=none
         try dd if=/dev/vde of=/dev/null bs=4k count=1 skip=300 status=none
         try dd if=/dev/vde of=/dev/null bs=4k count=1 skip=400 status=none",
    );
    let failed = "Input/output error";
    // What is written there is there again, and nothing beyond.
    assert_eq!(said, [failed, "done", "done", "done", "done", failed]);
}

#[test]
fn a_guest_at_rest_wakes_nobody_while_the_volumes_of_another_with_the_same_image_are_exchanged() {
    let ([netns, _other_end], dir) = (quiet_network(), directory());
    let disk = random(dir.path(), "disk", 1);
    let volume = format!("{}:/v", dir.path().display());
    let idle = Detached::start([
        "--memory",
        "128",
        "--net",
        &netns.option(),
        "-v",
        &volume,
        "--disk",
        disk.to_str().unwrap(),
        &busybox(),
        "sleep",
        "1000",
    ]);
    let vmm = idle.inspect()["vmm_pid"].as_i64().unwrap();
    let use_all = format!(
        "echo x >/v/file; dd if=/dev/vda of=/dev/null count=1 2>/dev/null; ping -c 1 -W 60 {} >/dev/null",
        netns.host_address()
    );
    let use_all = || idle.exec(["sh", "-c", &use_all]).run().ok();
    use_all();
    let before = std::thread::scope(|scope| {
        let at_rest = scope.spawn(|| wait_for_rest(vmm));
        let sources = Sources::new();
        let other = sources.container();
        assert_image_is_shared(vmm);
        volumes_stay_what_they_were(&sources, &other);
        links_that_come_and_go(&sources, &other);
        at_rest.join().unwrap()
    });
    use_all();
    let after = wake_ups(vmm);
    for kind in DEVICES {
        let sum = |counts: &BTreeMap<String, u64>| {
            counts.iter().filter(|(name, _)| name.starts_with(kind)).map(|(_, count)| count).sum::<u64>()
        };
        assert!(sum(&after) > sum(&before), "no thread of {kind} has worked: {before:?}, {after:?}");
    }
}

/// What volumes are made of, in a directory that the guest does not see.
struct Sources(tempfile::TempDir);

impl Sources {
    fn new() -> Self {
        let sources = Self(directory());
        for name in ["moved", "removed", "race", "race/d", "outside"] {
            fs::create_dir(sources.place(name)).unwrap();
        }
        for name in ["moved/f", "removed/f", "file"] {
            fs::write(sources.place(name), "old\n").unwrap();
        }
        for name in ["race/d/f", "race/f"] {
            fs::write(sources.place(name), "inside\n").unwrap();
        }
        fs::write(sources.place("outside/f"), "outside\n").unwrap();
        symlink(sources.place("outside"), sources.place("race/l")).unwrap();
        symlink(sources.place("outside/f"), sources.place("race/m")).unwrap();
        sources
    }

    fn place(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn container(&self) -> Detached {
        let volume = |name: &str, option: &str| format!("{}:/{name}{option}", self.place(name).display());
        Detached::start([
            "--memory",
            "128",
            "-v",
            &volume("moved", ""),
            "-v",
            &volume("removed", ""),
            "-v",
            &volume("file", ""),
            "-v",
            &volume("race", ":cache=never"),
            &busybox(),
            "sleep",
            "1000",
        ])
    }
}

fn volumes_stay_what_they_were(sources: &Sources, container: &Detached) {
    let place = |name: &str| sources.place(name);
    fs::rename(place("moved"), place("away")).unwrap();
    fs::remove_dir_all(place("removed")).unwrap();
    for name in ["moved", "removed"] {
        fs::create_dir(place(name)).unwrap();
        fs::write(place(name).join("f"), "new\n").unwrap();
    }
    fs::write(place("new"), "new\n").unwrap();
    fs::rename(place("new"), place("file")).unwrap();
    let said = try_in(
        container,
        "0",
        "cat /moved/f; echo written >/moved/g
         try cat /removed/f; try mkdir /removed/d; ls /removed | wc -l
         cat /file; echo changed >/file; cat /file",
    );
    let gone = "No such file or directory";
    assert_eq!(said, ["old", gone, gone, "0", "old", "changed"]);
    assert_eq!(fs::read_to_string(place("away/g")).unwrap(), "written\n");
    assert_eq!(fs::read_to_string(place("file")).unwrap(), "new\n");
    assert_eq!(names(&place("moved")), ["f"]);
}

/// Has the host exchange a directory and a file for links to others outside, to and fro, while the guest reads and makes files there.
fn links_that_come_and_go(sources: &Sources, container: &Detached) {
    let path = |name: &str| CString::new(sources.place(name).to_str().unwrap()).unwrap();
    let pairs = [("race/d", "race/l"), ("race/f", "race/m")].map(|(one, other)| (path(one), path(other)));
    let over = AtomicBool::new(false);
    let script = "
        count() { case $1 in inside) inside=$((inside + 1));; '') nothing=$((nothing + 1));; *) echo $1;; esac; }
        inside=0 nothing=0 rounds=0
        until [ $rounds -ge 200 ] && [ $inside -gt 0 ] && [ $nothing -gt 0 ]; do
            rounds=$((rounds + 1))
            content=; read -r content </race/d/f; count \"$content\"
            content=; read -r content </race/f; count \"$content\"
            echo >/race/d/new
        done 2>/dev/null
        echo over";
    let said = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                for (one, other) in &pairs {
                    renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE).unwrap();
                }
                // The guest may share the CPU with this thread.
                std::thread::sleep(Duration::from_micros(500));
            }
        });
        let said = container.exec(["timeout", "120", "sh", "-c", script]).run();
        over.store(true, Ordering::Relaxed);
        said
    });
    assert_eq!(said.ok(), "over");
    assert_eq!(names(&sources.place("outside")), ["f"]);
    let directory = ["race/d", "race/l"].map(|name| sources.place(name)).into_iter().find(|path| !path.is_symlink());
    assert_eq!(names(&directory.unwrap()), ["f", "new"], "the guest never got to the directory");
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Two namespaces with a link between their `eth0`, on which nobody says anything unasked, as IPv6 and what runs on a host do.
fn quiet_network() -> [Netns; 2] {
    let ends = [Netns::empty(), Netns::empty()];
    for end in &ends {
        host(&format!("ip netns exec {} sysctl -qw net.ipv6.conf.default.disable_ipv6=1", end.name));
    }
    let [one, other] = &ends;
    host(&format!("ip link add eth0 netns {} type veth peer name eth0 netns {}", one.name, other.name));
    for (end, address) in [(one, one.address()), (other, one.host_address())] {
        end.ip(&format!("addr add {address}/24 dev eth0"));
        end.ip("link set eth0 up");
    }
    ends
}

/// Asserts that what a guest uses of its image is in the host's memory once for it and the other guest.
fn assert_image_is_shared(vmm: i64) {
    let smaps = fs::read_to_string(format!("/proc/{vmm}/smaps")).unwrap();
    let image = smaps.lines().skip_while(|line| !line.ends_with("guest.img")).skip(1);
    let kib: BTreeMap<&str, u64> = image
        .map_while(|line| {
            let (name, value) = line.split_once(':')?;
            // The next mapping's line begins with its addresses.
            (!name.contains('-')).then_some((name, value.trim_end_matches(" kB").trim().parse().ok()?))
        })
        .collect();
    let (used, share) = (kib["Rss"], kib["Pss"]);
    assert!(used > 1024 && share * 10 < used * 6, "{share} of {used} KiB are this guest's own");
    assert_eq!(kib["Anonymous"], 0);
}

/// The names of the threads that serve disks, shares and interfaces begin with these. The one for all other devices is left out: a guest
/// draws random numbers from its host once a minute, and tells of memory that it has freed.
const DEVICES: [&str; 3] = ["blk-", "fs-", "net-"];

/// How often each thread of a VMM has waited for something.
fn wake_ups(vmm: i64) -> BTreeMap<String, u64> {
    let threads = fs::read_dir(format!("/proc/{vmm}/task")).unwrap().map(|thread| thread.unwrap().path());
    let of_thread = |thread: PathBuf| {
        let status = fs::read_to_string(thread.join("status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.unwrap().trim().to_owned()
        };
        let id = thread.file_name().unwrap().to_str().unwrap().to_owned();
        (format!("{} {id}", field("Name")), field("voluntary_ctxt_switches").parse().unwrap())
    };
    threads.map(of_thread).collect()
}

/// Waits until no device has woken its thread for longer than any of them looks ahead: a share looks ten seconds after its last use whether
/// there is anything to give back.
fn wait_for_rest(vmm: i64) -> BTreeMap<String, u64> {
    const QUIET: Duration = Duration::from_secs(12);
    let of_devices = |vmm| -> BTreeMap<String, u64> {
        let is_device = |name: &str| DEVICES.iter().any(|kind| name.starts_with(kind));
        wake_ups(vmm).into_iter().filter(|(name, _)| is_device(name)).collect()
    };
    let (start, mut seen) = (Instant::now(), of_devices(vmm));
    let mut since = Instant::now();
    while since.elapsed() < QUIET {
        std::thread::sleep(Duration::from_millis(500));
        let now = of_devices(vmm);
        if now != seen {
            assert!(start.elapsed() < Duration::from_secs(120), "still woken: {seen:?}, {now:?}");
            (since, seen) = (Instant::now(), now);
        }
    }
    seen
}
