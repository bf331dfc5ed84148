//! Turns at booting: at one time no more guests boot than the host has CPUs for.
//!
//! A boot is bound by the CPU. Of many that share it all are ready about when the last is; in turns most are ready long before that. Of fifty
//! pods on one CPU half were up after two thirds of the time that all took (docs/benchmarks.md).
//!
//! A slot is a file that whoever has the turn locks (`flock`), so that it is free again however that one ends. It is a courtesy and not
//! a limit: a guest that does not come up has its turn for [`LONGEST`] only, and who cannot use the files does without.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};
use tokio::sync::oneshot;

/// Where the slots are in the state directory.
const DIR: &str = ".turns";
/// What a boot takes on a host that is busy with little else; a turn longer than that keeps others from theirs.
const LONGEST: Duration = Duration::from_secs(10);
/// With one CPU, one guest boots while another waits for a disk.
const LEAST_SLOTS: usize = 2;
/// The stack of a thread that does nothing but wait for a lock.
const STACK_BYTES: usize = 64 << 10;

/// A turn, until it is dropped or has lasted as long as one may.
#[derive(Debug)]
pub(crate) struct Turn {
    _end: Option<oneshot::Sender<()>>,
}

impl Turn {
    /// Waits for a turn.
    pub(crate) async fn wait(state_dir: &Path) -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        Self::wait_among(state_dir.join(DIR), cpus.max(LEAST_SLOTS)).await
    }

    async fn wait_among(dir: PathBuf, slots: usize) -> Self {
        let slot = match take_free(&dir, slots) {
            Ok(Some(slot)) => Ok(slot),
            Ok(None) => {
                tracing::debug!("{slots} guests boot already; waiting for a turn");
                wait_for_one(dir, slots).await
            }
            Err(error) => Err(error),
        };
        match slot {
            Ok(slot) => Self { _end: Some(lend(slot)) },
            Err(error) => {
                tracing::debug!("booting out of turn: {error}");
                Self { _end: None }
            }
        }
    }
}

/// Lets go of a slot once what is returned is dropped, or the turn has been long enough.
fn lend(slot: File) -> oneshot::Sender<()> {
    let (end, ended) = oneshot::channel();
    tokio::spawn(async move {
        // Either way it has ended.
        let _ = tokio::time::timeout(LONGEST, ended).await;
        drop(slot);
    });
    end
}

/// A slot that nobody has.
fn take_free(dir: &Path, slots: usize) -> io::Result<Option<File>> {
    std::fs::create_dir_all(dir)?;
    for number in 0..slots {
        let slot = open(dir, number)?;
        match flock(&slot, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(Some(slot)),
            Err(Errno::WOULDBLOCK) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(None)
}

/// Stands in line for one slot. Nothing tells when any of several locks is free; so each picks one to wait for. Not by its process
/// identifier: what starts many processes of a kind may leave the same number between any two.
async fn wait_for_one(dir: PathBuf, slots: usize) -> io::Result<File> {
    let mut random = [0; 2];
    getrandom(&mut random[..], GetRandomFlags::empty())?;
    let number = usize::from(u16::from_ne_bytes(random)) % slots;
    let (send, received) = oneshot::channel();
    // Nobody waits for this thread where the caller changes its mind; it ends with the process or at its turn.
    std::thread::Builder::new().name("turn".to_owned()).stack_size(STACK_BYTES).spawn(move || {
        let locked = open(&dir, number).and_then(|slot| {
            flock(&slot, FlockOperation::LockExclusive)?;
            Ok(slot)
        });
        // Not wanted any more where this fails, and let go of.
        let _ = send.send(locked);
    })?;
    received.await.unwrap_or_else(|_| Err(io::ErrorKind::Other.into()))
}

fn open(dir: &Path, number: usize) -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let slot = rustix::fs::open(dir.join(number.to_string()), flags, Mode::from_raw_mode(0o600))?;
    Ok(slot.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_comes_when_all_boot_waits_until_one_is_done() {
        let dir = tempfile::tempdir().unwrap();
        let turns = [Turn::wait_among(dir.path().into(), 2).await, Turn::wait_among(dir.path().into(), 2).await];
        assert!(take_free(dir.path(), 2).unwrap().is_none());
        let third = tokio::spawn(Turn::wait_among(dir.path().into(), 2));
        tokio::task::yield_now().await;
        assert!(!third.is_finished());
        drop(turns);
        let third = third.await.unwrap();
        assert!(third._end.is_some());
    }

    #[tokio::test]
    async fn a_guest_that_does_not_come_up_has_its_turn_for_so_long_only() {
        let dir = tempfile::tempdir().unwrap();
        let turn = Turn::wait_among(dir.path().into(), 1).await;
        // The clock goes by itself where all that runs waits for it.
        tokio::time::pause();
        tokio::time::sleep(2 * LONGEST).await;
        assert!(take_free(dir.path(), 1).unwrap().is_some());
        drop(turn);
    }

    #[tokio::test]
    async fn without_a_directory_for_them_there_are_no_turns() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert!(Turn::wait_among(file, 1).await._end.is_none());
    }
}
