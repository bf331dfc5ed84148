//! Block devices and files of the host that a sandbox's guest has as disks, put on its bus while it runs.
//!
//! Containers that use one of them share one disk, and with it the guest's cache of it, unless one that writes comes after one that only
//! reads. The last of them that goes takes the disk
//! along: the guest lets go of it, the VMM takes it off the bus, and nobody has the host's device open any more.

mod growth;

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use hull_protocol::agent::{AddDeviceRequest, RemoveDeviceRequest};
use hull_vmm_api::config::{DiskConfig, Resource};
use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use rustix::io::Errno;

use crate::agent::{Agent, AgentError, answer, long, short};
use crate::control::{Control, ControlError, Request, Response};
use crate::read_only;
use growth::Growth;

/// A block device of the host by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HostDevice {
    /// The device's major number.
    pub major: u32,
    /// The device's minor number.
    pub minor: u32,
    /// Whether the guest can write to it: enforced on the host.
    pub read_only: bool,
}

/// The number of a block device in the guest, as the guest says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestDevice {
    /// Its node in the guest.
    pub path: String,
    /// The device's major number.
    pub major: u32,
    /// The device's minor number.
    pub minor: u32,
}

impl std::fmt::Display for HostDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// Whether what a disk holds is also in the host's page cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DiskCache {
    /// It is: what guests share is read once, what is written goes to the disk when the guest flushes or the host sees fit.
    #[default]
    Writeback,
    /// It is not (`O_DIRECT`): the guest's own cache is the only one.
    None,
}

/// A raw file or block device that a guest has as a disk from its start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskFile {
    /// The file or device.
    pub path: PathBuf,
    /// Whether the guest can write to it: enforced on the host.
    pub read_only: bool,
    /// Whether the host caches it.
    pub cache: DiskCache,
    /// What the guest reads as its serial number.
    pub serial: Option<String>,
}

impl DiskFile {
    pub(crate) fn open(&self) -> Result<OwnedFd, DiskError> {
        let disk = || self.path.display().to_string();
        open_disk(&self.path, self.read_only, self.cache.flags())
            .map_err(|source| match self.cache {
                DiskCache::None if is_not_direct(&source) => DiskError::NotDirect { disk: disk() },
                _ => DiskError::Open { disk: disk(), source },
            })
            .map(OwnedFd::from)
    }
}

/// Opens a disk for a VMM, which can write to one that is read-only in no way.
fn open_disk(path: &Path, read_only: bool, flags: OFlags) -> io::Result<File> {
    if read_only {
        return read_only::open(path, flags).map(File::from);
    }
    Ok(rustix::fs::open(path, flags | OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?.into())
}

impl DiskCache {
    fn flags(self) -> OFlags {
        match self {
            Self::Writeback => OFlags::empty(),
            Self::None => OFlags::DIRECT,
        }
    }
}

/// What open(2) says of a file system that has no `O_DIRECT`.
fn is_not_direct(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::INVAL.raw_os_error())
}

/// A disk that did not come or go.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The host's device or file.
    #[error("the disk {disk} cannot be opened: {source}; it must exist on the node")]
    Open {
        /// Which.
        disk: String,
        /// Why not.
        source: io::Error,
    },
    /// The file system has no `O_DIRECT`.
    #[error(
        "the disk {disk} cannot go without the host's page cache: its file system has no O_DIRECT; leave out cache=none, or move it to \
         another file system such as ext4 or xfs"
    )]
    NotDirect {
        /// Which.
        disk: String,
    },
    /// Somebody else writes to it, or this one would while somebody else reads.
    #[error("the disk {disk} is in use, by another sandbox or by a mount of the node; end that first, or use a copy")]
    InUse {
        /// Which.
        disk: String,
    },
    /// The VMM.
    #[error("the disk {disk} cannot be given to the guest: {source}")]
    Control {
        /// Which.
        disk: String,
        /// Why not.
        source: ControlError,
    },
    /// The guest.
    #[error("the guest does not take the disk {disk}: {source}")]
    Agent {
        /// Which.
        disk: String,
        /// Why not.
        source: AgentError,
    },
}

/// What the VMM calls a disk that is there from the start.
#[must_use]
pub fn disk_name(index: usize) -> String {
    format!("disk{index}")
}

/// The disks of a sandbox.
#[derive(Debug)]
pub struct Disks {
    control: PathBuf,
    /// How many there have been, for their names.
    made: u64,
    by_backing: HashMap<Backing, Added>,
    /// Of the devices that containers ask for.
    device_cache: DiskCache,
    growth: Growth,
}

/// What is behind a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Backing {
    Device(HostDevice),
    File { device: u64, inode: u64, read_only: bool },
}

/// What is behind a disk, open.
#[derive(Debug)]
pub(crate) struct Opened {
    /// For messages.
    name: String,
    backing: Backing,
    file: OwnedFd,
    read_only: bool,
}

#[derive(Debug)]
struct Added {
    id: String,
    pci_address: String,
    guest: GuestDevice,
    /// The containers that use it.
    users: HashSet<String>,
}

impl Disks {
    /// No disks yet, of the VMM whose control socket is at `control`.
    #[must_use]
    pub fn new(control: PathBuf) -> Self {
        let growth = Growth::new(control.clone());
        Self { control, made: 0, by_backing: HashMap::new(), device_cache: DiskCache::default(), growth }
    }

    /// Has the host cache the devices that containers ask for, or not.
    #[must_use]
    pub fn with_device_cache(self, device_cache: DiskCache) -> Self {
        Self { device_cache, ..self }
    }

    /// Has disks that the guest has from its start grow with their devices, where they are devices. In a tokio runtime.
    pub(crate) fn follow(&mut self, disks: &[DiskFile]) {
        for (index, disk) in disks.iter().enumerate() {
            match std::fs::metadata(&disk.path) {
                Ok(metadata) if metadata.file_type().is_block_device() => {
                    let number = metadata.rdev();
                    self.growth.watch(&disk_name(index), (rustix::fs::major(number), rustix::fs::minor(number)));
                }
                _ => {}
            }
        }
    }

    /// Has a device in the guest for a container and says which one it is there.
    ///
    /// # Errors
    ///
    /// Fails where the host has no such block device, or VMM or guest refuse it.
    pub async fn add(&mut self, agent: &Agent, container: &str, device: HostDevice) -> Result<GuestDevice, DiskError> {
        // Who only reads is to see what others write, and two disks would have two caches in the guest.
        let writable = Backing::Device(HostDevice { read_only: false, ..device });
        let known = if self.by_backing.contains_key(&writable) { writable } else { Backing::Device(device) };
        if let Some(added) = self.by_backing.get_mut(&known) {
            added.users.insert(container.to_owned());
            return Ok(added.guest.clone());
        }
        let opened = open(device, self.device_cache);
        let (file, read_only) = opened.map_err(|source| DiskError::Open { disk: device.to_string(), source })?;
        let opened = Opened { name: device.to_string(), backing: Backing::Device(device), file, read_only };
        self.plug(agent, container, opened).await.map(|added| added.guest.clone())
    }

    /// Has what is open in the guest for a container and says at which address of the bus.
    ///
    /// # Errors
    ///
    /// Fails where VMM or guest refuse it.
    pub(crate) async fn add_opened(
        &mut self,
        agent: &Agent,
        container: &str,
        opened: Opened,
    ) -> Result<String, DiskError> {
        if let Some(added) = self.by_backing.get_mut(&opened.backing) {
            added.users.insert(container.to_owned());
            return Ok(added.pci_address.clone());
        }
        self.plug(agent, container, opened).await.map(|added| added.pci_address.clone())
    }

    async fn plug(&mut self, agent: &Agent, container: &str, opened: Opened) -> Result<&Added, DiskError> {
        let Opened { name: disk, backing, file, read_only } = opened;
        // Those that were there from the start are called disk0 and so on.
        let id = format!("added{}", self.made);
        self.made += 1;
        let config = DiskConfig { id: id.clone(), file: Resource::Attached(0), read_only, serial: None };
        if let Backing::Device(HostDevice { major, minor, .. }) = backing {
            self.growth.watch(&id, (major, minor));
        }
        let pci_address = match self.call(Request::AddDisk(config), Some(file)).await {
            Ok(Response::Added { pci_address }) => pci_address,
            other => {
                self.growth.forget(&id);
                let source = other.err().unwrap_or_else(|| ControlError::Connection(io::ErrorKind::InvalidData.into()));
                return Err(DiskError::Control { disk, source });
            }
        };
        let request = AddDeviceRequest { pci_address: pci_address.clone(), ..Default::default() };
        let answered = answer("AddDevice", agent.sandbox.add_device(long(), &request).await);
        let guest = match answered {
            Ok(answer) => GuestDevice { path: answer.device_path, major: answer.major, minor: answer.minor },
            Err(source) => {
                self.growth.forget(&id);
                self.take_off(agent, &id, pci_address).await;
                return Err(DiskError::Agent { disk, source });
            }
        };
        let added = Added { id, pci_address, guest, users: HashSet::from([container.to_owned()]) };
        Ok(self.by_backing.entry(backing).insert_entry(added).into_mut())
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.by_backing.len()
    }

    /// The devices that a container uses, with what they are in the guest.
    #[must_use]
    pub fn of(&self, container: &str) -> Vec<(HostDevice, GuestDevice)> {
        let used = self.by_backing.iter().filter(|(_, added)| added.users.contains(container));
        let devices = used.filter_map(|(backing, added)| match backing {
            Backing::Device(device) => Some((*device, added.guest.clone())),
            Backing::File { .. } => None,
        });
        devices.collect()
    }

    /// Lets go of a container's disks, and takes off the bus those that no other uses.
    pub async fn release(&mut self, agent: &Agent, container: &str) {
        let mut unused = Vec::new();
        for (backing, added) in &mut self.by_backing {
            if added.users.remove(container) && added.users.is_empty() {
                unused.push(*backing);
            }
        }
        for backing in unused {
            if let Some(added) = self.by_backing.remove(&backing) {
                self.growth.forget(&added.id);
                self.take_off(agent, &added.id, added.pci_address).await;
            }
        }
    }

    /// Has the guest let go of a disk, and the VMM take it off the bus even if the guest does not: the node wants its device back.
    async fn take_off(&self, agent: &Agent, id: &str, pci_address: String) {
        let request = RemoveDeviceRequest { pci_address, ..Default::default() };
        match answer("RemoveDevice", agent.sandbox.remove_device(short(), &request).await) {
            Err(error) if !error.is_not_found() => tracing::warn!("the guest does not let go of {id}: {error}"),
            _ => {}
        }
        if let Err(error) = self.call(Request::RemoveDevice { id: id.to_owned() }, None).await {
            tracing::warn!("{id} cannot be taken off the bus: {error}");
        }
    }

    async fn call(&self, request: Request, file: Option<OwnedFd>) -> Result<Response, ControlError> {
        let control = self.control.clone();
        // The VMM answers soon, but this thread has others to serve.
        let called = tokio::task::spawn_blocking(move || {
            let mut control = Control::connect(&control)?;
            control.call_with(&request, file.as_slice())
        });
        called.await.map_err(|error| ControlError::Connection(error.into()))?
    }
}

/// Opens the node of a device: the kernel makes one for each, under a name that sysfs knows. Says too whether it can only be
/// read: one that is read-only itself may be opened for writing all the same, and each write would be an I/O error to the guest.
fn open(device: HostDevice, cache: DiskCache) -> io::Result<(OwnedFd, bool)> {
    let uevent = std::fs::read_to_string(format!("/sys/dev/block/{device}/uevent"))?;
    let name = device_name(&uevent).ok_or(io::ErrorKind::NotFound)?;
    let is_read_only = std::fs::read_to_string(format!("/sys/dev/block/{device}/ro"))?.trim() != "0";
    let read_only = device.read_only || is_read_only;
    let file = open_disk(&Path::new("/dev").join(name), read_only, cache.flags())?;
    let metadata = file.metadata()?;
    let number = metadata.rdev();
    let is_it = (rustix::fs::major(number), rustix::fs::minor(number)) == (device.major, device.minor);
    if !metadata.file_type().is_block_device() || !is_it {
        return Err(io::Error::new(io::ErrorKind::NotFound, format!("/dev/{name} is another device")));
    }
    Ok((file.into(), read_only))
}

impl Opened {
    /// Opens a raw file or a block device that holds a file system. Nobody but this sandbox may write to it meanwhile, and for a
    /// writer nobody may read it either: both would destroy what is on it.
    ///
    /// # Errors
    ///
    /// Fails where it is neither, or somebody else uses it.
    pub(crate) fn file_system(path: &Path, read_only: bool) -> Result<Self, DiskError> {
        let name = path.display().to_string();
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::ResourceBusy | io::ErrorKind::WouldBlock => DiskError::InUse { disk: name.clone() },
            _ => DiskError::Open { disk: name.clone(), source },
        };
        let (file, backing, read_only) = open_file_system(path, read_only).map_err(failed)?;
        Ok(Self { name, backing, file, read_only })
    }
}

fn open_file_system(path: &Path, read_only: bool) -> io::Result<(OwnedFd, Backing, bool)> {
    let is_device = std::fs::metadata(path)?.file_type().is_block_device();
    // The kernel gives a device to one such opener, and to none while it is mounted.
    let exclusive = if is_device && !read_only { OFlags::EXCL } else { OFlags::empty() };
    // A FIFO in its place must not block.
    let file = open_disk(path, read_only, exclusive | OFlags::NONBLOCK)?;
    let metadata = file.metadata()?;
    let kind = metadata.file_type();
    if kind.is_block_device() != is_device || !(is_device || kind.is_file()) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is neither a raw file nor a block device"));
    }
    if is_device {
        let (major, minor) = (rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev()));
        let device = HostDevice { major, minor, read_only };
        let is_read_only = std::fs::read_to_string(format!("/sys/dev/block/{device}/ro"))?.trim() != "0";
        return Ok((file.into(), Backing::Device(device), read_only || is_read_only));
    }
    // The lock is of what is open, so the VMM holds it for as long as it has the disk.
    let lock = match read_only {
        true => FlockOperation::NonBlockingLockShared,
        false => FlockOperation::NonBlockingLockExclusive,
    };
    match flock(&file, lock) {
        // A file system without locks, which is no reason to do without its files.
        Err(Errno::NOLCK | Errno::NOTSUP | Errno::INVAL) | Ok(()) => {}
        Err(errno) => return Err(errno.into()),
    }
    let backing = Backing::File { device: metadata.dev(), inode: metadata.ino(), read_only };
    Ok((file.into(), backing, read_only))
}

fn device_name(uevent: &str) -> Option<&str> {
    let name = uevent.lines().find_map(|line| line.strip_prefix("DEVNAME="))?;
    (!name.is_empty() && !name.split('/').any(|part| part == "..")).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_named_by_the_kernel() {
        assert_eq!(device_name("MAJOR=7\nMINOR=0\nDEVNAME=loop0\nDEVTYPE=disk\n"), Some("loop0"));
        assert_eq!(device_name("DEVNAME=mapper/a\n"), Some("mapper/a"));
        for uevent in ["", "MAJOR=7\n", "DEVNAME=\n", "DEVNAME=../etc/passwd\n"] {
            assert_eq!(device_name(uevent), None);
        }
    }

    #[test]
    fn a_device_that_the_host_does_not_have_is_not_found() {
        let device = HostDevice { major: 4095, minor: 1_048_575, read_only: true };
        assert_eq!(open(device, DiskCache::None).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_file_has_one_writer_or_any_number_of_readers() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = |read_only| Opened::file_system(file.path(), read_only);
        let in_use = |opened: Result<Opened, DiskError>| matches!(opened, Err(DiskError::InUse { .. }));
        let reader = open(true).unwrap();
        let another = open(true).unwrap();
        assert_eq!(reader.backing, another.backing);
        assert!(in_use(open(false)));
        drop((reader, another));
        let _writer = open(false).unwrap();
        assert!(in_use(open(true)) && in_use(open(false)));
    }

    #[test]
    fn a_disk_goes_without_the_page_cache_or_says_why_not() {
        let at = |dir: &str, cache| {
            let file = tempfile::NamedTempFile::new_in(dir).unwrap();
            let disk = DiskFile { path: file.path().to_owned(), read_only: true, cache, serial: None };
            disk.open().map(|file| rustix::fs::fcntl_getfl(&file).unwrap().contains(OFlags::DIRECT))
        };
        for dir in ["/var/tmp", "/dev/shm"] {
            assert!(!at(dir, DiskCache::Writeback).unwrap());
            match at(dir, DiskCache::None) {
                Ok(direct) => assert!(direct),
                Err(error) => assert!(error.to_string().contains("has no O_DIRECT; leave out"), "{error}"),
            }
        }
        let path = "/no/such".into();
        let missing = DiskFile { path, read_only: true, cache: DiskCache::None, serial: None };
        assert!(matches!(missing.open(), Err(DiskError::Open { .. })));
    }

    #[test]
    fn what_is_no_disk_is_named() {
        let dir = tempfile::tempdir().unwrap();
        for path in [dir.path(), Path::new("/dev/null"), &dir.path().join("missing")] {
            let error = Opened::file_system(path, true).unwrap_err().to_string();
            assert!(error.contains(&path.display().to_string()), "{error}");
        }
    }
}
