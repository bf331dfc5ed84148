//! Carries bytes between this process's standard streams and a program's.
//!
//! Each direction is a thread that blocks: the slowest of program, guest, VMM and reader holds up the rest, and nothing is kept
//! in between.
//!
//! Bytes are read and written, not spliced: splice(2) into a pipe holds the pipe's lock while it waits for its source, and
//! meanwhile who reads the pipe can neither take what is in it nor be killed.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use hull_sandbox::container::Connections;

use crate::log::{LogWriter, Stream};

/// Where a program's output goes besides the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Attach {
    /// This process's own standard output and error.
    Own,
    /// Nowhere.
    Nowhere,
}

/// The threads that carry a program's output; they end with the program's streams.
#[derive(Debug, Default)]
pub(crate) struct Pumps(Vec<JoinHandle<()>>);

impl Pumps {
    /// Starts to carry all of `connections`.
    pub(crate) fn start(
        connections: Connections,
        terminal: bool,
        attach: Attach,
        log: Option<&Arc<Mutex<LogWriter>>>,
    ) -> io::Result<Self> {
        let Connections { mut stdin, stdout, stderr } = connections;
        if terminal {
            stdin = stdout.as_ref().map(UnixStream::try_clone).transpose()?;
        }
        if let Some(stdin) = stdin {
            let source = own(io::stdin().as_fd())?;
            // Not waited for: it may be blocked on the user's keyboard when the program has long ended.
            spawn("stdin", move || send(source, &stdin, !terminal))?;
        }
        let mut pumps = Self::default();
        for (stream, connection) in [(Stream::Stdout, stdout), (Stream::Stderr, stderr)] {
            let Some(connection) = connection else { continue };
            let target = match (attach, stream) {
                (Attach::Nowhere, _) => None,
                (Attach::Own, Stream::Stdout) => Some(own(io::stdout().as_fd())?),
                (Attach::Own, Stream::Stderr) => Some(own(io::stderr().as_fd())?),
            };
            let log = log.cloned();
            pumps.0.push(spawn(stream.name(), move || receive(connection, target, log.as_deref(), stream))?);
        }
        Ok(pumps)
    }

    /// Waits until all output has been carried. The caller's thread blocks.
    pub(crate) fn finish(self) {
        for thread in self.0 {
            // A thread that panicked has said so on standard error.
            let _ = thread.join();
        }
    }
}

fn own(fd: std::os::fd::BorrowedFd<'_>) -> io::Result<File> {
    fd.try_clone_to_owned().map(|fd: OwnedFd| File::from(fd))
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name(name.to_owned()).stack_size(128 * 1024).spawn(work)
}

/// Carries input. The end of it is passed on as a half-close, but for a terminal, where it would hang up.
fn send(mut source: File, connection: &UnixStream, half_close: bool) {
    let mut target = connection;
    carry(&mut source, |bytes| target.write_all(bytes).is_ok());
    if half_close {
        let _ = connection.shutdown(Shutdown::Write);
    }
}

/// Carries output. When nobody reads it any more the connection is closed, and the program finds its pipe broken.
fn receive(mut connection: UnixStream, target: Option<File>, log: Option<&Mutex<LogWriter>>, stream: Stream) {
    let mut target = target;
    carry(&mut connection, |bytes| {
        if let Some(log) = log {
            log.lock().unwrap_or_else(PoisonError::into_inner).write(stream, bytes);
        }
        target.as_mut().is_none_or(|target| target.write_all(bytes).is_ok())
    });
}

/// Gives all of `source` to `take`, piece by piece as it comes, until one of the two has gone.
fn carry(source: &mut impl Read, mut take: impl FnMut(&[u8]) -> bool) {
    // What a pipe holds, and a packet of the socket device.
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match source.read(&mut buffer) {
            Ok(count @ 1..) if take(&buffer[..count]) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            _ => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    #[test]
    fn what_has_come_can_be_read_while_more_is_waited_for() {
        let (mut program, connection) = UnixStream::pair().unwrap();
        let (mut reader, writer) = io::pipe().unwrap();
        let pump = std::thread::spawn(move || {
            receive(connection, Some(OwnedFd::from(writer).into()), None, Stream::Stdout);
        });
        // The first piece has the pump wait for the second.
        program.write_all(b"a").unwrap();
        reader.read_exact(&mut [0]).unwrap();
        program.write_all(b"b").unwrap();
        let (sender, read) = mpsc::channel();
        std::thread::spawn(move || {
            // Long enough for the pump to have taken the piece and be waiting again.
            while reader_is_empty(&reader) {
                std::thread::yield_now();
            }
            std::thread::sleep(Duration::from_millis(20));
            let mut byte = [0];
            reader.read_exact(&mut byte).unwrap();
            let _ = sender.send(byte);
        });
        assert_eq!(read.recv_timeout(Duration::from_secs(10)), Ok(*b"b"));
        drop(program);
        pump.join().unwrap();
    }

    fn reader_is_empty(reader: &io::PipeReader) -> bool {
        rustix::io::ioctl_fionread(reader).unwrap() == 0
    }
}
