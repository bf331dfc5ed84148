//! A share as its driver sees it: FUSE messages through the queues.

use std::collections::HashMap;
use std::ffi::CString;
use std::fs::{self, File};
use std::os::fd::AsRawFd as _;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::super::device::GuestMemory;
use super::super::testing::{DriverQueue, FakeInterrupt, activation, memory};
use super::*;

const REQUEST: u64 = 0x10_0000;
const ANSWER: u64 = 0x30_0000;
const ROOT: u64 = 1;

// linux/fuse.h
const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const SETATTR: u32 = 4;
const READLINK: u32 = 5;
const SYMLINK: u32 = 6;
const MKNOD: u32 = 8;
const MKDIR: u32 = 9;
const UNLINK: u32 = 10;
const RMDIR: u32 = 11;
const RENAME: u32 = 12;
const LINK: u32 = 13;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const STATFS: u32 = 17;
const RELEASE: u32 = 18;
const FSYNC: u32 = 20;
const SETXATTR: u32 = 21;
const GETXATTR: u32 = 22;
const LISTXATTR: u32 = 23;
const REMOVEXATTR: u32 = 24;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const READDIR: u32 = 28;
const CREATE: u32 = 35;
const DESTROY: u32 = 38;
const BATCH_FORGET: u32 = 42;
const FALLOCATE: u32 = 43;
const READDIRPLUS: u32 = 44;
const RENAME2: u32 = 45;
const LSEEK: u32 = 46;
const COPY_FILE_RANGE: u32 = 47;
const SYNCFS: u32 = 50;
const TMPFILE: u32 = 51;
const STATX: u32 = 52;
const UNLINK_FORGET: u32 = 3002;
// Hull's own. A request for events waits, but with room for an answer such as these have it is refused.
const OF_HULL: std::ops::Range<u32> = 3000..3003;

struct Bench {
    memory: GuestMemory,
    hiprio: DriverQueue,
    driver: DriverQueue,
    interrupt: Arc<FakeInterrupt>,
    fs: Fs,
    root: tempfile::TempDir,
    user: (u32, u32),
    /// Answers to requests that were not waited for: their lengths by head.
    others: HashMap<u16, u32>,
}

fn share(root: &Path, read_only: bool, cache: CachePolicy) -> Fs {
    Fs::new("t", File::open(root).unwrap().into(), "tag", read_only, cache).unwrap()
}

/// A mounted share, or `None` where the thread cannot be set up.
fn bench_with(read_only: bool, cache: CachePolicy) -> Option<Bench> {
    let root = tempfile::tempdir().unwrap();
    fs::set_permissions(root.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let fs = share(root.path(), read_only, cache);
    bench_of(fs, root)
}

/// The same, of a share made ready.
fn bench_of(mut fs: Fs, root: tempfile::TempDir) -> Option<Bench> {
    let memory = memory(0x60_0000);
    let hiprio = DriverQueue::new(&memory, 0, HIPRIO_SIZE);
    let driver = DriverQueue::new(&memory, 0x1_0000, REQUEST_SIZE);
    let interrupt = Arc::new(FakeInterrupt::default());
    if let Err(error) = fs.activate(activation(&memory, 0, &interrupt, &[&hiprio, &driver])) {
        eprintln!("skipped: {error}");
        return None;
    }
    // SAFETY: no pointers.
    let user = unsafe { (libc::geteuid(), libc::getegid()) };
    let mut bench = Bench { memory, hiprio, driver, interrupt, fs, root, user, others: HashMap::new() };
    bench.init();
    Some(bench)
}

fn bench() -> Option<Bench> {
    bench_with(false, CachePolicy::Auto)
}

/// Ends a test that needs a share's thread where there can be none.
macro_rules! require {
    ($bench:expr) => {
        match $bench {
            Some(bench) => bench,
            None => return,
        }
    };
}

// Below the macro, which it needs.
mod attributes;
mod broker;
mod locks;
mod watches;

fn words(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn longs(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn named(mut body: Vec<u8>, names: &[&str]) -> Vec<u8> {
    for name in names {
        body.extend(name.as_bytes());
        body.push(0);
    }
    body
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

impl Bench {
    fn path(&self, name: &str) -> std::path::PathBuf {
        self.root.path().join(name)
    }

    /// Sends bytes with room for an answer; returns the used length.
    fn send_raw(&mut self, bytes: &[u8], room: u32) -> u32 {
        self.memory.write_slice(bytes, GuestAddress(REQUEST)).unwrap();
        let mut chain = vec![(REQUEST, u32::try_from(bytes.len()).unwrap(), false)];
        if room > 0 {
            chain.push((ANSWER, room, true));
        }
        self.send_chain(&chain)
    }

    /// Sends a chain of addresses, lengths and whether the device may write there; returns the used length.
    fn send_chain(&mut self, chain: &[(u64, u32, bool)]) -> u32 {
        let head = self.driver.add(chain);
        self.driver.kick.write(1).unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            match self.driver.take_used() {
                Some((used, len)) if used == head => return len,
                Some((used, len)) => drop(self.others.insert(used, len)),
                None => {}
            }
            assert!(Instant::now() < deadline, "the share did not answer");
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    fn message(&self, opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
        let mut bytes = words(&[u32::try_from(40 + body.len()).unwrap(), opcode]);
        bytes.extend(longs(&[77, node]));
        bytes.extend(words(&[self.user.0, self.user.1, 1, 0]));
        bytes.extend(body);
        bytes
    }

    /// Sends a request; the body of its answer, or the error.
    fn ask(&mut self, opcode: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, i32> {
        let bytes = self.message(opcode, node, body);
        let used = self.send_raw(&bytes, 0x20_0000) as usize;
        let mut answer = vec![0; used];
        self.memory.read_slice(&mut answer, GuestAddress(ANSWER)).unwrap();
        // The server does not count the answer to this one.
        if opcode == DESTROY {
            return Ok(Vec::new());
        }
        assert_eq!((u32_at(&answer, 0) as usize, u64_at(&answer, 8)), (used, 77));
        match u32_at(&answer, 4) as i32 {
            0 => Ok(answer.split_off(16)),
            error => Err(-error),
        }
    }

    fn init(&mut self) -> Vec<u8> {
        let all = u32::MAX;
        let mut body = words(&[7, 39, 0x2_0000, all, all]);
        body.extend([0; 44]);
        self.ask(INIT, 0, &body).unwrap()
    }

    fn lookup(&mut self, parent: u64, name: &str) -> Result<u64, i32> {
        self.ask(LOOKUP, parent, &named(vec![], &[name])).map(|entry| u64_at(&entry, 0))
    }

    /// Makes and opens a file; its node and handle.
    fn create(&mut self, parent: u64, name: &str, mode: u32) -> Result<(u64, u64), i32> {
        let flags = (libc::O_RDWR | libc::O_CREAT) as u32;
        let body = named(words(&[flags, mode, 0o022, 0]), &[name]);
        self.ask(CREATE, parent, &body).map(|answer| (u64_at(&answer, 0), u64_at(&answer, 128)))
    }

    fn open(&mut self, node: u64, flags: i32) -> Result<u64, i32> {
        self.ask(OPEN, node, &words(&[flags as u32, 0])).map(|answer| u64_at(&answer, 0))
    }

    fn write(&mut self, (node, handle): (u64, u64), offset: u64, data: &[u8]) -> Result<u32, i32> {
        let mut body = longs(&[handle, offset]);
        body.extend(words(&[data.len() as u32, 0, 0, 0, libc::O_RDWR as u32, 0]));
        body.extend(data);
        self.ask(WRITE, node, &body).map(|answer| u32_at(&answer, 0))
    }

    fn read(&mut self, (node, handle): (u64, u64), offset: u64, len: u32) -> Result<Vec<u8>, i32> {
        let mut body = longs(&[handle, offset]);
        body.extend(words(&[len, 0, 0, 0, 0, 0]));
        self.ask(READ, node, &body)
    }

    fn forget(&mut self, node: u64, count: u64) {
        let bytes = self.message(FORGET, node, &longs(&[count]));
        self.memory.write_slice(&bytes, GuestAddress(REQUEST)).unwrap();
        self.send_hiprio(bytes.len());
    }

    fn unlink_forget(&mut self, parent: u64, name: &str, (node, count): (u64, u64)) -> Result<(), i32> {
        self.ask(UNLINK_FORGET, parent, &named(longs(&[node, count]), &[name])).map(|body| assert!(body.is_empty()))
    }

    /// Sends what stands at the request's place by the queue for requests of high priority.
    fn send_hiprio(&mut self, len: usize) {
        self.hiprio.add(&[(REQUEST, len as u32, false)]);
        self.hiprio.kick.write(1).unwrap();
        while self.hiprio.take_used().is_none() {
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    fn names(&mut self, opcode: u32, node: u64, size: u32) -> Vec<String> {
        let handle = self.ask(OPENDIR, node, &words(&[0, 0])).map(|answer| u64_at(&answer, 0)).unwrap();
        let (mut names, mut offset) = (Vec::new(), 0);
        loop {
            let mut body = longs(&[handle, offset]);
            body.extend(words(&[size, 0, 0, 0, 0, 0]));
            let answer = self.ask(opcode, node, &body).unwrap();
            if answer.is_empty() {
                return names;
            }
            let mut at = 0;
            while at < answer.len() {
                at += if opcode == READDIRPLUS { 128 } else { 0 };
                offset = u64_at(&answer, at + 8);
                let len = u32_at(&answer, at + 16) as usize;
                names.push(String::from_utf8(answer[at + 24..at + 24 + len].to_vec()).unwrap());
                at += (24 + len).next_multiple_of(8);
            }
        }
    }

    /// Has another share of the same directory take over what was saved.
    fn go_on_in_copy(&mut self, state: &DeviceState) {
        let mut copy = share(self.root.path(), false, CachePolicy::Auto);
        copy.restore(state).unwrap();
        let ends = (0..).zip([&self.hiprio, &self.driver]).zip(&state.queues).map(|((index, driver), state)| {
            Some(driver.restored_end(index, self.interrupt.clone(), state.as_ref().unwrap()))
        });
        let ends = ends.collect();
        copy.activate(Activation::new(0, self.memory.clone(), self.interrupt.clone(), ends)).unwrap();
        self.fs = copy;
    }

    /// The numbers of known nodes, with the root, and of anchors.
    fn known(&self) -> (usize, usize) {
        let state = self.fs.share.state();
        (state.inodes.len(), state.inodes.anchors())
    }
}

fn is_root() -> bool {
    // SAFETY: no pointers.
    let root = unsafe { libc::geteuid() == 0 };
    if !root {
        eprintln!("skipped: needs root");
    }
    root
}

#[test]
fn the_protocol_is_agreed_on() {
    let mut b = require!(bench());
    let answer = b.init();
    assert_eq!(answer.len(), 64);
    assert_eq!((u32_at(&answer, 0), u32_at(&answer, 20)), (7, 1 << 20));
    let flags = u32_at(&answer, 12);
    for wanted in [1 << 1, 1 << 10, 1 << 20, 1 << 6, 1 << 28, 1 << 22, 1 << 30, 1 << 29, 1 << 3, 1 << 13] {
        assert_ne!(flags & wanted, 0, "{wanted:#x}");
    }
    // Export with its "..", write-back and open-free operation are not for us.
    for unwanted in [1 << 4, 1 << 16, 1 << 17, 1 << 24] {
        assert_eq!(flags & unwanted, 0, "{unwanted:#x}");
    }
    assert_eq!(b.ask(INIT, 0, &words(&[6, 0, 0, 0])), Err(libc::EPROTO));
    assert_eq!(b.ask(INIT, 0, &words(&[7, 20, 0, 0])), Err(libc::EPROTO));
    assert_eq!(b.ask(INIT, 0, &words(&[7])), Err(libc::EINVAL));
    assert_eq!(b.ask(INIT, 0, &words(&[8, 0, 0, 0])).map(|answer| u32_at(&answer, 0)), Ok(7));
}

#[test]
fn a_file_is_made_written_read_and_described() {
    let mut b = require!(bench());
    let file = b.create(ROOT, "file", 0o100_666).unwrap();
    assert_eq!(b.write(file, 3, b"hello"), Ok(5));
    assert_eq!(b.read(file, 0, 100), Ok(b"\0\0\0hello".to_vec()));
    assert_eq!(fs::read(b.path("file")).unwrap(), b"\0\0\0hello");
    assert_eq!(fs::metadata(b.path("file")).unwrap().mode() & 0o7777, 0o644, "the guest's umask");
    assert_eq!(b.lookup(ROOT, "file"), Ok(file.0));
    let attr = b.ask(GETATTR, file.0, &longs(&[0, 0])).unwrap();
    assert_eq!((u64_at(&attr, 0), u64_at(&attr, 24)), (1, 8), "one second, eight bytes");
    assert_eq!(b.ask(FSYNC, file.0, &longs(&[file.1, 0])), Ok(vec![]));
    assert_eq!(b.ask(FLUSH, file.0, &longs(&[file.1, 0, 0])), Err(libc::ENOSYS));
    assert_eq!(b.ask(RELEASE, file.0, &longs(&[file.1, 0, 0])), Ok(vec![]));
    assert_eq!(b.read(file, 0, 1), Err(libc::EBADF));
    assert!(u64_at(&b.ask(STATFS, ROOT, &[]).unwrap(), 0) > 0);
    assert_eq!(b.ask(SYNCFS, ROOT, &longs(&[0])), Ok(vec![]));
    // Large transfers come through whole.
    let file = (file.0, b.open(file.0, libc::O_RDWR).unwrap());
    let data: Vec<u8> = (0..1_u32 << 18).flat_map(u32::to_le_bytes).collect();
    assert_eq!(b.write(file, 0, &data), Ok(1 << 20));
    assert_eq!(b.read(file, 0, 1 << 20), Ok(data));
}

#[test]
fn there_is_no_way_out_of_the_root() {
    let mut b = require!(bench());
    let directory = b.ask(MKDIR, ROOT, &named(words(&[0o755, 0]), &["d"])).map(|entry| u64_at(&entry, 0)).unwrap();
    for name in ["..", ".", "", "/", "/etc", "d/..", "../x", "d/x"] {
        for parent in [ROOT, directory] {
            assert_eq!(b.lookup(parent, name), Err(libc::EINVAL), "{name}");
        }
        assert_eq!(b.create(ROOT, name, 0o644), Err(libc::EINVAL));
        assert_eq!(b.ask(MKDIR, ROOT, &named(words(&[0o755, 0]), &[name])), Err(libc::EINVAL));
        assert_eq!(b.ask(MKNOD, ROOT, &named(words(&[0o10_0644, 0, 0, 0]), &[name])), Err(libc::EINVAL));
        assert_eq!(b.ask(UNLINK, directory, &named(vec![], &[name])), Err(libc::EINVAL));
        assert_eq!(b.ask(RMDIR, directory, &named(vec![], &[name])), Err(libc::EINVAL));
        assert_eq!(b.unlink_forget(directory, name, (directory, 1)), Err(libc::EINVAL));
        assert_eq!(b.ask(RENAME, ROOT, &named(longs(&[directory]), &["d", name])), Err(libc::EINVAL));
        assert_eq!(b.ask(LINK, ROOT, &named(longs(&[directory]), &[name])), Err(libc::EINVAL));
        assert_eq!(b.ask(SYMLINK, ROOT, &named(vec![], &[name, "/"])), Err(libc::EINVAL));
    }
    // A link out is the guest's to follow: the host reads it and opens nothing.
    b.ask(SYMLINK, ROOT, &named(vec![], &["out", "/etc"])).unwrap();
    let link = b.lookup(ROOT, "out").unwrap();
    assert_eq!(b.ask(READLINK, link, &[]), Ok(b"/etc".to_vec()));
    assert!(b.lookup(link, "passwd").is_err());
    assert!(b.open(link, libc::O_RDONLY).is_err());
    assert!(b.ask(OPENDIR, link, &words(&[0, 0])).is_err());
    // Too long a name, and the longest.
    assert_eq!(b.lookup(ROOT, &"x".repeat(256)), Err(libc::ENAMETOOLONG));
    assert!(b.create(ROOT, &"x".repeat(255), 0o644).is_ok());
    assert_eq!(b.lookup(ROOT, "none"), Err(libc::ENOENT));
}

#[test]
fn directories_are_read_whole_whatever_the_room() {
    let mut b = require!(bench());
    let mut expected: Vec<_> = (0..300).map(|i| format!("file-{i}-{}", "x".repeat(i % 200))).collect();
    for name in &expected {
        fs::write(b.path(name), name).unwrap();
    }
    expected.extend([".".to_owned(), "..".to_owned()]);
    expected.sort();
    for (opcode, size) in [(READDIR, 4096), (READDIR, 512), (READDIRPLUS, 4096), (READDIRPLUS, 1 << 17)] {
        let mut names = b.names(opcode, ROOT, size);
        names.sort();
        assert_eq!(names, expected, "{opcode} {size}");
    }
    let (nodes, _) = b.known();
    assert_eq!(nodes, 301, "READDIRPLUS counts as lookups");
    let node = b.lookup(ROOT, &expected[2]).unwrap();
    b.forget(node, 1000);
    assert_eq!(b.known().0, 300);
    b.forget(ROOT, u64::MAX);
    b.ask(DESTROY, 0, &[]).unwrap();
    assert_eq!(b.known(), (1, 0));
}

#[test]
fn names_are_moved_linked_and_removed() {
    let mut b = require!(bench());
    let one = b.create(ROOT, "one", 0o644).unwrap();
    let two = b.create(ROOT, "two", 0o644).unwrap();
    b.write(one, 0, b"1").unwrap();
    b.write(two, 0, b"2").unwrap();
    assert_eq!(b.ask(RENAME2, ROOT, &named(longs(&[ROOT, 1]), &["one", "two"])), Err(libc::EEXIST));
    b.ask(RENAME2, ROOT, &named(longs(&[ROOT, 2]), &["one", "two"])).unwrap();
    assert_eq!((b.lookup(ROOT, "one"), b.lookup(ROOT, "two")), (Ok(two.0), Ok(one.0)));
    b.ask(RENAME, ROOT, &named(longs(&[ROOT]), &["two", "one"])).unwrap();
    assert_eq!(fs::read(b.path("one")).unwrap(), b"1");
    // What was replaced lives on while it is open, by node too.
    assert_eq!(b.read(two, 0, 9), Ok(b"2".to_vec()));
    assert!(b.ask(GETATTR, two.0, &longs(&[0, 0])).is_ok());
    let linked = b.ask(LINK, ROOT, &named(longs(&[one.0]), &["also"])).unwrap();
    assert_eq!(u64_at(&linked, 0), one.0);
    b.ask(UNLINK, ROOT, &named(vec![], &["also"])).unwrap();
    assert_eq!(b.ask(UNLINK, ROOT, &named(vec![], &["also"])), Err(libc::ENOENT));
    assert_eq!(b.lookup(ROOT, "one"), Ok(one.0));
    b.ask(MKDIR, ROOT, &named(words(&[0o755, 0]), &["d"])).unwrap();
    let directory = b.lookup(ROOT, "d").unwrap();
    b.create(directory, "x", 0o644).unwrap();
    assert_eq!(b.ask(RMDIR, ROOT, &named(vec![], &["d"])), Err(libc::ENOTEMPTY));
    b.ask(RENAME, ROOT, &named(longs(&[ROOT]), &["d", "e"])).unwrap();
    assert!(b.lookup(directory, "x").is_ok());
    b.ask(UNLINK, directory, &named(vec![], &["x"])).unwrap();
    b.ask(RMDIR, ROOT, &named(vec![], &["e"])).unwrap();
    assert_eq!(b.lookup(directory, "x"), Err(libc::ENOENT));
}

#[test]
fn a_file_is_forgotten_with_its_name() {
    let mut b = require!(bench());
    let file = b.create(ROOT, "file", 0o644).unwrap();
    b.lookup(ROOT, "file").unwrap();
    b.ask(MKDIR, ROOT, &named(words(&[0o755, 0]), &["d"])).unwrap();
    assert_eq!(b.unlink_forget(ROOT, "d", (file.0, 1)), Err(libc::EISDIR));
    assert_eq!(b.unlink_forget(ROOT, "none", (file.0, 1)), Err(libc::ENOENT));
    assert_eq!(b.unlink_forget(ROOT, &"x".repeat(255), (file.0, 1)), Err(libc::ENOENT));
    assert_eq!(b.unlink_forget(ROOT, &"x".repeat(256), (file.0, 1)), Err(libc::ENAMETOOLONG));
    // Without a name, and without its end.
    assert_eq!(b.ask(UNLINK_FORGET, ROOT, &longs(&[file.0, 1])), Err(libc::EINVAL));
    assert_eq!(b.ask(UNLINK_FORGET, ROOT, &[longs(&[file.0, 1]), b"file".to_vec()].concat()), Err(libc::EINVAL));
    // What failed took nothing back; an open file is kept by its handle.
    let (nodes, anchors) = b.known();
    assert_eq!(nodes, 3);
    b.unlink_forget(ROOT, "file", (file.0, 2)).unwrap();
    assert!(!b.path("file").exists());
    assert_eq!(b.write(file, 0, b"more"), Ok(4));
    assert_eq!(b.known(), (3, anchors), "the file has no anchor");
    b.ask(RELEASE, file.0, &longs(&[file.1, 0, 0])).unwrap();
    assert_eq!(b.known(), (2, anchors));
    assert_eq!(b.ask(GETATTR, file.0, &longs(&[0, 0])), Err(libc::ESTALE));

    // A file that has another name, which the table knows it by.
    fs::write(b.path("one"), "1").unwrap();
    let one = b.lookup(ROOT, "one").unwrap();
    b.ask(LINK, ROOT, &named(longs(&[one]), &["two"])).unwrap();
    b.unlink_forget(ROOT, "one", (one, 1)).unwrap();
    assert_eq!(b.lookup(ROOT, "two"), Ok(one));
    // And one that is another file by now: the guest knows it, and keeps it.
    fs::write(b.path("other"), "2").unwrap();
    let other = b.lookup(ROOT, "other").unwrap();
    b.unlink_forget(ROOT, "other", (one, 1)).unwrap();
    assert!(b.ask(GETATTR, other, &longs(&[0, 0])).is_ok());
    for node in [ROOT, 0, 12_345, u64::MAX] {
        fs::write(b.path("again"), "3").unwrap();
        b.unlink_forget(ROOT, "again", (node, u64::MAX)).unwrap();
    }
    b.unlink_forget(ROOT, "two", (one, u64::MAX)).unwrap();
    b.forget(other, 1);
    assert_eq!((b.known().0, fs::read_dir(b.root.path()).unwrap().count()), (2, 1));
}

#[test]
fn a_read_may_come_in_any_pieces() {
    let mut b = require!(bench());
    fs::write(b.path("file"), "0123456789").unwrap();
    let node = b.lookup(ROOT, "file").unwrap();
    let handle = b.open(node, libc::O_RDONLY).unwrap();
    let body = |size: u32, offset: u64| [longs(&[handle, offset]), words(&[size, 0, 0, 0, 0, 0])].concat();
    let pieces = |b: &mut Bench, message: &[u8], readable: &[u32], writable: &[u32]| {
        b.memory.write_slice(message, GuestAddress(REQUEST)).unwrap();
        b.memory.write_slice(&[0xee; 64], GuestAddress(ANSWER)).unwrap();
        let mut chain = Vec::new();
        for (lens, mut at, is_writable) in [(readable, REQUEST, false), (writable, ANSWER, true)] {
            for len in lens {
                chain.push((at, *len, is_writable));
                at += u64::from(*len);
            }
        }
        let used = b.send_chain(&chain) as usize;
        let mut answer = vec![0; 64];
        b.memory.read_slice(&mut answer, GuestAddress(ANSWER)).unwrap();
        (used, answer)
    };
    let message = b.message(READ, node, &body(6, 2));
    for readable in [&[80][..], &[40, 40], &[1, 79], &[7, 1, 32, 40], &[8, 72], &[30, 20, 30], &[80, 16]] {
        for writable in [&[48][..], &[16, 32], &[16, 1, 1, 30], &[3, 13, 6], &[20, 20], &[1, 1, 20]] {
            let (used, answer) = pieces(&mut b, &message, readable, writable);
            let what = format!("{readable:?} {writable:?}");
            assert_eq!((used, u32_at(&answer, 0), u32_at(&answer, 4)), (22, 22, 0), "{what}");
            assert_eq!((&answer[16..22], &answer[22..64]), (&b"234567"[..], &[0xee; 42][..]), "{what}");
        }
        // Less room than is asked for, none at all, and none for the answer's header.
        assert_eq!(pieces(&mut b, &message, readable, &[16, 4]).0, 20);
        assert_eq!(pieces(&mut b, &message, readable, &[16]).0, 16);
        assert_eq!(pieces(&mut b, &message, readable, &[8, 7]).0, 0);
    }
    let refused = |(used, answer): (usize, Vec<u8>)| (used == 16).then(|| -(u32_at(&answer, 4) as i32));
    assert_eq!(refused(pieces(&mut b, &message, &[79], &[48])), Some(libc::EINVAL));
    assert_eq!(refused(pieces(&mut b, &message, &[20, 20], &[48])), Some(libc::EINVAL));
    let mut short = message.clone();
    short[0] = 79;
    assert_eq!(refused(pieces(&mut b, &short, &[80], &[48])), Some(libc::EINVAL));
    for (node, message) in [(node, body(6, 1 << 63)), (node + 1, body(6, 0))] {
        let message = b.message(READ, node, &message);
        assert!(refused(pieces(&mut b, &message, &[40, 40], &[16, 32])).is_some_and(|error| error > 0));
    }
    let end = b.message(READ, node, &body(6, 100));
    assert_eq!(pieces(&mut b, &end, &[40, 40], &[16, 32]).0, 16);
}

#[test]
fn special_files_are_made_but_never_opened() {
    let mut b = require!(bench());
    let fifo = b.ask(MKNOD, ROOT, &named(words(&[libc::S_IFIFO | 0o644, 0, 0, 0]), &["fifo"])).unwrap();
    b.ask(MKNOD, ROOT, &named(words(&[libc::S_IFSOCK | 0o644, 0, 0, 0]), &["socket"])).unwrap();
    assert!(fs::symlink_metadata(b.path("fifo")).unwrap().file_type().is_fifo());
    assert!(fs::symlink_metadata(b.path("socket")).unwrap().file_type().is_socket());
    assert_eq!(b.open(u64_at(&fifo, 0), libc::O_RDONLY), Err(libc::ENXIO));
    // Not by creating over it either.
    assert_eq!(b.create(ROOT, "fifo", 0o644), Err(libc::ENXIO));
    if is_root() {
        let device = b.ask(MKNOD, ROOT, &named(words(&[libc::S_IFCHR | 0o600, 0x103, 0, 0]), &["null"])).unwrap();
        assert_eq!(fs::symlink_metadata(b.path("null")).unwrap().rdev(), libc::makedev(1, 3));
        assert_eq!(b.open(u64_at(&device, 0), libc::O_RDWR), Err(libc::ENXIO));
    }
}

#[test]
fn holes_ranges_and_nameless_files_work() {
    let mut b = require!(bench());
    let file = b.create(ROOT, "sparse", 0o644).unwrap();
    let mut body = longs(&[file.1, 0, 1 << 20]);
    body.extend(words(&[0, 0]));
    b.ask(FALLOCATE, file.0, &body).unwrap();
    assert_eq!(fs::metadata(b.path("sparse")).unwrap().len(), 1 << 20);
    let seek = |whence: i32| [longs(&[file.1, 0]), words(&[whence as u32, 0])].concat();
    assert!(b.ask(LSEEK, file.0, &seek(libc::SEEK_HOLE)).is_ok());
    assert_eq!(b.ask(LSEEK, file.0, &seek(libc::SEEK_SET)), Err(libc::EINVAL));
    let before_the_beginning = [longs(&[file.1, u64::MAX]), words(&[libc::SEEK_DATA as u32, 0])].concat();
    assert_eq!(b.ask(LSEEK, file.0, &before_the_beginning), Err(libc::ENXIO));
    b.write(file, 0, b"copied").unwrap();
    let copy = b.create(ROOT, "copy", 0o644).unwrap();
    let copied = b.ask(COPY_FILE_RANGE, file.0, &longs(&[file.1, 0, copy.0, copy.1, 0, 6, 0])).unwrap();
    assert_eq!(u32_at(&copied, 0), 6);
    assert_eq!(fs::read(b.path("copy")).unwrap(), b"copied");
    let flags = (libc::O_RDWR | libc::O_TMPFILE) as u32;
    match b.ask(TMPFILE, ROOT, &named(words(&[flags, 0o600, 0, 0]), &["/"])) {
        Ok(answer) => {
            let nameless = (u64_at(&answer, 0), u64_at(&answer, 128));
            b.write(nameless, 0, b"tmp").unwrap();
            assert!(b.ask(GETATTR, nameless.0, &longs(&[0, 0])).is_ok());
            b.ask(LINK, ROOT, &named(longs(&[nameless.0]), &["named"])).unwrap();
            assert_eq!(fs::read(b.path("named")).unwrap(), b"tmp");
        }
        Err(error) => assert_eq!(error, libc::EOPNOTSUPP),
    }
}

#[test]
fn extended_attributes_are_kept() {
    let mut b = require!(bench());
    let file = b.create(ROOT, "file", 0o644).unwrap();
    let set = [words(&[5, 0, 0, 0]), b"user.key\0value".to_vec()].concat();
    if b.ask(SETXATTR, file.0, &set) == Err(libc::EOPNOTSUPP) {
        eprintln!("skipped: no user attributes here");
        return;
    }
    let get = |size: u32| named(words(&[size, 0]), &["user.key"]);
    assert_eq!(b.ask(GETXATTR, file.0, &get(100)), Ok(b"value".to_vec()));
    assert_eq!(b.ask(GETXATTR, file.0, &get(0)).map(|answer| u32_at(&answer, 0)), Ok(5));
    assert_eq!(b.ask(GETXATTR, file.0, &get(2)), Err(libc::ERANGE));
    assert_eq!(b.ask(LISTXATTR, file.0, &words(&[u32::MAX, 0])), Ok(b"user.key\0".to_vec()));
    b.ask(REMOVEXATTR, file.0, &named(vec![], &["user.key"])).unwrap();
    assert_eq!(b.ask(GETXATTR, file.0, &get(100)), Err(libc::ENODATA));
    for broken in [&set[..20], &words(&[5, 0, 0, 0]), &words(&[u32::MAX, 0, 0, 0])] {
        assert!(b.ask(SETXATTR, file.0, broken).is_err());
    }
}

#[test]
fn files_belong_to_who_made_them_and_lose_set_id_bits() {
    if !is_root() {
        return;
    }
    let mut b = require!(bench());
    b.user = (1234, 5678);
    let file = b.create(ROOT, "file", 0o755).unwrap();
    let meta = fs::metadata(b.path("file")).unwrap();
    assert_eq!((meta.uid(), meta.gid()), (1234, 5678));
    // The host's permissions are not asked: the guest has judged.
    fs::set_permissions(b.root.path(), fs::Permissions::from_mode(0o700)).unwrap();
    assert!(b.create(ROOT, "second", 0o644).is_ok());
    assert!(b.ask(MKNOD, ROOT, &named(words(&[libc::S_IFCHR, 0x103, 0, 0]), &["null"])).is_ok());
    let set_mode = |mode: u32| {
        let mut body = words(&[1, 0]);
        body.extend([0; 60]);
        body.extend(words(&[mode, 0, 0, 0, 0]));
        body
    };
    assert_eq!(set_mode(0).len(), 88);
    b.ask(SETATTR, file.0, &set_mode(0o6755)).unwrap();
    b.write(file, 0, b"by root of the guest").unwrap();
    assert_eq!(fs::metadata(b.path("file")).unwrap().mode() & 0o7777, 0o6755);
    let mut body = longs(&[file.1, 0]);
    body.extend(words(&[1, 4, 0, 0, libc::O_RDWR as u32, 0]));
    body.extend(b"x");
    b.ask(WRITE, file.0, &body).unwrap();
    assert_eq!(fs::metadata(b.path("file")).unwrap().mode() & 0o7777, 0o755);
    b.user = (0, 0);
    b.create(ROOT, "of-root", 0o644).unwrap();
    assert_eq!(fs::metadata(b.path("of-root")).unwrap().uid(), 0);
}

#[test]
fn a_read_only_share_refuses_every_change() {
    let mut b = require!(bench_with(true, CachePolicy::Auto));
    fs::write(b.path("file"), "data").unwrap();
    let node = b.lookup(ROOT, "file").unwrap();
    let handle = b.open(node, libc::O_RDONLY).unwrap();
    assert_eq!(b.read((node, handle), 0, 9), Ok(b"data".to_vec()));
    for flags in [libc::O_WRONLY, libc::O_RDWR, libc::O_RDONLY | libc::O_TRUNC] {
        assert_eq!(b.open(node, flags), Err(libc::EROFS));
    }
    let body = named(vec![0; 96], &["x", "y"]);
    for opcode in [
        SETATTR,
        SYMLINK,
        MKNOD,
        MKDIR,
        UNLINK,
        RMDIR,
        RENAME,
        LINK,
        WRITE,
        SETXATTR,
        REMOVEXATTR,
        CREATE,
        FALLOCATE,
        RENAME2,
        COPY_FILE_RANGE,
        TMPFILE,
        UNLINK_FORGET,
    ] {
        assert_eq!(b.ask(opcode, ROOT, &body), Err(libc::EROFS), "{opcode}");
    }
    // An open flag that opens for writing on the sly.
    assert!(b.open(node, libc::O_ACCMODE).is_err());
    assert_eq!(fs::read(b.path("file")).unwrap(), b"data");
    assert_eq!(b.names(READDIRPLUS, ROOT, 4096).len(), 3);
}

#[test]
fn broken_messages_are_answered_with_errors() {
    let mut b = require!(bench());
    for opcode in [0, 7, 19, 34, 37, 39, 40, 48, 49, 53, 4096, u32::MAX] {
        assert_eq!(b.ask(opcode, ROOT, &[0; 64]), Err(libc::ENOSYS), "{opcode}");
    }
    // A header cut short, or that promises more or less than there is.
    assert_eq!(b.send_raw(&[1; 39], 4096), 0);
    let mut bytes = b.message(GETATTR, ROOT, &longs(&[0, 0]));
    for len in [0, 39, 57, 1 << 20, u32::MAX] {
        bytes[..4].copy_from_slice(&len.to_le_bytes());
        assert_eq!(b.send_raw(&bytes, 4096), 16, "{len}");
        assert_eq!(b.memory.read_obj::<i32>(GuestAddress(ANSWER + 4)).unwrap(), -libc::EINVAL);
    }
    // Bodies cut short, names without an end, no room for the answer, no answer at all.
    for opcode in [LOOKUP, GETATTR, SETATTR, CREATE, OPEN, READ, WRITE, MKNOD, RENAME, READDIR, COPY_FILE_RANGE] {
        assert!(b.ask(opcode, ROOT, b"x").is_err(), "{opcode}");
    }
    let bytes = b.message(GETATTR, ROOT, &longs(&[0, 0]));
    for room in [0, 1, 15] {
        assert_eq!(b.send_raw(&bytes, room), 0);
    }
    let many = b.message(BATCH_FORGET, 0, &words(&[u32::MAX, 0]));
    assert_eq!(b.send_raw(&many, 0), 0);
    // Numbers that were never given.
    for node in [0, 2, 1 << 32 | 1, u64::MAX] {
        assert_eq!(b.lookup(node, "x"), Err(libc::ESTALE));
        b.forget(node, 1);
    }
    assert_eq!(b.read((ROOT, 5), 0, u32::MAX), Err(libc::EBADF));
    let file = b.create(ROOT, "file", 0o644).unwrap();
    assert_eq!(b.read(file, 0, u32::MAX), Ok(vec![]));
    assert_eq!(b.read(file, u64::MAX, 10), Err(libc::EINVAL));
    assert!(b.interrupt.resets.lock().unwrap().is_empty());
}

#[test]
fn a_thousand_files_take_few_descriptors() {
    let mut b = require!(bench());
    let directory = b.ask(MKDIR, ROOT, &named(words(&[0o755, 0]), &["d"])).map(|entry| u64_at(&entry, 0)).unwrap();
    for i in 0..1000 {
        fs::write(b.path(&format!("d/{i}")), "x").unwrap();
        b.lookup(directory, &i.to_string()).unwrap();
    }
    assert_eq!(b.known(), (1002, 1));
    // One that the host replaces is another file.
    let old = b.lookup(directory, "7").unwrap();
    fs::remove_file(b.path("d/7")).unwrap();
    fs::write(b.path("d/7"), "new").unwrap();
    assert_eq!(b.ask(GETATTR, old, &longs(&[0, 0])), Err(libc::ESTALE));
    assert_ne!(b.lookup(directory, "7"), Ok(old));
}

#[test]
fn a_share_goes_on_after_a_pause_and_in_a_copy() {
    let mut b = require!(bench());
    let directory = b.ask(MKDIR, ROOT, &named(words(&[0o755, 0]), &["d"])).map(|entry| u64_at(&entry, 0)).unwrap();
    let file = b.create(directory, "file", 0o644).unwrap();
    b.write(file, 0, b"data").unwrap();
    b.fs.pause();
    let state = b.fs.save();
    b.fs.resume();
    assert_eq!(b.read(file, 0, 9), Ok(b"data".to_vec()));
    let mut copy = share(b.root.path(), false, CachePolicy::Auto);
    copy.restore(&state).unwrap();
    b.fs.deactivate();
    b.hiprio = DriverQueue::new(&b.memory, 0, HIPRIO_SIZE);
    b.driver = DriverQueue::new(&b.memory, 0x1_0000, REQUEST_SIZE);
    b.memory.write_slice(&[0; 0x2_0000], GuestAddress(0)).unwrap();
    copy.activate(activation(&b.memory, 0, &b.interrupt, &[&b.hiprio, &b.driver])).unwrap();
    b.fs = copy;
    assert_eq!(b.lookup(directory, "file"), Ok(file.0));
    assert_eq!(b.read(file, 0, 9), Ok(b"data".to_vec()));
    assert_eq!(b.write(file, 4, b"!"), Ok(1));
    for damaged in [&[][..], &[9; 40], &state.private[..state.private.len() - 1]] {
        let state = DeviceState { queues: vec![], private: damaged.to_vec() };
        assert!(share(b.root.path(), false, CachePolicy::Auto).restore(&state).is_err());
    }
}

#[test]
fn mounts_made_later_are_crossed_with_inode_numbers_of_their_own() {
    if !is_root() {
        return;
    }
    let mut b = require!(bench());
    fs::create_dir(b.path("mnt")).unwrap();
    let before = b.lookup(ROOT, "mnt").unwrap();
    let target = CString::new(b.path("mnt").as_os_str().as_bytes()).unwrap();
    // SAFETY: terminated strings.
    let mounted = unsafe { libc::mount(c"none".as_ptr(), target.as_ptr(), c"tmpfs".as_ptr(), 0, std::ptr::null()) };
    if mounted != 0 {
        eprintln!("skipped: no mounts here");
        return;
    }
    fs::write(b.path("mnt/in"), "side").unwrap();
    let after = b.ask(LOOKUP, ROOT, &named(vec![], &["mnt"])).unwrap();
    let inside = b.ask(LOOKUP, u64_at(&after, 0), &named(vec![], &["in"])).unwrap();
    let node = u64_at(&inside, 0);
    let handle = b.open(node, libc::O_RDONLY).unwrap();
    let data = b.read((node, handle), 0, 9);
    b.ask(RELEASE, node, &longs(&[handle, 0, 0])).unwrap();
    let host_number = fs::metadata(b.path("mnt/in")).unwrap().ino();
    let moved = b.ask(RENAME, u64_at(&after, 0), &named(longs(&[ROOT]), &["in", "out"]));
    // An idle share lets the host unmount.
    while b.fs.share.state().sweep() {}
    // SAFETY: a terminated string.
    let unmounted = unsafe { libc::umount(target.as_ptr()) };
    assert_eq!(unmounted, 0, "{}", io::Error::last_os_error());
    assert_ne!(u64_at(&after, 0), before);
    assert_eq!(data, Ok(b"side".to_vec()));
    assert_ne!(u64_at(&inside, 40), host_number);
    assert_eq!(moved, Err(libc::EXDEV));
    assert_eq!(b.lookup(ROOT, "mnt"), Ok(before));
    assert!(b.fs.share.state().host.stat(b.root.path().as_os_str().len() as i32 + 9000).is_err());
}

#[test]
fn what_is_no_directory_or_has_no_good_tag_is_not_shared() {
    let directory = || File::open("/").unwrap();
    for tag in ["", "a\0b", &"x".repeat(37)] {
        assert!(matches!(Fs::new("t", directory().into(), tag, false, CachePolicy::Auto), Err(FsError::Tag(_))));
    }
    let file = tempfile::tempfile().unwrap();
    assert!(file.as_raw_fd() >= 0);
    assert!(matches!(Fs::new("t", file.into(), "t", false, CachePolicy::Auto), Err(FsError::Root(_))));
    let fs = Fs::new("t", directory().into(), "my-tag", false, CachePolicy::Auto).unwrap();
    let mut config = [0xff; 44];
    fs.read_config(0, &mut config);
    assert_eq!((&config[..7], config[36], config[40]), (&b"my-tag\0"[..], 1, 0));
}

#[test]
fn caching_follows_the_policy() {
    for (cache, seconds, options) in
        [(CachePolicy::Never, 0, 1), (CachePolicy::Auto, 1, 0), (CachePolicy::Always, 1 << 28, 2)]
    {
        let mut b = require!(bench_with(false, cache));
        fs::write(b.path("file"), "x").unwrap();
        let entry = b.ask(LOOKUP, ROOT, &named(vec![], &["file"])).unwrap();
        assert!(u64_at(&entry, 16) >= seconds && u64_at(&entry, 24) >= seconds);
        assert_eq!(seconds == 0, u64_at(&entry, 16) == 0);
        let opened = b.ask(OPEN, u64_at(&entry, 0), &words(&[0, 0])).unwrap();
        assert_eq!(u32_at(&opened, 8), options);
        match b.lookup(ROOT, "none") {
            Ok(node) => assert_eq!((node, cache), (0, CachePolicy::Always)),
            Err(error) => assert_eq!(error, libc::ENOENT),
        }
    }
}

#[test]
fn names_at_the_root_of_a_tree_of_containers_are_asked_for_each_time() {
    for cache in [CachePolicy::Auto, CachePolicy::Always] {
        let mut b = require!(bench_with(false, cache));
        b.fs.share.state().private = Some(b"rootfs".to_vec());
        fs::create_dir_all(b.path("container/rootfs")).unwrap();
        let container = b.ask(LOOKUP, ROOT, &named(vec![], &["container"])).unwrap();
        let root = b.ask(LOOKUP, u64_at(&container, 0), &named(vec![], &["rootfs"])).unwrap();
        let valid = |entry: &[u8]| (u64_at(entry, 16), u32_at(entry, 32));
        assert_eq!(valid(&container), (0, 0));
        assert!(valid(&root) >= (1, 0));
        if let Ok(nothing) = b.ask(LOOKUP, ROOT, &named(vec![], &["none"])) {
            assert_eq!(valid(&nothing), (0, 0));
        }
    }
}

/// What a hostile guest might send: mostly near-requests, some noise.
fn hostile_message() -> impl Strategy<Value = Vec<u8>> {
    let opcode = prop_oneof![8 => 0..54_u32, 1 => OF_HULL, 1 => any::<u32>()];
    let node = prop_oneof![4 => 0..6_u64, 1 => any::<u64>()];
    let body = prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..120),
        proptest::collection::vec(prop_oneof![Just(0_u8), 1..4_u8, Just(b'a'), Just(b'/'), Just(b'.')], 0..120),
    ];
    let len = prop_oneof![6 => Just(None), 1 => any::<u32>().prop_map(Some)];
    (opcode, node, body, len).prop_map(|(opcode, node, body, len)| {
        let mut bytes = words(&[len.unwrap_or(40 + body.len() as u32), opcode]);
        bytes.extend(longs(&[1, node]));
        bytes.extend(words(&[0, 0, 0, 0]));
        bytes.extend(body);
        bytes
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn no_message_stops_the_share(
        messages in proptest::collection::vec((hostile_message(), 0..300_u32), 1..40),
        read_only in any::<bool>(),
    ) {
        let Some(mut b) = bench_with(read_only, CachePolicy::Auto) else { return Ok(()) };
        fs::write(b.path("a"), "x").unwrap();
        b.lookup(ROOT, "a").unwrap();
        for (message, room) in messages {
            b.send_raw(&message, room);
        }
        prop_assert!(b.lookup(ROOT, "none").is_err() || !read_only);
        prop_assert!(b.interrupt.resets.lock().unwrap().is_empty());
        if read_only {
            prop_assert_eq!(fs::read(b.path("a")).unwrap(), b"x");
            prop_assert_eq!(fs::read_dir(b.root.path()).unwrap().count(), 1);
        }
    }
}
