//! All of a share that changes, behind one lock that only its thread takes while it serves.

use std::collections::HashMap;
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use fuse_backend_rs::api::filesystem::{Context, Entry};
use vmm_sys_util::eventfd::EventFd;

use super::broker::Broker;
use super::credentials::Credentials;
use super::handles::{Allowance, Handles};
use super::host::{Host, Stat};
use super::inodes::{Inodes, Node, ROOT, Slot};
use super::locks::Locks;
use super::locks::snapshot::SavedLocks;
use super::policy::Policy;
use super::snapshot::SavedHandle;
use super::watches::Watches;
use super::watches::snapshot::SavedWatches;

/// Bits of an inode number that a file system is left with; those above tell devices apart.
const INODE_BITS: u32 = 48;

/// A share's root and rules, its tables, and its thread's identity.
pub(super) struct State {
    pub(super) host: Host,
    /// Who does what takes capabilities of the host, if there is somebody.
    pub(super) broker: Option<Arc<Broker>>,
    pub(super) policy: Policy,
    pub(super) read_only: bool,
    /// What directories two levels below the root are called that nobody else has.
    pub(super) private: Option<Vec<u8>>,
    pub(super) inodes: Inodes,
    pub(super) handles: Handles,
    pub(super) locks: Locks,
    pub(super) watches: Watches,
    /// Features that `FUSE_INIT` agreed on.
    pub(super) features: u64,
    /// The devices met, each with a small number of its own; the root's is 0.
    devices: HashMap<u64, u64>,
    credentials: Option<Credentials>,
    /// For reading directories; empty while there is no thread.
    pub(super) buffer: Vec<u8>,
    /// Nodes and handles were put back and are not looked up yet.
    pub(super) restored: bool,
    /// Handles to open again.
    pub(super) saved_handles: Vec<SavedHandle>,
    /// Locks to take again.
    pub(super) saved_locks: SavedLocks,
    /// Files to watch again.
    pub(super) saved_watches: SavedWatches,
}

/// How much a share may hold.
pub(super) struct Bounds {
    /// Files that the guest knows.
    pub(super) nodes: usize,
    /// Descriptors that stand for known files.
    pub(super) anchors: usize,
    /// Files that the guest has open, in all shares.
    pub(super) handles: Arc<Allowance>,
    /// Descriptors of owners of locks.
    pub(super) locks: usize,
}

impl State {
    /// Wakes the thread by `wake`.
    pub(super) fn new(
        host: Host,
        root: OwnedFd,
        (policy, read_only): (Policy, bool),
        bounds: &Bounds,
        wake: Arc<EventFd>,
    ) -> io::Result<Self> {
        let stat = host.stat(root.as_raw_fd())?;
        if stat.file_type() != libc::S_IFDIR {
            return Err(io::ErrorKind::NotADirectory.into());
        }
        Ok(Self {
            host,
            broker: Broker::of_process(),
            policy,
            read_only,
            private: None,
            inodes: Inodes::new(host, root, &stat, bounds.nodes, bounds.anchors),
            handles: Handles::new(bounds.handles.clone()),
            locks: Locks::new(host, wake, bounds.locks),
            watches: Watches::new(host),
            features: 0,
            devices: HashMap::from([(stat.attr.st_dev, 0)]),
            credentials: None,
            buffer: Vec::new(),
            restored: false,
            saved_handles: Vec::new(),
            saved_locks: SavedLocks::default(),
            saved_watches: SavedWatches::default(),
        })
    }

    /// Makes the calling thread the one that serves.
    pub(super) fn enter_thread(&mut self) -> io::Result<()> {
        self.host.enter_thread()?;
        self.credentials = Some(Credentials::of_this_thread(self.host));
        if std::mem::take(&mut self.restored) {
            self.inodes.adopt();
            self.reopen_saved();
            self.lock_saved();
            self.watch_saved();
        }
        Ok(())
    }

    /// The session is over: the guest knows nothing any more.
    pub(super) fn clear(&mut self) {
        self.locks.clear();
        self.watches.clear();
        self.handles.clear();
        self.inodes.clear();
        self.buffer = Vec::new();
        self.features = 0;
    }

    /// Between requests: back to what costs little to keep.
    pub(super) fn tidy(&mut self) {
        if let Some(credentials) = &mut self.credentials {
            credentials.done();
        }
        self.inodes.trim();
    }

    /// Gives back what was not used since the last call; returns whether there may be something for the next one.
    pub(super) fn sweep(&mut self) -> bool {
        self.sweep_watches();
        if self.inodes.sweep() {
            return true;
        }
        // Idle by now.
        self.buffer = Vec::new();
        self.host.trim_heap();
        false
    }

    /// Makes what is created next belong to the user who asks for it.
    pub(super) fn create_as(&mut self, context: &Context, umask: u32) -> io::Result<()> {
        self.keep_set_id(true);
        match &mut self.credentials {
            Some(credentials) => credentials.create_as(context.uid, context.gid, umask),
            None => Err(io::Error::from_raw_os_error(libc::EPERM)),
        }
    }

    /// Makes the next change leave set-user-ID bits alone, or clear what of them a change by this user clears: a file that its group may
    /// not execute keeps its set-group-ID bit if the user is in that group.
    pub(super) fn change_as(&mut self, context: &Context, keep_set_id: bool) -> io::Result<()> {
        if let (false, Some(credentials)) = (keep_set_id, &mut self.credentials) {
            credentials.act_as(context.uid, context.gid)?;
        }
        self.keep_set_id(keep_set_id);
        Ok(())
    }

    /// Whether the next change leaves set-user-ID bits alone.
    pub(super) fn keep_set_id(&mut self, keep: bool) {
        if let Some(credentials) = &mut self.credentials {
            credentials.keep_set_id(keep);
        }
    }

    /// What the guest is to see of a file: inode numbers of different devices must differ, since it sees one device.
    pub(super) fn attributes(&mut self, stat: &Stat) -> libc::stat64 {
        let mut attr = stat.attr;
        attr.st_ino = self.inode_number(attr.st_dev, attr.st_ino);
        attr
    }

    pub(super) fn inode_number(&mut self, device: u64, inode: u64) -> u64 {
        let next = self.devices.len() as u64;
        inode ^ *self.devices.entry(device).or_insert(next) << INODE_BITS
    }

    /// How long a name in `directory` stays good. At the root of a tree of containers that is no time at all: they come and go by the
    /// host's doing, and one may be called as another that has just gone.
    pub(super) fn name_timeout(&self, directory: Slot) -> Duration {
        if self.private.is_some() && directory == ROOT { Duration::ZERO } else { self.policy.timeout }
    }

    /// The answer to a lookup that [`Inodes::enter`] counted.
    pub(super) fn entry(&mut self, slot: Slot, stat: &Stat) -> Entry {
        let directory = self.inodes.node(slot).ok().and_then(Node::place).map_or(slot, |(directory, _)| directory);
        Entry {
            inode: self.inodes.number(slot),
            generation: 0,
            attr: self.attributes(stat),
            attr_flags: 0,
            attr_timeout: self.policy.timeout,
            entry_timeout: self.name_timeout(directory),
        }
    }
}

/// Lets through what names one entry of a directory and nothing else: no way up, no path.
pub(super) fn check_name(name: &CStr) -> io::Result<()> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        bytes if bytes.contains(&b'/') => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        bytes if bytes.len() > 255 => Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG)),
        _ => Ok(()),
    }
}

/// An error of the host by number.
pub(super) fn errno(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}
