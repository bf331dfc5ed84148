//! Locks on files of a volume: between guests, and between a guest and the host's programs.

use std::fs::{self, File, TryLockError};
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use fixture::{Detached, debian, wait_gone};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::fs::FlockOperation;

use crate::dialogue::Program;

/// What all programs begin with. `ofd` is a lock of an open file description, which Python has no function for.
const PRELUDE: &str = "
import fcntl, mmap, os, struct, sys
from fcntl import LOCK_EX, LOCK_SH, LOCK_UN, LOCK_NB
def say(what): print(what, flush=True)
def hear(): return sys.stdin.readline().strip()
def attempt(work, *args):
    try:
        work(*args)
        return 0
    except OSError as error:
        return error.errno
def ofd(fd, kind): fcntl.fcntl(fd, 37, struct.pack('hhqqi4x', kind, 0, 0, 0, 0))
f = os.open('/v/f', os.O_RDWR)
";

/// A directory of the host with a file `f` in it.
fn volume() -> (tempfile::TempDir, File) {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(dir.path().join("f"), "0".repeat(20)).unwrap();
    let file = File::options().read(true).write(true).open(dir.path().join("f")).unwrap();
    (dir, file)
}

/// A container that has the directory at /v.
fn container(dir: &tempfile::TempDir) -> Detached {
    let volume = format!("{}:/v", dir.path().display());
    Detached::start(["--memory", "256", "-v", &volume, &debian(), "sleep", "1000"])
}

/// Runs a program in a container.
fn start(container: &Detached, program: &str) -> Program {
    Program::start(container, &format!("{PRELUDE}{program}"))
}

/// Whether the host can have the whole file by fcntl, and then has not.
fn host_can_lock(file: &File) -> bool {
    let had = rustix::fs::fcntl_lock(file, FlockOperation::NonBlockingLockExclusive).is_ok();
    rustix::fs::fcntl_lock(file, FlockOperation::NonBlockingUnlock).unwrap();
    had
}

/// Whether the host can have the file by flock, and then has not.
fn host_can_flock(file: &File) -> bool {
    match file.try_lock() {
        Ok(()) => file.unlock().map(|()| true).unwrap(),
        Err(TryLockError::WouldBlock) => false,
        Err(TryLockError::Error(error)) => panic!("{error}"),
    }
}

/// Waits for what a program's end brings about.
fn eventually(what: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !what() {
        assert!(Instant::now() < deadline, "it does not come");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn the_host_and_a_guest_keep_each_other_out() {
    let (dir, file) = volume();
    let guest = container(&dir);
    let mut program = start(
        &guest,
        "
fcntl.lockf(f, LOCK_EX, 5, 10); fcntl.flock(f, LOCK_SH); say('locked'); hear()
fcntl.lockf(f, LOCK_UN, 5, 10); fcntl.flock(f, LOCK_UN); say('unlocked'); hear()
say((attempt(fcntl.lockf, f, LOCK_SH | LOCK_NB), attempt(fcntl.flock, f, LOCK_SH | LOCK_NB)))
",
    );
    program.expect("locked");
    assert!(!host_can_lock(&file));
    assert!(!host_can_flock(&file));
    program.say("");
    program.expect("unlocked");
    assert!(host_can_lock(&file) && host_can_flock(&file));
    rustix::fs::fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive).unwrap();
    file.lock().unwrap();
    program.say("");
    program.expect("(11, 11)");
    program.end();
}

#[test]
fn who_waits_goes_on_when_the_other_unlocks() {
    let (dir, file) = volume();
    let guest = container(&dir);
    file.lock().unwrap();
    let mut program =
        start(&guest, "say('waits'); fcntl.flock(f, LOCK_EX); say('had'); hear(); fcntl.flock(f, LOCK_UN)");
    program.expect("waits");
    let started = Instant::now();
    std::thread::sleep(Duration::from_millis(500));
    file.unlock().unwrap();
    program.expect("had");
    assert!(started.elapsed() >= Duration::from_millis(500));
    assert!(!host_can_flock(&file));
    program.say("");
    file.lock().unwrap();
    file.unlock().unwrap();
    program.end();
}

#[test]
fn a_signal_ends_a_wait() {
    let (dir, file) = volume();
    let guest = container(&dir);
    file.lock().unwrap();
    rustix::fs::fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive).unwrap();
    let said = guest.exec(["flock", "-w", "1", "/v/f", "true"]).run();
    assert_eq!((said.code, said.stderr.as_str()), (1, ""));
    let said = guest.exec(["timeout", "-s", "KILL", "2", "flock", "/v/f", "true"]).run();
    assert_eq!(said.code, 137, "{}", said.stderr);
    let program = "
import signal
def handler(number, frame): raise TimeoutError
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.5)
try:
    fcntl.lockf(f, LOCK_SH)
except TimeoutError:
    say('interrupted')
# One that is not interested goes on to wait.
signal.signal(signal.SIGALRM, lambda number, frame: None)
signal.setitimer(signal.ITIMER_REAL, 0.2, 0.2)
say('waits')
fcntl.lockf(f, LOCK_EX)
say('had')
";
    let mut program = start(&guest, program);
    program.expect("interrupted");
    program.expect("waits");
    std::thread::sleep(Duration::from_secs(1));
    rustix::fs::fcntl_lock(&file, FlockOperation::NonBlockingUnlock).unwrap();
    program.expect("had");
    program.end();
}

#[test]
fn locks_go_with_who_has_them() {
    let (dir, file) = volume();
    let (one, other) = (container(&dir), container(&dir));
    let lock = "fcntl.lockf(f, LOCK_EX); fcntl.flock(f, LOCK_EX); say(os.getpid()); hear()";
    let wait = "
say((attempt(fcntl.lockf, f, LOCK_EX | LOCK_NB), attempt(fcntl.flock, f, LOCK_EX | LOCK_NB)))
fcntl.lockf(f, LOCK_EX); fcntl.flock(f, LOCK_EX); say('had'); hear()
";
    let mut holder = start(&one, lock);
    let pid = holder.hear();
    let mut waiter = start(&other, wait);
    waiter.expect("(11, 11)");
    one.exec(["sh", "-c", &format!("kill -9 {pid}")]).run().ok();
    waiter.expect("had");
    assert!(!host_can_lock(&file) && !host_can_flock(&file));
    holder.end();
    // The virtual machine.
    let vmm = other.inspect()["vmm_pid"].as_i64().unwrap() as i32;
    kill(Pid::from_raw(vmm), Signal::SIGKILL).unwrap();
    wait_gone(vmm);
    eventually(|| host_can_lock(&file) && host_can_flock(&file));
    waiter.end();
    // The container.
    let mut holder = start(&one, lock);
    holder.hear();
    assert!(!host_can_lock(&file) && !host_can_flock(&file));
    drop(one);
    eventually(|| host_can_lock(&file) && host_can_flock(&file));
    holder.end();
}

#[test]
fn a_process_loses_its_locks_with_any_file_it_closes_and_an_open_file_does_not() {
    let (dir, file) = volume();
    let guest = container(&dir);
    let mut program = start(
        &guest,
        "
os.close(os.open('/v/f', os.O_RDONLY))
fcntl.lockf(f, LOCK_EX); say('process'); hear()
if os.fork() == 0: os._exit(0)
os.wait(); say('child'); hear()
os.close(os.open('/v/f', os.O_RDONLY)); say('closed'); hear()
ofd(f, fcntl.F_WRLCK); say('file'); hear()
os.close(os.open('/v/f', os.O_RDONLY)); say('closed'); hear()
copy = os.dup(f); os.close(f); say('copy'); hear()
os.close(copy); say('gone'); hear()
",
    );
    for (state, locked) in [
        ("process", true),
        ("child", true),
        ("closed", false),
        ("file", true),
        ("closed", true),
        ("copy", true),
        ("gone", false),
    ] {
        program.expect(state);
        // The last close of a file is told to the host in the background.
        eventually(|| host_can_lock(&file) != locked);
        program.say("");
    }
    program.end();
}

#[test]
fn a_circle_of_waits_in_a_guest_is_refused() {
    let (dir, _) = volume();
    let guest = container(&dir);
    let mut program = start(
        &guest,
        "
fcntl.lockf(f, LOCK_EX, 1, 0)
ready, go = os.pipe(), os.pipe()
if os.fork() == 0:
    fcntl.lockf(f, LOCK_EX, 1, 1)
    os.write(ready[1], b'x')
    fcntl.lockf(f, LOCK_EX, 1, 0)
    os._exit(0)
os.read(ready[0], 1)
import time; time.sleep(0.5)
say(attempt(fcntl.lockf, f, LOCK_EX, 1, 1))
fcntl.lockf(f, LOCK_UN, 1, 0)
say(os.wait()[1])
",
    );
    program.expect("35");
    program.expect("0");
    program.end();
}

#[test]
fn who_has_the_lock_sees_what_others_wrote_under_it() {
    const TURNS: usize = 150;
    let (dir, file) = volume();
    let containers = [container(&dir), container(&dir)];
    // By read and write, and by a mapping.
    let counting = format!(
        "
hear()
m = mmap.mmap(f, 20)
for i in range({TURNS}):
    fcntl.flock(f, LOCK_EX)
    os.pwrite(f, b'%010d' % (int(os.pread(f, 10, 0)) + 1), 0)
    m[10:20] = b'%010d' % (int(m[10:20]) + 1)
    fcntl.flock(f, LOCK_UN)
say('done'); hear()
"
    );
    let mut programs = containers.each_ref().map(|container| start(container, &counting));
    for program in &mut programs {
        program.say("");
    }
    let path = dir.path().join("f");
    for _ in 0..TURNS {
        file.lock().unwrap();
        let text = fs::read_to_string(&path).unwrap();
        let next = |part: &str| format!("{:010}", part.parse::<usize>().unwrap() + 1);
        let text = next(&text[..10]) + &next(&text[10..]);
        rustix::io::pwrite(&file, text.as_bytes(), 0).unwrap();
        file.unlock().unwrap();
    }
    for mut program in programs {
        program.expect("done");
        program.end();
    }
    assert_eq!(fs::read_to_string(&path).unwrap(), format!("{:010}", 3 * TURNS).repeat(2));
}
