//! Children that this process has started, told from those that it was given as a subreaper (`PR_SET_CHILD_SUBREAPER`, prctl(2)).
//!
//! Each of the first has somebody who waits for it, and an exit status can be taken once. So whoever starts one does it by [`start`],
//! which holds the one lock from before the child exists until its number is noted; [`reap_orphans`] takes that lock too.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

static STARTED: Mutex<BTreeSet<u32>> = Mutex::new(BTreeSet::new());

/// Keeps the exit status of a child for whoever waits for it. To be dropped after that, and after whatever may still signal the child.
#[derive(Debug)]
#[must_use = "without it the child is an orphan like any other"]
pub struct Started(Option<u32>);

impl Drop for Started {
    fn drop(&mut self) {
        if let Some(pid) = self.0 {
            started().remove(&pid);
        }
    }
}

/// Starts a child by `spawn`, whose process identifier `id` tells.
///
/// # Errors
///
/// Fails as `spawn` does.
pub fn start<C>(spawn: impl FnOnce() -> io::Result<C>, id: impl FnOnce(&C) -> Option<u32>) -> io::Result<(C, Started)> {
    let mut started = started();
    let child = spawn()?;
    let pid = id(&child);
    started.extend(pid);
    Ok((child, Started(pid)))
}

/// Takes the exit statuses of all children that have ended and that nobody here has started. Answers whether that was all: the kernel
/// shows one at a time, so a child that was started here hides those behind it until its own exit status is taken, which is soon.
///
/// # Errors
///
/// Fails as waitid(2) does.
pub fn reap_orphans() -> io::Result<bool> {
    let started = started();
    loop {
        let pid = match next_ended() {
            Ok(Some(pid)) => pid,
            Ok(None) => return Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ECHILD) => return Ok(true),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        if u32::try_from(pid).is_ok_and(|pid| started.contains(&pid)) {
            return Ok(false);
        }
        // SAFETY: it takes no pointer. The child has ended and, being nobody's, is still there to be waited for.
        unsafe { libc::waitpid(pid, std::ptr::null_mut(), libc::WNOHANG) };
    }
}

/// A child that has ended, and goes on being there.
fn next_ended() -> io::Result<Option<libc::pid_t>> {
    // SAFETY: zeros are a value of this structure of integers and a union of such; waitid(2) leaves them where no child has ended.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: the structure is ours to be written to.
    let result = unsafe { libc::waitid(libc::P_ALL, 0, &raw mut info, libc::WEXITED | libc::WNOHANG | libc::WNOWAIT) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the union's member is the one of a child's end, or zeros.
    let pid = unsafe { info.si_pid() };
    Ok((pid != 0).then_some(pid))
}

fn started() -> MutexGuard<'static, BTreeSet<u32>> {
    STARTED.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Stdio};

    use super::*;

    fn exits_with_3() -> io::Result<Child> {
        Command::new("sh").args(["-c", "exit 3"]).stdin(Stdio::null()).spawn()
    }

    fn has_ended(child: &Child) -> bool {
        std::fs::read_to_string(format!("/proc/{}/stat", child.id())).is_ok_and(|stat| stat.contains(") Z "))
    }

    #[test]
    fn an_exit_status_is_left_to_whoever_started_the_child_and_taken_otherwise() {
        let (mut own, _started) = start(exits_with_3, |child| Some(child.id())).unwrap();
        while !has_ended(&own) {
            std::thread::yield_now();
        }
        assert!(!reap_orphans().unwrap());
        let mut orphan = exits_with_3().unwrap();
        while !has_ended(&orphan) {
            std::thread::yield_now();
        }
        assert!(!reap_orphans().unwrap(), "it may hide the orphan");
        assert_eq!(own.wait().unwrap().code(), Some(3));
        // Other tests of this program may have a child that has just ended.
        while !reap_orphans().unwrap() {
            std::thread::yield_now();
        }
        assert_eq!(orphan.wait().unwrap_err().raw_os_error(), Some(libc::ECHILD));
    }

    #[test]
    fn what_does_not_start_is_noted_nowhere() {
        let failed = start(|| Command::new("/no/such/program").spawn(), |child| Some(child.id()));
        assert_eq!(failed.unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
