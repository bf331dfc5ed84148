//! Locks: between owners of one guest, two shares of one directory, and programs of the host.

use super::super::locks::MAX_WAITING;
use super::*;

const GETLK: u32 = 31;
const SETLK: u32 = 32;
const SETLKW: u32 = 33;
const INTERRUPT: u32 = 36;
const LK_FLOCK: u32 = 1;

const SHARED: i32 = libc::F_RDLCK;
const EXCLUSIVE: i32 = libc::F_WRLCK;
const NONE: i32 = libc::F_UNLCK;
const END: u64 = i64::MAX as u64;
const ALL: (u64, u64) = (0, END);

/// Where the requests that are not waited for lie, a page for each.
const POSTED: u64 = 0x40_0000;

type Open = (u64, u64);

/// `struct fuse_lk_in`.
fn lk((_, handle): Open, owner: u64, (start, end): (u64, u64), kind: i32, flags: u32) -> Vec<u8> {
    [longs(&[handle, owner, start, end]), words(&[kind as u32, 4321, flags, 0])].concat()
}

impl Bench {
    fn lock(&mut self, file: Open, owner: u64, range: (u64, u64), kind: i32) -> Result<(), i32> {
        self.ask(SETLK, file.0, &lk(file, owner, range, kind, 0)).map(drop)
    }

    fn flock(&mut self, file: Open, kind: i32) -> Result<(), i32> {
        self.ask(SETLK, file.0, &lk(file, 1, ALL, kind, LK_FLOCK)).map(drop)
    }

    /// Start, end, kind and process of a lock that conflicts; `None` where there is none.
    fn conflict(&mut self, file: Open, owner: u64, range: (u64, u64), kind: i32) -> Option<(u64, u64, i32, u32)> {
        let found = self.ask(GETLK, file.0, &lk(file, owner, range, kind, 0)).unwrap();
        let kind = u32_at(&found, 16) as i32;
        (kind != NONE).then(|| (u64_at(&found, 0), u64_at(&found, 8), kind, u32_at(&found, 20)))
    }

    /// Sends a request under a number of its own and does not wait for the answer; returns its head.
    fn post(&mut self, unique: u64, opcode: u32, node: u64, body: &[u8]) -> u16 {
        let mut bytes = self.message(opcode, node, body);
        bytes[8..16].copy_from_slice(&unique.to_le_bytes());
        let at = POSTED + 0x1000 * unique;
        self.memory.write_slice(&bytes, GuestAddress(at)).unwrap();
        // An answer in two pieces.
        let head = self.driver.add(&[(at, bytes.len() as u32, false), (at + 0x800, 5, true), (at + 0x805, 100, true)]);
        self.driver.kick.write(1).unwrap();
        head
    }

    fn post_lock(&mut self, unique: u64, file: Open, owner: u64, range: (u64, u64), kind: i32) -> u16 {
        self.post(unique, SETLKW, file.0, &lk(file, owner, range, kind, 0))
    }

    fn post_flock(&mut self, unique: u64, file: Open, kind: i32) -> u16 {
        self.post(unique, SETLKW, file.0, &lk(file, 1, ALL, kind, LK_FLOCK))
    }

    fn is_answered(&mut self, head: u16) -> bool {
        while let Some((used, len)) = self.driver.take_used() {
            self.others.insert(used, len);
        }
        self.others.contains_key(&head)
    }

    /// The answer to a posted request.
    fn answer(&mut self, unique: u64, head: u16) -> Result<(), i32> {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !self.is_answered(head) {
            assert!(Instant::now() < deadline, "no answer to {unique}");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(self.others.remove(&head), Some(16));
        let mut answer = [0; 16];
        self.memory.read_slice(&mut answer, GuestAddress(POSTED + 0x1000 * unique + 0x800)).unwrap();
        assert_eq!((u32_at(&answer, 0), u64_at(&answer, 8)), (16, unique));
        match u32_at(&answer, 4) as i32 {
            0 => Ok(()),
            error => Err(-error),
        }
    }

    fn interrupt(&mut self, unique: u64) {
        let bytes = self.message(INTERRUPT, 0, &longs(&[unique]));
        self.memory.write_slice(&bytes, GuestAddress(REQUEST)).unwrap();
        self.send_hiprio(bytes.len());
    }

    fn threads(&self) -> usize {
        self.fs.share.state().locks.threads()
    }

    fn until_waiting_outside(&self, threads: usize) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.threads() != threads {
            assert!(Instant::now() < deadline, "{} threads wait", self.threads());
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// A file of the host.
struct Outside(File);

impl Outside {
    fn open(b: &Bench, name: &str) -> Self {
        Self(File::options().read(true).write(true).open(b.path(name)).unwrap())
    }

    fn lock(&self, (start, end): (u64, u64), kind: i32) -> bool {
        // SAFETY: all zeroes is a value of this structure of integers, which the kernel reads.
        unsafe {
            let mut lock: libc::flock64 = std::mem::zeroed();
            lock.l_type = kind as i16;
            lock.l_start = start as i64;
            lock.l_len = if end == END { 0 } else { (end - start + 1) as i64 };
            libc::fcntl(self.0.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) == 0
        }
    }

    fn flock(&self, operation: i32) -> bool {
        // SAFETY: no pointers.
        unsafe { libc::flock(self.0.as_raw_fd(), operation | libc::LOCK_NB) == 0 }
    }
}

#[test]
fn the_host_sees_the_guests_locks_and_the_guest_the_hosts() {
    let mut b = require!(bench());
    let file = b.create(ROOT, "f", 0o644).unwrap();
    let outside = Outside::open(&b, "f");
    b.lock(file, 1, (10, 19), EXCLUSIVE).unwrap();
    assert!(!outside.lock((19, 19), SHARED));
    assert!(outside.lock((20, END), EXCLUSIVE));
    assert_eq!(b.lock(file, 1, (15, 25), EXCLUSIVE), Err(libc::EAGAIN));
    // What was had before is still.
    assert!(!outside.lock((15, 15), SHARED));
    assert_eq!(b.conflict(file, 1, ALL, SHARED), Some((20, END, EXCLUSIVE, 0)));
    b.lock(file, 1, (12, 13), NONE).unwrap();
    assert!(outside.lock((12, 13), EXCLUSIVE));
    assert!(!outside.lock((14, 14), SHARED));
    b.lock(file, 1, (0, END), NONE).unwrap();
    assert!(outside.lock(ALL, EXCLUSIVE));
    assert!(outside.lock(ALL, NONE));
    assert_eq!(b.conflict(file, 1, ALL, EXCLUSIVE), None);

    b.flock(file, EXCLUSIVE).unwrap();
    assert!(!outside.flock(libc::LOCK_SH));
    b.flock(file, SHARED).unwrap();
    assert!(outside.flock(libc::LOCK_SH));
    assert_eq!(b.flock(file, EXCLUSIVE), Err(libc::EWOULDBLOCK));
    // As everywhere, the lock is lost that was to be converted.
    assert!(outside.flock(libc::LOCK_EX));
    assert_eq!(b.flock(file, SHARED), Err(libc::EWOULDBLOCK));
    assert!(outside.flock(libc::LOCK_UN));
    b.flock(file, SHARED).unwrap();
    b.flock(file, NONE).unwrap();
    assert!(outside.flock(libc::LOCK_EX));
}

#[test]
fn owners_of_one_guest_keep_each_other_out() {
    let mut b = require!(bench());
    let file = b.create(ROOT, "f", 0o644).unwrap();
    let other = (file.0, b.open(file.0, libc::O_RDWR).unwrap());
    b.lock(file, 1, (0, 9), SHARED).unwrap();
    b.lock(other, 2, (5, 14), SHARED).unwrap();
    assert_eq!(b.lock(other, 2, (5, 14), EXCLUSIVE), Err(libc::EAGAIN));
    assert_eq!(b.conflict(other, 2, ALL, EXCLUSIVE), Some((0, 9, SHARED, 4321)));
    b.lock(file, 1, (5, 9), NONE).unwrap();
    b.lock(other, 2, (5, 14), EXCLUSIVE).unwrap();
    // One handle may serve two owners, as after a fork.
    assert_eq!(b.lock(file, 3, (14, 14), SHARED), Err(libc::EAGAIN));
    b.flock(file, SHARED).unwrap();
    b.flock(other, SHARED).unwrap();
    assert_eq!(b.flock(other, EXCLUSIVE), Err(libc::EWOULDBLOCK));
    b.flock(file, EXCLUSIVE).unwrap();
}

#[test]
fn locks_go_with_the_process_that_closes_or_with_the_handle() {
    let mut b = require!(bench());
    let file = b.create(ROOT, "f", 0o644).unwrap();
    let outside = Outside::open(&b, "f");
    let other = b.open(file.0, libc::O_RDONLY).unwrap();
    let flush = |handle: u64, owner: u64| longs(&[handle, 0, owner]);
    b.lock(file, 1, (0, 0), EXCLUSIVE).unwrap();
    b.lock(file, 2, (1, 1), EXCLUSIVE).unwrap();
    // Through another file than the lock was taken with, and by another process.
    assert_eq!(b.ask(FLUSH, file.0, &flush(other, 3)), Err(libc::ENOSYS));
    assert!(!outside.lock((0, 0), SHARED));
    b.ask(FLUSH, file.0, &flush(other, 1)).unwrap();
    assert!(outside.lock((0, 0), SHARED));
    assert!(!outside.lock((1, 1), SHARED));
    b.flock(file, EXCLUSIVE).unwrap();
    b.ask(RELEASE, file.0, &longs(&[other, 0, 0])).unwrap();
    assert!(!outside.lock((1, 1), SHARED));
    assert!(!outside.flock(libc::LOCK_SH));
    b.ask(RELEASE, file.0, &longs(&[file.1, 0, 0])).unwrap();
    assert!(outside.lock((1, 1), SHARED));
    assert!(outside.flock(libc::LOCK_SH));
    let again = (file.0, b.open(file.0, libc::O_RDWR).unwrap());
    assert!(outside.lock(ALL, NONE));
    b.lock(again, 1, ALL, EXCLUSIVE).unwrap();
    b.fs.deactivate();
    assert!(outside.lock(ALL, EXCLUSIVE));
}

#[test]
fn who_waits_for_the_guest_goes_on_when_it_unlocks() {
    let mut b = require!(bench());
    let file = b.create(ROOT, "f", 0o644).unwrap();
    b.lock(file, 1, ALL, EXCLUSIVE).unwrap();
    let first = b.post_lock(1, file, 2, (0, 9), EXCLUSIVE);
    let second = b.post_lock(2, file, 3, (5, 14), SHARED);
    let third = b.post_lock(3, file, 4, (20, 29), SHARED);
    assert_eq!(b.conflict(file, 9, ALL, SHARED), Some((0, END, EXCLUSIVE, 4321)));
    assert!(!b.is_answered(first) && !b.is_answered(second) && !b.is_answered(third));
    assert_eq!(b.threads(), 0);
    b.lock(file, 1, (0, 14), NONE).unwrap();
    assert_eq!(b.answer(1, first), Ok(()));
    assert!(!b.is_answered(second) && !b.is_answered(third));
    // A shared lock lets others in, too.
    b.lock(file, 1, (15, END), SHARED).unwrap();
    assert_eq!(b.answer(3, third), Ok(()));
    b.ask(FLUSH, file.0, &longs(&[file.1, 0, 2])).unwrap();
    assert_eq!(b.answer(2, second), Ok(()));
    let other = (file.0, b.open(file.0, libc::O_RDWR).unwrap());
    b.flock(file, SHARED).unwrap();
    b.flock(other, SHARED).unwrap();
    // Both want it alone, and each gives up what it has for that.
    let first = b.post_flock(4, file, EXCLUSIVE);
    let second = b.post_flock(5, other, EXCLUSIVE);
    assert_eq!(b.answer(5, second), Ok(()));
    assert!(!b.is_answered(first));
    b.ask(RELEASE, file.0, &longs(&[other.1, 0, 0])).unwrap();
    assert_eq!(b.answer(4, first), Ok(()));
}

#[test]
fn who_waits_for_the_host_goes_on_when_it_unlocks() {
    let mut b = require!(bench());
    let file = b.create(ROOT, "f", 0o644).unwrap();
    let outside = Outside::open(&b, "f");
    assert!(outside.lock((0, 9), EXCLUSIVE));
    assert!(outside.flock(libc::LOCK_EX));
    let bytes = b.post_lock(1, file, 1, (5, 14), EXCLUSIVE);
    let whole = b.post_flock(2, file, SHARED);
    b.until_waiting_outside(2);
    // The share serves on.
    b.write(file, 0, b"x").unwrap();
    assert!(!b.is_answered(bytes) && !b.is_answered(whole));
    assert!(outside.lock((0, 9), NONE));
    assert_eq!(b.answer(1, bytes), Ok(()));
    assert!(!outside.lock((14, 14), SHARED));
    assert!(outside.flock(libc::LOCK_UN));
    assert_eq!(b.answer(2, whole), Ok(()));
    assert!(outside.flock(libc::LOCK_SH));
    assert!(!outside.flock(libc::LOCK_EX));
    b.until_waiting_outside(0);
}

#[test]
fn more_waits_than_threads_are_all_served() {
    let mut b = require!(bench());
    let file = b.create(ROOT, "f", 0o644).unwrap();
    let outside = Outside::open(&b, "f");
    assert!(outside.lock(ALL, EXCLUSIVE));
    let heads: Vec<_> = (1..20).map(|i| b.post_lock(i, file, i, (i, i), EXCLUSIVE)).collect();
    b.until_waiting_outside(8);
    assert!(outside.lock(ALL, NONE));
    for (i, head) in (1..).zip(heads) {
        assert_eq!(b.answer(i, head), Ok(()));
        assert!(!outside.lock((i, i), SHARED));
    }
}

#[test]
fn an_interrupt_ends_a_wait_wherever_it_is() {
    let mut b = require!(bench());
    let file = b.create(ROOT, "f", 0o644).unwrap();
    let outside = Outside::open(&b, "f");
    assert!(outside.lock((0, 9), EXCLUSIVE));
    b.lock(file, 1, (20, 29), EXCLUSIVE).unwrap();
    b.lock(file, 2, (5, 5), SHARED).unwrap_err();
    b.lock(file, 2, (10, 14), SHARED).unwrap();
    let host = b.post_lock(1, file, 2, (5, 14), EXCLUSIVE);
    let guest = b.post_lock(2, file, 2, (20, 29), SHARED);
    b.until_waiting_outside(1);
    b.interrupt(1);
    assert_eq!(b.answer(1, host), Err(libc::EINTR));
    assert!(!b.is_answered(guest));
    b.interrupt(2);
    assert_eq!(b.answer(2, guest), Err(libc::EINTR));
    b.until_waiting_outside(0);
    // Nothing was got, nothing lost.
    assert!(outside.lock((0, 9), NONE));
    assert!(outside.lock((0, 9), EXCLUSIVE));
    assert!(outside.lock((10, 14), SHARED));
    assert!(!outside.lock((10, 14), EXCLUSIVE));
    assert!(outside.flock(libc::LOCK_EX));
    let whole = b.post_flock(3, file, EXCLUSIVE);
    b.until_waiting_outside(1);
    b.interrupt(3);
    assert_eq!(b.answer(3, whole), Err(libc::EINTR));
    b.until_waiting_outside(0);
    assert!(outside.flock(libc::LOCK_UN));
    assert!(outside.flock(libc::LOCK_EX));
    // Numbers that nobody waits under.
    for unique in [0, 1, 77, u64::MAX] {
        b.interrupt(unique);
    }
    assert!(b.lookup(ROOT, "f").is_ok());
}

#[test]
fn an_interrupt_that_overtakes_its_request_is_kept_for_it() {
    let mut b = require!(bench());
    let file = b.create(ROOT, "f", 0o644).unwrap();
    b.lock(file, 1, ALL, EXCLUSIVE).unwrap();
    b.fs.pause();
    let head = b.post_lock(9, file, 2, ALL, SHARED);
    let bytes = b.message(INTERRUPT, 0, &longs(&[9]));
    b.memory.write_slice(&bytes, GuestAddress(REQUEST)).unwrap();
    b.hiprio.add(&[(REQUEST, bytes.len() as u32, false)]);
    // The queue of high priority is served first.
    b.fs.resume();
    assert_eq!(b.answer(9, head), Err(libc::EINTR));
}

#[test]
fn a_circle_of_waits_is_refused() {
    let mut b = require!(bench());
    let (f, g) = (b.create(ROOT, "f", 0o644).unwrap(), b.create(ROOT, "g", 0o644).unwrap());
    b.lock(f, 1, (0, 0), EXCLUSIVE).unwrap();
    b.lock(g, 2, (0, 0), EXCLUSIVE).unwrap();
    b.lock(g, 3, (1, 1), EXCLUSIVE).unwrap();
    let first = b.post_lock(1, g, 1, (0, 0), SHARED);
    let second = b.post_lock(2, f, 3, (0, 0), SHARED);
    let last = b.post_lock(3, g, 2, (1, 1), SHARED);
    assert_eq!(b.answer(3, last), Err(libc::EDEADLK));
    assert!(!b.is_answered(first) && !b.is_answered(second));
    b.lock(g, 2, (0, 0), NONE).unwrap();
    assert_eq!(b.answer(1, first), Ok(()));
    b.lock(f, 1, (0, 0), NONE).unwrap();
    assert_eq!(b.answer(2, second), Ok(()));
}

#[test]
fn what_a_guest_may_hold_and_wait_for_is_bounded() {
    let mut b = require!(bench());
    let file = b.create(ROOT, "f", 0o644).unwrap();
    b.lock(file, 1, ALL, EXCLUSIVE).unwrap();
    let heads: Vec<_> = (2..MAX_WAITING as u64 + 2).map(|i| b.post_lock(i, file, i, ALL, SHARED)).collect();
    let beyond = b.post_lock(1, file, 999, ALL, SHARED);
    assert_eq!(b.answer(1, beyond), Err(libc::ENOLCK));
    assert!(b.write(file, 0, b"x").is_ok());
    b.lock(file, 1, ALL, NONE).unwrap();
    for (i, head) in (2..).zip(heads) {
        assert_eq!(b.answer(i, head), Ok(()));
    }
    let other = b.create(ROOT, "g", 0o644).unwrap();
    let refused = (0..5000).find(|i| b.lock(other, 1, (2 * i, 2 * i), SHARED).is_err()).unwrap();
    assert!((2000..4097).contains(&refused), "{refused}");
    b.lock(other, 1, (6, 6), NONE).unwrap();
}

#[test]
fn broken_requests_about_locks_are_refused() {
    let mut b = require!(bench());
    let file = b.create(ROOT, "f", 0o644).unwrap();
    let reading = (file.0, b.open(file.0, libc::O_RDONLY).unwrap());
    let writing = (file.0, b.open(file.0, libc::O_WRONLY).unwrap());
    for range in [(5, 4), (0, END + 1), (u64::MAX, u64::MAX), (END + 1, END + 2), (1, u64::MAX)] {
        assert_eq!(b.lock(file, 1, range, EXCLUSIVE), Err(libc::EINVAL), "{range:?}");
    }
    b.lock(file, 1, (END, END), EXCLUSIVE).unwrap();
    for kind in [3, 4, -1, 1 << 16] {
        assert_eq!(b.lock(file, 1, ALL, kind), Err(libc::EINVAL));
    }
    assert_eq!(b.ask(GETLK, file.0, &lk(file, 1, ALL, NONE, 0)), Err(libc::EINVAL));
    assert_eq!(b.lock(reading, 2, (0, 9), EXCLUSIVE), Err(libc::EBADF));
    assert_eq!(b.lock(writing, 2, (0, 9), SHARED), Err(libc::EBADF));
    b.flock(reading, EXCLUSIVE).unwrap();
    assert_eq!(b.flock(writing, SHARED), Err(libc::EWOULDBLOCK));
    // An owner that read first and writes later keeps what it had.
    b.lock(reading, 3, (0, 9), SHARED).unwrap();
    b.lock(writing, 3, (20, 29), EXCLUSIVE).unwrap();
    let outside = Outside::open(&b, "f");
    assert!(!outside.lock((0, 0), EXCLUSIVE));
    assert!(!outside.lock((20, 20), SHARED));
    for handle in [0, 99, u64::MAX] {
        assert_eq!(b.lock((file.0, handle), 1, ALL, SHARED), Err(libc::EBADF));
        assert_eq!(b.flock((file.0, handle), SHARED), Err(libc::EBADF));
    }
    assert_eq!(b.lock((99, file.1), 1, ALL, SHARED), Err(libc::ESTALE));
    let directory = b.ask(OPENDIR, ROOT, &words(&[0, 0])).map(|answer| u64_at(&answer, 0)).unwrap();
    assert_eq!(b.lock((ROOT, directory), 1, ALL, SHARED), Err(libc::EBADF));
    for opcode in [GETLK, SETLK, SETLKW] {
        assert_eq!(b.ask(opcode, file.0, &[0; 47]), Err(libc::EINVAL));
    }
    // A wait without room for its answer, by a handle that then goes.
    let handle = b.open(file.0, libc::O_RDWR).unwrap();
    let message = b.message(SETLKW, file.0, &lk((file.0, handle), 9, ALL, EXCLUSIVE, 0));
    b.memory.write_slice(&message, GuestAddress(POSTED)).unwrap();
    let head = b.driver.add(&[(POSTED, message.len() as u32, false)]);
    b.driver.kick.write(1).unwrap();
    b.ask(RELEASE, file.0, &longs(&[handle, 0, 0])).unwrap();
    while !b.is_answered(head) {}
    assert_eq!(b.others[&head], 0);
    assert!(b.interrupt.resets.lock().unwrap().is_empty());
}

#[test]
fn a_guest_that_did_not_ask_for_locks_gets_none() {
    let mut b = require!(bench());
    b.ask(INIT, 0, &[words(&[7, 39, 0x2_0000, 0, 0]), vec![0; 44]].concat()).unwrap();
    let file = b.create(ROOT, "f", 0o644).unwrap();
    assert_eq!(b.lock(file, 1, ALL, SHARED), Err(libc::ENOSYS));
    assert_eq!(b.flock(file, SHARED), Err(libc::ENOSYS));
}

#[test]
fn a_read_only_share_can_be_locked() {
    let mut b = require!(bench_with(true, CachePolicy::Auto));
    fs::write(b.path("f"), "x").unwrap();
    let node = b.lookup(ROOT, "f").unwrap();
    let file = (node, b.open(node, libc::O_RDONLY).unwrap());
    b.lock(file, 1, ALL, SHARED).unwrap();
    b.flock(file, EXCLUSIVE).unwrap();
    let outside = Outside::open(&b, "f");
    assert!(!outside.lock(ALL, EXCLUSIVE) && outside.lock(ALL, SHARED));
    assert!(!outside.flock(libc::LOCK_SH));
}

#[test]
fn locks_and_waits_go_on_in_a_copy() {
    let mut b = require!(bench());
    let file = b.create(ROOT, "f", 0o644).unwrap();
    let outside = Outside::open(&b, "f");
    b.lock(file, 1, (0, 9), EXCLUSIVE).unwrap();
    b.flock(file, SHARED).unwrap();
    assert!(outside.lock((20, 29), EXCLUSIVE));
    let guest = b.post_lock(1, file, 2, (5, 14), SHARED);
    let host = b.post_lock(2, file, 3, (25, 25), SHARED);
    b.until_waiting_outside(1);
    b.fs.pause();
    let state = b.fs.save();
    b.fs.resume();
    assert!(!b.is_answered(guest) && !b.is_answered(host));
    b.fs.pause();
    for len in (0..state.private.len()).step_by(7) {
        let state = DeviceState { queues: vec![], private: state.private[..len].to_vec() };
        assert!(share(b.root.path(), false, CachePolicy::Auto).restore(&state).is_err());
    }
    b.fs.deactivate();
    assert!(outside.lock((0, 9), SHARED) && outside.lock((0, 9), NONE));
    b.go_on_in_copy(&state);
    assert_eq!(b.lookup(ROOT, "f"), Ok(file.0));
    assert!(!outside.lock((0, 9), SHARED));
    assert!(!outside.flock(libc::LOCK_EX));
    assert!(!b.is_answered(guest) && !b.is_answered(host));
    assert!(outside.lock((20, 29), NONE));
    assert_eq!(b.answer(2, host), Ok(()));
    b.ask(FLUSH, file.0, &longs(&[file.1, 0, 1])).unwrap();
    assert_eq!(b.answer(1, guest), Ok(()));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 48, ..ProptestConfig::default() })]

    /// The model: how each owner holds each byte. Owners 0 to 2 are the guest's, 3 is the host's.
    #[test]
    fn locks_are_what_a_table_of_bytes_says(
        steps in proptest::collection::vec((0..4_usize, 0..12_u64, 0..12_u64, 0..3_i32), 1..60),
    ) {
        let Some(mut b) = bench() else { return Ok(()) };
        let file = b.create(ROOT, "f", 0o644).unwrap();
        let outside = Outside::open(&b, "f");
        let mut model = [[NONE; 12]; 4];
        for (owner, x, y, kind) in steps {
            let (start, end) = (x.min(y), x.max(y));
            let bytes = start as usize..=end as usize;
            let conflicts = |other: &[i32; 12]| {
                let both = |held: &i32| *held == EXCLUSIVE || (*held == SHARED && kind == EXCLUSIVE);
                kind != NONE && other[bytes.clone()].iter().any(both)
            };
            let free = !(0..4).any(|other| other != owner && conflicts(&model[other]));
            let done = if owner == 3 {
                outside.lock((start, end), kind)
            } else {
                b.lock(file, owner as u64, (start, end), kind).is_ok()
            };
            prop_assert_eq!(done, free);
            if done {
                model[owner][bytes].fill(kind);
            }
        }
    }
}

#[test]
fn locks_on_private_files_are_left_to_the_guest() {
    let mut b = require!(bench());
    b.fs.share.state().private = Some(b"rootfs".to_vec());
    for (directory, private) in [("c/rootfs/etc", true), ("c/volumes/rootfs", false), ("rootfs/c/d", false)] {
        fs::create_dir_all(b.path(directory)).unwrap();
        fs::write(b.path(directory).join("f"), "").unwrap();
        let node = directory.split('/').fold(ROOT, |node, name| b.lookup(node, name).unwrap());
        let file = b.lookup(node, "f").unwrap();
        let opened = b.ask(OPEN, file, &words(&[0, 0])).unwrap();
        assert_eq!(u32_at(&opened, 8), u32::from(private) << 31, "{directory}");
        let created = b.ask(CREATE, node, &named(words(&[libc::O_RDWR as u32, 0o644, 0, 0]), &["g"])).unwrap();
        assert_eq!(u32_at(&created, 136), u32::from(private) << 31, "{directory}");
    }
}
