//! What of a share goes into a saved VM: which files the guest knows and has open, by their places.
//!
//! The copy looks them up anew in its own root, which must hold the same tree. Files without a place are lost: they are
//! stale (`ESTALE`) in the copy, and handles on them are bad (`EBADF`).
//!
//! The form, all integers little-endian: version, features (u64), number of nodes (u32), for each its slot, generation,
//! type, parent's slot or all ones (u32), lookups (u64), name (u16 length, bytes); number of handles (u32), for each its number (u64),
//! node's slot and flags (u32); the [locks](super::locks::snapshot); and the [watches](super::watches::snapshot).

use std::ffi::CString;

use super::handles::Handle;
use super::inodes::{ROOT, Slot};
use super::locks::snapshot::SavedLocks;
use super::state::State;
use super::watches::snapshot::SavedWatches;

const VERSION: u32 = 3;
const NOWHERE: u32 = u32::MAX;

/// A handle to open again once its node is found.
pub(super) struct SavedHandle {
    number: u64,
    node: Slot,
    flags: i32,
}

impl State {
    /// The share's state for [`restore`](Self::restore).
    pub(super) fn save(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let put = |out: &mut Vec<u8>, value: u32| out.extend(value.to_le_bytes());
        put(&mut out, VERSION);
        out.extend(self.features.to_le_bytes());
        put(&mut out, self.inodes.iter().count() as u32);
        for (slot, generation, node) in self.inodes.iter() {
            let (parent, name) = node.place().map_or((NOWHERE, c""), |(parent, name)| (parent.0, name));
            for value in [slot.0, generation, node.file_type(), parent] {
                put(&mut out, value);
            }
            out.extend(node.lookups.to_le_bytes());
            out.extend((name.to_bytes().len() as u16).to_le_bytes());
            out.extend(name.to_bytes());
        }
        put(&mut out, self.handles.iter().count() as u32);
        for (number, handle) in self.handles.iter() {
            out.extend(number.to_le_bytes());
            put(&mut out, handle.node.0);
            put(&mut out, handle.flags as u32);
        }
        self.locks.save(&mut out);
        self.watches.save(&mut out);
        out
    }

    /// Takes over what [`save`](Self::save) returned. The files are looked up when the share's thread starts. `None` if it
    /// does not parse.
    pub(super) fn restore(&mut self, saved: &[u8]) -> Option<()> {
        let mut input = Input(saved);
        if input.u32()? != VERSION {
            return None;
        }
        self.clear();
        self.features = input.u64()?;
        let mut places: Vec<(Slot, Slot, CString)> = Vec::new();
        for _ in 0..input.u32()? {
            let [slot, generation, file_type, parent] = [input.u32()?, input.u32()?, input.u32()?, input.u32()?];
            let lookups = input.u64()?;
            let len = usize::from(input.u16()?);
            let name = CString::new(input.take(len)?).ok()?;
            if !self.inodes.insert_saved(Slot(slot), generation, lookups, file_type) {
                return None;
            }
            if parent != NOWHERE {
                super::state::check_name(&name).ok()?;
                places.push((Slot(slot), Slot(parent), name));
            }
        }
        for (slot, parent, name) in places {
            self.inodes.set_place(slot, parent, &name).ok()?;
        }
        self.saved_handles.clear();
        for _ in 0..input.u32()? {
            let handle = SavedHandle { number: input.u64()?, node: Slot(input.u32()?), flags: input.u32()? as i32 };
            self.inodes.node(handle.node).ok()?;
            self.saved_handles.push(handle);
        }
        self.saved_locks = SavedLocks::parse(&mut input)?;
        self.saved_watches = SavedWatches::parse(&mut input)?;
        self.restored = true;
        input.0.is_empty().then_some(())
    }

    /// Opens the handles that were saved, as far as their files are found.
    pub(super) fn reopen_saved(&mut self) {
        for SavedHandle { number, node, flags } in std::mem::take(&mut self.saved_handles) {
            let Ok(fd) = self.inodes.anchor(node) else { continue };
            let is_directory = self.inodes.node(node).is_ok_and(|node| node.file_type() == libc::S_IFDIR);
            let is_file = self.inodes.node(node).is_ok_and(|node| node.file_type() == libc::S_IFREG);
            let passed = match (is_directory, is_file) {
                (true, _) => libc::O_RDONLY | libc::O_DIRECTORY,
                (_, true) if !self.read_only => flags & super::files::PASSED_FLAGS & !libc::O_TRUNC,
                (_, true) => libc::O_RDONLY,
                _ => continue,
            };
            let Ok(file) = self.host.reopen(fd, passed) else { continue };
            if self.handles.insert_saved(number, Handle { file, node, flags, position: u64::MAX }) {
                self.inodes.hold(node);
            }
        }
        debug_assert!(self.inodes.node(ROOT).is_ok());
    }
}

/// Bytes taken from the front.
pub(super) struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    fn u16(&mut self) -> Option<u16> {
        Some(u16::from_le_bytes(self.take(2)?.try_into().ok()?))
    }

    pub(super) fn u32(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }

    pub(super) fn u64(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(self.take(8)?.try_into().ok()?))
    }
}
