//! What a virtual machine is made of.
//!
//! The VMM checks a configuration once, when it reads it, and refuses unknown fields. All file-like things are
//! [`Resource`]s, so that a jailed VMM needs to open nothing.

use std::os::fd::RawFd;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Most virtual CPUs that one VM may have.
pub const MAX_CPUS: u8 = 64;
/// Least guest memory, in MiB, that the supported kernel boots in.
pub const MIN_MEMORY_MIB: u64 = 32;
/// Most guest memory, in MiB: 512 GiB.
pub const MAX_MEMORY_MIB: u64 = 512 * 1024;
/// Longest kernel command line, in bytes, with its terminating zero (`COMMAND_LINE_SIZE` of Linux on x86_64).
pub const MAX_CMDLINE_BYTES: usize = 2048;

/// Most queue pairs of a network interface.
pub const MAX_NET_QUEUES: usize = 8;

/// A file, device or socket that the VMM uses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Resource {
    /// A descriptor that the caller opened and the VMM inherited.
    Fd(RawFd),
    /// A path that the VMM opens itself; for use by hand, since a jailed VMM sees none.
    Path(PathBuf),
    /// In a control request only: the descriptor at this index among those sent with the request (`SCM_RIGHTS`).
    Attached(usize),
}

/// A whole virtual machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// Virtual CPUs.
    pub cpus: CpusConfig,
    /// Guest memory.
    pub memory: MemoryConfig,
    /// What the VM boots.
    pub boot: BootConfig,
    /// The virtio console (`hvc0` in the guest).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console: Option<ConsoleConfig>,
    /// Where the output of an emulated 16550 (`ttyS0`) goes; absent, the guest has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub debug_console: Option<Resource>,
    /// The socket device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockConfig>,
    /// Directories that the guest sees through virtio-fs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shares: Vec<ShareConfig>,
    /// Files and block devices that the guest sees through virtio-blk.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskConfig>,
    /// Files that the guest sees as persistent memory, and reads where they lie in the host's page cache.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pmems: Vec<PmemConfig>,
    /// Taps of the host that the guest sees as network interfaces.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nets: Vec<NetConfig>,
}

/// Virtual CPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpusConfig {
    /// CPUs that the guest starts with, 1 to `max`.
    pub boot: u8,
    /// CPUs that exist in all, at most [`MAX_CPUS`]; those beyond `boot` wait for the guest to bring them online.
    pub max: u8,
}

/// Guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryConfig {
    /// Memory at boot, in MiB, from [`MIN_MEMORY_MIB`] to [`MAX_MEMORY_MIB`].
    pub size_mib: u64,
}

/// What the VM boots: a kernel entered directly in 64-bit mode.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootConfig {
    /// An uncompressed ELF `vmlinux`.
    pub kernel: Resource,
    /// An initial RAM file system in any form that the kernel unpacks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<Resource>,
    /// The kernel's command line, at most [`MAX_CMDLINE_BYTES`] with its terminating zero.
    pub cmdline: String,
}

/// The virtio console.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConsoleConfig {
    /// Where the guest's output goes. Output is dropped, never blocks the guest, while this cannot take more.
    pub output: Resource,
    /// Where the guest's input comes from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input: Option<Resource>,
}

/// The socket device: host processes reach `AF_VSOCK` listeners in the guest through one Unix stream socket.
///
/// A client connects, writes `CONNECT <port>\n`, reads `OK <host port>\n` (or finds the connection closed when nothing
/// listens on that port) and has a byte stream to the guest from then on. The guest can open connections to the host
/// only where [`GuestPort`] lets it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's context identifier, 3 or more.
    pub guest_cid: u32,
    /// The listening Unix stream socket, or with [`Resource::Path`] where to make it.
    pub listener: Resource,
    /// Ports of the host (context identifier 2) that the guest may connect to.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub guest_ports: Vec<GuestPort>,
}

/// A port of the host that the guest may connect to, once: that is how a guest tells that it is ready.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestPort {
    /// The port on the host's side.
    pub port: u32,
    /// A connected Unix stream socket, which becomes the host's end of the guest's first connection to that port;
    /// further connections are refused.
    pub stream: Resource,
}

/// A directory that the guest sees through virtio-fs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShareConfig {
    /// Name of the device in control requests, unique in the VM.
    pub id: String,
    /// The mount tag, 1 to 36 bytes (virtio 1.3, section 5.11.4).
    pub tag: String,
    /// The directory.
    pub root: Resource,
    /// Whether every change fails with `EROFS`.
    #[serde(default)]
    pub read_only: bool,
    /// What the guest may cache.
    #[serde(default)]
    pub cache: CachePolicy,
    /// What directories two levels below the root are called that nobody else has: locks on files in them are the guest's own affair.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub private: Option<String>,
}

/// What a guest may cache of a share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CachePolicy {
    /// Nothing: for directories that host and guest both change and that must stay coherent at once.
    Never,
    /// For about a second, and file contents until they are opened anew.
    #[default]
    Auto,
    /// Without limit: for directories that nobody changes on the host.
    Always,
}

/// A file or block device that the guest sees through virtio-blk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// Name of the device in control requests, unique in the VM.
    pub id: String,
    /// A raw image or a block device. A descriptor that was opened with `O_DIRECT` goes past the host's page cache.
    pub file: Resource,
    /// Whether writes fail.
    #[serde(default)]
    pub read_only: bool,
    /// What the guest reads as the disk's serial number, at most 20 bytes (virtio 1.3, section 5.2.6).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
}

/// A file that the guest sees as persistent memory through virtio-pmem, always read-only.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PmemConfig {
    /// Name of the device in control requests, unique in the VM.
    pub id: String,
    /// The file, which nobody may change or shorten while the VM lives.
    pub file: Resource,
}

/// A network interface of the guest through virtio-net, whose other end is a tap of the host, or a program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// Name of the device in control requests, unique in the VM.
    pub id: String,
    /// What the descriptors are.
    #[serde(default)]
    pub backend: NetBackend,
    /// Of a tap: descriptors of `/dev/net/tun`, attached to one tap that was made with `IFF_TAP`, `IFF_NO_PI` and
    /// `IFF_VNET_HDR`: a queue pair each, 1 to [`MAX_NET_QUEUES`]; of more than one with `IFF_MULTI_QUEUE`. Of a stream: its
    /// socket, and nothing else. Never a path.
    pub queues: Vec<Resource>,
    /// The interface's address in the guest.
    pub mac: MacAddress,
    /// The largest unit in bytes, 68 or more, which the guest's driver takes over; absent, it is told none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Whether the link is down at first, until [`SetLink`](crate::control::Request::SetLink) says otherwise.
    #[serde(default)]
    pub link_down: bool,
}

/// What carries an interface's packets on the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NetBackend {
    /// A tap.
    #[default]
    Tap,
    /// A program behind a connected Unix stream socket, such as passt: each packet has its length before it, 32 bits in
    /// network order, and no virtio header.
    Stream,
}

/// The address of one Ethernet interface, not of a group; written `02:00:00:00:00:01`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct MacAddress([u8; 6]);

/// Something that is not the address of an interface.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} is not the address of an interface: write six bytes such as 02:00:00:00:00:01, the first one even")]
pub struct NotAMacAddress(String);

impl MacAddress {
    /// Its bytes in the order in which they are sent.
    #[must_use]
    pub fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl std::fmt::Display for MacAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl TryFrom<[u8; 6]> for MacAddress {
    type Error = NotAMacAddress;

    fn try_from(bytes: [u8; 6]) -> Result<Self, NotAMacAddress> {
        let address = Self(bytes);
        // Bit 0 of the first byte marks the address of a group.
        if bytes[0] & 1 != 0 || bytes == [0; 6] { Err(NotAMacAddress(address.to_string())) } else { Ok(address) }
    }
}

impl TryFrom<String> for MacAddress {
    type Error = NotAMacAddress;

    fn try_from(text: String) -> Result<Self, NotAMacAddress> {
        text.parse()
    }
}

impl std::str::FromStr for MacAddress {
    type Err = NotAMacAddress;

    fn from_str(text: &str) -> Result<Self, NotAMacAddress> {
        let byte = |part: &str| match part.len() {
            2 if part.bytes().all(|digit| digit.is_ascii_hexdigit()) => u8::from_str_radix(part, 16).ok(),
            _ => None,
        };
        let bytes: Option<Vec<u8>> = text.split(':').map(byte).collect();
        bytes
            .and_then(|bytes| <[u8; 6]>::try_from(bytes).ok())
            .and_then(|bytes| Self::try_from(bytes).ok())
            .ok_or_else(|| NotAMacAddress(text.to_owned()))
    }
}

impl From<MacAddress> for String {
    fn from(address: MacAddress) -> Self {
        address.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_interfaces_are_read_and_written() {
        let address: MacAddress = "02:00:5E:00:53:0a".parse().unwrap();
        assert_eq!(address.bytes(), [2, 0, 0x5e, 0, 0x53, 10]);
        assert_eq!(address.to_string(), "02:00:5e:00:53:0a");
        for bad in
            ["", "02:00:00:00:00", "02:00:00:00:00:00:01", "2:0:0:0:0:1", "+2:00:00:00:00:01", "01:00:00:00:00:01"]
        {
            assert!(bad.parse::<MacAddress>().is_err(), "{bad}");
        }
        assert!("00:00:00:00:00:00".parse::<MacAddress>().is_err());
    }
}
