//! The last words of a process whose reader is away: containerd is restarted, and opens the FIFO again.
//!
//! What is in a FIFO is lost with the last descriptor of it. So one stays open for as long as something is unread and nobody has it open for
//! reading; and no longer, since containerd waits for the end of the stream before it deletes the process.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use hull_sandbox_sys::readiness::readable;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, inotify};
use tokio::net::unix::pipe;

/// Returns once `fifo`, which is open for reading too, is empty or somebody else reads it.
pub(super) async fn until_read(fifo: pipe::Sender) -> io::Result<()> {
    if rustix::io::ioctl_fionread(&fifo)? == 0 {
        return Ok(());
    }
    let path = format!("/proc/self/fd/{}", fifo.as_raw_fd());
    let opened = inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC)?;
    inotify::add_watch(&opened, path.as_str(), inotify::WatchFlags::OPEN)?;
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    let writer = File::options().write(true).custom_flags(flags).open(&path)?;
    // Of this one the kernel tells whether there is a reader besides us.
    drop(fifo);
    wait_for_reader(&writer, opened).await
}

async fn wait_for_reader(writer: &File, opened: OwnedFd) -> io::Result<()> {
    let opened = readable(opened)?;
    let mut buffer = [std::mem::MaybeUninit::uninit(); 512];
    while !has_reader(writer)? {
        let mut ready = opened.readable().await?;
        let mut events = inotify::Reader::new(opened.get_ref(), &mut buffer);
        // Who has opened it does not matter.
        while events.next().is_ok() {}
        ready.clear_ready();
    }
    Ok(())
}

fn has_reader(writer: &File) -> io::Result<bool> {
    let mut fds = [PollFd::new(writer, PollFlags::OUT)];
    poll(&mut fds, Some(&Timespec::default()))?;
    Ok(!fds[0].revents().contains(PollFlags::ERR))
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use tokio::io::AsyncWriteExt as _;

    use super::*;

    fn fifo() -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        (dir, path)
    }

    fn sender(path: &std::path::Path) -> pipe::Sender {
        pipe::OpenOptions::new().read_write(true).open_sender(path).unwrap()
    }

    #[tokio::test]
    async fn what_nobody_has_read_waits_for_a_reader() {
        let (_dir, path) = fifo();
        let mut sender = sender(&path);
        sender.write_all(b"last words").await.unwrap();
        let waiting = tokio::spawn(until_read(sender));
        while !waiting.is_finished() {
            // A writer that comes is none to wait for. Without a reader there is none to be had: ours is closed then.
            if File::options().write(true).custom_flags(OFlags::NONBLOCK.bits().cast_signed()).open(&path).is_err() {
                break;
            }
            tokio::task::yield_now().await;
        }
        assert!(!waiting.is_finished());
        let read = tokio::task::spawn_blocking(move || {
            let mut text = String::new();
            File::open(path).unwrap().read_to_string(&mut text).unwrap();
            text
        });
        waiting.await.unwrap().unwrap();
        assert_eq!(read.await.unwrap(), "last words");
    }

    #[tokio::test]
    async fn a_reader_that_is_there_or_nothing_to_read_is_not_waited_for() {
        let (_dir, path) = fifo();
        until_read(sender(&path)).await.unwrap();
        let mut sender = sender(&path);
        let mut reader = File::open(&path).unwrap();
        sender.write_all(b"words").await.unwrap();
        until_read(sender).await.unwrap();
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "words");
    }
}
