//! What the sandbox library on the host and the agent in the guest say to each other.
//!
//! [`agent`] holds the messages and [`agent_ttrpc`] the services of `proto/agent.proto`, generated at build. The rest
//! is what a schema cannot say: ports, the version, and the caps that each side puts on the other.
#![deny(unsafe_code)]

pub mod user;

/// Version of the protocol. Sides with equal majors understand each other; a minor only adds.
pub const VERSION: (u32, u32) = (1, 9);

/// The vsock port on which the agent serves ttrpc.
pub const AGENT_PORT: u32 = 1024;
/// The vsock port on which the agent takes the connections of standard streams.
pub const STREAM_PORT: u32 = 1025;
/// The host's vsock port to which the agent connects once it serves the two others. It writes [`READY_GREETING`] and
/// closes; the host waits for that instead of trying the agent's ports over and over.
pub const READY_PORT: u32 = 1026;
/// What the agent writes to [`READY_PORT`].
pub const READY_GREETING: &[u8] = b"hull-agent ready\n";

/// The vsock port on which the agent takes connections for ports of the guest's loopback interface. The host writes the
/// family that its client used (4 or 6), [`FORWARD_TCP`] or [`FORWARD_UDP`] and the port in network order, and reads one byte:
/// [`FORWARD_CONNECTED`] or [`FORWARD_REFUSED`]. Since 1.1.
pub const FORWARD_PORT: u32 = 1027;
/// A connection of the guest's is wanted.
pub const FORWARD_TCP: u8 = 0;
/// A socket for datagrams is wanted. Since 1.4.
pub const FORWARD_UDP: u8 = 1;
/// From here on the connection is that to the guest's listener; or each way a row of datagrams, each behind its length,
/// 16 bits in network order.
pub const FORWARD_CONNECTED: u8 = 0;
/// Nobody listens there.
pub const FORWARD_REFUSED: u8 = 1;

/// Bytes of a stream's token, the first that the host sends on it.
pub const STREAM_TOKEN_BYTES: usize = 16;
/// Most bytes of files that one request may carry: a message holds 4 MiB with all that is around them.
pub const MAX_FILES_BYTES: usize = 3 << 20;
/// Longest container or exec identifier, in bytes (containerd allows 76).
pub const MAX_ID_BYTES: usize = 128;
/// Most entropy, in bytes, that one request may carry.
pub const MAX_ENTROPY_BYTES: usize = 512;

/// The kernel's name, by tag, of the share with everything that the sandbox library prepares for its containers.
pub const SHARE_TAG: &str = "hull";
/// Where the guest has file systems of single containers that hold files of the host's, and what they have of volumes in memory:
/// `CONTAINER/N` below it.
pub const FILES_DIRECTORY: &str = "/run/hull/files";
/// Where the guest has the roots of containers that it mounts itself, and what they are made of: `CONTAINER/NAME` below it.
pub const ROOTS_DIRECTORY: &str = "/run/hull/roots";
/// Where the guest mounts that share.
pub const SHARE_MOUNT_POINT: &str = "/run/hull/shared";

pub use generated::{agent, agent_ttrpc};

#[allow(missing_docs, clippy::all, clippy::pedantic, unused, unreachable_pub, rustdoc::all)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/generated.rs"));
}
