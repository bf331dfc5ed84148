//! The files of a share that the guest knows: what its node numbers stand for.
//!
//! A node is found on the host by its *place*, a name in its parent node, or by its *anchor*, a descriptor opened
//! with `O_PATH`. Places are cheap, so that a guest may know a million files; anchors are exact, so there is one where
//! a place is no longer, or where a file is worked with. A bounded number is kept, those not used lately go first. What is found at a place must be the file that was there before, or the node is stale (`ESTALE`), upon which a
//! guest looks the name up anew.
//!
//! ```text
//!               use                      file removed or unnamed
//!   place only ─────▶ place and anchor ──────────────────────────▶ anchor only
//!        ▲   ◀──────── (evicted)                                      │
//!        └────────────────────────── found again ◀────────────────────┘
//! ```
//!
//! Files are told apart by device and inode number, directories by their mount too: a guest's directory has one place only,
//! and a bind mount gives it two.

use std::collections::HashMap;
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use super::host::{Host, Stat};
use super::slots::Slots;

/// Most files without a place that are kept; those beyond become stale.
const MAX_UNPLACED: usize = 4096;
/// Longest way up from a node: `PATH_MAX` holds no more names.
const MAX_DEPTH: usize = 2048;
/// The root's slot, which the protocol's number 1 stands for.
pub(super) const ROOT: Slot = Slot(0);

/// Where a node is in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Slot(pub(super) u32);

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Key {
    device: u64,
    inode: u64,
    /// 0 for what is not a directory.
    mount: u64,
}

/// One file.
pub(super) struct Node {
    key: Key,
    birth: i64,
    file_type: u32,
    /// How often the guest was told of it and has not forgotten.
    pub(super) lookups: u64,
    /// Nodes placed in it and handles open on it.
    holds: u32,
    place: Option<(Slot, Box<CStr>)>,
    anchor: Option<OwnedFd>,
    recent: bool,
}

/// The table.
pub(super) struct Inodes {
    host: Host,
    nodes: Slots<Node>,
    by_key: HashMap<Key, Slot>,
    max_nodes: usize,
    max_anchors: usize,
    anchors: usize,
    unplaced: usize,
    hand: u32,
}

impl Key {
    fn new(stat: &Stat) -> Self {
        let mount = if stat.file_type() == libc::S_IFDIR { stat.mount } else { 0 };
        Self { device: stat.attr.st_dev, inode: stat.attr.st_ino, mount }
    }
}

impl Node {
    pub(super) fn file_type(&self) -> u32 {
        self.file_type
    }

    pub(super) fn place(&self) -> Option<(Slot, &CStr)> {
        self.place.as_ref().map(|(parent, name)| (*parent, &**name))
    }

    fn is(&self, stat: &Stat) -> bool {
        self.key == Key::new(stat) && self.file_type == stat.file_type() && self.birth == stat.birth
    }
}

fn stale() -> io::Error {
    io::Error::from_raw_os_error(libc::ESTALE)
}

impl Inodes {
    /// A table that holds the root alone, and at most `max_nodes` files later, of which `max_anchors` have a descriptor
    /// beyond the request that needed it.
    pub(super) fn new(host: Host, root: OwnedFd, stat: &Stat, max_nodes: usize, max_anchors: usize) -> Self {
        let node = Node {
            key: Key::new(stat),
            birth: stat.birth,
            file_type: stat.file_type(),
            lookups: 1,
            holds: 0,
            place: None,
            anchor: Some(root),
            recent: true,
        };
        let by_key = HashMap::from([(node.key, ROOT)]);
        let mut nodes = Slots::new();
        nodes.insert(node);
        Self { host, nodes, by_key, max_nodes, max_anchors, anchors: 0, unplaced: 0, hand: 0 }
    }

    /// Forgets all but the root.
    pub(super) fn clear(&mut self) {
        let root = self.nodes.remove(ROOT.0);
        self.nodes = Slots::new();
        self.by_key = HashMap::new();
        (self.anchors, self.unplaced, self.hand) = (0, 0, 0);
        if let Some(mut root) = root {
            root.holds = 0;
            self.by_key.insert(root.key, ROOT);
            self.nodes.insert(root);
        }
    }

    /// Changes how many files the guest may know.
    pub(super) fn set_max_nodes(&mut self, max_nodes: usize) {
        self.max_nodes = max_nodes;
    }

    /// How many files the guest knows, with the root.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// How many descriptors the table holds, without the root's.
    #[cfg(test)]
    pub(super) fn anchors(&self) -> usize {
        self.anchors
    }

    /// The guest's number for a node.
    pub(super) fn number(&self, slot: Slot) -> u64 {
        u64::from(self.nodes.generation(slot.0)) << 32 | u64::from(slot.0 + 1)
    }

    /// The node of a guest's number.
    pub(super) fn resolve(&self, number: u64) -> io::Result<Slot> {
        let slot = (number as u32).checked_sub(1).ok_or_else(stale)?;
        let is_it = self.nodes.get(slot).is_some() && u64::from(self.nodes.generation(slot)) == number >> 32;
        if is_it { Ok(Slot(slot)) } else { Err(stale()) }
    }

    /// The node at a slot that is in use.
    pub(super) fn node(&self, slot: Slot) -> io::Result<&Node> {
        self.nodes.get(slot.0).ok_or_else(stale)
    }

    /// Whether a node is in a directory of this name two levels below the root.
    pub(super) fn is_below(&self, mut slot: Slot, name: &[u8]) -> bool {
        let mut below: &[u8] = b"";
        for _ in 0..MAX_DEPTH {
            let Some((parent, own)) = self.node(slot).ok().and_then(Node::place) else { break };
            if parent == ROOT {
                return below == name;
            }
            below = own.to_bytes();
            slot = parent;
        }
        false
    }

    fn node_mut(&mut self, slot: Slot) -> io::Result<&mut Node> {
        self.nodes.get_mut(slot.0).ok_or_else(stale)
    }

    /// The node of the file at `stat`, if the guest knows it.
    pub(super) fn find(&self, stat: &Stat) -> Option<Slot> {
        let slot = *self.by_key.get(&Key::new(stat))?;
        let node = self.node(slot).ok()?;
        // An anchor keeps the inode number from being given away; without one, the time of birth tells.
        (node.file_type == stat.file_type() && (node.anchor.is_some() || node.birth == stat.birth)).then_some(slot)
    }

    /// Counts one more lookup of the file that `stat` tells of and that was found at `place`, or of one without a
    /// place, at `anchor`.
    pub(super) fn enter(
        &mut self,
        stat: &Stat,
        place: Option<(Slot, &CStr)>,
        anchor: Option<OwnedFd>,
    ) -> io::Result<Slot> {
        let slot = match self.find(stat) {
            Some(slot) => slot,
            None => self.add(stat)?,
        };
        if let Some((parent, name)) = place {
            self.set_place(slot, parent, name)?;
        }
        let node = self.node_mut(slot)?;
        node.lookups = node.lookups.saturating_add(1);
        node.birth = stat.birth;
        if let (None, Some(fd)) = (&node.anchor, anchor) {
            node.anchor = Some(fd);
            node.recent = true;
            self.anchors += 1;
        }
        Ok(slot)
    }

    fn add(&mut self, stat: &Stat) -> io::Result<Slot> {
        if self.nodes.len() >= self.max_nodes {
            return Err(io::Error::from_raw_os_error(libc::ENFILE));
        }
        let key = Key::new(stat);
        let slot = Slot(self.nodes.insert(Node {
            key,
            birth: stat.birth,
            file_type: stat.file_type(),
            lookups: 0,
            holds: 0,
            place: None,
            anchor: None,
            recent: false,
        }));
        self.unplaced += 1;
        self.by_key.insert(key, slot);
        Ok(slot)
    }

    /// Notes where a node is found from now on.
    pub(super) fn set_place(&mut self, slot: Slot, parent: Slot, name: &CStr) -> io::Result<()> {
        if slot == ROOT || self.node(slot)?.place() == Some((parent, name)) {
            return Ok(());
        }
        // The host may have moved a directory below one that the table still places in it: the older place is wrong.
        let mut above = parent;
        for _ in 0..MAX_DEPTH {
            let Some((next, _)) = self.node(above)?.place() else { break };
            if next == slot {
                self.unplace(above);
                break;
            }
            above = next;
        }
        self.node_mut(parent)?.holds += 1;
        let old = self.node_mut(slot)?.place.replace((parent, name.into()));
        match old {
            Some((old, _)) => self.release(old),
            None => self.unplaced -= 1,
        }
        Ok(())
    }

    /// Notes that a node is not where it was, nor anywhere else known.
    pub(super) fn unplace(&mut self, slot: Slot) {
        let Some((parent, _)) = self.node_mut(slot).ok().and_then(|node| node.place.take()) else { return };
        self.unplaced += 1;
        if self.unplaced > MAX_UNPLACED {
            self.drop_anchor(slot);
        }
        self.release(parent);
    }

    /// Counts one more handle on a node.
    pub(super) fn hold(&mut self, slot: Slot) {
        if let Ok(node) = self.node_mut(slot) {
            node.holds += 1;
        }
    }

    /// Takes back a [`hold`](Self::hold).
    pub(super) fn release(&mut self, slot: Slot) {
        if let Ok(node) = self.node_mut(slot) {
            node.holds = node.holds.saturating_sub(1);
        }
        self.remove_if_unused(slot);
    }

    /// Takes back `count` lookups.
    pub(super) fn forget(&mut self, slot: Slot, count: u64) {
        if slot == ROOT {
            return;
        }
        if let Ok(node) = self.node_mut(slot) {
            node.lookups = node.lookups.saturating_sub(count);
        }
        self.remove_if_unused(slot);
    }

    fn remove_if_unused(&mut self, mut slot: Slot) {
        // Upwards, since a node's parent may have been kept for it alone.
        while slot != ROOT && self.node(slot).is_ok_and(|node| node.lookups == 0 && node.holds == 0) {
            self.drop_anchor(slot);
            let Some(node) = self.nodes.remove(slot.0) else { return };
            if self.by_key.get(&node.key) == Some(&slot) {
                self.by_key.remove(&node.key);
            }
            match node.place {
                Some((parent, _)) => {
                    slot = parent;
                    if let Ok(parent) = self.node_mut(slot) {
                        parent.holds = parent.holds.saturating_sub(1);
                    }
                }
                None => {
                    self.unplaced -= 1;
                    return;
                }
            }
        }
    }

    /// A descriptor for the node, good until the next [`trim`](Self::trim).
    pub(super) fn anchor(&mut self, slot: Slot) -> io::Result<RawFd> {
        // Up to what has an anchor, and down again.
        let mut way = Vec::new();
        let mut at = slot;
        let mut fd = loop {
            let node = self.node_mut(at)?;
            node.recent = true;
            if let Some(anchor) = &node.anchor {
                break anchor.as_raw_fd();
            }
            let (parent, _) = node.place().ok_or_else(stale)?;
            way.push(at);
            if way.len() > MAX_DEPTH {
                return Err(stale());
            }
            at = parent;
        };
        while let Some(slot) = way.pop() {
            let host = self.host;
            let node = self.node_mut(slot)?;
            let (_, name) = node.place().ok_or_else(stale)?;
            let anchor = host.open_path(fd, name).map_err(gone)?;
            let stat = host.stat(anchor.as_raw_fd())?;
            if !node.is(&stat) {
                return Err(stale());
            }
            fd = anchor.as_raw_fd();
            node.anchor = Some(anchor);
            self.anchors += 1;
        }
        Ok(fd)
    }

    /// What the host tells of a node.
    pub(super) fn stat(&mut self, slot: Slot) -> io::Result<Stat> {
        let node = self.node(slot)?;
        match (&node.anchor, node.place()) {
            (None, Some((parent, _))) => {
                let directory = self.anchor(parent)?;
                let node = self.node(slot)?;
                let (_, name) = node.place().ok_or_else(stale)?;
                let stat = self.host.stat_at(directory, name).map_err(gone)?;
                if node.is(&stat) { Ok(stat) } else { Err(stale()) }
            }
            _ => {
                let fd = self.anchor(slot)?;
                let stat = self.host.stat(fd)?;
                // A union file system gives a file another time of birth when it copies it up.
                self.node_mut(slot)?.birth = stat.birth;
                Ok(stat)
            }
        }
    }

    /// Drops anchors beyond their bound. To be called between requests.
    pub(super) fn trim(&mut self) {
        // A few steps at a time: a request makes few anchors, too.
        for _ in 0..64 {
            if self.anchors <= self.max_anchors {
                return;
            }
            self.hand = (self.hand + 1) % self.nodes.end();
            let slot = Slot(self.hand);
            match self.node_mut(slot) {
                Ok(node) if node.recent => node.recent = false,
                _ => self.evict(slot),
            }
        }
    }

    /// Drops each anchor that was not used since the last call and whose node has a place: anchors keep the host from
    /// freeing and unmounting. Returns whether any that could go is left.
    pub(super) fn sweep(&mut self) -> bool {
        let mut left = false;
        for slot in (1..self.nodes.end()).rev().map(Slot) {
            match self.node_mut(slot) {
                Ok(node) if node.anchor.is_none() || node.place.is_none() => {}
                Ok(node) if node.recent => (node.recent, left) = (false, true),
                _ => self.evict(slot),
            }
        }
        self.shrink();
        left
    }

    /// Gives back room that the table grew into and no longer needs.
    fn shrink(&mut self) {
        self.nodes.shrink();
        if self.by_key.len() < self.by_key.capacity() / 4 {
            self.by_key.shrink_to_fit();
        }
    }

    /// Whether there is a descriptor for a node.
    pub(super) fn is_anchored(&self, slot: Slot) -> bool {
        self.node(slot).is_ok_and(|node| node.anchor.is_some())
    }

    /// Drops a node's anchor if the file is found without.
    pub(super) fn evict(&mut self, slot: Slot) {
        let Ok(node) = self.node(slot) else { return };
        let (Some(anchor), Some((parent, name))) = (&node.anchor, node.place()) else { return };
        // The last chance to learn whether the place is still right, and the time of birth.
        let stat = match self.node(parent).map(|parent| &parent.anchor) {
            Ok(Some(directory)) => self.host.stat_at(directory.as_raw_fd(), name),
            _ => self.host.stat(anchor.as_raw_fd()),
        };
        let key = node.key;
        match stat {
            Ok(stat) if Key::new(&stat) == key => {
                if let Ok(node) = self.node_mut(slot) {
                    node.birth = stat.birth;
                }
                self.drop_anchor(slot);
            }
            _ => {
                self.drop_anchor(slot);
                self.unplace(slot);
            }
        }
    }

    fn drop_anchor(&mut self, slot: Slot) {
        if slot != ROOT && self.node_mut(slot).is_ok_and(|node| node.anchor.take().is_some()) {
            self.anchors -= 1;
        }
    }

    /// All nodes but the root, for saving.
    pub(super) fn iter(&self) -> impl Iterator<Item = (Slot, u32, &Node)> {
        self.nodes.iter().skip(1).map(|(slot, generation, node)| (Slot(slot), generation, node))
    }

    /// Puts back a node that was saved, at the slot where it was, before anything else is in the table. It has no
    /// identity until [`adopt`](Self::adopt) has found it.
    pub(super) fn insert_saved(&mut self, slot: Slot, generation: u32, lookups: u64, file_type: u32) -> bool {
        if slot == ROOT || slot.0 as usize >= self.max_nodes {
            return false;
        }
        let node = Node {
            key: Key::default(),
            birth: 0,
            file_type,
            lookups,
            holds: 0,
            place: None,
            anchor: None,
            recent: false,
        };
        let is_free = self.nodes.insert_at(slot.0, generation, node);
        self.unplaced += usize::from(is_free);
        is_free
    }

    /// Looks up each node that was put back, once all have their places; those not found become stale.
    pub(super) fn adopt(&mut self) {
        for slot in (1..self.nodes.end()).map(Slot) {
            self.adopt_one(slot, 0);
        }
    }

    fn adopt_one(&mut self, slot: Slot, depth: usize) {
        let Ok(node) = self.node(slot) else { return };
        if node.key != Key::default() || node.anchor.is_some() {
            return;
        }
        let Some((parent, _)) = node.place() else { return };
        // Deep enough for any tree that an agent shares, and it bounds the recursion.
        if depth < 64 {
            self.adopt_one(parent, depth + 1);
        }
        let found = self.anchor(parent).and_then(|directory| {
            let node = self.node(slot)?;
            let (_, name) = node.place().ok_or_else(stale)?;
            self.host.stat_at(directory, name)
        });
        match found {
            Ok(stat) if self.node(slot).is_ok_and(|node| node.file_type == stat.file_type()) => {
                let key = Key::new(&stat);
                if let Ok(node) = self.node_mut(slot) {
                    (node.key, node.birth) = (key, stat.birth);
                }
                self.by_key.entry(key).or_insert(slot);
            }
            _ => self.unplace(slot),
        }
    }
}

/// A name that is gone from where the table has it.
fn gone(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR) => stale(),
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::CString;
    use std::fs::{self, File};

    use super::*;

    fn table(max_nodes: usize, max_anchors: usize) -> (tempfile::TempDir, Inodes) {
        let root = tempfile::tempdir().unwrap();
        let host = Host::new().unwrap();
        let fd: OwnedFd = File::open(root.path()).unwrap().into();
        let stat = host.stat(fd.as_raw_fd()).unwrap();
        (root, Inodes::new(host, fd, &stat, max_nodes, max_anchors))
    }

    fn enter(inodes: &mut Inodes, parent: Slot, name: &str) -> io::Result<Slot> {
        let name = CString::new(name).unwrap();
        let directory = inodes.anchor(parent)?;
        let stat = inodes.host.stat_at(directory, &name)?;
        inodes.enter(&stat, Some((parent, &name)), None)
    }

    #[test]
    fn anchors_are_bounded_and_come_back() {
        let (root, mut inodes) = table(1000, 20);
        let slots: Vec<_> = (0..300)
            .map(|i| {
                fs::create_dir(root.path().join(i.to_string())).unwrap();
                let slot = enter(&mut inodes, ROOT, &i.to_string()).unwrap();
                inodes.anchor(slot).unwrap();
                inodes.trim();
                slot
            })
            .collect();
        assert!(inodes.anchors() <= 20, "{}", inodes.anchors());
        for slot in slots {
            assert!(inodes.anchor(slot).is_ok());
            inodes.trim();
        }
        while inodes.sweep() {}
        assert_eq!((inodes.len(), inodes.anchors()), (301, 0));
    }

    #[test]
    fn a_table_that_is_full_takes_no_more() {
        let (root, mut inodes) = table(3, 20);
        for name in ["a", "b", "c"] {
            fs::write(root.path().join(name), "").unwrap();
        }
        let first = enter(&mut inodes, ROOT, "a").unwrap();
        assert_eq!(enter(&mut inodes, ROOT, "b").unwrap(), Slot(2));
        assert_eq!(enter(&mut inodes, ROOT, "c").unwrap_err().raw_os_error(), Some(libc::ENFILE));
        let number = inodes.number(first);
        inodes.forget(first, 1);
        assert!(inodes.resolve(number).is_err());
        assert_eq!(enter(&mut inodes, ROOT, "c").unwrap(), first);
        assert!(inodes.resolve(number).is_err(), "the slot is the same, the number is not");
    }

    #[test]
    fn a_parent_outlives_what_is_placed_in_it() {
        let (root, mut inodes) = table(100, 20);
        fs::create_dir_all(root.path().join("a/b/c")).unwrap();
        let a = enter(&mut inodes, ROOT, "a").unwrap();
        let b = enter(&mut inodes, a, "b").unwrap();
        let c = enter(&mut inodes, b, "c").unwrap();
        inodes.forget(a, 1);
        inodes.forget(b, 1);
        while inodes.sweep() {}
        assert!(inodes.anchor(c).is_ok());
        inodes.forget(c, 1);
        assert_eq!((inodes.len(), inodes.anchors()), (1, 0));
    }

    #[test]
    fn directories_that_the_host_turns_inside_out_make_no_circle() {
        let (root, mut inodes) = table(100, 20);
        let at = |path: &str| root.path().join(path);
        fs::create_dir_all(at("a/b")).unwrap();
        let a = enter(&mut inodes, ROOT, "a").unwrap();
        let b = enter(&mut inodes, a, "b").unwrap();
        inodes.anchor(b).unwrap();
        fs::rename(at("a/b"), at("b")).unwrap();
        fs::rename(at("a"), at("b/a")).unwrap();
        assert_eq!(enter(&mut inodes, b, "a").unwrap(), a);
        assert!(inodes.node(b).unwrap().place().is_none());
        while inodes.sweep() {}
        assert!(inodes.anchor(a).is_ok());
        assert_eq!(enter(&mut inodes, ROOT, "b").unwrap(), b);
        for (slot, lookups) in [(a, 2), (b, 2)] {
            inodes.forget(slot, lookups);
        }
        assert_eq!((inodes.len(), inodes.anchors(), inodes.unplaced), (1, 0, 0));
    }

    #[test]
    fn what_stays_known_keeps_no_room_of_what_was_forgotten_and_no_number_is_given_twice() {
        let (root, mut inodes) = table(10_000, 20);
        for name in ["f", "last"] {
            fs::write(root.path().join(name), "").unwrap();
        }
        let mut stat = inodes.host.stat_at(inodes.anchor(ROOT).unwrap(), c"f").unwrap();
        let slots: Vec<_> = (0..5000)
            .map(|_| {
                stat.attr.st_ino += 1;
                inodes.enter(&stat, Some((ROOT, c"x")), None).unwrap()
            })
            .collect();
        let numbers: Vec<_> = slots.iter().map(|slot| inodes.number(*slot)).collect();
        let last = enter(&mut inodes, ROOT, "last").unwrap();
        for slot in slots {
            inodes.forget(slot, 1);
        }
        inodes.sweep();
        assert_eq!(inodes.nodes.blocks(), 2, "the root's, and that of the last");
        assert!(inodes.by_key.capacity() < 10);
        let again = enter(&mut inodes, ROOT, "f").unwrap();
        assert!(again.0 < last.0 && !numbers.contains(&inodes.number(again)));
    }
}
