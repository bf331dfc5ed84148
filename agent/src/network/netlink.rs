//! Requests to rtnetlink(7), written by hand: the agent only adds things, and reading nothing but acknowledgements it
//! needs 10 KB for it instead of a library's hundreds.

use std::io;
use std::os::fd::OwnedFd;

use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{
    AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType, bind, recv, send, socket_with,
};

/// rtnetlink is the protocol with the number 0.
const NETLINK_ROUTE: Option<Protocol> = None;
/// `struct nlmsghdr`: length, type, flags, sequence number, port.
const HEADER_BYTES: usize = 16;
/// Everything in a message starts at a multiple of this.
const ALIGNMENT: usize = 4;
/// The type of an answer that is an error number or, as 0, an acknowledgement.
const NLMSG_ERROR: u16 = 2;

const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
/// Make what is missing; replace what is there, refuse to, or put it behind that.
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;
const NLM_F_APPEND: u16 = 0x800;
/// Marks an attribute that consists of attributes.
const NLA_F_NESTED: u16 = 0x8000;

/// What is to be made: the type of its message (`RTM_NEWLINK` and its like).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Kind {
    Link = 16,
    Address = 20,
    Route = 24,
    Neighbour = 28,
    Rule = 32,
}

/// A message in the making: a structure of fixed size, then attributes.
#[derive(Debug)]
pub(super) struct Request(Vec<u8>);

impl Request {
    /// A request to take away what `body` and attributes describe.
    pub(super) fn removal(kind: Kind, body: &[u8]) -> Self {
        // The types that remove follow those that make.
        Self::with_header(kind as u16 + 1, 0, body)
    }

    /// A request to make what `body`, the structure for its kind, and attributes describe. A link is only ever
    /// changed; an address or neighbour that is there is replaced; a route comes behind others for its destination;
    /// a rule that is there is an error.
    pub(super) fn new(kind: Kind, body: &[u8]) -> Self {
        let make = match kind {
            Kind::Link => 0,
            Kind::Address | Kind::Neighbour => NLM_F_CREATE | NLM_F_REPLACE,
            Kind::Route => NLM_F_CREATE | NLM_F_APPEND,
            Kind::Rule => NLM_F_CREATE | NLM_F_EXCL,
        };
        Self::with_header(kind as u16, make, body)
    }

    fn with_header(kind: u16, flags: u16, body: &[u8]) -> Self {
        let mut message = vec![0; HEADER_BYTES];
        message[4..6].copy_from_slice(&kind.to_ne_bytes());
        message[6..8].copy_from_slice(&(NLM_F_REQUEST | NLM_F_ACK | flags).to_ne_bytes());
        message.extend(body);
        Self(message).aligned()
    }

    fn aligned(mut self) -> Self {
        self.0.resize(self.0.len().next_multiple_of(ALIGNMENT), 0);
        self
    }

    /// Adds an attribute.
    pub(super) fn with(mut self, kind: u16, value: &[u8]) -> Self {
        let start = self.open(kind);
        self.0.extend(value);
        self.close(start)
    }

    /// Adds an attribute unless its value is empty.
    pub(super) fn with_some(self, kind: u16, value: &[u8]) -> Self {
        if value.is_empty() { self } else { self.with(kind, value) }
    }

    /// Adds an attribute that consists of those that `fill` adds.
    pub(super) fn with_nested(mut self, kind: u16, fill: impl FnOnce(Self) -> Self) -> Self {
        let start = self.open(kind | NLA_F_NESTED);
        fill(self).close(start)
    }

    /// Adds one next hop (`struct rtnexthop`), to be called while filling `RTA_MULTIPATH`.
    pub(super) fn with_hop(mut self, flags: u8, hops: u8, index: u32, fill: impl FnOnce(Self) -> Self) -> Self {
        let start = self.0.len();
        self.0.extend([0, 0, flags, hops]);
        self.0.extend(index.to_ne_bytes());
        fill(self).close(start)
    }

    fn open(&mut self, kind: u16) -> usize {
        let start = self.0.len();
        self.0.extend([0, 0]);
        self.0.extend(kind.to_ne_bytes());
        start
    }

    /// Writes the length of what was opened at `start` and is complete now.
    fn close(mut self, start: usize) -> Self {
        // Lists are capped where they come in, far below 64 KiB.
        let length = (self.0.len() - start) as u16;
        self.0[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self.aligned()
    }

    pub(super) fn finished(mut self, sequence: u32) -> Vec<u8> {
        let length = self.0.len() as u32;
        self.0[..4].copy_from_slice(&length.to_ne_bytes());
        self.0[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.0
    }
}

/// A connection to the kernel.
#[derive(Debug)]
pub(super) struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

impl Netlink {
    pub(super) fn open() -> io::Result<Self> {
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, NETLINK_ROUTE)?;
        bind(&socket, &SocketAddrNetlink::new(0, 0))?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Has the kernel carry out a request, which it has done when it answers.
    pub(super) fn call(&mut self, request: Request) -> io::Result<()> {
        self.sequence += 1;
        send(&self.socket, &request.finished(self.sequence), SendFlags::empty())?;
        let mut answer = [0_u8; 4096];
        loop {
            let (_, length) = recv(&self.socket, &mut answer, RecvFlags::empty())?;
            if let Some(result) = acknowledgement(&answer[..length.min(answer.len())], self.sequence) {
                return result;
            }
        }
    }
}

/// What an answer says, if it is the one to the request with this number.
fn acknowledgement(answer: &[u8], sequence: u32) -> Option<io::Result<()>> {
    let word = |at: usize| answer.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes);
    let kind = u16::from_ne_bytes(answer.get(4..6)?.try_into().ok()?);
    if kind != NLMSG_ERROR || word(8)? != sequence {
        return None;
    }
    match word(HEADER_BYTES)?.cast_signed() {
        0 => Some(Ok(())),
        code => Some(Err(io::Error::from_raw_os_error(code.wrapping_neg()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_aligned_and_know_their_length() {
        let request = Request::new(Kind::Link, &[1; 4])
            .with(3, b"eth0\0")
            .with_some(4, &[])
            .with_nested(8, |request| request.with(2, &7_u32.to_ne_bytes()));
        let bytes = request.finished(9);
        assert_eq!(bytes.len(), 16 + 4 + 12 + 12);
        assert_eq!(bytes[..4], 44_u32.to_ne_bytes());
        assert_eq!(bytes[4..8], [16, 0, 5, 0]);
        assert_eq!(bytes[8..12], 9_u32.to_ne_bytes());
        assert_eq!(bytes[20..32], *b"\x09\0\x03\0eth0\0\0\0\0");
        assert_eq!(bytes[32..], [12, 0, 8, 0x80, 8, 0, 2, 0, 7, 0, 0, 0]);
    }

    #[test]
    fn a_removal_is_the_next_type_without_flags_to_make() {
        let bytes = Request::removal(Kind::Route, &[0; 12]).finished(1);
        assert_eq!(bytes[4..8], [25, 0, 5, 0]);
    }

    #[test]
    fn an_acknowledgement_belongs_to_its_request() {
        let answer = |sequence: u32, code: i32| {
            let mut bytes = vec![20, 0, 0, 0, 2, 0, 0, 0];
            bytes.extend(sequence.to_ne_bytes());
            bytes.extend([0; 4]);
            bytes.extend(code.to_ne_bytes());
            bytes
        };
        assert!(acknowledgement(&answer(1, 0), 1).unwrap().is_ok());
        assert_eq!(acknowledgement(&answer(1, -17), 1).unwrap().unwrap_err().raw_os_error(), Some(17));
        assert!(acknowledgement(&answer(1, i32::MIN), 1).unwrap().is_err());
        assert!(acknowledgement(&answer(2, 0), 1).is_none());
        assert!(acknowledgement(&answer(1, 0)[..18], 1).is_none());
    }

    #[test]
    fn the_kernel_answers() {
        // Index 0 is nobody's, whoever asks.
        let request = Request::new(Kind::Link, &[0; 16]).with(3, b"no-such-link\0");
        assert!(Netlink::open().unwrap().call(request).is_err());
    }
}
