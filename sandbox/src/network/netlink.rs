//! Conversations with the kernel's rtnetlink(7).
//!
//! A socket belongs to the network namespace in which it was opened, for good: it can be taken along to another thread
//! and still changes that namespace.

use std::io;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_ROUTE;

/// How often a list is asked for again that changed while the kernel made it.
const DUMP_ATTEMPTS: usize = 16;

/// A conversation.
#[derive(Debug)]
pub(super) struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    /// Opens a conversation about the calling thread's namespace.
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Has the kernel do something, which is done when this returns. `flags` are those beyond `NLM_F_REQUEST` and
    /// `NLM_F_ACK`.
    pub(super) fn call(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.send(message, NLM_F_ACK | flags)?;
        let mut outcome = None;
        while outcome.is_none() {
            self.receive(|_, payload| match payload {
                NetlinkPayload::Error(error) => outcome = Some(check(error.raw_code())),
                NetlinkPayload::Overrun(_) => outcome = Some(Err(io::ErrorKind::Interrupted.into())),
                _ => {}
            })?;
        }
        outcome.unwrap_or(Ok(()))
    }

    /// Asks for a list.
    pub(super) fn dump(&mut self, message: &RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
        for _ in 0..DUMP_ATTEMPTS {
            if let Some(list) = self.dump_once(message.clone())? {
                return Ok(list);
            }
        }
        Err(io::Error::other("the list keeps changing while it is read"))
    }

    /// `None` where the list changed meanwhile.
    fn dump_once(&mut self, message: RouteNetlinkMessage) -> io::Result<Option<Vec<RouteNetlinkMessage>>> {
        self.send(message, NLM_F_DUMP)?;
        let (mut list, mut changed, mut outcome) = (Vec::new(), false, None);
        while outcome.is_none() {
            self.receive(|header, payload| {
                changed |= header.flags & NLM_F_DUMP_INTR != 0;
                match payload {
                    NetlinkPayload::InnerMessage(inner) => list.push(inner),
                    NetlinkPayload::Done(done) => outcome = Some(check(done.code)),
                    NetlinkPayload::Error(error) => outcome = Some(check(error.raw_code())),
                    NetlinkPayload::Overrun(_) => changed = true,
                    _ => {}
                }
            })?;
        }
        outcome.unwrap_or(Ok(()))?;
        Ok((!changed).then_some(list))
    }

    fn send(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.sequence += 1;
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0).map(drop)
    }

    /// Waits for the next datagram and calls `take` for each message in it that answers the last request.
    fn receive(&mut self, mut take: impl FnMut(&NetlinkHeader, NetlinkPayload<RouteNetlinkMessage>)) -> io::Result<()> {
        let (bytes, _) = self.socket.recv_from_full()?;
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let length = rest.first_chunk::<4>().map_or(0, |length| u32::from_ne_bytes(*length) as usize);
            if length < 16 || length > rest.len() {
                return Err(io::Error::other("the kernel's answer is malformed"));
            }
            match NetlinkMessage::<RouteNetlinkMessage>::deserialize(&rest[..length]) {
                Ok(message) if message.header.sequence_number == self.sequence => {
                    take(&message.header, message.payload);
                }
                Ok(_) => {}
                // One thing of a newer kernel's kind is no reason to do without the others.
                Err(error) => tracing::warn!("not understood and left out: {error}"),
            }
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
        Ok(())
    }
}

/// An error number as netlink has it: 0, or less.
fn check(code: i32) -> io::Result<()> {
    if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(code.wrapping_neg())) }
}

#[cfg(test)]
mod tests {
    use netlink_packet_route::link::{LinkAttribute, LinkMessage};

    use super::*;

    #[test]
    fn the_loopback_interface_is_listed() {
        let mut netlink = Netlink::open().unwrap();
        let links = netlink.dump(&RouteNetlinkMessage::GetLink(LinkMessage::default())).unwrap();
        let is_lo = |message: &RouteNetlinkMessage| match message {
            RouteNetlinkMessage::NewLink(link) => link.attributes.contains(&LinkAttribute::IfName("lo".into())),
            _ => false,
        };
        assert!(links.iter().any(is_lo));
    }

    #[test]
    fn a_refusal_is_an_error() {
        let mut netlink = Netlink::open().unwrap();
        let mut link = LinkMessage::default();
        link.header.index = u32::MAX >> 1;
        assert!(netlink.call(RouteNetlinkMessage::SetLink(link), 0).is_err());
    }
}
