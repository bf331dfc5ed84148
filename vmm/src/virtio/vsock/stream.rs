//! One connection: a Unix stream socket on the host joined to a socket in the guest.
//!
//! ```text
//! Greeting ──"CONNECT n"──▶ Requested ──RESPONSE──▶ Established ──▶ Closing ──RST──▶ gone
//!                                                      ▲   │
//!                       guest's REQUEST (GuestPort) ───┘   └─guest is done, host has yet to read─▶ Draining ──▶ gone
//! ```
//!
//! **Flow control** (virtio 1.3, section 5.10.6.3). Each side may send what fits in the other's buffer. Towards the
//! guest nothing is buffered here: bytes stay in the host's socket until the guest has room for them. Towards the host,
//! bytes go straight from guest memory to the socket; what it does not take is kept, at most [`BUFFER_BYTES`], which is
//! what the guest is told it may send.
//!
//! **Ends.** Each direction ends by itself and after its last byte: the host's end of file becomes `SHUTDOWN`, the
//! guest's `SHUTDOWN` becomes the end of file.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::net::Shutdown;
use std::num::Wrapping;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use super::packet::{HEADER_BYTES, HOST_CID, Header, Ports, TYPE_STREAM, op, shutdown};
use crate::virtio::queue::Chain;

/// Most bytes kept of what the guest sent and the host has not read, for one connection.
pub const BUFFER_BYTES: u32 = 128 * 1024;
/// The guest is told of freed room once there is this much of it that it does not know of.
const CREDIT_STEP: u32 = BUFFER_BYTES / 2;
/// Most payload of one packet to the guest.
const MAX_PAYLOAD_BYTES: usize = 64 * 1024;
/// Longest greeting: "CONNECT 4294967295\n".
const MAX_GREETING_BYTES: usize = 19;

/// Where a connection stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The client has not said yet which port it wants.
    Greeting,
    /// The guest has not answered yet.
    Requested,
    /// Bytes flow.
    Established,
    /// The host's end is closed; the guest has not confirmed.
    Closing,
    /// The guest's end is gone; the host has not read everything.
    Draining,
}

/// What came of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// The connection goes on.
    Lives,
    /// It is over, and the guest knows or never knew of it.
    Over,
    /// It is over, and the guest must be told.
    Reset,
}

/// What a connection made of a buffer of the guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Produced {
    /// Nothing: the buffer is free for others.
    Nothing,
    /// A packet of so many bytes.
    Packet(u32),
}

/// One connection.
pub struct Stream {
    /// The host's end, until it is closed.
    socket: Option<UnixStream>,
    ports: Ports,
    phase: Phase,
    /// Whether reading may yield something: cleared when it would block, set by the next event.
    readable: bool,
    /// Whether writing may be possible, likewise.
    writable: bool,
    /// The host closed its socket, not only one direction of it.
    hung_up: bool,
    /// The host's end of file was read.
    host_done: bool,
    /// The host does not read any more: what the guest sends is lost.
    host_deaf: bool,
    /// The guest said that it sends no more, receives no more.
    guest_done: u32,
    /// Bytes of the guest's that the socket did not take yet.
    kept: VecDeque<u8>,
    /// All bytes that came from the guest, and those of them that went to the host.
    received: Wrapping<u32>,
    forwarded: Wrapping<u32>,
    /// What the guest was last told of `forwarded`.
    told: Wrapping<u32>,
    /// All bytes that went to the guest, and what it said of its buffer.
    sent: Wrapping<u32>,
    guest_buffer: u32,
    guest_forwarded: Wrapping<u32>,
    /// What is to be sent beside payload.
    due: Due,
}

/// Packets without payload that wait for a buffer of the guest's.
#[derive(Default)]
struct Due {
    request: bool,
    response: bool,
    shutdown: u32,
    credit: bool,
}

impl Stream {
    /// A client that just connected; its socket does not block.
    #[must_use]
    pub fn greeting(socket: UnixStream, host_port: u32) -> Self {
        Self::new(socket, Ports { host: host_port, guest: 0 }, Phase::Greeting)
    }

    /// A connection that the guest asked for, accepted; the socket does not block.
    #[must_use]
    pub fn accepted(socket: UnixStream, ports: Ports, request: &Header) -> Self {
        let mut stream = Self::new(socket, ports, Phase::Established);
        stream.due.response = true;
        stream.learn_credit(request);
        stream
    }

    fn new(socket: UnixStream, ports: Ports, phase: Phase) -> Self {
        Self {
            socket: Some(socket),
            ports,
            phase,
            readable: true,
            writable: true,
            hung_up: false,
            host_done: false,
            host_deaf: false,
            guest_done: 0,
            kept: VecDeque::new(),
            received: Wrapping(0),
            forwarded: Wrapping(0),
            told: Wrapping(0),
            sent: Wrapping(0),
            guest_buffer: 0,
            guest_forwarded: Wrapping(0),
            due: Due::default(),
        }
    }

    /// The two ports.
    #[must_use]
    pub fn ports(&self) -> Ports {
        self.ports
    }

    /// Where it stands.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// The host's end.
    #[must_use]
    pub fn socket(&self) -> Option<&UnixStream> {
        self.socket.as_ref()
    }

    /// Whether [`produce`](Self::produce) may have something for the guest.
    #[must_use]
    pub fn wants_to_send(&self) -> bool {
        let due = &self.due;
        due.request || due.response || due.shutdown != 0 || due.credit || self.may_read()
    }

    fn may_read(&self) -> bool {
        self.phase == Phase::Established
            && self.readable
            && !self.host_done
            && self.guest_done & shutdown::RECEIVE == 0
            && self.guest_room() > 0
    }

    /// What the guest's buffer has room for.
    fn guest_room(&self) -> u32 {
        // A guest that claims to have read more than it was sent, or shrinks its buffer, has no room.
        self.guest_buffer.saturating_sub((self.sent - self.guest_forwarded).0)
    }

    fn learn_credit(&mut self, header: &Header) {
        self.guest_buffer = header.buf_alloc;
        self.guest_forwarded = Wrapping(header.fwd_cnt);
    }

    // ---- events of the host's socket

    /// The socket may be read, written, or was closed at the other end.
    pub fn host_event(&mut self, readable: bool, writable: bool, hung_up: bool) -> Fate {
        self.readable |= readable || hung_up;
        self.writable |= writable || hung_up;
        self.hung_up |= hung_up;
        match self.phase {
            Phase::Greeting => self.read_greeting(),
            // A client that gives up before the guest answered leaves nobody to talk to.
            Phase::Requested if self.hung_up => Fate::Reset,
            Phase::Requested | Phase::Closing => Fate::Lives,
            Phase::Draining => self.flush(),
            Phase::Established => {
                let fate = self.flush();
                self.close_if_finished();
                fate
            }
        }
    }

    /// Reads "CONNECT n\n" and not a byte more.
    fn read_greeting(&mut self) -> Fate {
        let Some(socket) = &self.socket else { return Fate::Over };
        let mut greeting = [0; MAX_GREETING_BYTES];
        let seen = match receive(socket, &mut greeting, libc::MSG_PEEK) {
            Ok(0) => return Fate::Over,
            Ok(seen) => seen,
            Err(error) if is_transient(&error) => return Fate::Lives,
            Err(_) => return Fate::Over,
        };
        let Some(end) = greeting[..seen].iter().position(|byte| *byte == b'\n') else {
            return if seen == MAX_GREETING_BYTES || self.hung_up { Fate::Over } else { Fate::Lives };
        };
        let Some(port) = parse_greeting(&greeting[..end]) else { return Fate::Over };
        if !matches!(receive(socket, &mut greeting[..=end], 0), Ok(len) if len == end + 1) {
            return Fate::Over;
        }
        self.ports.guest = port;
        self.phase = Phase::Requested;
        self.due.request = true;
        Fate::Lives
    }

    // ---- packets from the guest

    /// The guest accepted the connection.
    fn established(&mut self) -> Fate {
        if self.phase != Phase::Requested || self.due.request {
            return Fate::Reset;
        }
        self.phase = Phase::Established;
        self.readable = true;
        // Nothing was written before it, so that there is room, unless the client is gone.
        let answer = format!("OK {}\n", self.ports.host);
        match self.socket.as_ref().map(|mut socket| socket.write(answer.as_bytes())) {
            Some(Ok(len)) if len == answer.len() => Fate::Lives,
            _ => Fate::Reset,
        }
    }

    /// A packet for this connection. `chain` holds its payload behind the header.
    pub fn packet(&mut self, header: &Header, chain: &Chain) -> Fate {
        self.learn_credit(header);
        match header.op {
            op::RESPONSE => self.established(),
            op::RW => self.payload(header.len as usize, chain),
            op::SHUTDOWN => self.guest_shutdown(header.flags),
            op::CREDIT_UPDATE => Fate::Lives,
            op::CREDIT_REQUEST => {
                self.due.credit = true;
                Fate::Lives
            }
            op::RST if self.guest_done & shutdown::SEND != 0 => self.drain(),
            op::RST => Fate::Over,
            // Another request on ports in use, or nothing that is known.
            _ => Fate::Reset,
        }
    }

    fn payload(&mut self, len: usize, chain: &Chain) -> Fate {
        if self.phase == Phase::Closing {
            // The host is gone; the guest does not know yet.
            return Fate::Lives;
        }
        let room = (BUFFER_BYTES - (self.received - self.forwarded).0) as usize;
        if self.phase != Phase::Established || self.guest_done & shutdown::SEND != 0 || len > room {
            return Fate::Reset;
        }
        // Not more than the buffer's 128 KiB.
        self.received += len as u32;
        if self.host_deaf {
            self.forward(len);
            return Fate::Lives;
        }
        let mut taken = 0;
        if self.kept.is_empty() && self.writable {
            while taken < len {
                match self.write_from(chain, HEADER_BYTES + taken, len - taken) {
                    Ok(written) => taken += written,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) if is_transient(&error) => {
                        self.writable = false;
                        break;
                    }
                    Err(_) => return self.host_gone(),
                }
            }
        }
        self.forward(taken);
        if taken < len {
            let before = self.kept.len();
            self.kept.resize(before + len - taken, 0);
            let mut at = HEADER_BYTES + taken;
            let (front, back) = self.kept.as_mut_slices();
            // The new bytes are the last of the two halves.
            let skip = before.min(front.len());
            for part in [&mut front[skip..], &mut back[before - skip..]] {
                at += chain.read_at(at, part);
            }
        }
        Fate::Lives
    }

    fn write_from(&self, chain: &Chain, offset: usize, len: usize) -> io::Result<usize> {
        let socket = self.socket.as_ref().ok_or(io::ErrorKind::BrokenPipe)?;
        let parts = chain.readable_iovecs(offset, len);
        let mut message = empty_message();
        message.msg_iov = parts.as_ptr().cast_mut();
        message.msg_iovlen = parts.len();
        // SAFETY: the parts lie in guest memory, which the chain keeps mapped; the message refers to nothing else.
        let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
        match usize::try_from(sent) {
            Ok(0) => Err(io::ErrorKind::WriteZero.into()),
            Ok(sent) => Ok(sent),
            Err(_) => Err(io::Error::last_os_error()),
        }
    }

    /// Bytes of the guest's are with the host: it may send as many more.
    fn forward(&mut self, len: usize) {
        // Not more than the buffer's 128 KiB.
        self.forwarded += len as u32;
        if (self.forwarded - self.told).0 >= CREDIT_STEP {
            self.due.credit = true;
        }
    }

    /// Gives the socket what was kept for it, then ends what has ended.
    fn flush(&mut self) -> Fate {
        while !self.kept.is_empty() && self.writable {
            let Some(mut socket) = self.socket.as_ref() else { return self.host_gone() };
            match socket.write(self.kept.as_slices().0) {
                Ok(written) if written > 0 => {
                    self.kept.drain(..written);
                    self.forward(written);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if is_transient(&error) => self.writable = false,
                _ => return self.host_gone(),
            }
        }
        if !self.kept.is_empty() {
            return Fate::Lives;
        }
        // A connection that is idle should cost no memory.
        self.kept = VecDeque::new();
        if self.phase == Phase::Draining {
            return Fate::Over;
        }
        if self.guest_done & shutdown::SEND != 0 {
            self.end_host(Shutdown::Write);
        }
        Fate::Lives
    }

    fn guest_shutdown(&mut self, flags: u32) -> Fate {
        self.guest_done |= flags & shutdown::BOTH;
        if self.phase == Phase::Closing || self.guest_done == shutdown::BOTH {
            // The guest's end is confirmed at once: what it sent is safe here.
            self.drain();
            return Fate::Reset;
        }
        if self.guest_done & shutdown::RECEIVE != 0 {
            self.end_host(Shutdown::Read);
        }
        if self.kept.is_empty() && self.guest_done & shutdown::SEND != 0 {
            self.end_host(Shutdown::Write);
        }
        Fate::Lives
    }

    /// The guest's end is gone: only what was kept is left to do.
    fn drain(&mut self) -> Fate {
        if self.kept.is_empty() || self.socket.is_none() {
            return Fate::Over;
        }
        self.phase = Phase::Draining;
        self.due = Due::default();
        Fate::Lives
    }

    fn end_host(&mut self, direction: Shutdown) {
        if let Some(socket) = &self.socket {
            // A socket that is closed at the other end cannot be shut down, and need not.
            let _ = socket.shutdown(direction);
        }
    }

    /// The host reads no more: what was kept for it is lost, and the guest is told.
    fn host_gone(&mut self) -> Fate {
        self.kept = VecDeque::new();
        if self.phase == Phase::Draining {
            return Fate::Over;
        }
        self.host_deaf = true;
        self.forwarded = self.received;
        self.due.shutdown |= shutdown::RECEIVE;
        // What the host sent before is still to be read.
        self.readable = true;
        Fate::Lives
    }

    /// Ends the connection if neither direction has anything to come.
    fn close_if_finished(&mut self) {
        let host_sends_no_more = self.host_done || self.hung_up && self.guest_done & shutdown::RECEIVE != 0;
        let host_reads_no_more =
            self.hung_up || self.host_deaf || self.guest_done & shutdown::SEND != 0 && self.kept.is_empty();
        if host_sends_no_more && host_reads_no_more {
            self.due.shutdown = shutdown::BOTH;
            self.phase = Phase::Closing;
            self.kept = VecDeque::new();
        }
    }

    // ---- packets to the guest

    /// Makes one packet in `chain`, which has room for a header and more, if there is anything to send.
    pub fn produce(&mut self, guest_cid: u32, chain: &Chain) -> Produced {
        let due = &mut self.due;
        let (op, flags, len) = if std::mem::take(&mut due.request) {
            (op::REQUEST, 0, 0)
        } else if std::mem::take(&mut due.response) {
            (op::RESPONSE, 0, 0)
        } else if let Some(len) = self.read_into(chain) {
            (op::RW, 0, len)
        } else if self.due.shutdown != 0 {
            (op::SHUTDOWN, std::mem::take(&mut self.due.shutdown), 0)
        } else if self.due.credit {
            (op::CREDIT_UPDATE, 0, 0)
        } else {
            return Produced::Nothing;
        };
        // Every packet tells of credit.
        self.due.credit = false;
        self.told = self.forwarded;
        let mut header = header(guest_cid, self.ports, op);
        header.flags = flags;
        header.len = len;
        header.fwd_cnt = self.forwarded.0;
        header.write(chain);
        // At most 64 KiB.
        Produced::Packet(HEADER_BYTES as u32 + len)
    }

    /// Reads from the host's socket straight into the chain behind the header.
    fn read_into(&mut self, chain: &Chain) -> Option<u32> {
        if !self.may_read() {
            return None;
        }
        let room = chain.writable_len() - HEADER_BYTES;
        let limit = room.min(self.guest_room() as usize).min(MAX_PAYLOAD_BYTES);
        let socket = self.socket.as_ref()?;
        loop {
            let parts = chain.writable_iovecs(HEADER_BYTES, limit);
            // At most 1,024 segments.
            let count = parts.len() as libc::c_int;
            // SAFETY: the parts lie in guest memory, which the chain keeps mapped.
            let len = unsafe { libc::readv(socket.as_raw_fd(), parts.as_ptr(), count) };
            if let Ok(len) = u32::try_from(len) {
                if len == 0 {
                    break;
                }
                self.sent += len;
                return Some(len);
            }
            match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error if is_transient(&error) => {
                    self.readable = false;
                    return None;
                }
                // An error is an end too.
                _ => {
                    self.hung_up = true;
                    break;
                }
            }
        }
        self.host_done = true;
        self.due.shutdown |= shutdown::SEND;
        self.close_if_finished();
        None
    }

    /// The host's socket, once the connection needs it no more, to be closed.
    pub fn take_finished_socket(&mut self) -> Option<UnixStream> {
        if self.phase == Phase::Closing { self.socket.take() } else { None }
    }
}

/// A header from the host to the guest, with nothing but its addresses and the size of the buffer.
#[must_use]
pub fn header(guest_cid: u32, ports: Ports, op: u16) -> Header {
    Header {
        src_cid: HOST_CID,
        dst_cid: u64::from(guest_cid),
        src_port: ports.host,
        dst_port: ports.guest,
        kind: TYPE_STREAM,
        op,
        buf_alloc: BUFFER_BYTES,
        ..Header::default()
    }
}

/// The port of a greeting without its line end.
fn parse_greeting(line: &[u8]) -> Option<u32> {
    let digits = std::str::from_utf8(line.strip_prefix(b"CONNECT ")?).ok()?;
    if digits.bytes().all(|byte| byte.is_ascii_digit()) { digits.parse().ok() } else { None }
}

fn receive(socket: &UnixStream, data: &mut [u8], flags: libc::c_int) -> io::Result<usize> {
    // SAFETY: `data` is a live buffer of that length.
    let len = unsafe { libc::recv(socket.as_raw_fd(), data.as_mut_ptr().cast(), data.len(), flags) };
    usize::try_from(len).map_err(|_| io::Error::last_os_error())
}

fn empty_message() -> libc::msghdr {
    // SAFETY: a message of zeros is one without address, parts or control data.
    unsafe { std::mem::zeroed() }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greetings_are_parsed_strictly() {
        assert_eq!(parse_greeting(b"CONNECT 1024"), Some(1024));
        assert_eq!(parse_greeting(b"CONNECT 4294967295"), Some(u32::MAX));
        for bad in [&b"CONNECT 4294967296"[..], b"CONNECT ", b"CONNECT +1", b"CONNECT -1", b"connect 1", b"CONNECT 1 "]
        {
            assert_eq!(parse_greeting(bad), None);
        }
    }
}
