//! Files and directories that the guest has open.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::inodes::Slot;

/// How many files may be open in several shares together: each takes a descriptor of the one process.
#[derive(Debug)]
pub(super) struct Allowance {
    total: usize,
    left: AtomicUsize,
}

/// The right to have one of them open, given back when dropped.
struct Permit(Arc<Allowance>);

impl Allowance {
    pub(super) fn new(total: usize) -> Arc<Self> {
        Arc::new(Self { total, left: AtomicUsize::new(total) })
    }

    fn take(self: &Arc<Self>) -> Option<Permit> {
        let taken = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        taken.ok().map(|_| Permit(self.clone()))
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.left.fetch_add(1, Ordering::Relaxed);
    }
}

/// An open file or directory.
pub(super) struct Handle {
    pub(super) file: File,
    pub(super) node: Slot,
    /// The guest's `open` flags, as far as they were honoured.
    pub(super) flags: i32,
    /// Where a directory's descriptor stands, which saves seeking in a scan.
    pub(super) position: u64,
}

#[derive(Default)]
struct Entry {
    generation: u32,
    handle: Option<(Handle, Permit)>,
}

/// The table.
pub(super) struct Handles {
    entries: Vec<Entry>,
    free: Vec<u32>,
    allowance: Arc<Allowance>,
}

impl Handles {
    /// A table for as many handles as the allowance has left.
    pub(super) fn new(allowance: Arc<Allowance>) -> Self {
        Self { entries: Vec::new(), free: Vec::new(), allowance }
    }

    pub(super) fn clear(&mut self) {
        *self = Self::new(self.allowance.clone());
    }

    /// Adds a handle; returns the guest's number for it.
    pub(super) fn add(&mut self, handle: Handle) -> io::Result<u64> {
        let permit = self.allowance.take().ok_or_else(|| io::Error::from_raw_os_error(libc::ENFILE))?;
        let index = self.free.pop().unwrap_or_else(|| {
            self.entries.push(Entry::default());
            self.entries.len() as u32 - 1
        });
        let entry = &mut self.entries[index as usize];
        entry.handle = Some((handle, permit));
        Ok(number(index, entry.generation))
    }

    /// The handle of a guest's number, if it is open on `node`.
    pub(super) fn get(&mut self, number: u64, node: Slot) -> io::Result<&mut Handle> {
        (number as u32)
            .checked_sub(1)
            .and_then(|index| self.entries.get_mut(index as usize))
            .filter(|entry| u64::from(entry.generation) == number >> 32)
            .and_then(|entry| entry.handle.as_mut())
            .map(|(handle, _)| handle)
            .filter(|handle| handle.node == node)
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))
    }

    /// Closes a handle.
    pub(super) fn remove(&mut self, number: u64, node: Slot) -> io::Result<()> {
        self.get(number, node)?;
        let index = number as u32 - 1;
        let entry = &mut self.entries[index as usize];
        entry.handle = None;
        entry.generation = entry.generation.wrapping_add(1);
        self.free.push(index);
        Ok(())
    }

    /// All open handles with their numbers.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, &Handle)> {
        (0_u32..)
            .zip(&self.entries)
            .filter_map(|(index, entry)| Some((number(index, entry.generation), &entry.handle.as_ref()?.0)))
    }

    /// Puts back a handle under the number that it had, before any other is added.
    pub(super) fn insert_saved(&mut self, number: u64, handle: Handle) -> bool {
        let Some(index) = (number as u32).checked_sub(1) else { return false };
        if index as usize >= self.allowance.total {
            return false;
        }
        while self.entries.len() <= index as usize {
            self.free.push(self.entries.len() as u32);
            self.entries.push(Entry::default());
        }
        let entry = &mut self.entries[index as usize];
        if entry.handle.is_some() {
            return false;
        }
        let Some(permit) = self.allowance.take() else { return false };
        *entry = Entry { generation: (number >> 32) as u32, handle: Some((handle, permit)) };
        self.free.retain(|free| *free != index);
        true
    }
}

fn number(index: u32, generation: u32) -> u64 {
    u64::from(generation) << 32 | u64::from(index + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handle(node: u32) -> Handle {
        Handle { file: File::open("/dev/null").unwrap(), node: Slot(node), flags: 0, position: 0 }
    }

    #[test]
    fn a_number_is_good_for_its_node_until_it_is_closed() {
        let mut handles = Handles::new(Allowance::new(2));
        let first = handles.add(handle(5)).unwrap();
        assert!(handles.get(first, Slot(5)).is_ok());
        assert!(handles.get(first, Slot(6)).is_err());
        assert!(handles.get(0, Slot(5)).is_err());
        assert!(handles.remove(first, Slot(6)).is_err());
        handles.remove(first, Slot(5)).unwrap();
        let second = handles.add(handle(5)).unwrap();
        assert_ne!(first, second);
        assert!(handles.get(first, Slot(5)).is_err());
        handles.add(handle(5)).unwrap();
        assert!(handles.add(handle(5)).is_err());
    }

    #[test]
    fn shares_have_as_many_files_open_together_as_one_may() {
        let allowance = Allowance::new(3);
        let [mut first, mut second] = [(); 2].map(|()| Handles::new(allowance.clone()));
        let number = first.add(handle(5)).unwrap();
        assert!(first.insert_saved(9 << 32 | 2, handle(5)));
        second.add(handle(5)).unwrap();
        for full in [&mut first, &mut second] {
            assert_eq!(full.add(handle(5)).unwrap_err().raw_os_error(), Some(libc::ENFILE));
            assert!(!full.insert_saved(9 << 32 | 3, handle(5)));
        }
        // Whatever lets go of one makes room for another's.
        first.remove(number, Slot(5)).unwrap();
        second.add(handle(5)).unwrap();
        second.clear();
        first.add(handle(5)).unwrap();
        first.add(handle(5)).unwrap();
        assert!(second.add(handle(5)).is_err());
        drop(first);
        second.add(handle(5)).unwrap();
    }

    #[test]
    fn saved_handles_keep_their_numbers() {
        let mut handles = Handles::new(Allowance::new(10));
        assert!(handles.insert_saved(3 << 32 | 4, handle(1)));
        assert!(!handles.insert_saved(4 << 32 | 4, handle(1)));
        assert!(!handles.insert_saved(0, handle(1)));
        assert!(!handles.insert_saved(11, handle(1)));
        assert!(handles.get(3 << 32 | 4, Slot(1)).is_ok());
        for _ in 0..9 {
            handles.add(handle(2)).unwrap();
        }
        assert!(handles.add(handle(2)).is_err());
    }
}
