//! Makes a configuration ([`hull_vmm_api::config`]) into what a VM can be built from: every limit checked, every file open.
//!
//! This is the one place that judges a configuration; behind it, everything is as it has to be.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};

use hull_vmm_api::config::{
    CachePolicy, ConsoleConfig, CpusConfig, DiskConfig, MAX_CMDLINE_BYTES, MAX_CPUS, MAX_MEMORY_MIB, MAX_NET_QUEUES,
    MIN_MEMORY_MIB, MacAddress, NetBackend, NetConfig, PmemConfig, Resource, ShareConfig, VmConfig, VsockConfig,
};

/// Longest mount tag (virtio 1.3, section 5.11.4).
const MAX_TAG_BYTES: usize = 36;
/// Longest serial number of a disk (virtio 1.3, section 5.2.6).
const MAX_SERIAL_BYTES: usize = 20;
/// Longest device name; it stands in thread names and messages.
const MAX_ID_BYTES: usize = 64;
/// Least that an interface's largest unit may be (virtio 1.3, section 5.1.4.1).
const MIN_MTU: u16 = 68;
/// Names of the devices that a VM has one of.
pub const RESERVED_IDS: [&str; 4] = ["console", "rng", "balloon", "vsock"];
/// Least context identifier of a guest (virtio 1.3, section 5.10.4): those below have fixed meanings.
const MIN_GUEST_CID: u32 = 3;

/// Why a configuration was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It is not JSON of the right form.
    #[error("the configuration is not valid: {0}")]
    Parse(#[from] serde_json::Error),
    /// A field's value is not acceptable.
    #[error("{field}: {problem}")]
    Field {
        /// The field as the configuration spells it.
        field: String,
        /// What is wrong with it.
        problem: String,
    },
    /// Something named by the configuration cannot be opened or is of the wrong kind.
    #[error("{field}: cannot use {what}: {source}")]
    Open {
        /// The field as the configuration spells it.
        field: String,
        /// The path or descriptor.
        what: String,
        /// Why not.
        source: io::Error,
    },
}

/// A whole VM, ready to be built.
pub struct Settings {
    /// Virtual CPUs.
    pub cpus: CpusConfig,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// What to boot.
    pub kernel: File,
    /// The initial RAM file system.
    pub initrd: Option<File>,
    /// The kernel's command line, with what the VMM adds to it.
    pub cmdline: String,
    /// Output and input of the console device.
    pub console: Option<(File, Option<File>)>,
    /// Output of the emulated serial port.
    pub debug_console: Option<File>,
    /// The socket device.
    pub vsock: Option<VsockSettings>,
    /// Disks there from the start.
    pub disks: Vec<DiskSettings>,
    /// Shares there from the start.
    pub shares: Vec<ShareSettings>,
    /// Files that are persistent memory.
    pub pmems: Vec<PmemSettings>,
    /// Network interfaces there from the start.
    pub nets: Vec<NetSettings>,
}

/// The socket device.
pub struct VsockSettings {
    /// The guest's context identifier.
    pub guest_cid: u32,
    /// Where host processes connect.
    pub listener: UnixListener,
    /// Ports of the host that the guest may connect to, and what it then reaches.
    pub guest_ports: Vec<(u32, UnixStream)>,
}

/// A disk.
pub struct DiskSettings {
    /// Name in control requests.
    pub id: String,
    /// The image or block device.
    pub file: File,
    /// Whether writes fail.
    pub read_only: bool,
    /// What the guest reads as the serial number.
    pub serial: Option<String>,
}

/// A share.
pub struct ShareSettings {
    /// Name in control requests.
    pub id: String,
    /// The directory.
    pub root: OwnedFd,
    /// The mount tag.
    pub tag: String,
    /// Whether every change fails.
    pub read_only: bool,
    /// What the guest may cache.
    pub cache: CachePolicy,
    /// Name of directories two levels below the root that nobody else has.
    pub private: Option<String>,
}

/// Persistent memory.
pub struct PmemSettings {
    /// Name in control requests.
    pub id: String,
    /// What is in it, at least a byte.
    pub file: File,
}

/// A network interface.
pub struct NetSettings {
    /// Name in control requests.
    pub id: String,
    /// What the descriptors are.
    pub backend: NetBackend,
    /// The tap's descriptors, one for each queue pair, or the one socket of a stream.
    pub queues: Vec<OwnedFd>,
    /// Its address.
    pub mac: MacAddress,
    /// The largest unit that the driver is told.
    pub mtu: Option<u16>,
    /// Whether the link is down at first.
    pub link_down: bool,
}

fn refuse(field: impl Into<String>, problem: impl Into<String>) -> ConfigError {
    ConfigError::Field { field: field.into(), problem: problem.into() }
}

/// Turns resources into open files, and sees to it that no descriptor is used twice.
#[derive(Default)]
pub struct Opener {
    taken: HashSet<RawFd>,
    attached: Vec<Option<OwnedFd>>,
}

impl Opener {
    /// For a control request that came with these descriptors.
    #[must_use]
    pub fn with_attached(attached: Vec<OwnedFd>) -> Self {
        Self { taken: HashSet::new(), attached: attached.into_iter().map(Some).collect() }
    }

    fn open(&mut self, field: &str, resource: Resource, options: &OpenOptions) -> Result<OwnedFd, ConfigError> {
        let failed = |what: String| move |source| ConfigError::Open { field: field.to_owned(), what, source };
        match resource {
            Resource::Path(path) => options.open(&path).map(OwnedFd::from).map_err(failed(path.display().to_string())),
            Resource::Fd(fd) => self.inherit(fd).map_err(failed(format!("descriptor {fd}"))),
            Resource::Attached(index) => self
                .attached
                .get_mut(index)
                .and_then(Option::take)
                .ok_or_else(|| refuse(field, format!("no descriptor with index {index} came with the request"))),
        }
    }

    fn inherit(&mut self, fd: RawFd) -> io::Result<OwnedFd> {
        if fd < 0 || !self.taken.insert(fd) {
            return Err(io::Error::other("it is used twice or negative"));
        }
        // SAFETY: any number may be asked about.
        if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
            return Err(io::Error::last_os_error());
        }
        if fd <= libc::STDERR_FILENO {
            // The standard descriptors stay what they are.
            // SAFETY: the descriptor is open, as was just seen.
            let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
            if copy < 0 {
                return Err(io::Error::last_os_error());
            }
            // SAFETY: the descriptor was just made, and nobody else knows it.
            return Ok(unsafe { OwnedFd::from_raw_fd(copy) });
        }
        // SAFETY: the descriptor is open, and the caller handed it to this process for this use alone; `taken` sees to
        // that it is not taken twice.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    fn reader(&mut self, field: &str, resource: Resource) -> Result<File, ConfigError> {
        self.open(field, resource, File::options().read(true)).map(File::from)
    }

    fn writer(&mut self, field: &str, resource: Resource) -> Result<File, ConfigError> {
        self.open(field, resource, File::options().append(true).create(true)).map(File::from)
    }

    /// Checks and opens a disk.
    ///
    /// # Errors
    ///
    /// When it is not acceptable.
    pub fn disk(&mut self, field: &str, disk: DiskConfig) -> Result<DiskSettings, ConfigError> {
        check_id(field, &disk.id)?;
        if disk.serial.as_ref().is_some_and(|serial| serial.len() > MAX_SERIAL_BYTES) {
            return Err(refuse(format!("{field}.serial"), format!("longer than {MAX_SERIAL_BYTES} bytes")));
        }
        let options = File::options().read(true).write(!disk.read_only).clone();
        let file = self.open(&format!("{field}.file"), disk.file, &options)?.into();
        Ok(DiskSettings { id: disk.id, file, read_only: disk.read_only, serial: disk.serial })
    }

    /// Checks and opens a share.
    ///
    /// # Errors
    ///
    /// When it is not acceptable.
    pub fn share(&mut self, field: &str, share: ShareConfig) -> Result<ShareSettings, ConfigError> {
        check_id(field, &share.id)?;
        if share.tag.is_empty() || share.tag.len() > MAX_TAG_BYTES {
            return Err(refuse(format!("{field}.tag"), format!("must have 1 to {MAX_TAG_BYTES} bytes")));
        }
        let options = File::options().read(true).custom_flags(libc::O_DIRECTORY).clone();
        let root = self.open(&format!("{field}.root"), share.root, &options)?;
        let ShareConfig { id, tag, read_only, cache, private, .. } = share;
        Ok(ShareSettings { id, root, tag, read_only, cache, private })
    }

    fn pmem(&mut self, field: &str, pmem: PmemConfig) -> Result<PmemSettings, ConfigError> {
        check_id(field, &pmem.id)?;
        let file = self.reader(&format!("{field}.file"), pmem.file)?;
        match file.metadata() {
            Ok(metadata) if metadata.is_file() && metadata.len() > 0 => Ok(PmemSettings { id: pmem.id, file }),
            _ => Err(refuse(format!("{field}.file"), "must be a regular file that is not empty")),
        }
    }

    /// Checks a network interface and takes its descriptors.
    ///
    /// # Errors
    ///
    /// When it is not acceptable.
    pub fn net(&mut self, field: &str, net: NetConfig) -> Result<NetSettings, ConfigError> {
        check_id(field, &net.id)?;
        if net.queues.is_empty() || net.queues.len() > MAX_NET_QUEUES {
            return Err(refuse(format!("{field}.queues"), format!("must be 1 to {MAX_NET_QUEUES} descriptors")));
        }
        if net.backend == NetBackend::Stream && net.queues.len() != 1 {
            return Err(refuse(format!("{field}.queues"), "a stream has one socket"));
        }
        if net.mtu.is_some_and(|mtu| mtu < MIN_MTU) {
            return Err(refuse(format!("{field}.mtu"), format!("must be {MIN_MTU} or more")));
        }
        let mut queues = Vec::new();
        for (index, queue) in net.queues.into_iter().enumerate() {
            let field = format!("{field}.queues[{index}]");
            if matches!(queue, Resource::Path(_)) {
                return Err(refuse(field, "must be a descriptor"));
            }
            queues.push(self.open(&field, queue, &OpenOptions::new())?);
        }
        let NetConfig { id, backend, mac, mtu, link_down, .. } = net;
        Ok(NetSettings { id, backend, queues, mac, mtu, link_down })
    }

    fn console(&mut self, console: ConsoleConfig) -> Result<(File, Option<File>), ConfigError> {
        // A terminal is often both.
        let same = console.input.as_ref() == Some(&console.output);
        let output = self.writer("console.output", console.output)?;
        let input = match console.input {
            Some(_) if same => {
                let copy = output.try_clone();
                Some(copy.map_err(|source| ConfigError::Open {
                    field: "console.input".to_owned(),
                    what: format!("descriptor {}", output.as_raw_fd()),
                    source,
                })?)
            }
            Some(input) => Some(self.reader("console.input", input)?),
            None => None,
        };
        Ok((output, input))
    }

    fn vsock(&mut self, vsock: VsockConfig) -> Result<VsockSettings, ConfigError> {
        if vsock.guest_cid < MIN_GUEST_CID || vsock.guest_cid == u32::MAX {
            return Err(refuse("vsock.guest_cid", format!("must be from {MIN_GUEST_CID} to {}", u32::MAX - 1)));
        }
        let field = "vsock.listener";
        let listener = match vsock.listener {
            Resource::Path(path) => UnixListener::bind(&path).map_err(|source| ConfigError::Open {
                field: field.to_owned(),
                what: path.display().to_string(),
                source,
            })?,
            other => UnixListener::from(self.open(field, other, &OpenOptions::new())?),
        };
        let mut guest_ports: Vec<(u32, UnixStream)> = Vec::new();
        for (index, port) in vsock.guest_ports.into_iter().enumerate() {
            let field = format!("vsock.guest_ports[{index}]");
            if guest_ports.iter().any(|(other, _)| *other == port.port) {
                return Err(refuse(field, format!("port {} is there twice", port.port)));
            }
            if matches!(port.stream, Resource::Path(_)) {
                return Err(refuse(field, "the stream must be a descriptor"));
            }
            guest_ports.push((port.port, self.open(&field, port.stream, &OpenOptions::new())?.into()));
        }
        Ok(VsockSettings { guest_cid: vsock.guest_cid, listener, guest_ports })
    }
}

fn check_id(field: &str, id: &str) -> Result<(), ConfigError> {
    let valid = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | ':');
    let problem = if id.is_empty() || id.len() > MAX_ID_BYTES || !id.chars().all(valid) {
        format!("must have 1 to {MAX_ID_BYTES} letters, digits, and any of \"-_.:\"")
    } else if RESERVED_IDS.contains(&id) {
        format!("\"{id}\" is the name of a device that every VM may have")
    } else {
        return Ok(());
    };
    Err(refuse(format!("{field}.id"), problem))
}

impl Settings {
    /// Reads a configuration from JSON.
    ///
    /// # Errors
    ///
    /// When it is not of the right form, a value is out of its limits, or a file cannot be opened.
    pub fn parse(json: &[u8]) -> Result<Self, ConfigError> {
        Self::check(serde_json::from_slice(json)?)
    }

    /// Checks a configuration and opens what it names.
    ///
    /// # Errors
    ///
    /// When a value is out of its limits, or a file cannot be opened.
    pub fn check(config: VmConfig) -> Result<Self, ConfigError> {
        let CpusConfig { boot, max } = config.cpus;
        if max == 0 || max > MAX_CPUS {
            return Err(refuse("cpus.max", format!("must be from 1 to {MAX_CPUS}")));
        }
        if boot == 0 || boot > max {
            return Err(refuse("cpus.boot", format!("must be from 1 to cpus.max, {max}")));
        }
        let memory_mib = config.memory.size_mib;
        if !(MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&memory_mib) {
            return Err(refuse("memory.size_mib", format!("must be from {MIN_MEMORY_MIB} to {MAX_MEMORY_MIB}")));
        }
        let cmdline = complete_cmdline(config.boot.cmdline, config.cpus)?;
        let mut opener = Opener::default();
        let kernel = opener.reader("boot.kernel", config.boot.kernel)?;
        let initrd = config.boot.initrd.map(|initrd| opener.reader("boot.initrd", initrd)).transpose()?;
        let console = config.console.map(|console| opener.console(console)).transpose()?;
        let debug_console = config.debug_console.map(|out| opener.writer("debug_console", out)).transpose()?;
        let vsock = config.vsock.map(|vsock| opener.vsock(vsock)).transpose()?;
        let mut ids = HashSet::new();
        let mut disks = Vec::new();
        for (index, disk) in config.disks.into_iter().enumerate() {
            disks.push(opener.disk(&format!("disks[{index}]"), disk)?);
        }
        let mut shares = Vec::new();
        for (index, share) in config.shares.into_iter().enumerate() {
            shares.push(opener.share(&format!("shares[{index}]"), share)?);
        }
        let mut pmems = Vec::new();
        for (index, pmem) in config.pmems.into_iter().enumerate() {
            pmems.push(opener.pmem(&format!("pmems[{index}]"), pmem)?);
        }
        let mut nets = Vec::new();
        for (index, net) in config.nets.into_iter().enumerate() {
            nets.push(opener.net(&format!("nets[{index}]"), net)?);
        }
        let all = disks.iter().map(|disk| &disk.id).chain(shares.iter().map(|share| &share.id));
        let all = all.chain(pmems.iter().map(|pmem| &pmem.id)).chain(nets.iter().map(|net| &net.id));
        if let Some(twice) = all.into_iter().find(|id| !ids.insert(id.as_str())) {
            return Err(refuse("disks, shares, pmems, nets", format!("the name \"{twice}\" is there twice")));
        }
        Ok(Self {
            cpus: config.cpus,
            memory_mib,
            kernel,
            initrd,
            cmdline,
            console,
            debug_console,
            vsock,
            disks,
            shares,
            pmems,
            nets,
        })
    }
}

/// Adds what the kernel must know of the VM beyond its tables: how many of the processors to start by itself.
fn complete_cmdline(mut cmdline: String, cpus: CpusConfig) -> Result<String, ConfigError> {
    if cpus.boot < cpus.max {
        cmdline = format!("{cmdline} maxcpus={}", cpus.boot);
    }
    if cmdline.len() >= MAX_CMDLINE_BYTES {
        let problem = format!("has {} bytes with what the VMM adds; {} fit", cmdline.len(), MAX_CMDLINE_BYTES - 1);
        return Err(refuse("boot.cmdline", problem));
    }
    if cmdline.contains('\0') {
        return Err(refuse("boot.cmdline", "contains a zero byte"));
    }
    Ok(cmdline)
}

#[cfg(test)]
mod tests {
    use std::os::fd::IntoRawFd;

    use super::*;

    fn config(change: impl FnOnce(&mut serde_json::Value)) -> Result<Settings, ConfigError> {
        let mut json = serde_json::json!({
            "cpus": {"boot": 1, "max": 2},
            "memory": {"size_mib": 128},
            "boot": {"kernel": {"path": "/dev/null"}, "cmdline": "quiet"},
        });
        change(&mut json);
        Settings::parse(json.to_string().as_bytes())
    }

    fn problem(change: impl FnOnce(&mut serde_json::Value)) -> String {
        config(change).err().expect("the configuration should be refused").to_string()
    }

    #[test]
    fn a_small_configuration_is_accepted_and_completed() {
        let settings = config(|_| {}).unwrap();
        assert_eq!(settings.cmdline, "quiet maxcpus=1");
        assert_eq!(config(|json| json["cpus"]["boot"] = 2.into()).unwrap().cmdline, "quiet");
    }

    #[test]
    fn values_out_of_their_limits_are_refused_by_name() {
        assert!(problem(|json| json["cpus"]["max"] = 65.into()).starts_with("cpus.max: "));
        assert!(problem(|json| json["cpus"]["boot"] = 3.into()).starts_with("cpus.boot: "));
        assert!(problem(|json| json["memory"]["size_mib"] = 16.into()).starts_with("memory.size_mib: "));
        assert!(problem(|json| json["boot"]["cmdline"] = "x".repeat(2048).into()).starts_with("boot.cmdline: "));
        assert!(problem(|json| json["unknown"] = 1.into()).contains("unknown field `unknown`"));
        assert!(problem(|json| json["boot"]["kernel"] = serde_json::json!({"path": "/nowhere"})).contains("/nowhere"));
        assert!(problem(|json| json["boot"]["kernel"] = serde_json::json!({"fd": 9999})).contains("descriptor 9999"));
        assert!(problem(|json| json["boot"]["kernel"] = serde_json::json!({"attached": 0})).contains("index 0"));
    }

    #[test]
    fn devices_need_names_of_their_own() {
        let share = |id: &str| serde_json::json!({"id": id, "tag": "t", "root": {"path": "/"}});
        assert!(problem(|json| json["shares"] = serde_json::json!([share("a"), share("a")])).contains("\"a\""));
        for id in RESERVED_IDS {
            assert!(problem(|json| json["shares"] = serde_json::json!([share(id)])).contains(id));
        }
        assert!(problem(|json| json["shares"] = serde_json::json!([share("")])).starts_with("shares[0].id"));
        assert_eq!(config(|json| json["shares"] = serde_json::json!([share("a")])).unwrap().shares.len(), 1);
    }

    #[test]
    fn persistent_memory_is_a_file_with_something_in_it() {
        let pmem = |path: &str| serde_json::json!([{"id": "image", "file": {"path": path}}]);
        for bad in ["/dev/zero", "/proc/self/maps", "/"] {
            assert!(problem(|json| json["pmems"] = pmem(bad)).starts_with("pmems[0].file: "), "{bad}");
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&file, "x").unwrap();
        let path = file.path().to_str().unwrap();
        assert_eq!(config(|json| json["pmems"] = pmem(path)).unwrap().pmems.len(), 1);
    }

    #[test]
    fn interfaces_are_descriptors_with_an_address() {
        let net = |change: fn(&mut serde_json::Value)| {
            let mut net = serde_json::json!({"id": "eth0", "queues": [{"fd": 9999}], "mac": "02:00:00:00:00:01"});
            change(&mut net);
            problem(|json| json["nets"] = serde_json::json!([net]))
        };
        assert!(net(|_| {}).starts_with("nets[0].queues[0]: cannot use descriptor 9999"));
        assert!(net(|net| net["mac"] = "03:00:00:00:00:01".into()).contains("03:00:00:00:00:01"));
        assert!(net(|net| net["mtu"] = 67.into()).starts_with("nets[0].mtu: "));
        assert!(net(|net| net["queues"] = serde_json::json!([])).starts_with("nets[0].queues: "));
        assert!(net(|net| net["queues"] = serde_json::json!([{"path": "/dev/net/tun"}])).contains("a descriptor"));
        assert!(
            net(|net| {
                net["backend"] = "stream".into();
                net["queues"] = serde_json::json!([{"fd": 9998}, {"fd": 9999}]);
            })
            .contains("one socket")
        );
        assert!(net(|net| net["backend"] = "vde".into()).contains("unknown variant `vde`"));
        assert!(net(|net| net["vlan"] = 1.into()).contains("unknown field `vlan`"));
    }

    #[test]
    fn a_descriptor_is_taken_once() {
        let fd = File::open("/dev/null").unwrap().into_raw_fd();
        let text = problem(|json| {
            json["boot"]["kernel"] = serde_json::json!({"fd": fd});
            json["boot"]["initrd"] = serde_json::json!({"fd": fd});
        });
        assert!(text.starts_with("boot.initrd: ") && text.contains("twice"), "{text}");
    }
}
