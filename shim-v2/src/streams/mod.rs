//! Carries a process's standard streams between the guest and where containerd wants them.
//!
//! Each direction is a task that reads only what it can pass on: the slowest of program, guest, VMM and reader holds up
//! the rest, and at most one buffer is kept in between, only while bytes are on their way.

mod binary;

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream as StdStream;
use std::sync::Arc;
use std::time::Duration;

use hull_sandbox::container::{Connections, Streams};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use crate::error::{Error, Result};

/// Bytes carried at a time, as many as a pipe holds.
const BUFFER_BYTES: usize = 64 * 1024;
/// How long a reader may take for the rest after the process has ended, before it is given up.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// Where containerd wants a process's streams: paths of FIFOs or URIs; empty for nowhere.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Stdio {
    pub(crate) stdin: String,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) terminal: bool,
}

impl Stdio {
    /// What the guest is to provide.
    pub(crate) fn streams(&self) -> Streams {
        if self.terminal {
            Streams::Terminal { columns: 0, rows: 0 }
        } else {
            Streams::Pipes { stdin: !self.stdin.is_empty() }
        }
    }

    /// Opens all of them, so that one that is missing is found before a process exists. A program that takes the output is
    /// told the container's namespace and identifier.
    ///
    /// # Errors
    ///
    /// Names the stream that cannot be opened.
    pub(crate) async fn open(&self, namespace: &str, id: &str) -> Result<Ends> {
        let failed = |target: &str| Error::host(format!("cannot open the stream {target}"));
        let stdin = match self.stdin.as_str() {
            "" => None,
            path => Some(
                pipe::OpenOptions::new()
                    .open_receiver(path.strip_prefix("fifo://").unwrap_or(path))
                    .map_err(failed(path))?,
            ),
        };
        if let Some(uri) = self.stdout.strip_prefix("binary://") {
            // One program for both, whatever is said of standard error.
            let (stdout, stderr) = binary::start(uri, namespace, id).await.map_err(failed(&self.stdout))?;
            return Ok(Ends { stdin, stdout: Sink::Fifo(stdout), stderr: Sink::Fifo(stderr) });
        }
        Ok(Ends { stdin, stdout: Sink::open(&self.stdout)?, stderr: Sink::open(&self.stderr)? })
    }
}

/// The opened ends on the host.
#[derive(Debug)]
pub(crate) struct Ends {
    stdin: Option<pipe::Receiver>,
    stdout: Sink,
    stderr: Sink,
}

/// Where output goes.
#[derive(Debug)]
enum Sink {
    Nowhere,
    Fifo(pipe::Sender),
    File(File),
}

impl Sink {
    fn open(target: &str) -> Result<Self> {
        let opened = match target.split_once("://") {
            None if target.is_empty() => return Ok(Self::Nowhere),
            None => open_fifo(target),
            Some(("fifo", path)) => open_fifo(path),
            Some(("file", path)) => File::options().append(true).create(true).open(path).map(Self::File),
            Some((scheme, _)) => {
                return Err(Error::Unsupported(format!(
                    "streams to {scheme}:// are not supported; use a FIFO, file:// or binary://"
                )));
            }
        };
        opened.map_err(Error::host(format!("cannot open the stream {target}")))
    }

    async fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        match self {
            Self::Nowhere => Ok(()),
            Self::Fifo(fifo) => fifo.write_all(bytes).await,
            Self::File(file) => file.write_all(bytes),
        }
    }
}

fn open_fifo(path: &str) -> std::io::Result<Sink> {
    // For reading too: a reader that goes away, as containerd does when it is restarted, then breaks nothing, and the
    // one that comes back finds what has been written meanwhile.
    match pipe::OpenOptions::new().read_write(true).open_sender(path) {
        Ok(sender) => Ok(Sink::Fifo(sender)),
        // Something else than a FIFO.
        Err(error) if error.kind() == ErrorKind::InvalidInput => {
            File::options().append(true).open(path).map(Sink::File)
        }
        Err(error) => Err(error),
    }
}

/// The tasks that carry a process's streams. Dropping them ends the streams.
#[derive(Debug, Default)]
pub(crate) struct Pumps {
    input: Option<(JoinHandle<()>, Arc<Notify>)>,
    output: Vec<JoinHandle<()>>,
}

impl Pumps {
    /// Starts to carry between the guest's connections and the host's ends.
    pub(crate) fn start(connections: Connections, ends: Ends, terminal: bool) -> std::io::Result<Self> {
        let mut pumps = Self::default();
        let (mut input, stdout) = (connections.stdin, connections.stdout);
        if terminal {
            input = stdout.as_ref().map(StdStream::try_clone).transpose()?;
        }
        if let (Some(source), Some(connection)) = (ends.stdin, input) {
            let closed = Arc::new(Notify::new());
            let task = tokio::spawn(send(source, adopt(connection)?, closed.clone(), !terminal));
            pumps.input = Some((task, closed));
        }
        for (connection, sink) in [(stdout, ends.stdout), (connections.stderr, ends.stderr)] {
            if let Some(connection) = connection {
                pumps.output.push(tokio::spawn(receive(adopt(connection)?, sink)));
            }
        }
        Ok(pumps)
    }

    /// Ends the process's input after what has been written to it by now.
    pub(crate) fn close_input(&self) {
        if let Some((_, closed)) = &self.input {
            closed.notify_one();
        }
    }

    /// Waits until all output has been carried.
    pub(crate) async fn finish(mut self) {
        let drained = async {
            for task in &mut self.output {
                // A task that panicked has nothing more to carry.
                let _ = task.await;
            }
        };
        if tokio::time::timeout(DRAIN_TIMEOUT, drained).await.is_err() {
            tracing::warn!("nobody reads a stream of a process that has ended; the rest of its output is lost");
        }
    }
}

impl Drop for Pumps {
    fn drop(&mut self) {
        for task in self.output.iter().chain(self.input.as_ref().map(|(task, _)| task)) {
            task.abort();
        }
    }
}

fn adopt(connection: StdStream) -> std::io::Result<UnixStream> {
    connection.set_nonblocking(true)?;
    UnixStream::from_std(connection)
}

/// Carries input until its end or until `closed`, and then passes the end on; but not to a terminal, where it would
/// hang up.
async fn send(source: pipe::Receiver, mut target: UnixStream, closed: Arc<Notify>, half_close: bool) {
    let mut closing = false;
    loop {
        if !closing {
            tokio::select! {
                biased;
                ready = source.readable() => if ready.is_err() { break },
                () = closed.notified() => closing = true,
            }
        }
        let mut buffer = vec![0; BUFFER_BYTES];
        // At the end the pipe itself is asked: that bytes have arrived may not have come through to the runtime yet.
        let read = if closing {
            rustix::io::read(&source, &mut buffer).map_err(std::io::Error::from)
        } else {
            source.try_read(&mut buffer)
        };
        match read {
            Ok(0) => break,
            Ok(count) => {
                // An error means that the process takes no more input.
                if target.write_all(&buffer[..count]).await.is_err() {
                    return;
                }
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                if closing {
                    break;
                }
            }
            Err(_) => break,
        }
    }
    if half_close {
        // Fails where the process has gone.
        let _ = target.into_std().and_then(|target| target.shutdown(Shutdown::Write));
    } else {
        // The terminal's other half is still in use, and this end of it closes without hanging up.
        drop(target);
    }
}

/// Carries output until its end. When it cannot be passed on the connection is closed, and the process finds its pipe
/// broken.
async fn receive(source: UnixStream, mut sink: Sink) {
    while source.readable().await.is_ok() {
        let mut buffer = vec![0; BUFFER_BYTES];
        match source.try_read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => {
                if let Err(error) = sink.write(&buffer[..count]).await {
                    tracing::warn!("output cannot be passed on: {error}");
                    return;
                }
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    struct Fifos {
        dir: tempfile::TempDir,
    }

    impl Fifos {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            for name in ["in", "out"] {
                let path = dir.path().join(name);
                rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
            }
            Self { dir }
        }

        fn path(&self, name: &str) -> String {
            self.dir.path().join(name).into_os_string().into_string().unwrap()
        }

        fn stdio(&self) -> Stdio {
            Stdio { stdin: self.path("in"), stdout: self.path("out"), ..Stdio::default() }
        }
    }

    /// A guest's process that sends back what it reads, and ends with its input.
    fn echo() -> Connections {
        let (stdin, mut from_host) = StdStream::pair().unwrap();
        let (stdout, mut to_host) = StdStream::pair().unwrap();
        std::thread::spawn(move || std::io::copy(&mut from_host, &mut to_host).unwrap());
        Connections { stdin: Some(stdin), stdout: Some(stdout), stderr: None }
    }

    #[tokio::test]
    async fn bytes_arrive_whole_and_the_end_of_input_is_passed_on() {
        let fifos = Fifos::new();
        let ends = fifos.stdio().open("n", "c").await.unwrap();
        let sent: Vec<u8> = (0..3_000_000_u32).map(|number| (number % 251) as u8).collect();
        let writer = std::thread::spawn({
            let (path, sent) = (fifos.path("in"), sent.clone());
            move || File::options().write(true).open(path).unwrap().write_all(&sent).unwrap()
        });
        let reader = std::thread::spawn({
            let mut out = File::open(fifos.path("out")).unwrap();
            move || {
                let mut received = Vec::new();
                out.read_to_end(&mut received).unwrap();
                received
            }
        });
        Pumps::start(echo(), ends, false).unwrap().finish().await;
        writer.join().unwrap();
        assert!(reader.join().unwrap() == sent);
    }

    #[tokio::test]
    async fn closing_the_input_passes_on_what_was_written_before() {
        let fifos = Fifos::new();
        let ends = fifos.stdio().open("n", "c").await.unwrap();
        // The writer stays open: only the request says that there is no more.
        let mut writer = File::options().write(true).open(fifos.path("in")).unwrap();
        let mut out = File::open(fifos.path("out")).unwrap();
        let pumps = Pumps::start(echo(), ends, false).unwrap();
        writer.write_all(b"last words").unwrap();
        pumps.close_input();
        pumps.finish().await;
        let mut received = String::new();
        out.read_to_string(&mut received).unwrap();
        assert_eq!(received, "last words");
    }

    #[tokio::test]
    async fn a_missing_fifo_is_named_and_an_unknown_scheme_refused() {
        let missing = Stdio { stdout: "/no/such/fifo".into(), ..Stdio::default() };
        assert!(missing.open("n", "c").await.unwrap_err().to_string().contains("/no/such/fifo"));
        let unknown = Stdio { stdout: "carrier://pigeon".into(), ..Stdio::default() };
        assert!(matches!(unknown.open("n", "c").await, Err(Error::Unsupported(_))));
    }

    #[tokio::test]
    async fn output_goes_to_a_file_too() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let stdio = Stdio { stdout: format!("file://{}", path.display()), ..Stdio::default() };
        let (stdout, mut process) = StdStream::pair().unwrap();
        let connections = Connections { stdin: None, stdout: Some(stdout), stderr: None };
        let pumps = Pumps::start(connections, stdio.open("n", "c").await.unwrap(), false).unwrap();
        process.write_all(b"hello").unwrap();
        drop(process);
        pumps.finish().await;
        assert_eq!(std::fs::read(path).unwrap(), b"hello");
    }
}
