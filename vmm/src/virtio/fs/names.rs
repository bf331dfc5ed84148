//! Names in directories: found, made, changed, removed.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use fuse_backend_rs::abi::fuse_abi::{CreateIn, FOPEN_IN_KILL_SUIDGID};
use fuse_backend_rs::api::filesystem::{Context, Entry};
use hull_vmm_api::broker::Request;

use super::files::{Opened, PASSED_FLAGS};
use super::handles::Handle;
use super::inodes::Slot;
use super::state::{State, check_name};

/// What to make under a name.
pub(super) enum Make<'a> {
    Directory { mode: u32 },
    Node { mode: u32, device: u32 },
    Symlink { target: &'a CStr },
}

impl State {
    pub(super) fn lookup(&mut self, parent: u64, name: &CStr) -> io::Result<Entry> {
        check_name(name)?;
        let parent = self.inodes.resolve(parent)?;
        match self.enter_at(parent, name) {
            Err(error) if self.policy.negative_names && error.raw_os_error() == Some(libc::ENOENT) => {
                // Node 0: the guest may remember that there is nothing.
                Ok(Entry { entry_timeout: self.name_timeout(parent), ..Entry::default() })
            }
            result => result,
        }
    }

    pub(super) fn enter_at(&mut self, parent: Slot, name: &CStr) -> io::Result<Entry> {
        let directory = self.inodes.anchor(parent)?;
        let stat = self.host.stat_at(directory, name)?;
        let slot = self.inodes.enter(&stat, Some((parent, name)), None)?;
        Ok(self.entry(slot, &stat))
    }

    /// Makes what is no regular file.
    pub(super) fn make(
        &mut self,
        context: &Context,
        parent: u64,
        name: &CStr,
        umask: u32,
        what: &Make<'_>,
    ) -> io::Result<Entry> {
        check_name(name)?;
        let parent = self.inodes.resolve(parent)?;
        let directory = self.inodes.anchor(parent)?;
        self.create_as(context, umask)?;
        match *what {
            Make::Directory { mode } => self.host.make_directory(directory, name, mode & 0o7777)?,
            Make::Node { mode, device } => self.make_node(context, (directory, name), (mode, device), umask)?,
            Make::Symlink { target } => self.host.make_symlink(target, directory, name)?,
        }
        self.enter_at(parent, name)
    }

    fn make_node(
        &self,
        context: &Context,
        (directory, name): (RawFd, &CStr),
        (mode, device): (u32, u32),
        umask: u32,
    ) -> io::Result<()> {
        let is_device = matches!(mode & libc::S_IFMT, libc::S_IFCHR | libc::S_IFBLK);
        match (self.host.make_node(directory, name, mode, device), self.broker.as_deref()) {
            // But for what overlayfs marks removed files with, devices take a capability.
            (Err(error), Some(broker)) if is_device && error.raw_os_error() == Some(libc::EPERM) => {
                let owner = (context.uid, context.gid);
                broker
                    .ask(directory, &Request::MakeNode { name: name.to_bytes(), mode, device, owner, umask })
                    .map(drop)
            }
            (result, _) => result,
        }
    }

    /// Makes a regular file, or takes the one that is there, and opens it.
    pub(super) fn create(
        &mut self,
        context: &Context,
        parent: u64,
        name: &CStr,
        how: &CreateIn,
    ) -> io::Result<(Entry, Opened)> {
        check_name(name)?;
        let parent = self.inodes.resolve(parent)?;
        let directory = self.inodes.anchor(parent)?;
        let flags = how.flags as i32;
        self.create_as(context, how.umask)?;
        // Exclusively in any case: opening what is there must look at what it is first, a FIFO would block.
        match self.host.create(directory, name, flags & PASSED_FLAGS, how.mode & 0o7777) {
            Ok(file) => {
                let stat = self.host.stat(file.as_raw_fd())?;
                let slot = self.inodes.enter(&stat, Some((parent, name)), None)?;
                let opened = self.add_handle(Handle { file, node: slot, flags, position: 0 });
                self.or_forget(slot, opened).map(|opened| (self.entry(slot, &stat), opened))
            }
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) && flags & libc::O_EXCL == 0 => {
                let entry = self.enter_at(parent, name)?;
                let slot = self.inodes.resolve(entry.inode)?;
                self.keep_set_id(how.fuse_flags & FOPEN_IN_KILL_SUIDGID == 0);
                let opened = self.open_node(slot, flags);
                self.or_forget(slot, opened).map(|opened| (entry, opened))
            }
            Err(error) => Err(error),
        }
    }

    /// Makes a regular file in a directory's file system, with no name, and opens it (`O_TMPFILE`).
    pub(super) fn create_unnamed(
        &mut self,
        context: &Context,
        parent: u64,
        how: &CreateIn,
    ) -> io::Result<(Entry, Opened)> {
        let parent = self.inodes.resolve(parent)?;
        let directory = self.inodes.anchor(parent)?;
        let flags = how.flags as i32;
        self.create_as(context, how.umask)?;
        let kept = flags & (PASSED_FLAGS | libc::O_EXCL);
        let file = self.host.create_unnamed(directory, kept, how.mode & 0o7777)?;
        let stat = self.host.stat(file.as_raw_fd())?;
        let slot = self.inodes.enter(&stat, None, Some(file.try_clone()?.into()))?;
        let opened = self.add_handle(Handle { file, node: slot, flags, position: 0 });
        self.or_forget(slot, opened).map(|opened| (self.entry(slot, &stat), opened))
    }

    /// Takes back the lookup of an answer that will not be given.
    fn or_forget<T>(&mut self, slot: Slot, result: io::Result<T>) -> io::Result<T> {
        if result.is_err() {
            self.inodes.forget(slot, 1);
        }
        result
    }

    pub(super) fn link(&mut self, node: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        check_name(name)?;
        let node = self.inodes.resolve(node)?;
        let parent = self.inodes.resolve(parent)?;
        let file = self.inodes.anchor(node)?;
        let directory = self.inodes.anchor(parent)?;
        self.host.link(file, directory, name)?;
        self.enter_at(parent, name)
    }

    pub(super) fn remove(&mut self, parent: u64, name: &CStr, flags: i32) -> io::Result<()> {
        check_name(name)?;
        let parent = self.inodes.resolve(parent)?;
        let victim = self.placed_at(parent, name);
        let directory = self.inodes.anchor(parent)?;
        self.host.unlink(directory, name, flags)?;
        if let Some(slot) = victim {
            self.inodes.unplace(slot);
        }
        Ok(())
    }

    /// Removes a file's name and takes back lookups of the node that the guest knows by it and has no other use for: that
    /// node need not stay within reach.
    pub(super) fn remove_and_forget(
        &mut self,
        parent: u64,
        name: &CStr,
        (node, lookups): (u64, u64),
    ) -> io::Result<()> {
        check_name(name)?;
        let directory = self.inodes.resolve(parent)?;
        let known = self.inodes.resolve(node).ok();
        let placed =
            known.filter(|slot| self.inodes.node(*slot).is_ok_and(|node| node.place() == Some((directory, name))));
        match placed {
            Some(slot) => {
                let directory = self.inodes.anchor(directory)?;
                self.host.unlink(directory, name, 0)?;
                self.inodes.unplace(slot);
            }
            None => self.remove(parent, name, 0)?,
        }
        if let Some(slot) = known {
            self.inodes.forget(slot, lookups);
        }
        Ok(())
    }

    pub(super) fn rename(&mut self, from: (u64, &CStr), to: (u64, &CStr), flags: u32) -> io::Result<()> {
        check_name(from.1)?;
        check_name(to.1)?;
        let source = self.inodes.resolve(from.0)?;
        let target = self.inodes.resolve(to.0)?;
        let moved = self.placed_at(source, from.1);
        let victim = self.placed_at(target, to.1);
        let from_directory = self.inodes.anchor(source)?;
        let to_directory = self.inodes.anchor(target)?;
        self.host.rename((from_directory, from.1), (to_directory, to.1), flags)?;
        // Two names of one file: the call does nothing, nor must the table.
        if moved.is_some() && moved == victim {
            return Ok(());
        }
        match victim {
            Some(slot) if flags & libc::RENAME_EXCHANGE != 0 => self.inodes.set_place(slot, source, from.1)?,
            Some(slot) => self.inodes.unplace(slot),
            None => {}
        }
        if let Some(slot) = moved {
            self.inodes.set_place(slot, target, to.1)?;
        }
        Ok(())
    }

    /// The node that the table places at a name that is about to change, with an anchor: the name will no longer do.
    fn placed_at(&mut self, parent: Slot, name: &CStr) -> Option<Slot> {
        let directory = self.inodes.anchor(parent).ok()?;
        let stat = self.host.stat_at(directory, name).ok()?;
        let slot = self.inodes.find(&stat)?;
        if self.inodes.node(slot).ok()?.place() != Some((parent, name)) {
            return None;
        }
        self.inodes.anchor(slot).ok()?;
        Some(slot)
    }
}
