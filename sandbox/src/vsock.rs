//! Connections to the guest's socket ports through the VMM's Unix socket.
//!
//! The VMM takes `CONNECT <port>\n` and answers `OK <host port>\n`, or closes where the guest has no listener.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hull_protocol::{STREAM_PORT, STREAM_TOKEN_BYTES};
use rustix::rand::{GetRandomFlags, getrandom};

/// How long VMM and guest may take to answer a connection request.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest answer: `OK `, ten digits, a newline.
const MAX_ANSWER_BYTES: usize = 14;

/// A connection that did not come about.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// The VMM's socket cannot be reached.
    #[error("cannot reach the virtual machine at {path}: {source}; has it ended?")]
    Unreachable {
        /// The VMM's socket.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The VMM or the guest refused, or went silent.
    #[error("the guest does not take connections on port {port}: {source}")]
    Refused {
        /// The guest's port.
        port: u32,
        /// Why.
        source: std::io::Error,
    },
    /// The host has no randomness for a token.
    #[error("cannot draw a random token: {0}")]
    Random(#[source] std::io::Error),
}

/// The secret that joins a stream connection with the request that names it.
pub type Token = [u8; STREAM_TOKEN_BYTES];

/// Connects to `port` in the guest.
///
/// # Errors
///
/// Fails where the VMM has gone, nothing listens on the port, or no answer comes within ten seconds.
pub fn connect(socket: &Path, port: u32) -> Result<UnixStream, VsockError> {
    let mut stream =
        UnixStream::connect(socket).map_err(|source| VsockError::Unreachable { path: socket.to_owned(), source })?;
    let refused = |source| VsockError::Refused { port, source };
    stream.set_read_timeout(Some(CONNECT_TIMEOUT)).map_err(refused)?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).map_err(refused)?;
    read_answer(&mut stream).map_err(refused)?;
    stream.set_read_timeout(None).map_err(refused)?;
    Ok(stream)
}

/// Opens a standard stream: a connection to the agent that has sent a fresh token.
///
/// # Errors
///
/// As [`connect`].
pub fn open_stream(socket: &Path) -> Result<(UnixStream, Token), VsockError> {
    let mut token: Token = [0; STREAM_TOKEN_BYTES];
    getrandom(&mut token, GetRandomFlags::empty()).map_err(|errno| VsockError::Random(errno.into()))?;
    let mut stream = connect(socket, STREAM_PORT)?;
    stream.write_all(&token).map_err(|source| VsockError::Refused { port: STREAM_PORT, source })?;
    Ok((stream, token))
}

/// Reads the answer byte by byte: what follows it belongs to the guest's stream.
fn read_answer(stream: &mut impl Read) -> std::io::Result<()> {
    let mut answer = Vec::with_capacity(MAX_ANSWER_BYTES);
    let mut byte = [0];
    while answer.len() < MAX_ANSWER_BYTES {
        stream.read_exact(&mut byte).map_err(|error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => std::io::Error::other("nothing listens there"),
            std::io::ErrorKind::WouldBlock => std::io::Error::other("no answer"),
            _ => error,
        })?;
        if byte == *b"\n" {
            return if answer.starts_with(b"OK ") { Ok(()) } else { Err(std::io::Error::other("unknown answer")) };
        }
        answer.push(byte[0]);
    }
    Err(std::io::Error::other("answer too long"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stops_reading_right_after_the_answer() {
        let mut input = &b"OK 1073741824\nguest data"[..];
        read_answer(&mut input).unwrap();
        assert_eq!(input, b"guest data");
    }

    #[test]
    fn refuses_anything_but_an_answer() {
        for input in [&b""[..], b"OK", b"NO 1\n", b"OK 12345678901\n"] {
            assert!(read_answer(&mut &*input).is_err(), "{input:?}");
        }
    }
}
