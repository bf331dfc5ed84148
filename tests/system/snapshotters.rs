//! Snapshotters of containerd whose roots are disks: blockfile, devmapper and erofs. Each test has a containerd of its own, with the
//! snapshotter configured, beside whichever else runs.

use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use fixture::containerd::{BUSYBOX, RUNTIME, processes};
use fixture::devices::{Loop, without_udev};
use fixture::{Said, shell};

/// Where containerd may be. The lab has version 2 beside the distribution's own.
const PROGRAMS: [&str; 2] = ["/usr/bin", "/opt/containerd-2/usr/bin"];
const START_TIMEOUT: Duration = Duration::from_secs(120);
/// A containerd; gone when dropped.
struct Server {
    child: Child,
    programs: PathBuf,
    dir: tempfile::TempDir,
}

/// Those that are installed, in the order of their versions.
fn programs() -> impl Iterator<Item = &'static Path> {
    PROGRAMS.iter().map(Path::new).filter(|programs| programs.join("containerd").exists())
}

impl Server {
    /// One with this in its configuration, where `DIR` is a directory of its own.
    fn start(programs: &Path, dir: tempfile::TempDir, config: &str) -> Self {
        let place = dir.path().display();
        let config = format!(
            "version = 2\nroot = '{place}/root'\nstate = '{place}/state'\n\
             disabled_plugins = ['io.containerd.grpc.v1.cri', 'io.containerd.cri.v1.images', 'io.containerd.cri.v1.runtime']\n\
             [grpc]\naddress = '{place}/containerd.sock'\n{}",
            config.replace("DIR", dir.path().to_str().unwrap())
        );
        std::fs::write(dir.path().join("config.toml"), config).unwrap();
        let ready = UnixDatagram::bind(dir.path().join("notify")).unwrap();
        ready.set_read_timeout(Some(START_TIMEOUT)).unwrap();
        let log = std::fs::File::create(dir.path().join("log")).unwrap();
        let child = Command::new(programs.join("containerd"))
            .arg("--config")
            .arg(dir.path().join("config.toml"))
            .envs(without_udev())
            .env("NOTIFY_SOCKET", dir.path().join("notify"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let server = Self { child, programs: programs.to_owned(), dir };
        let mut message = [0; 4096];
        loop {
            let Ok(count) = ready.recv(&mut message) else { panic!("it does not come up: {}", server.log()) };
            if message[..count].windows(7).any(|part| part == b"READY=1") {
                break;
            }
        }
        server.import(&fixture::busybox(), BUSYBOX);
        server
    }

    fn import(&self, layout: &str, name: &str) {
        let archive = self.dir.path().join("image.tar");
        shell(&format!("tar -C {layout} -cf {} .", archive.display()));
        self.ctr(["image", "import", "--no-unpack", "--index-name", name, archive.to_str().unwrap()]).ok();
    }

    fn ctr<const N: usize>(&self, args: [&str; N]) -> Said {
        let mut command = Command::new(self.programs.join("ctr"));
        command.arg("--address").arg(self.dir.path().join("containerd.sock")).args(args).stdin(Stdio::null());
        Said::new(command.output().unwrap())
    }

    /// `ctr run --rm` of a shell script.
    fn run(&self, snapshotter: &str, id: &str, script: &str) -> Said {
        self.ctr(["run", "--rm", "--runtime", RUNTIME, "--snapshotter", snapshotter, BUSYBOX, id, "sh", "-c", script])
    }

    /// `ctr run -d`, with options before the image, of what sleeps.
    fn start_sleeping<const N: usize>(&self, snapshotter: &str, id: &str, options: [&str; N]) {
        let start = ["run", "-d", "--runtime", RUNTIME, "--snapshotter", snapshotter].into_iter().chain(options);
        let args: Vec<_> = start.chain([BUSYBOX, id, "sleep", "1000"]).collect();
        let mut command = Command::new(self.programs.join("ctr"));
        command.arg("--address").arg(self.dir.path().join("containerd.sock")).args(args).stdin(Stdio::null());
        Said::new(command.output().unwrap()).ok();
    }

    fn exec(&self, id: &str, script: &str) -> String {
        let said = self.ctr(["task", "exec", "--exec-id", "exec", id, "sh", "-c", script]);
        assert_eq!(said.code, 0, "{said:?}; {}", self.log());
        said.text().trim_end().to_owned()
    }

    fn log(&self) -> String {
        let log = std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
        let wrong = log.lines().filter(|line| !["level=info", "level=debug"].iter().any(|level| line.contains(level)));
        wrong.collect::<Vec<_>>().join("\n")
    }

    /// Files below its directory that some process has open, or that some mount is of.
    fn in_use(&self, part: &str) -> Vec<String> {
        let place = self.dir.path().join(part);
        let place = place.to_str().unwrap();
        let processes = std::fs::read_dir("/proc").unwrap().flatten();
        let fds = processes.filter_map(|process| std::fs::read_dir(process.path().join("fd")).ok()).flatten().flatten();
        let open = fds.filter_map(|fd| std::fs::read_link(fd.path()).ok()?.into_os_string().into_string().ok());
        let loops = shell("losetup -ln -O BACK-FILE 2>/dev/null || true");
        let all = open.chain(loops.lines().map(|line| line.trim().to_owned()));
        // containerd has its database open.
        all.filter(|path| path.starts_with(place) && !path.ends_with(".db")).collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let containers = self.ctr(["container", "ls", "-q"]).text();
        for id in containers.lines() {
            let _ = self.ctr(["task", "rm", "-f", id]);
            let _ = self.ctr(["container", "rm", id]);
        }
        if std::thread::panicking() {
            eprintln!("containerd's log:\n{}", self.log());
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        // Layers of erofs are mounted by versions before 2.2.
        shell(&format!(
            "grep -o '{}[^ ]*' /proc/mounts | sort -r | xargs -r umount -l || true",
            self.dir.path().display()
        ));
    }
}

fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in("/var/tmp").unwrap()
}

/// Asserts that the root is a disk's file system of this type, as the guest's own kernel has mounted it, and that the host has mounted none.
#[track_caller]
fn assert_on_disk(server: &Server, id: &str, fstype: &str) {
    let mounts = server.exec(id, "grep ' / ' /proc/mounts");
    assert!(mounts.starts_with("/dev/vd") && mounts.contains(&format!(" / {fstype} rw")), "{mounts}");
    assert_no_mount(fstype);
}

/// Asserts that no shim or VMM has a file system of this type from a disk of a snapshotter mounted.
#[track_caller]
fn assert_no_mount(fstype: &str) {
    for (pid, _) in processes("containerd-shim-hull-v2").into_iter().chain(processes("hull-vmm")) {
        let mounts = std::fs::read_to_string(format!("/proc/{pid}/mounts")).unwrap_or_default();
        let found = mounts.lines().find(|line| {
            let words: Vec<_> = line.split(' ').collect();
            words[2] == fstype && (words[0].starts_with("/dev/loop") || words[0].contains("snap"))
        });
        assert_eq!(found, None, "in process {pid}");
    }
}

/// What holds for any snapshotter whose roots are one disk each.
fn its_roots_are_disks(server: &Server, snapshotter: &str, fstype: &str, part: &str) {
    assert_eq!(server.run(snapshotter, "first", "echo hello").ok(), "hello");
    server.start_sleeping(snapshotter, "kept", []);
    assert_on_disk(server, "kept", fstype);
    server.exec("kept", "echo changed >/file");
    server.ctr(["task", "kill", "-s", "KILL", "kept"]).ok();
    while server.ctr(["task", "ls"]).text().contains("RUNNING") {}
    server.ctr(["task", "rm", "kept"]);
    assert!(server.in_use(part).is_empty(), "{:?}", server.in_use(part));
    // The snapshot is the container's, whose next task finds what the one before has written.
    server.ctr(["task", "start", "-d", "kept"]).ok();
    assert_eq!(server.exec("kept", "cat /file"), "changed");
    server.ctr(["task", "rm", "-f", "kept"]);
    server.ctr(["container", "rm", "kept"]).ok();
}

#[test]
fn blockfile_roots_are_disks_of_the_guests() {
    for programs in programs() {
        let dir = directory();
        shell(&format!(
            "truncate -s 24M {0}/scratch && mkfs.ext4 -q -O ^has_journal -m 0 {0}/scratch",
            dir.path().display()
        ));
        let config = "[plugins.'io.containerd.snapshotter.v1.blockfile']\n\
                      root_path = 'DIR/blockfile'\nscratch_file = 'DIR/scratch'\nfs_type = 'ext4'\nrecreate_scratch = true\n";
        let server = Server::start(programs, dir, config);
        its_roots_are_disks(&server, "blockfile", "ext4", "blockfile/snapshots");
        a_full_root_is_the_containers_own(&server);
        a_broken_or_missing_disk_is_told_and_leaves_nothing(&server);
    }
}

fn a_full_root_is_the_containers_own(server: &Server) {
    let script = "dd if=/dev/zero of=/full bs=1M count=100 2>&1 | grep -o 'No space left'; rm /full; echo again >/file; cat /file";
    assert_eq!(server.run("blockfile", "full", script).ok(), "No space left\nagain");
}

fn a_broken_or_missing_disk_is_told_and_leaves_nothing(server: &Server) {
    let create = ["container", "create", "--runtime", RUNTIME, "--snapshotter", "blockfile", BUSYBOX, "broken", "true"];
    server.ctr(create).ok();
    let snapshots = server.dir.path().join("blockfile/snapshots");
    let newest = shell(&format!("ls -t {} | head -1", snapshots.display()));
    let file = snapshots.join(newest.trim());
    shell(&format!("dd if=/dev/urandom of={} bs=4k count=64 conv=notrunc 2>/dev/null", file.display()));
    let said = server.ctr(["task", "start", "broken"]);
    assert!(said.code != 0 && said.stderr.contains("broken") && said.stderr.contains("fsck"), "{said:?}");
    std::fs::remove_file(&file).unwrap();
    let said = server.ctr(["task", "start", "broken"]);
    assert!(said.code != 0 && said.stderr.contains(file.to_str().unwrap()), "{said:?}");
    assert!(processes("containerd-shim-hull-v2").iter().all(|(_, words)| !words.iter().any(|word| word == "broken")));
    assert!(server.in_use("blockfile/snapshots").is_empty(), "{:?}", server.in_use("blockfile/snapshots"));
    server.ctr(["container", "rm", "broken"]);
}

#[test]
fn devmapper_roots_are_disks_of_the_guests() {
    for programs in programs() {
        let dir = directory();
        let pool = Pool::new(dir.path());
        let config = format!(
            "[plugins.'io.containerd.snapshotter.v1.devmapper']\n\
             root_path = 'DIR/devmapper'\npool_name = '{}'\nbase_image_size = '64MB'\nfs_type = 'ext4'\n",
            pool.name
        );
        let server = Server::start(programs, dir, &config);
        its_roots_are_disks(&server, "devmapper", "ext4", "devmapper");
        assert_eq!(
            shell(&format!("dmsetup info -c --noheadings -o open,name | grep '^[1-9].*{}-snap' || true", pool.name)),
            ""
        );
        drop(server);
    }
}

/// A pool of thin volumes on loop devices; gone when dropped.
struct Pool {
    name: String,
    /// What it lies on, which goes after it.
    _loops: [Loop; 2],
}

impl Pool {
    fn new(dir: &Path) -> Self {
        let name = format!("hull-{}", dir.file_name().unwrap().to_str().unwrap().trim_start_matches('.'));
        let device = |file: &str, size: &str| {
            let path = dir.join(file);
            shell(&format!("truncate -s {size} {}", path.display()));
            Loop::new(path.display())
        };
        let loops = [device("metadata", "16M"), device("data", "512M")];
        shell("modprobe dm-thin-pool");
        let table = format!("0 1048576 thin-pool {} {} 128 32768 1 skip_block_zeroing", loops[0].0, loops[1].0);
        let variable = without_udev().map(|(name, value)| format!("{name}={value}")).unwrap_or_default();
        shell(&format!("{variable} dmsetup create {name} --table '{table}'"));
        Self { name, _loops: loops }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let script = format!(
            "for name in $(dmsetup ls | cut -f1 | grep '^{0}-snap') {0}; do dmsetup remove --retry $name; done",
            self.name
        );
        let _ = Command::new("sh").args(["-c", &script]).status();
    }
}

#[test]
fn erofs_roots_are_an_overlay_of_the_guests_or_before_2_2_of_the_hosts() {
    let is_2 = |programs: &&Path| version(programs) >= (2, 1);
    let Some(programs) = programs().find(is_2) else {
        assert!(std::env::var_os("HULL_IN_LAB").is_none(), "the lab has a containerd of version 2");
        println!("left out: no containerd of version 2 is installed");
        return;
    };
    shell("modprobe erofs");
    let config = "[plugins.'io.containerd.snapshotter.v1.erofs']\nroot_path = 'DIR/erofs'\n\
                  [plugins.'io.containerd.service.v1.diff-service']\ndefault = ['erofs', 'walking']\n";
    let server = Server::start(programs, directory(), config);
    let script = "rm /bin/wget && ! ls /bin/wget 2>/dev/null; echo changed >/file; cat /file; grep ' / ' /proc/mounts | cut -d' ' -f3";
    let kind = if version(programs) >= (2, 2) { "overlay" } else { "virtiofs" };
    assert_eq!(server.run("erofs", "first", script).ok(), format!("changed\n{kind}"));
    assert_eq!(server.run("erofs", "second", "ls /bin/wget /file 2>/dev/null || true").ok(), "/bin/wget");
}

/// Its major and minor version.
fn version(programs: &Path) -> (u32, u32) {
    let said = shell(&format!("{}/containerd --version", programs.display()));
    let version = said.split_whitespace().find_map(|word| {
        let mut numbers =
            word.trim_start_matches('v').split(['.', '~', '+', '-']).map_while(|number| number.parse().ok());
        Some((numbers.next()?, numbers.next()?))
    });
    version.unwrap_or_else(|| panic!("no version in {said}"))
}
