//! The life of a sandbox on the host: one VMM process, the agent in its guest, and what the two need from the host.
//!
//! A sandbox goes through typed phases, each consuming the one before:
//!
//! ```text
//! Configured ──start──▶ Booting ──ready──▶ Running ──stop──▶ gone, or kept as a record
//!     checked, has          VMM runs,          agent answers,
//!     a directory           guest boots        containers come and go
//! ```
//!
//! The process that holds a phase is the sandbox's owner. It holds the lock file in the sandbox's directory for as long as it
//! lives, and the writing end of a pipe that the VMM watches: when the owner dies, however it dies, the VMM ends, the
//! mounts vanish with the owner's mount namespace, and the next process that looks at the state directory sweeps the
//! rest away ([`registry`]).
//!
//! What other processes need is in the directory: [`registry::Record`] and two sockets, so `exec`, `kill` or `stats` work
//! without a daemon.
//!
//! The guest is hostile, and what the agent says comes from there: texts are capped and stripped of control characters
//! before a person sees them, and nothing it says is used as a path or a size on the host.
#![forbid(unsafe_code)]

pub mod agent;
pub mod bare;
mod broker;
pub mod cgroup;
pub mod config;
mod console;
pub mod container;
pub mod control;
pub mod disks;
pub mod ext4;
pub mod host;
pub mod mount;
pub mod network;
mod read_only;
pub mod registry;
pub mod root;
pub mod sandbox;
pub mod share;
pub mod superblock;
mod turn;
pub mod vmm;
pub mod vsock;

pub use hull_protocol::user;
