//! Disks that come and go with containers while the guest is at work on them.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;

use fixture::devices::Loop;

use super::*;

const BLOCK_BYTES: u64 = 4096;
/// So many that nobody gets through them in the course of a test.
const BLOCKS: u64 = 1 << 20;
/// Those before are for what containers tell each other.
const FIRST_WRITTEN: u64 = 16;

const FAILED: &str = "Input/output error";

/// A disk of the host's; gone when dropped.
struct Disk {
    device: Loop,
    _image: tempfile::NamedTempFile,
}

impl Disk {
    fn new() -> Self {
        let image = tempfile::NamedTempFile::new_in("/var/tmp").unwrap();
        image.as_file().set_len(BLOCKS * BLOCK_BYTES).unwrap();
        Self { device: Loop::new(image.path().display()), _image: image }
    }

    /// Has a container have it as /dev/disk, and leave to use each device of the guest's that it finds.
    fn give(&self, bundle: &Path) {
        let number = std::fs::metadata(&self.device.0).unwrap().rdev();
        let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
        change(bundle, |spec| {
            spec["linux"]["devices"] = json!([{ "path": "/dev/disk", "type": "b", "major": major, "minor": minor }]);
            spec["linux"]["resources"] = json!({ "devices": [{ "allow": true, "access": "rwm" }] });
        });
    }

    /// What the host reads of a block.
    fn block(&self, number: u64) -> Vec<u8> {
        let mut block = vec![0; BLOCK_BYTES as usize];
        std::fs::File::open(&self.device.0).unwrap().read_exact_at(&mut block, number * BLOCK_BYTES).unwrap();
        block
    }

    fn wait_until_written(&self, number: u64) {
        eventually("something is written", || match self.block(number).iter().any(|byte| *byte != 0) {
            true => Ok(()),
            false => Err(format!("block {number} of {} is empty", self.device.0)),
        });
    }
}

/// A shell script that reads a disk, or writes to it, without the guest's cache and for longer than any test takes.
fn read_on(path: &str) -> String {
    format!("exec dd if={path} of=/dev/null bs={BLOCK_BYTES} iflag=direct")
}

fn write_on(path: &str) -> String {
    format!("exec dd if=/dev/urandom of={path} bs={BLOCK_BYTES} seek={FIRST_WRITTEN} oflag=direct conv=notrunc")
}

/// What a VMM has for its disks: descriptors that are no file's, and threads. Files of a share come and go, and the kernel's threads.
fn kept_by(vmm: u32) -> (usize, usize) {
    let of = |what: &str| std::fs::read_dir(format!("/proc/{vmm}/{what}")).unwrap().flatten().map(|entry| entry.path());
    let is_anonymous =
        |fd: &PathBuf| std::fs::read_link(fd).is_ok_and(|at| at.to_string_lossy().starts_with("anon_inode:"));
    let serves_a_disk =
        |thread: &PathBuf| std::fs::read_to_string(thread.join("comm")).is_ok_and(|name| name.starts_with("blk-"));
    (of("fd").filter(is_anonymous).count(), of("task").filter(serves_a_disk).count())
}

/// What a VMM answers to a request of the host's.
fn control(vmm: u32, request: &Value) -> Value {
    let inodes = std::fs::read_dir(format!("/proc/{vmm}/fd")).unwrap().flatten().filter_map(|fd| {
        let link = std::fs::read_link(fd.path()).ok()?.into_os_string().into_string().ok()?;
        Some(link.strip_prefix("socket:[")?.strip_suffix("]")?.to_owned())
    });
    let inodes: BTreeSet<String> = inodes.collect();
    let sockets = std::fs::read_to_string("/proc/net/unix").unwrap();
    let path = sockets.lines().find_map(|line| {
        let words: Vec<_> = line.split_whitespace().collect();
        let path = words.get(7).filter(|path| path.ends_with("/control.sock"))?;
        inodes.contains(words[6]).then_some(*path)
    });
    let mut stream = UnixStream::connect(path.expect("the VMM listens")).unwrap();
    writeln!(stream, "{request}").unwrap();
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).unwrap();
    serde_json::from_str(&answer).unwrap()
}

/// The disk that came last.
fn last_added(vmm: u32) -> String {
    let status = control(vmm, &json!({ "op": "status" }));
    let added = |device: &Value| device["id"].as_str().and_then(|id| id.strip_prefix("added")?.parse::<u32>().ok());
    let last = status["devices"].as_array().unwrap().iter().filter_map(added).max().expect("a disk");
    format!("added{last}")
}

/// Creates and starts a container that has a disk; its output goes to a file.
async fn start(shim: &Shim, id: &str, disk: &Disk, script: &str) -> PathBuf {
    let bundle = shim.bundle(id, &["/bin/sh", "-c", script]);
    disk.give(&bundle);
    let out = bundle.join("out");
    let stdout = format!("file://{}", out.display());
    shim.tasks().create(patience(), &CreateTaskRequest { stdout, ..create(id, &bundle) }).await.unwrap();
    shim.start_task(id, "").await.unwrap();
    out
}

impl Shim {
    /// Starts another process of a container whose errors go to a file.
    async fn exec_telling(&self, id: &str, exec_id: &str, script: &str) -> PathBuf {
        let told = self.dir.join(id).join(exec_id);
        let stderr = format!("file://{}", told.display());
        let request = ExecProcessRequest { stderr, ..exec(id, exec_id, script) };
        self.tasks().exec(patience(), &request).await.unwrap();
        self.start_task(id, exec_id).await.unwrap();
        told
    }

    /// Runs another process of a container to its end: its status, and what it says of errors.
    async fn run_in(&self, id: &str, exec_id: &str, script: &str) -> (u32, String) {
        let told = self.exec_telling(id, exec_id, script).await;
        let ended = self.ended(id, exec_id, &told).await;
        self.delete_task(id, exec_id).await.unwrap();
        ended
    }

    async fn ended(&self, id: &str, exec_id: &str, told: &Path) -> (u32, String) {
        let status = self.wait_task(id, exec_id).await;
        (status, std::fs::read_to_string(told).unwrap())
    }
}

#[test]
fn task_delete_takes_a_disk_from_under_the_io_of_another_container() {
    run(async {
        let (shim, vmm) = Shim::shared().await;
        let (kept, gone) = (Disk::new(), Disk::new());
        let before = kept_by(vmm);
        start(&shim, "keeper", &kept, "sleep 1000").await;
        shim.exec_telling("keeper", "kept-reads", &read_on("/dev/disk")).await;
        shim.exec_telling("keeper", "kept-writes", &write_on("/dev/disk")).await;
        kept.wait_until_written(FIRST_WRITTEN);

        // One comes while the guest is at work on another.
        let tell_first = "dd if=/dev/disk bs=6 count=1 2>/dev/null; sleep 1000".to_owned();
        let tell =
            "echo first | dd of=/dev/disk bs=4096 conv=sync,fsync 2>/dev/null; busybox stat -c '%t %T' /dev/disk";
        let out = start(&shim, "user", &gone, &format!("{tell}; sleep 1000")).await;
        let number = eventually("the disk's number", || match std::fs::read_to_string(&out).unwrap_or_default() {
            text if text.ends_with('\n') => Ok(text),
            text => Err(text),
        });
        let number: Vec<_> = number.split_whitespace().map(|hex| u32::from_str_radix(hex, 16).unwrap()).collect();
        assert!(gone.block(0).starts_with(b"first\n"));

        // It goes with its container, whoever else is at work on it.
        fixture::shell(&format!("mknod {}/keeper/rootfs/gone b {} {}", shim.dir.display(), number[0], number[1]));
        let reads = shim.exec_telling("keeper", "reads", &read_on("/gone")).await;
        let writes = shim.exec_telling("keeper", "writes", &write_on("/gone")).await;
        gone.wait_until_written(FIRST_WRITTEN + 16);
        assert_eq!(opened(vmm, &gone.device.0), 1);
        shim.remove_task("user").await;
        assert_eq!(opened(vmm, &gone.device.0), 0);
        // What is under way fails; after that the disk has no blocks any more, and its end is where a reader is.
        let (status, told) = shim.ended("keeper", "writes", &writes).await;
        let is_failure = told.contains(FAILED) || told.contains("No space left on device");
        assert!(status != 0 && is_failure, "{status}: {told}");
        let (status, told) = shim.ended("keeper", "reads", &reads).await;
        let read = told.lines().find_map(|line| line.split_once('+')?.0.parse::<u64>().ok());
        let is_short = status == 0 && read.is_some_and(|blocks| (1..BLOCKS).contains(&blocks));
        assert!(is_short || told.contains(FAILED), "{status}: {told}");
        let (status, told) = shim.run_in("keeper", "late", &read_on("/gone")).await;
        assert!(status != 0 && told.contains("No such device"), "{status}: {told}");

        // The other one knows nothing of it.
        let marks = "echo mark | dd of=/dev/disk bs=4096 oflag=direct conv=sync,notrunc 2>/dev/null";
        assert_eq!(shim.run_in("keeper", "marks", marks).await, (0, String::new()));
        assert!(kept.block(0).starts_with(b"mark\n"));
        for process in ["kept-reads", "kept-writes"] {
            assert_eq!(shim.status("keeper", process).await, Status::RUNNING, "{process}");
        }

        // The same disk comes again, and goes as from a guest that does not let go of it in time.
        says(&start(&shim, "again", &gone, &tell_first).await, "first\n");
        let reads = shim.exec_telling("keeper", "more-reads", &read_on("/gone")).await;
        let writes = shim.exec_telling("keeper", "more-writes", &write_on("/gone")).await;
        control(vmm, &json!({ "op": "remove_device", "id": last_added(vmm) }));
        assert_eq!(opened(vmm, &gone.device.0), 0);
        for (process, told) in [("more-reads", reads), ("more-writes", writes)] {
            let (status, told) = shim.ended("keeper", process, &told).await;
            assert!(status != 0 && told.contains(FAILED), "{process}: {status}: {told}");
        }
        shim.remove_task("again").await;

        // Nor has the guest lost more than that.
        says(&start(&shim, "last", &gone, &tell_first).await, "first\n");
        shim.remove_task("last").await;
        assert_eq!(opened(vmm, &gone.device.0), 0);
        shim.remove_task("keeper").await;
        assert_eq!(kept_by(vmm), before, "descriptors and threads");
    });
}
