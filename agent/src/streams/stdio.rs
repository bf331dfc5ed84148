//! A process's standard streams, from the tokens of a request to running pumps.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, ready};

use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::termios::{Winsize, tcsetwinsize};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, Interest, ReadBuf, split};
use tokio::net::unix::pipe;
use tokio::sync::Notify;

use super::BoxedConnection;
use super::parking::{Parking, Token};
use super::pump::{Pump, Stop};
use crate::error::{Error, Result, Step};

/// What a request says of its process's streams.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Io {
    /// `None` stands for /dev/null.
    pub(crate) stdin: Option<Token>,
    /// With a terminal, the one connection for both directions.
    pub(crate) stdout: Option<Token>,
    pub(crate) stderr: Option<Token>,
    pub(crate) terminal: bool,
    pub(crate) size: WindowSize,
}

/// A terminal's size in characters; 0 by 0 where it is not known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct WindowSize {
    pub(crate) columns: u16,
    pub(crate) rows: u16,
}

/// Streams that are claimed, and whose process does not exist yet.
pub(crate) enum Prepared {
    Pipes { stdin: Option<(BoxedConnection, pipe::Sender)>, outputs: Vec<(pipe::Receiver, BoxedConnection)> },
    Terminal(Option<BoxedConnection>),
}

/// What stays in hand of a process's streams while the pumps run.
#[derive(Default)]
pub(crate) struct Controls {
    close_stdin: Option<Arc<Notify>>,
    /// The terminal's master, as long as its pumps run.
    terminal: Weak<Master>,
}

impl Io {
    /// Claims the streams. Answers them and, without a terminal, the three descriptors for the process.
    pub(crate) async fn prepare(&self, parking: &Parking) -> Result<(Prepared, Vec<OwnedFd>)> {
        if self.terminal {
            let connection = match self.stdout {
                Some(token) => Some(parking.claim(token).await?),
                None => None,
            };
            return Ok((Prepared::Terminal(connection), Vec::new()));
        }
        let mut process = Vec::with_capacity(3);
        let mut stdin = None;
        if let Some(token) = self.stdin {
            let connection = parking.claim(token).await?;
            let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).step("make the pipe of stdin")?;
            process.push(reader);
            stdin = Some((connection, pipe::Sender::from_owned_fd(writer).step("prepare the pipe of stdin")?));
        } else {
            process.push(null()?);
        }
        let mut outputs = Vec::new();
        for token in [self.stdout, self.stderr] {
            let Some(token) = token else {
                process.push(null()?);
                continue;
            };
            let connection = parking.claim(token).await?;
            let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).step("make the pipe of an output")?;
            process.push(writer);
            outputs.push((pipe::Receiver::from_owned_fd(reader).step("prepare the pipe of an output")?, connection));
        }
        Ok((Prepared::Pipes { stdin, outputs }, process))
    }
}

fn null() -> Result<OwnedFd> {
    Ok(File::options().read(true).write(true).open("/dev/null").step("open /dev/null")?.into())
}

impl Prepared {
    /// Starts the pumps. `master` is the process's terminal, which it has if these streams are of one.
    pub(crate) fn start(self, master: Option<OwnedFd>) -> Result<Controls> {
        match (self, master) {
            (Self::Pipes { stdin, outputs }, _) => {
                for (reader, connection) in outputs {
                    tokio::spawn(pump_output(reader, connection));
                }
                let close_stdin = stdin.map(|(connection, writer)| {
                    let close = Arc::new(Notify::new());
                    tokio::spawn(pump_stdin(connection, writer, close.clone()));
                    close
                });
                Ok(Controls { close_stdin, terminal: Weak::new() })
            }
            (Self::Terminal(connection), Some(master)) => {
                let master = Arc::new(Master::new(master)?);
                let terminal = Arc::downgrade(&master);
                tokio::spawn(pump_terminal(master, connection));
                Ok(Controls { close_stdin: None, terminal })
            }
            (Self::Terminal(_), None) => Err(Error::failed("start the terminal's streams", "there is no terminal")),
        }
    }
}

impl Controls {
    /// Gives the process the end of its standard input after what has arrived. On a terminal, which has no such end,
    /// and where it is closed already, there is nothing to do.
    pub(crate) fn close_stdin(&self) {
        if let Some(close) = &self.close_stdin {
            close.notify_one();
        }
    }

    /// Changes the terminal's size; answers whether there is a terminal. One that has hung up takes any size.
    pub(crate) fn resize(&self, size: WindowSize) -> Result<()> {
        match self.terminal.upgrade() {
            Some(master) => set_size(master.0.get_ref(), size).step("set the terminal's size"),
            None => Ok(()),
        }
    }
}

/// Sets a terminal's size, which its foreground processes learn by SIGWINCH.
pub(crate) fn set_size(master: impl AsFd, size: WindowSize) -> io::Result<()> {
    Ok(tcsetwinsize(master, Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 })?)
}

async fn pump_output(mut reader: pipe::Receiver, mut connection: BoxedConnection) {
    // Where the host is gone, dropping the reader gives the process SIGPIPE at its next write.
    if let Stop::End = Pump::default().run(&mut reader, &mut connection).await {
        let _ = connection.shutdown().await;
    }
}

async fn pump_stdin(mut connection: BoxedConnection, mut writer: pipe::Sender, close: Arc<Notify>) {
    let mut pump = Pump::default();
    tokio::select! {
        biased;
        _ = pump.run(&mut connection, &mut writer) => {}
        () = close.notified() => pump.drain(&mut connection, &mut writer).await,
    }
}

/// Both directions of a terminal. The end of the connection's input leaves the terminal alone; the end of its output,
/// or of the connection as a whole, hangs up.
async fn pump_terminal(master: Arc<Master>, connection: Option<BoxedConnection>) {
    let Some(connection) = connection else {
        // Nobody listens, but the process must not block.
        let mut pump = Pump::default();
        pump.run(&mut &*master, &mut tokio::io::sink()).await;
        return;
    };
    let (mut input, mut output) = split(connection);
    let from_host = async {
        Pump::default().run(&mut input, &mut &*master).await;
        std::future::pending::<()>().await;
    };
    let to_host = async {
        Pump::default().run(&mut &*master, &mut output).await;
    };
    tokio::select! {
        () = to_host => {}
        () = from_host => {}
    }
    let _ = output.shutdown().await;
}

/// The master side of a terminal.
struct Master(AsyncFd<OwnedFd>);

impl Master {
    fn new(master: OwnedFd) -> Result<Self> {
        let flags = rustix::fs::fcntl_getfl(&master).step("read the terminal's flags")?;
        rustix::fs::fcntl_setfl(&master, flags | OFlags::NONBLOCK).step("set the terminal's flags")?;
        let interest = Interest::READABLE | Interest::WRITABLE;
        Ok(Self(crate::sys::watch(master, interest).step("watch the terminal")?))
    }
}

impl AsyncRead for &Master {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(context))?;
            match guard.try_io(|master| Ok(rustix::io::read(master, buffer.initialize_unfilled())?)) {
                Ok(Ok(bytes)) => {
                    buffer.advance(bytes);
                    return Poll::Ready(Ok(()));
                }
                // The last process has closed the terminal.
                Ok(Err(error)) if error.raw_os_error() == Some(Errno::IO.raw_os_error()) => return Poll::Ready(Ok(())),
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_) => {}
            }
        }
    }
}

impl AsyncWrite for &Master {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.0.poll_write_ready(context))?;
            if let Ok(result) = guard.try_io(|master| Ok(rustix::io::write(master, bytes)?)) {
                return Poll::Ready(result);
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt as _;
    use tokio::net::UnixStream;

    use super::*;

    fn run(test: impl Future<Output = ()>) {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test);
    }

    #[test]
    fn the_end_of_the_hosts_input_closes_stdin() {
        run(async {
            let (mut host, guest) = UnixStream::pair().unwrap();
            let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
            let writer = pipe::Sender::from_owned_fd(writer).unwrap();
            tokio::spawn(pump_stdin(Box::new(guest), writer, Arc::new(Notify::new())));
            host.write_all(b"all of it").await.unwrap();
            host.shutdown().await.unwrap();
            let mut read = String::new();
            pipe::Receiver::from_owned_fd(reader).unwrap().read_to_string(&mut read).await.unwrap();
            assert_eq!(read, "all of it");
        });
    }

    #[test]
    fn closing_stdin_by_request_loses_nothing_that_has_arrived() {
        run(async {
            let (mut host, guest) = UnixStream::pair().unwrap();
            let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
            let writer = pipe::Sender::from_owned_fd(writer).unwrap();
            let close = Arc::new(Notify::new());
            let data = vec![5; 150_000];
            host.write_all(&data[..100_000]).await.unwrap();
            close.notify_one();
            tokio::spawn(pump_stdin(Box::new(guest), writer, close));
            let mut read = Vec::new();
            pipe::Receiver::from_owned_fd(reader).unwrap().read_to_end(&mut read).await.unwrap();
            assert_eq!(read, data[..100_000]);
        });
    }

    #[test]
    fn the_end_of_an_output_closes_the_connection_after_the_last_byte() {
        run(async {
            let (mut host, guest) = UnixStream::pair().unwrap();
            let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
            tokio::spawn(pump_output(pipe::Receiver::from_owned_fd(reader).unwrap(), Box::new(guest)));
            let mut writer = pipe::Sender::from_owned_fd(writer).unwrap();
            writer.write_all(b"last").await.unwrap();
            drop(writer);
            let mut read = String::new();
            host.read_to_string(&mut read).await.unwrap();
            assert_eq!(read, "last");
        });
    }

    #[test]
    fn a_host_that_is_gone_breaks_the_process_pipe() {
        run(async {
            let (host, guest) = UnixStream::pair().unwrap();
            let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
            tokio::spawn(pump_output(pipe::Receiver::from_owned_fd(reader).unwrap(), Box::new(guest)));
            let mut writer = pipe::Sender::from_owned_fd(writer).unwrap();
            drop(host);
            while writer.write_all(b"x").await.is_ok() {
                tokio::task::yield_now().await;
            }
        });
    }
}
