//! Carries a process's standard streams between the guest and where containerd wants them.
//!
//! Each direction is a task that reads only what it can pass on: the slowest of program, guest, VMM and reader holds up
//! the rest, and at most one buffer is kept in between, only while bytes are on their way.

mod binary;
mod linger;
mod service;

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::net::Shutdown;
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::os::unix::net::UnixStream as StdStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hull_sandbox::container::{Connections, Streams};
use rustix::fs::OFlags;
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinHandle;
use tokio::time::Instant;

pub(crate) use self::service::{NAME as STREAMING, Streaming};
use self::service::{Reservation, Side};

use crate::error::{Error, Result};

/// Bytes carried at a time, as many as a pipe holds.
const BUFFER_BYTES: usize = 64 * 1024;
/// How long a reader may take for the rest after the process has ended, before it is given up.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a stream's last bytes may take after the request that says that there are no more, which comes by another connection.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

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
    pub(crate) async fn open(&self, namespace: &str, id: &str, streaming: &Arc<Streaming>) -> Result<Ends> {
        let failed = |target: &str| Error::host(format!("cannot open the stream {target}"));
        let mut names = Vec::new();
        let stdin = match self.stdin.as_str() {
            "" => None,
            target => Some(match streaming_id(target)? {
                Some(name) => Source::Stream(reserve(streaming, &name, &mut names)),
                None => Source::open(target.strip_prefix("fifo://").unwrap_or(target)).map_err(failed(target))?,
            }),
        };
        if let Some((version, uri)) = binary::version(&self.stdout) {
            // One program for both, whatever is said of standard error.
            let (stdout, stderr) = binary::start(version, uri, namespace, id).await.map_err(failed(&self.stdout))?;
            return Ok(Ends { stdin, stdout: Sink::Fifo(stdout), stderr: Sink::Fifo(stderr), names });
        }
        let mut open = |target: &str| match streaming_id(target)? {
            Some(name) => Ok(Sink::Stream(reserve(streaming, &name, &mut names))),
            None => Sink::open(target),
        };
        let (stdout, stderr) = (open(&self.stdout)?, open(&self.stderr)?);
        Ok(Ends { stdin, stdout, stderr, names })
    }
}

/// The name of a stream that containerd opens to the shim, `ttrpc+unix://SOCKET?streaming_id=NAME`; none of other targets.
fn streaming_id(target: &str) -> Result<Option<String>> {
    let Some(rest) = target.strip_prefix("ttrpc+unix://") else { return Ok(None) };
    let query = rest.split_once('?').map_or("", |(_, query)| query);
    let name = query.split('&').find_map(|pair| pair.strip_prefix("streaming_id=")).unwrap_or_default();
    match binary::decode(name, true).filter(|name| !name.is_empty()) {
        Some(name) => Ok(Some(name)),
        None => Err(Error::Invalid(format!("the stream {target} has no streaming_id"))),
    }
}

fn reserve(streaming: &Arc<Streaming>, name: &str, names: &mut Vec<Reservation>) -> Side {
    let (reservation, side) = streaming.reserve(name);
    names.push(reservation);
    side
}

/// The opened ends on the host.
#[derive(Debug)]
pub(crate) struct Ends {
    stdin: Option<Source>,
    stdout: Sink,
    stderr: Sink,
    /// Kept until the process is forgotten: a client that comes back is to find the end of what has ended.
    names: Vec<Reservation>,
}

/// Where input comes from.
#[derive(Debug)]
enum Source {
    /// With a writing end that keeps the input from ending with its last client, as when containerd is restarted: another may come.
    Fifo(pipe::Receiver, File),
    Stream(Side),
}

impl Source {
    fn open(path: &str) -> std::io::Result<Self> {
        // First, and for reading too since that alone needs no reader: without a writer the other would be told of an end at once.
        let flags = OFlags::NONBLOCK.bits().cast_signed();
        let keeper = File::options().read(true).write(true).custom_flags(flags).open(path)?;
        Ok(Self::Fifo(pipe::OpenOptions::new().open_receiver(path)?, keeper))
    }
}

/// Where output goes.
#[derive(Debug)]
enum Sink {
    Nowhere,
    Fifo(pipe::Sender),
    File(File),
    Stream(Side),
}

impl Sink {
    fn open(target: &str) -> Result<Self> {
        let opened = match target.split_once("://") {
            None if target.is_empty() => return Ok(Self::Nowhere),
            None => open_fifo(target),
            Some(("fifo", path)) => open_fifo(path),
            Some(("file", path)) => open_log(path),
            Some((scheme, _)) => {
                return Err(Error::Unsupported(format!(
                    "streams to {scheme}:// are not supported; use a FIFO, file://, binary://, binary-v2:// or streaming"
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
            Self::Stream(side) => {
                side.write(bytes).await;
                Ok(())
            }
        }
    }
}

/// Its directories are made too, as by runc's shim.
fn open_log(path: &str) -> std::io::Result<Sink> {
    if let Some(parent) = Path::new(path).parent() {
        std::fs::create_dir_all(parent)?;
    }
    // As a file, a FIFO would be waited for until it has a reader.
    if std::fs::metadata(path).is_ok_and(|found| found.file_type().is_fifo()) {
        return open_fifo(path);
    }
    File::options().append(true).create(true).open(path).map(Sink::File)
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
    /// Each with what tells that all has been carried.
    output: Vec<(JoinHandle<()>, oneshot::Receiver<()>)>,
    _names: Vec<Reservation>,
}

impl Pumps {
    /// Starts to carry between the guest's connections and the host's ends.
    pub(crate) fn start(connections: Connections, ends: Ends, terminal: bool) -> std::io::Result<Self> {
        let mut pumps = Self { input: None, output: Vec::new(), _names: ends.names };
        let (mut input, stdout) = (connections.stdin, connections.stdout);
        if terminal {
            input = stdout.as_ref().map(StdStream::try_clone).transpose()?;
        }
        if let (Some(source), Some(connection)) = (ends.stdin, input) {
            let closed = Arc::new(Notify::new());
            let (target, half_close, closing) = (adopt(connection)?, !terminal, closed.clone());
            let task = match source {
                Source::Fifo(fifo, keeper) => tokio::spawn(send(fifo, keeper, target, closing, half_close)),
                Source::Stream(side) => tokio::spawn(send_from_stream(side, target, closing, half_close)),
            };
            pumps.input = Some((task, closed));
        }
        for (connection, sink) in [(stdout, ends.stdout), (connections.stderr, ends.stderr)] {
            if let Some(connection) = connection {
                let (carried, is_carried) = oneshot::channel();
                let task = tokio::spawn(receive(adopt(connection)?, sink, carried));
                pumps.output.push((task, is_carried));
            }
        }
        Ok(pumps)
    }

    /// Ends the process's input once its clients have closed it too.
    pub(crate) fn close_input(&self) {
        if let Some((_, closed)) = &self.input {
            closed.notify_one();
        }
    }

    /// Waits until all output has been carried, and ends the streams.
    pub(crate) async fn finish(mut self) {
        let drained = async {
            for (_, is_carried) in &mut self.output {
                // A task that panicked has nothing more to carry.
                let _ = is_carried.await;
            }
        };
        if tokio::time::timeout(DRAIN_TIMEOUT, drained).await.is_err() {
            tracing::warn!("nobody reads a stream of a process that has ended; the rest of its output is lost");
        }
    }
}

impl Drop for Pumps {
    fn drop(&mut self) {
        for task in self.output.iter().map(|(task, _)| task).chain(self.input.as_ref().map(|(task, _)| task)) {
            task.abort();
        }
    }
}

fn adopt(connection: StdStream) -> std::io::Result<UnixStream> {
    connection.set_nonblocking(true)?;
    UnixStream::from_std(connection)
}

/// Carries input until it has been `closed` and the last client has closed it too, and then passes the end on; but not to a terminal,
/// where it would hang up.
async fn send(source: pipe::Receiver, keeper: File, mut target: UnixStream, closed: Arc<Notify>, half_close: bool) {
    let mut keeper = Some(keeper);
    loop {
        let ready = tokio::select! {
            biased;
            ready = source.ready(Interest::READABLE) => ready,
            () = closed.notified(), if keeper.is_some() => {
                keeper = None;
                continue;
            }
        };
        let Ok(ready) = ready else { break };
        let mut buffer = vec![0; BUFFER_BYTES];
        match source.try_read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => {
                // An error means that the process takes no more input.
                if target.write_all(&buffer[..count]).await.is_err() {
                    return;
                }
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                // Whoever has opened it since then has come too late.
                if ready.is_read_closed() {
                    break;
                }
            }
            Err(_) => break,
        }
    }
    end_input(target, half_close);
}

/// The same from a stream of containerd's.
async fn send_from_stream(mut source: Side, mut target: UnixStream, closed: Arc<Notify>, half_close: bool) {
    let mut deadline = None;
    loop {
        let late = async {
            match deadline {
                Some(deadline) => tokio::time::sleep_until(deadline).await,
                None => std::future::pending().await,
            }
        };
        let bytes = tokio::select! {
            biased;
            bytes = source.read() => bytes,
            // A client that has written all closes the stream; one that does not has said so with the request.
            () = closed.notified(), if deadline.is_none() => {
                deadline = Some(Instant::now() + CLOSE_TIMEOUT);
                continue;
            }
            () = late => None,
        };
        let Some(bytes) = bytes else { break };
        // An error means that the process takes no more input.
        if target.write_all(&bytes).await.is_err() {
            return;
        }
    }
    end_input(target, half_close);
}

fn end_input(target: UnixStream, half_close: bool) {
    if half_close {
        // Fails where the process has gone.
        let _ = target.into_std().and_then(|target| target.shutdown(Shutdown::Write));
    } else {
        // The terminal's other half is still in use, and this end of it closes without hanging up.
        drop(target);
    }
}

/// Carries output until its end, tells so, and leaves what nobody has read for whoever comes to read it. When it cannot be passed on the
/// connection is closed, and the process finds its pipe broken.
async fn receive(source: UnixStream, mut sink: Sink, carried: oneshot::Sender<()>) {
    let has_ended = carry(source, &mut sink).await;
    // Nobody waits for it where the streams have been ended.
    let _ = carried.send(());
    if let (true, Sink::Fifo(fifo)) = (has_ended, sink)
        && let Err(error) = linger::until_read(fifo).await
    {
        tracing::warn!("what a process has written last may be lost: {error}");
    }
}

/// Whether the output has come to its end.
async fn carry(source: UnixStream, sink: &mut Sink) -> bool {
    while source.readable().await.is_ok() {
        let mut buffer = vec![0; BUFFER_BYTES];
        match source.try_read(&mut buffer) {
            Ok(0) => return true,
            Ok(count) => {
                if let Err(error) = sink.write(&buffer[..count]).await {
                    tracing::warn!("output cannot be passed on: {error}");
                    return false;
                }
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => return true,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use tokio::io::AsyncReadExt as _;

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

        /// A client's end of the input. It is an error where nobody reads it.
        fn input(&self) -> std::io::Result<File> {
            let flags = OFlags::NONBLOCK.bits().cast_signed();
            let input = File::options().write(true).custom_flags(flags).open(self.path("in"))?;
            rustix::fs::fcntl_setfl(&input, OFlags::empty())?;
            Ok(input)
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
        let ends = fifos.stdio().open("n", "c", &Arc::default()).await.unwrap();
        let sent: Vec<u8> = (0..3_000_000_u32).map(|number| (number % 251) as u8).collect();
        let mut input = fifos.input().unwrap();
        let writer = std::thread::spawn({
            let sent = sent.clone();
            move || input.write_all(&sent).unwrap()
        });
        let reader = std::thread::spawn({
            let mut out = File::open(fifos.path("out")).unwrap();
            move || {
                let mut received = Vec::new();
                out.read_to_end(&mut received).unwrap();
                received
            }
        });
        let pumps = Pumps::start(echo(), ends, false).unwrap();
        // While the client has more to write, as one that does so when it has read the end of its own.
        pumps.close_input();
        pumps.finish().await;
        writer.join().unwrap();
        assert!(reader.join().unwrap() == sent);
    }

    #[tokio::test]
    async fn an_input_lasts_from_client_to_client_until_it_is_closed() {
        let fifos = Fifos::new();
        let ends = fifos.stdio().open("n", "c", &Arc::default()).await.unwrap();
        let mut out = pipe::OpenOptions::new().open_receiver(fifos.path("out")).unwrap();
        let pumps = Pumps::start(echo(), ends, false).unwrap();
        let mut received = [0; 10];
        for words in [b"some words", b"more words"] {
            fifos.input().unwrap().write_all(words).unwrap();
            out.read_exact(&mut received).await.unwrap();
            assert_eq!(&received, words);
        }
        fifos.input().unwrap().write_all(b"last words").unwrap();
        pumps.close_input();
        pumps.finish().await;
        out.read_exact(&mut received).await.unwrap();
        assert_eq!(&received, b"last words");
        assert!(fifos.input().is_err());
    }

    #[tokio::test]
    async fn an_input_that_is_closed_ends_with_its_last_client() {
        let fifos = Fifos::new();
        let ends = fifos.stdio().open("n", "c", &Arc::default()).await.unwrap();
        let mut out = pipe::OpenOptions::new().open_receiver(fifos.path("out")).unwrap();
        let pumps = Pumps::start(echo(), ends, false).unwrap();
        let mut client = fifos.input().unwrap();
        pumps.close_input();
        let mut received = [0; 10];
        for words in [b"some words", b"last words"] {
            client.write_all(words).unwrap();
            out.read_exact(&mut received).await.unwrap();
            assert_eq!(&received, words);
        }
        drop(client);
        pumps.finish().await;
    }

    #[tokio::test]
    async fn an_input_that_is_closed_ends_though_no_client_ever_came() {
        let fifos = Fifos::new();
        let ends = fifos.stdio().open("n", "c", &Arc::default()).await.unwrap();
        let pumps = Pumps::start(echo(), ends, false).unwrap();
        pumps.close_input();
        pumps.finish().await;
        assert!(fifos.input().is_err());
    }

    #[tokio::test]
    async fn a_missing_fifo_is_named_and_an_unknown_scheme_refused() {
        let missing = Stdio { stdout: "/no/such/fifo".into(), ..Stdio::default() };
        assert!(missing.open("n", "c", &Arc::default()).await.unwrap_err().to_string().contains("/no/such/fifo"));
        let unknown = Stdio { stdout: "carrier://pigeon".into(), ..Stdio::default() };
        assert!(matches!(unknown.open("n", "c", &Arc::default()).await, Err(Error::Unsupported(_))));
    }

    #[tokio::test]
    async fn output_goes_to_a_file_too() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let stdio = Stdio { stdout: format!("file://{}", path.display()), ..Stdio::default() };
        let (stdout, mut process) = StdStream::pair().unwrap();
        let connections = Connections { stdin: None, stdout: Some(stdout), stderr: None };
        let pumps = Pumps::start(connections, stdio.open("n", "c", &Arc::default()).await.unwrap(), false).unwrap();
        process.write_all(b"hello").unwrap();
        drop(process);
        pumps.finish().await;
        assert_eq!(std::fs::read(path).unwrap(), b"hello");
    }

    #[tokio::test]
    async fn streams_of_containerd_carry_both_ways_and_end() {
        let shim = service::testing::Shim::start().await;
        let (stdin, mut stdout) = (shim.named("c-stdin").await, shim.named("c-stdout").await);
        let target = |name: &str| format!("ttrpc+{}?streaming_id={name}", shim.address);
        let stdio = Stdio { stdin: target("c-stdin"), stdout: target("c-stdout"), ..Stdio::default() };
        let pumps = Pumps::start(echo(), stdio.open("n", "c", &shim.streaming).await.unwrap(), false).unwrap();
        stdout.grant(1 << 16).await;
        stdin.write(b"there and back").await;
        // By another connection than the bytes, which are not to be lost for that.
        pumps.close_input();
        stdin.close().await;
        assert_eq!(stdout.read().await.unwrap(), b"there and back");
        assert_eq!(stdout.read().await, None);
        pumps.finish().await;
    }

    #[test]
    fn a_stream_is_named_by_its_target() {
        let name = |target: &str| streaming_id(target).ok().flatten();
        assert_eq!(name("ttrpc+unix:///run/s?streaming_id=c-stdin").as_deref(), Some("c-stdin"));
        assert_eq!(name("ttrpc+unix:///run/s?x=y&streaming_id=a%20b").as_deref(), Some("a b"));
        assert_eq!(name("/run/fifo"), None);
        for wrong in
            ["ttrpc+unix:///run/s", "ttrpc+unix:///run/s?streaming_id=", "ttrpc+unix:///run/s?streaming_id=%00"]
        {
            assert!(streaming_id(wrong).is_err(), "{wrong}");
        }
    }
}
