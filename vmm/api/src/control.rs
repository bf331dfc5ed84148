//! The control protocol: one JSON object a line each way over a Unix stream socket.
//!
//! The socket named by `--control-fd` listens; the VMM serves any number of clients on it, each answered in order. The
//! descriptors that a request refers to by [`Resource::Attached`](crate::config::Resource::Attached) travel with the
//! request's first byte as `SCM_RIGHTS`. A line longer than [`MAX_LINE_BYTES`] ends the connection.

use serde::{Deserialize, Serialize};

use crate::config::{DiskConfig, NetConfig, ShareConfig};

/// Longest line, in bytes, that either side accepts.
pub const MAX_LINE_BYTES: usize = 64 * 1024;

/// What a client asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// The VM's state and devices; answered by [`Response::Status`].
    Status,
    /// Stops all vCPUs; a VM that is paused stays so.
    Pause,
    /// Lets all vCPUs go on.
    Resume,
    /// Puts a disk on the PCI bus; the guest finds it when it rescans the bus.
    AddDisk(DiskConfig),
    /// Puts a share on the PCI bus; the guest finds it when it rescans the bus.
    AddShare(ShareConfig),
    /// Puts a network interface on the PCI bus; the guest finds it when it rescans the bus.
    AddNet(NetConfig),
    /// Takes a device that was added, or was there from the start, off the bus. The guest must have let go of it. A disk that it has not let
    /// go of is without its file from now on, answers each request with an error, and leaves the bus once the guest has and another device comes or goes; another device
    /// is gone from under its driver, which may wait for it for ever.
    RemoveDevice {
        /// The device's name.
        id: String,
    },
    /// Has a disk take over the size that its file or device has now, which may be more than before and not less. The guest
    /// is told.
    ResizeDisk {
        /// The disk's name.
        id: String,
    },
    /// Has the guest see an interface's link come up or go down. Packets are carried either way.
    SetLink {
        /// The interface's name.
        id: String,
        /// Whether it is up.
        up: bool,
    },
    /// Ends the VM.
    Stop {
        /// Whether to end at once, rather than after the devices have written back what the guest gave them.
        hard: bool,
    },
    /// What the VM has done since it started; answered by [`Response::Counters`].
    Counters,
}

/// What the VMM answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "result", rename_all = "snake_case")]
pub enum Response {
    /// Done.
    Ok,
    /// Done; a device now stands at this place on the bus.
    Added {
        /// PCI address as Linux writes it: `0000:00:05.0`.
        pci_address: String,
    },
    /// Done; the disk has this size.
    Resized {
        /// In bytes, whole logical blocks.
        size_bytes: u64,
    },
    /// Answer to [`Request::Status`].
    Status(Status),
    /// Answer to [`Request::Counters`].
    Counters(Counters),
    /// Not done; nothing has changed.
    Error {
        /// Cause and remedy.
        message: String,
    },
}

/// The VM as it stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Whether its vCPUs run.
    pub state: State,
    /// vCPUs that exist.
    pub cpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// Its devices, in the order of their places on the bus.
    pub devices: Vec<Device>,
}

/// Whether a VM's vCPUs run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// They run.
    Running,
    /// They stand still.
    Paused,
}

/// One device on the bus.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Its name.
    pub id: String,
    /// Its virtio kind: `block`, `fs`, `net`, `vsock`, `console`, `rng`, `balloon`.
    pub kind: String,
    /// PCI address as Linux writes it.
    pub pci_address: String,
}

/// What a VM has done since it started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Returns of `KVM_RUN` to the VMM, by reason and over all vCPUs.
    pub exits: std::collections::BTreeMap<String, u64>,
    /// Requests or packets that each device has completed.
    pub devices: std::collections::BTreeMap<String, u64>,
    /// What devices count beside that, by device and name: of an interface `rx_packets`, `rx_bytes`, `rx_dropped` (what
    /// the guest received) and the same with `tx_` (what it sent).
    #[serde(default, skip_serializing_if = "std::collections::BTreeMap::is_empty")]
    pub details: std::collections::BTreeMap<String, std::collections::BTreeMap<String, u64>>,
    /// Bytes of guest memory that are resident on the host.
    pub guest_resident_bytes: u64,
}
