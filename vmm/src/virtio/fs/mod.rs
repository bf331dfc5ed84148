//! The file system device (virtio 1.3, section 5.11): a directory of the host, mounted by the guest.
//!
//! ```text
//!   queues ─▶ worker ─▶ session ─┬─▶ fuse-backend-rs ─▶ share ─┬─▶ state: names, files, directories ─▶ host
//!                                └─▶ extensions ───────────────┘        └─ inodes, handles, credentials
//! ```
//!
//! Each share has a thread of its own, alive from `activate` or `resume` to `deactivate` or `pause`, which alone touches
//! the host's files, but for threads that wait for what somebody else has locked; a paused share has no thread and its queues
//! rest with the device. The one lock is that on the share's state.
//!
//! **The guest cannot leave the root.** It names files by a node that it was told of and a name in it, never by a path;
//! `.`, `..` and names with a slash are refused; symbolic links are the guest's to follow; every name is opened with
//! `O_NOFOLLOW` to stand for the file only (`O_PATH`), and for reading or writing only once it is known to be a regular file or a directory.
//!
//! **What it may hold.** Open files: with all other shares together half of the process's limit of descriptors, which is raised
//! to its maximum ([`Fs::new`]). Known files: one per KiB of guest memory, no more than a guest has room for itself; each takes some 200
//! bytes and its name, and no descriptor but for the 4,096 used last (less where the limit is low), which a sweep every ten seconds
//! gives back, and those removed while in use. The sweep gives back the memory of those that the guest has forgotten, too. Owners of locks:
//! 4,096 at most, each with a descriptor. Watched files: 16,384.

mod broker;
mod credentials;
mod directories;
mod extensions;
mod files;
mod handles;
mod host;
mod inodes;
mod locks;
mod names;
mod policy;
mod reads;
mod session;
mod share;
mod slots;
mod snapshot;
mod state;
mod statx;
mod waiting;
mod watches;
mod worker;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};

use hull_vmm_api::config::CachePolicy;
use vm_memory::{GuestMemory as _, GuestMemoryRegion};

use self::broker::Broker;
use self::handles::Allowance;
use self::host::Host;
use self::policy::Policy;
use self::session::Session;
use self::share::Share;
use self::state::{Bounds, State};
use self::worker::{Control, Running, Worker};
use super::device::{
    ActivateError, Activation, DeviceKind, DeviceState, RestoreError, VirtioDevice, read_config_bytes,
};

/// The queue for requests of high priority, in which guests forget files; it holds nothing large.
const HIPRIO_SIZE: u16 = 128;
/// The queue for all else: a request of 1 MiB is 256 pages and its headers, and must fit.
const REQUEST_SIZE: u16 = 512;
const QUEUES: [u16; 2] = [HIPRIO_SIZE, REQUEST_SIZE];

/// Length of the mount tag in the configuration space (section 5.11.4).
const TAG_BYTES: usize = 36;
const CONFIG_BYTES: usize = TAG_BYTES + 4;

/// Guest memory that a guest needs to know one file, at least: an inode and a name.
const GUEST_BYTES_PER_NODE: u64 = 1024;
/// Files that any guest may know.
const LEAST_NODES: u64 = 65_536;
/// Files that a share takes over from a saved VM at most: with less than 4 GiB of memory no guest knows more.
const MOST_SAVED_NODES: usize = 4 << 20;
/// Descriptors that stand for known files, at most: each pins an inode of the host.
const MOST_ANCHORS: u64 = 4096;
/// Descriptors of owners of locks, at most.
const MOST_OWNERS: u64 = 4096;
/// Handles that shares may have, however low the limit of descriptors.
const LEAST_HANDLES: u64 = 256;
/// What part of the limit of descriptors each share may have for known files, and for owners of locks: with the shares of a
/// container, of which there are up to three, something is left for the rest of the VMM.
const PART_OF_DESCRIPTORS: u64 = 16;

/// What the shares of the process may have open.
static OPEN_FILES: OnceLock<Arc<Allowance>> = OnceLock::new();

/// Why a directory cannot be shared.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// The tag does not fit.
    #[error("a share's tag has 1 to {TAG_BYTES} bytes without zeroes; choose another than {0:?}")]
    Tag(String),
    /// The process sees no `/proc`.
    #[error("/proc/self/fd cannot be opened: {0}; is /proc mounted?")]
    Proc(io::Error),
    /// The root is no directory or cannot be looked at.
    #[error("a share's root must be an open directory: {0}")]
    Root(io::Error),
    /// The process may open no more descriptors.
    #[error("no eventfd for the share: {0}; raise the limit of open files")]
    EventFd(io::Error),
}

/// Has all shares use `descriptors`, the process's own `/proc/self/fd`, which a jailed process does not find by its name. To
/// be called before the first share is made.
pub fn use_descriptors(descriptors: OwnedFd) {
    Host::use_descriptors(descriptors);
}

/// Has all shares ask by `socket` for what takes capabilities of the host ([`hull_vmm_api::broker`]). To be called before the first share
/// is made.
pub fn use_broker(socket: OwnedFd) {
    Broker::of_process_is(socket);
}

/// A shared directory.
pub struct Fs {
    name: String,
    config: [u8; CONFIG_BYTES],
    session: Arc<Session>,
    share: Arc<Share>,
    control: Arc<Control>,
    run: Run,
}

enum Run {
    Inactive,
    Active(Running),
    Paused(Box<Worker>),
}

/// How many files the guest may have open, with this limit of descriptors.
fn most_handles(descriptors: u64) -> usize {
    (descriptors / 2).clamp(LEAST_HANDLES, u64::from(u32::MAX)) as usize
}

impl Fs {
    /// A share of the directory `root`, also if that was opened with `O_PATH`. What is mounted below it is part of it, whenever it was mounted.
    ///
    /// Raises the process's limit of open descriptors to its maximum. The first call must be before the process loses
    /// sight of `/proc`.
    ///
    /// # Errors
    ///
    /// When `root` is no directory, or `tag` is empty or too long.
    pub fn new(id: &str, root: OwnedFd, tag: &str, read_only: bool, cache: CachePolicy) -> Result<Self, FsError> {
        if tag.is_empty() || tag.len() > TAG_BYTES || tag.contains('\0') {
            return Err(FsError::Tag(tag.to_owned()));
        }
        let mut config = [0; CONFIG_BYTES];
        config[..tag.len()].copy_from_slice(tag.as_bytes());
        config[TAG_BYTES..].copy_from_slice(&(QUEUES.len() as u32 - 1).to_le_bytes());
        let host = Host::new().map_err(FsError::Proc)?;
        let descriptors = host::raise_descriptor_limit();
        let bounds = Bounds {
            nodes: MOST_SAVED_NODES,
            anchors: (descriptors / PART_OF_DESCRIPTORS).min(MOST_ANCHORS) as usize,
            locks: (descriptors / PART_OF_DESCRIPTORS).min(MOST_OWNERS) as usize,
            handles: OPEN_FILES.get_or_init(|| Allowance::new(most_handles(descriptors))).clone(),
        };
        let control = Arc::new(Control::new().map_err(FsError::EventFd)?);
        let rules = (Policy::new(cache), read_only);
        let state = State::new(host, root, rules, &bounds, control.wake.clone()).map_err(FsError::Root)?;
        let share = Arc::new(Share::new(state));
        Ok(Self {
            name: format!("fs-{id}"),
            config,
            session: Arc::new(Session::new(share.clone(), read_only)),
            share,
            control,
            run: Run::Inactive,
        })
    }
}

impl Fs {
    /// The share with the directories of this name, two levels below its root, known as nobody else's: locks on files in
    /// them are left to the guest.
    #[must_use]
    pub fn with_private(self, name: Option<String>) -> Self {
        self.share.state().private = name.map(String::into_bytes);
        self
    }
}

impl VirtioDevice for Fs {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Fs
    }

    fn features(&self) -> u64 {
        // No `VIRTIO_FS_F_NOTIFICATION`: nobody implements it.
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let queues =
            (0..QUEUES.len() as u16).map(|index| activation.take_queue(index)).collect::<Result<Vec<_>, _>>()?;
        let memory_bytes: u64 = activation.memory.iter().map(GuestMemoryRegion::len).sum();
        let nodes = (memory_bytes / GUEST_BYTES_PER_NODE).clamp(LEAST_NODES, u64::from(u32::MAX / 2));
        self.share.state().inodes.set_max_nodes(nodes as usize);
        let worker = Worker { queues, session: self.session.clone(), control: self.control.clone() };
        let running = worker
            .start(&self.name)
            .map_err(|source| ActivateError::Host { step: "starting the share's thread", source })?;
        self.run = Run::Active(running);
        Ok(())
    }

    fn deactivate(&mut self) {
        if let Run::Active(running) = std::mem::replace(&mut self.run, Run::Inactive) {
            running.stop();
        }
        self.share.state().clear();
    }

    fn pause(&mut self) {
        match std::mem::replace(&mut self.run, Run::Inactive) {
            Run::Active(running) => {
                if let Some(worker) = running.stop() {
                    self.run = Run::Paused(Box::new(worker));
                }
            }
            other => self.run = other,
        }
    }

    fn resume(&mut self) {
        match std::mem::replace(&mut self.run, Run::Inactive) {
            // Fails only where the host has no thread left; the guest then sees a share that no longer answers.
            Run::Paused(worker) => match worker.start(&self.name) {
                Ok(running) => self.run = Run::Active(running),
                Err(error) => crate::log::warn(format_args!("{}: no thread to resume with: {error}", self.name)),
            },
            other => self.run = other,
        }
    }

    fn save(&self) -> DeviceState {
        let queues = match &self.run {
            Run::Paused(worker) => worker.queues.iter().map(|queue| Some(queue.state())).collect(),
            _ => vec![None; QUEUES.len()],
        };
        DeviceState { queues, private: self.share.state().save() }
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        self.share.state().restore(&state.private).ok_or(RestoreError::Damaged(DeviceKind::Fs))
    }

    fn completed(&self) -> u64 {
        self.control.completed.load(Ordering::Relaxed)
    }
}

impl Drop for Fs {
    fn drop(&mut self) {
        self.deactivate();
    }
}

#[cfg(test)]
mod tests;
