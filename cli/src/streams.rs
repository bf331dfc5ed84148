//! Carries bytes between this process's standard streams and a program's.
//!
//! Each direction is a thread that blocks: the slowest of program, guest, VMM and reader holds up the rest, and nothing is kept
//! in between. The kernel moves the bytes where it can (splice, through `std::io::copy`).

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
    // An error means that one side has gone: there is nothing more to carry.
    let _ = io::copy(&mut source, &mut target);
    if half_close {
        let _ = connection.shutdown(Shutdown::Write);
    }
}

/// Carries output. When nobody reads it any more the connection is closed, and the program finds its pipe broken.
fn receive(mut connection: UnixStream, target: Option<File>, log: Option<&Mutex<LogWriter>>, stream: Stream) {
    let Some(log) = log else {
        let carried = match target {
            Some(mut target) => io::copy(&mut connection, &mut target),
            None => io::copy(&mut connection, &mut io::sink()),
        };
        drop(carried);
        return;
    };
    let mut buffer = vec![0; 16 * 1024];
    let mut target = target;
    while let Ok(count @ 1..) = connection.read(&mut buffer) {
        let bytes = &buffer[..count];
        log.lock().unwrap_or_else(PoisonError::into_inner).write(stream, bytes);
        if target.as_mut().is_some_and(|target| target.write_all(bytes).is_err()) {
            break;
        }
    }
}
