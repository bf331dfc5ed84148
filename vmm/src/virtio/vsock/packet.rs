//! The header that every packet of the socket device starts with (virtio 1.3, section 5.10.6).
//!
//! The payload may lie in any number of descriptors, together with the header or apart from it (section 2.7.4.1), so
//! headers are copied out of and into chains rather than found in place.

use vm_memory::ByteValued;

use crate::virtio::queue::Chain;

/// Bytes of a header.
pub const HEADER_BYTES: usize = size_of::<Header>();
/// The host's context identifier.
pub const HOST_CID: u64 = 2;
/// Socket type: stream, the only one offered.
pub const TYPE_STREAM: u16 = 1;

/// Operations.
pub mod op {
    /// Wants a connection.
    pub const REQUEST: u16 = 1;
    /// Accepts one.
    pub const RESPONSE: u16 = 2;
    /// Ends or refuses one.
    pub const RST: u16 = 3;
    /// Sends or receives no more.
    pub const SHUTDOWN: u16 = 4;
    /// Carries payload.
    pub const RW: u16 = 5;
    /// Tells of room in the receiver's buffer; every packet does, this one does nothing else.
    pub const CREDIT_UPDATE: u16 = 6;
    /// Asks for a credit update.
    pub const CREDIT_REQUEST: u16 = 7;
}

/// Flags of `SHUTDOWN`: the sender of it will receive no more, will send no more.
pub mod shutdown {
    /// Receives no more.
    pub const RECEIVE: u32 = 1;
    /// Sends no more.
    pub const SEND: u32 = 2;
    /// Neither.
    pub const BOTH: u32 = RECEIVE | SEND;
}

/// `struct virtio_vsock_hdr`, in the byte order of the wire, which is that of the supported hosts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, packed)]
pub struct Header {
    /// Sender.
    pub src_cid: u64,
    /// Receiver.
    pub dst_cid: u64,
    /// Sender's port.
    pub src_port: u32,
    /// Receiver's port.
    pub dst_port: u32,
    /// Bytes of payload.
    pub len: u32,
    /// Socket type.
    pub kind: u16,
    /// Operation.
    pub op: u16,
    /// Flags of the operation.
    pub flags: u32,
    /// Size of the sender's receive buffer.
    pub buf_alloc: u32,
    /// Bytes that the sender has taken out of it, modulo 2³².
    pub fwd_cnt: u32,
}

#[cfg(not(target_endian = "little"))]
compile_error!("headers are read as they are on the wire, which is little-endian");

// SAFETY: all fields are integers, and a packed structure has no padding.
unsafe impl ByteValued for Header {}

impl Header {
    /// The header of a chain from the driver; `None` if the chain is too short for one.
    #[must_use]
    pub fn read(chain: &Chain) -> Option<Self> {
        chain.read_obj(0)
    }

    /// Writes the header to the front of a chain that has room for it.
    pub fn write(&self, chain: &Chain) {
        chain.write_at(0, self.as_slice());
    }
}

/// The two ports of a connection, which name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ports {
    /// On the host.
    pub host: u32,
    /// In the guest.
    pub guest: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_has_the_size_and_order_of_the_specification() {
        assert_eq!(HEADER_BYTES, 44);
        let header =
            Header { src_port: 0x0102_0304, kind: 0x0506, op: 0x0708, fwd_cnt: 0x090a_0b0c, ..Header::default() };
        let bytes = header.as_slice();
        assert_eq!(bytes[16..20], [4, 3, 2, 1]);
        assert_eq!(bytes[28..32], [6, 5, 8, 7]);
        assert_eq!(bytes[40..44], [0xc, 0xb, 0xa, 9]);
    }
}
