//! Collects children that have ended.
//!
//! As PID 1 the agent inherits every orphan of the guest, and all but a few are of no interest. Those that are get
//! registered with [`Reaper::watch`]. A container's process can end before its creator has learned its number, so a
//! creator holds a [`Birth`] meanwhile: while there is one, the ends of unknown children are kept.
//!
//! Nothing else in the agent waits for children. libcontainer, which does, runs in processes of its own.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::io::Errno;
use rustix::process::{Pid, WaitOptions, WaitStatus, wait};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use crate::error::{Result, Step};

/// How and when a child ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Exit {
    /// 128 + n where signal n ended it.
    pub(crate) code: u32,
    /// The signal, or 0.
    pub(crate) signal: u32,
    /// Nanoseconds since the epoch.
    pub(crate) at_ns: u64,
}

#[derive(Default)]
pub(crate) struct Reaper {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    watched: HashMap<Pid, oneshot::Sender<Exit>>,
    births: usize,
    /// Ends that nobody watched for, while there are births.
    unclaimed: HashMap<Pid, Exit>,
}

/// Keeps the ends of unknown children while it lives.
pub(crate) struct Birth(Arc<Reaper>);

impl Reaper {
    /// Announces that a child is about to be made, whose number becomes known only later.
    pub(crate) fn birth(self: &Arc<Self>) -> Birth {
        self.lock().births += 1;
        Birth(self.clone())
    }

    /// The end of child `pid`, which was made during `_birth`; may have happened already.
    pub(crate) fn watch(&self, _birth: &Birth, pid: Pid) -> oneshot::Receiver<Exit> {
        let (sender, receiver) = oneshot::channel();
        let mut state = self.lock();
        match state.unclaimed.remove(&pid) {
            Some(exit) => {
                let _ = sender.send(exit);
            }
            None => {
                state.watched.insert(pid, sender);
            }
        }
        receiver
    }

    /// Signals a watched child; answers whether it was still there. Its number cannot have gone to another process,
    /// since a number is free only once this reaper has collected its owner.
    pub(crate) fn kill(&self, pid: Pid, number: i32) -> Result<bool> {
        let state = self.lock();
        if !state.watched.contains_key(&pid) {
            return Ok(false);
        }
        send_signal(pid, number)
    }

    /// Runs `action` on a watched child while it cannot be collected; `None` if it has been.
    pub(crate) fn hold<T>(&self, pid: Pid, action: impl FnOnce(Pid) -> T) -> Option<T> {
        let state = self.lock();
        state.watched.contains_key(&pid).then(|| action(pid))
    }

    /// Collects children for as long as the agent runs.
    pub(crate) async fn run(self: Arc<Self>) -> Result<()> {
        let mut child_signals = signal(SignalKind::child()).step("listen to SIGCHLD")?;
        loop {
            self.collect();
            child_signals.recv().await;
        }
    }

    fn collect(&self) {
        loop {
            match wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => {
                    if let Some(exit) = exit_of(status) {
                        self.ended(pid, exit);
                    }
                }
                Err(Errno::INTR) => {}
                // No child has ended, or there is none.
                Ok(None) | Err(_) => return,
            }
        }
    }

    fn ended(&self, pid: Pid, exit: Exit) {
        let mut state = self.lock();
        if let Some(watcher) = state.watched.remove(&pid) {
            let _ = watcher.send(exit);
        } else if state.births > 0 {
            state.unclaimed.insert(pid, exit);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Birth {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.births -= 1;
        if state.births == 0 {
            state.unclaimed = HashMap::new();
        }
    }
}

fn exit_of(status: WaitStatus) -> Option<Exit> {
    let at_ns = now_ns();
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => Some(Exit { code: code as u32, signal: 0, at_ns }),
        (None, Some(signal)) => Some(Exit { code: 128 + signal as u32, signal: signal as u32, at_ns }),
        (None, None) => None,
    }
}

/// Sends a signal by its number, real-time ones included; answers whether the process was there.
pub(crate) fn send_signal(pid: Pid, number: i32) -> Result<bool> {
    match crate::sys::kill(pid, number) {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(false),
        Err(error) => Err(error).step("kill"),
    }
}

/// The time of day.
pub(crate) fn now_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pid(number: i32) -> Pid {
        Pid::from_raw(number).unwrap()
    }

    fn end(reaper: &Reaper, number: i32, code: u32, signal: u32) {
        reaper.ended(pid(number), Exit { code, signal, at_ns: 1 });
    }

    #[test]
    fn an_end_before_the_watch_is_kept_during_a_birth() {
        let reaper = Arc::new(Reaper::default());
        let birth = reaper.birth();
        end(&reaper, 77, 3, 0);
        let exit = reaper.watch(&birth, pid(77)).try_recv().unwrap();
        assert_eq!((exit.code, exit.signal), (3, 0));
    }

    #[test]
    fn an_end_after_the_watch_reaches_it() {
        let reaper = Arc::new(Reaper::default());
        let mut watch = reaper.watch(&reaper.birth(), pid(78));
        assert!(watch.try_recv().is_err());
        end(&reaper, 78, 137, 9);
        let exit = watch.try_recv().unwrap();
        assert_eq!((exit.code, exit.signal), (137, 9));
        assert!(!reaper.kill(pid(78), 9).unwrap());
    }

    #[test]
    fn unclaimed_ends_go_with_the_last_birth() {
        let reaper = Arc::new(Reaper::default());
        let (first, second) = (reaper.birth(), reaper.birth());
        end(&reaper, 79, 0, 0);
        drop(first);
        assert_eq!(reaper.lock().unclaimed.len(), 1);
        drop(second);
        assert!(reaper.lock().unclaimed.is_empty());
        end(&reaper, 80, 0, 0);
        assert!(reaper.lock().unclaimed.is_empty());
    }
}
