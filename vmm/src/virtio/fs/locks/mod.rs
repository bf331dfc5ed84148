//! Locks on files that hold between guests and with the host: those of fcntl(2), which an owner has on stretches of
//! bytes, and those of flock(2), which an open file has on the whole.
//!
//! Each owner's locks are on an open file description of its own on the host: for flock the handle's own, for fcntl one
//! more (`F_OFD_SETLK`). So the host's kernel judges all conflicts but those within the guest, which are looked for here first, since
//! only here is known who waits for whom.
//!
//! ```text
//!   SETLKW ──▶ had ──▶ answered
//!     │  ▲
//!     │  └─────────── tried again at each unlock in the guest ◀─┐
//!     ├──▶ waits for the guest ─────────────────────────────────┘
//!     ├──▶ waits outside: in a thread, or without one left tried again every tenth of a second
//!     └──▶ EDEADLK, ENOLCK (too many wait)
//!   a wait ends early, with EINTR, at FUSE_INTERRUPT
//! ```
//!
//! The protocol does not say whether an owner is a process or an open file description. A process's locks go when it closes
//! any file (`FUSE_FLUSH` with the owner), those of a description when it is closed (`FUSE_RELEASE`): an owner also goes with the
//! handle that it used last, which a process would have flushed before.
//!
//! **Bounds.** [`MAX_WAITING`] requests wait; [`MAX_SEGMENTS`] stretches are locked; owners have as many
//! descriptors as [`Bounds`](super::state::Bounds) says. Beyond, it is `ENOLCK`.
//!
//! **What cannot be locked on the host.** An owner whose file the VMM may not open a second time has its locks within the guest only.

pub(super) mod ranges;
pub(super) mod requests;
pub(super) mod snapshot;
mod waits;

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use self::ranges::{Kind, Range, Ranges, Segment};
use self::waits::{Waits, Wanted};
use super::host::Host;
use super::inodes::Slot;
use super::state::{State, errno};
use super::waiting::Answer;

/// Requests that wait for a lock: a quarter of the queue, each an entry of it.
pub(super) const MAX_WAITING: usize = super::REQUEST_SIZE as usize / 4;
/// Stretches that are locked: each is memory of the host's kernel.
const MAX_SEGMENTS: usize = 4096;
/// Interrupts that came before their requests, which another queue has: as many as the one for interrupts holds.
const MAX_EARLY: usize = super::HIPRIO_SIZE as usize;
/// How often who waits outside without a thread looks.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Names a wait.
pub(super) type Token = u64;

/// Who holds locks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    /// Of fcntl: a process, or an open file, by a number of the guest's.
    Bytes(u64),
    /// Of flock: an open file, by its handle.
    Whole(u64),
}

impl Owner {
    /// Locks of fcntl and flock do not meet.
    fn meets(self, other: Self) -> bool {
        self != other && matches!(self, Self::Bytes(_)) == matches!(other, Self::Bytes(_))
    }
}

/// A lock that somebody wants.
#[derive(Clone, Copy, Debug)]
pub(super) struct Request {
    pub(super) node: Slot,
    pub(super) handle: u64,
    pub(super) owner: Owner,
    pub(super) wanted: Segment,
    /// The process that asks, for others to be told.
    pub(super) process: u32,
}

/// What one owner holds on one file.
pub(super) struct Holder {
    pub(super) owner: Owner,
    /// That it used last.
    pub(super) handle: u64,
    pub(super) process: u32,
    pub(super) ranges: Ranges,
    /// Of fcntl: the open file that the host knows it by; `None` where that cannot be.
    file: Option<File>,
    /// How that was opened.
    access: i32,
}

/// Where a request waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Where {
    /// For another owner of the guest.
    Guest,
    /// For somebody else, without a thread.
    Outside,
    Thread,
}

struct Waiter {
    token: Token,
    request: Request,
    answer: Answer,
    at: Where,
}

/// What trying for a lock comes to.
enum Attempt {
    Held,
    Guest,
    Outside,
}

/// The locks of a share.
pub(super) struct Locks {
    files: HashMap<Slot, Vec<Holder>>,
    waiting: Vec<Waiter>,
    /// Interrupts whose requests have not been seen.
    early: VecDeque<u64>,
    /// Answers to give.
    done: Vec<(Answer, i32)>,
    /// Waits that were ended in their threads, which may have got what they waited for.
    ended: Vec<(Token, Request)>,
    waits: Waits,
    next_token: Token,
    max_owners: usize,
    looked: Instant,
}

impl Locks {
    /// No locks, of owners that have at most `max_owners` descriptors. `wake` is made readable when [`State::look_at_locks`] is to be
    /// called.
    pub(super) fn new(host: Host, wake: Arc<EventFd>, max_owners: usize) -> Self {
        Self {
            files: HashMap::new(),
            waiting: Vec::new(),
            early: VecDeque::new(),
            done: Vec::new(),
            ended: Vec::new(),
            waits: Waits::new(host, wake),
            next_token: 0,
            max_owners,
            looked: Instant::now(),
        }
    }

    /// The guest has no locks any more and waits for none.
    pub(super) fn clear(&mut self) {
        self.waits.clear();
        (self.files, self.early) = (HashMap::new(), VecDeque::new());
        (self.waiting, self.done, self.ended) = (Vec::new(), Vec::new(), Vec::new());
    }

    /// All that is held.
    fn iter(&self) -> impl Iterator<Item = (Slot, &Holder)> {
        let held = self.files.iter().flat_map(|(node, holders)| holders.iter().map(|holder| (*node, holder)));
        held.filter(|(_, holder)| !holder.ranges.is_empty())
    }

    fn holder(&mut self, node: Slot, owner: Owner) -> Option<&mut Holder> {
        self.files.get_mut(&node)?.iter_mut().find(|holder| holder.owner == owner)
    }

    fn holders(&self, node: Slot) -> &[Holder] {
        self.files.get(&node).map_or(&[], Vec::as_slice)
    }

    /// Who of the guest keeps a request from its lock, and by what.
    fn blockers<'a>(&'a self, request: &'a Request) -> impl Iterator<Item = (&'a Holder, Segment)> {
        self.holders(request.node)
            .iter()
            .filter(|holder| holder.owner.meets(request.owner))
            .filter_map(|holder| Some((holder, holder.ranges.conflict(&request.wanted)?)))
    }

    /// Whether a request would wait for its own owner in the end.
    fn is_deadlock(&self, request: &Request) -> bool {
        let mut seen = vec![false; self.waiting.len()];
        let mut todo = vec![request];
        while let Some(next) = todo.pop() {
            for (holder, _) in self.blockers(next) {
                if holder.owner == request.owner {
                    return true;
                }
                for (waiter, seen) in self.waiting.iter().zip(&mut seen) {
                    if waiter.request.owner == holder.owner && !*seen {
                        *seen = true;
                        todo.push(&waiter.request);
                    }
                }
            }
        }
        false
    }

    fn count_segments(&self) -> usize {
        self.files.values().flatten().map(|holder| holder.ranges.len()).sum()
    }

    /// Threads that wait.
    #[cfg(test)]
    pub(super) fn threads(&self) -> usize {
        self.waits.count()
    }

    /// Those whose files are beside the handles.
    fn count_owners(&self) -> usize {
        self.files.values().flatten().filter(|holder| matches!(holder.owner, Owner::Bytes(_))).count()
    }

    /// Lets go of owners that hold nothing and wait for nothing.
    fn drop_idle(&mut self) {
        let waiting = &self.waiting;
        for (node, holders) in &mut self.files {
            holders.retain(|holder| {
                let waits = |waiter: &Waiter| waiter.request.node == *node && waiter.request.owner == holder.owner;
                !holder.ranges.is_empty() || waiting.iter().any(waits)
            });
        }
        self.files.retain(|_, holders| !holders.is_empty());
    }

    /// Answers a request that waits.
    fn finish(&mut self, index: usize, result: io::Result<()>) {
        let waiter = self.waiting.remove(index);
        if waiter.at == Where::Thread {
            self.waits.end(waiter.token);
            self.ended.push((waiter.token, waiter.request));
        }
        self.answer(waiter.answer, result);
    }

    fn answer(&mut self, answer: Answer, result: io::Result<()>) {
        let error = result.err().map_or(0, |error| error.raw_os_error().unwrap_or(libc::EIO));
        self.done.push((answer, error));
    }

    /// When to call [`State::look_at_locks`] at the latest.
    pub(super) fn look_within(&self) -> Option<Duration> {
        self.waiting.iter().any(|waiter| waiter.at == Where::Outside).then_some(LOOK_EVERY)
    }

    /// Notes that all requests have been seen that there were when interrupts came.
    pub(super) fn forget_early(&mut self) {
        self.early.clear();
    }

    /// Takes the answers that are due, each with its error or 0.
    pub(super) fn take_answers(&mut self) -> Vec<(Answer, i32)> {
        std::mem::take(&mut self.done)
    }
}

impl State {
    /// Judges what a guest asks for of an open file: whether that may have such a lock. `kind` is `None` for unlocking.
    pub(super) fn check_lock(&mut self, node: u64, handle: u64, owner: Owner, kind: Option<Kind>) -> io::Result<Slot> {
        let slot = self.inodes.resolve(node)?;
        let access = self.handles.get(handle, slot)?.flags & libc::O_ACCMODE;
        if self.inodes.node(slot)?.file_type() != libc::S_IFREG {
            return Err(errno(libc::EBADF));
        }
        // The guest's kernel has seen to it, for what it is worth. Any open file will do for flock.
        match (owner, kind) {
            (Owner::Bytes(_), Some(Kind::Shared)) if access == libc::O_WRONLY => Err(errno(libc::EBADF)),
            (Owner::Bytes(_), Some(Kind::Exclusive)) if access == libc::O_RDONLY => Err(errno(libc::EBADF)),
            _ => Ok(slot),
        }
    }

    /// Takes a lock, or says that it cannot be had now (`EAGAIN`).
    pub(super) fn lock(&mut self, request: &Request) -> io::Result<()> {
        let attempt = self.try_lock(request);
        self.retry(request.node);
        match attempt? {
            Attempt::Held => Ok(()),
            Attempt::Guest | Attempt::Outside => Err(errno(libc::EAGAIN)),
        }
    }

    /// Takes a lock, or has the request wait for it: `None`.
    pub(super) fn lock_or_wait(
        &mut self,
        request: &Request,
        answer: impl FnOnce() -> Answer,
    ) -> Option<io::Result<()>> {
        let attempt = self.try_lock(request);
        let at = match attempt {
            Ok(Attempt::Held) => {
                self.retry(request.node);
                return Some(Ok(()));
            }
            Ok(Attempt::Guest) => Where::Guest,
            Ok(Attempt::Outside) => Where::Outside,
            Err(error) => {
                self.retry(request.node);
                return Some(Err(error));
            }
        };
        let answer = answer();
        let refused = if let Some(index) = self.locks.early.iter().position(|unique| *unique == answer.unique) {
            self.locks.early.remove(index);
            Some(libc::EINTR)
        } else if matches!(request.owner, Owner::Bytes(_)) && self.locks.is_deadlock(request) {
            Some(libc::EDEADLK)
        } else {
            (self.locks.waiting.len() >= MAX_WAITING).then_some(libc::ENOLCK)
        };
        if refused.is_none() {
            self.locks.next_token += 1;
            let token = self.locks.next_token;
            self.locks.waiting.push(Waiter { token, request: *request, answer, at });
            if at == Where::Outside {
                self.wait_outside(self.locks.waiting.len() - 1);
            }
        }
        // An open file loses one lock of flock when it asks for another.
        self.retry(request.node);
        refused.map(|number| Err(errno(number)))
    }

    /// Gives up an owner's locks on a stretch.
    pub(super) fn unlock(&mut self, node: Slot, owner: Owner, range: Range) -> io::Result<()> {
        let (host, segments) = (self.host, self.locks.count_segments());
        let whole = self.whole_file(node, owner);
        let Some(holder) = self.locks.holder(node, owner) else { return Ok(()) };
        // A hole makes two of one. Who ends up here has made nothing but holes.
        if segments >= 2 * MAX_SEGMENTS && holder.ranges.within(range).len() == 1 {
            return Err(errno(libc::ENOLCK));
        }
        match (&holder.file, whole) {
            (_, Some(fd)) => host.lock_whole(fd, None, false)?,
            (Some(file), None) => host.lock(file, range, None)?,
            (None, None) => {}
        }
        holder.ranges.set(range, None);
        self.retry(node);
        Ok(())
    }

    /// A lock that keeps a request from its own, and the guest's process that has it, or 0.
    pub(super) fn find_conflict(&mut self, request: &Request) -> io::Result<Option<(Segment, u32)>> {
        if let Some((holder, segment)) = self.locks.blockers(request).next() {
            return Ok(Some((segment, holder.process)));
        }
        let host = self.host;
        let own = self.locks.holder(request.node, request.owner).and_then(|holder| holder.file.as_ref());
        let file = match own {
            Some(file) => file,
            // Has no such locks, so that all that are found are others'.
            None => &self.handles.get(request.handle, request.node)?.file,
        };
        let found = host.find_lock(file, request.wanted.range, request.wanted.kind)?;
        // A process of the host has no number in the guest.
        Ok(found.map(|segment| (segment, 0)))
    }

    /// Gives up all that a process has locked of a file, of which it closes one descriptor; returns whether there was anything.
    pub(super) fn flush_locks(&mut self, node: u64, owner: u64) -> bool {
        let Ok(slot) = self.inodes.resolve(node) else { return false };
        self.drop_holders(slot, |holder| holder.owner == Owner::Bytes(owner))
    }

    /// Gives up what was locked through a handle that is about to go.
    pub(super) fn release_locks(&mut self, node: Slot, handle: u64) {
        // Only who breaks the rules lets go of what is waited with.
        let waits = |waiter: &Waiter| waiter.request.node == node && waiter.request.handle == handle;
        while let Some(index) = self.locks.waiting.iter().position(waits) {
            self.locks.finish(index, Err(errno(libc::EBADF)));
        }
        self.drop_holders(node, |holder| holder.handle == handle);
    }

    fn drop_holders(&mut self, node: Slot, which: impl Fn(&Holder) -> bool) -> bool {
        let host = self.host;
        let Some(holders) = self.locks.files.get_mut(&node) else { return false };
        let dropped: Vec<Holder> = holders.extract_if(.., |holder| which(holder)).collect();
        if holders.is_empty() {
            self.locks.files.remove(&node);
        }
        for holder in &dropped {
            // Not left to closing the file: a thread that waits may have it open too, and the handle is still there.
            match (&holder.file, self.whole_file(node, holder.owner)) {
                (_, Some(fd)) => drop(host.lock_whole(fd, None, false)),
                (Some(file), None) => drop(host.lock(file, Range::ALL, None)),
                (None, None) => {}
            }
        }
        if !dropped.is_empty() {
            self.retry(node);
        }
        !dropped.is_empty()
    }

    /// Ends a request's wait.
    pub(super) fn interrupt_lock(&mut self, unique: u64) {
        if let Some(index) = self.locks.waiting.iter().position(|waiter| waiter.answer.unique == unique) {
            self.locks.finish(index, Err(errno(libc::EINTR)));
            return;
        }
        if self.locks.early.len() == MAX_EARLY {
            self.locks.early.pop_front();
        }
        self.locks.early.push_back(unique);
    }

    /// Goes on with what threads have to tell, and looks for those who wait without one.
    pub(super) fn look_at_locks(&mut self) {
        while let Some((token, result)) = self.locks.waits.report() {
            if let Some(index) = self.locks.ended.iter().position(|(ended, _)| *ended == token) {
                let (_, request) = self.locks.ended.swap_remove(index);
                if result.is_ok() {
                    self.undo(&request);
                }
                self.retry(request.node);
            } else if let Some(index) = self.locks.waiting.iter().position(|waiter| waiter.token == token) {
                self.locks.waiting[index].at = Where::Outside;
                match result {
                    Err(error) if error.raw_os_error() != Some(libc::EINTR) => self.locks.finish(index, Err(error)),
                    _ => drop(self.try_waiter(index)),
                }
            }
        }
        if self.locks.waiting.is_empty() || self.locks.looked.elapsed() < LOOK_EVERY {
            return;
        }
        self.locks.looked = Instant::now();
        let mut index = 0;
        while index < self.locks.waiting.len() {
            if self.locks.waiting[index].at != Where::Outside || !self.try_waiter(index) {
                index += 1;
            }
        }
    }

    /// Serves who waits for what may have become free in the guest.
    fn retry(&mut self, node: Slot) {
        let mut index = 0;
        while index < self.locks.waiting.len() {
            let waiter = &self.locks.waiting[index];
            if waiter.request.node != node || waiter.at == Where::Thread || !self.try_waiter(index) {
                index += 1;
            }
        }
    }

    /// Tries for what a request waits for; returns whether it was answered.
    fn try_waiter(&mut self, index: usize) -> bool {
        let request = self.locks.waiting[index].request;
        match self.try_lock(&request) {
            Ok(Attempt::Held) => self.locks.finish(index, Ok(())),
            Ok(Attempt::Guest) => {
                self.locks.waiting[index].at = Where::Guest;
                return false;
            }
            Ok(Attempt::Outside) => {
                self.locks.waiting[index].at = Where::Outside;
                self.wait_outside(index);
                return false;
            }
            Err(error) => self.locks.finish(index, Err(error)),
        }
        true
    }

    /// Has a thread wait, if there is one.
    fn wait_outside(&mut self, index: usize) {
        let Waiter { token, request, .. } = self.locks.waiting[index];
        let fd = match self.whole_file(request.node, request.owner) {
            Some(_) => self.handles.get(request.handle, request.node).ok().map(|handle| handle.file.as_fd()),
            None => {
                self.locks.holder(request.node, request.owner).and_then(|holder| holder.file.as_ref()).map(File::as_fd)
            }
        };
        let Some(Ok(own)) = fd.map(|fd| fd.try_clone_to_owned()) else { return };
        let own: OwnedFd = own;
        let Segment { range, kind } = request.wanted;
        let wanted = match request.owner {
            Owner::Bytes(_) => Wanted::Bytes(range, kind),
            Owner::Whole(_) => Wanted::Whole(kind),
        };
        if self.locks.waits.start(token, own, wanted) {
            self.locks.waiting[index].at = Where::Thread;
        }
    }

    /// Makes the host hold what the table says, after a wait that was given up got its lock all the same.
    fn undo(&mut self, request: &Request) {
        let host = self.host;
        let whole = self.whole_file(request.node, request.owner);
        let Some(holder) = self.locks.holder(request.node, request.owner) else {
            if let Some(fd) = whole {
                let _ = host.lock_whole(fd, None, false);
            }
            return;
        };
        for (range, kind) in holder.ranges.within(request.wanted.range) {
            let _ = match (&holder.file, whole) {
                (_, Some(fd)) => host.lock_whole(fd, kind, false),
                (Some(file), None) => host.lock(file, range, kind),
                (None, None) => Ok(()),
            };
        }
    }

    /// The descriptor of a file that is locked by flock.
    fn whole_file(&mut self, node: Slot, owner: Owner) -> Option<i32> {
        let Owner::Whole(handle) = owner else { return None };
        self.handles.get(handle, node).ok().map(|handle| handle.file.as_raw_fd())
    }

    fn try_lock(&mut self, request: &Request) -> io::Result<Attempt> {
        let in_guest = self.locks.blockers(request).next().is_some();
        let Segment { range, kind } = request.wanted;
        let host = self.host;
        let own = self.locks.holder(request.node, request.owner);
        let held = own.map_or(0, |holder| holder.ranges.len());
        // At most two more: a stretch of one kind cut in three.
        if self.locks.count_segments() + 2 > MAX_SEGMENTS {
            return Err(errno(libc::ENOLCK));
        }
        if let Some(fd) = self.whole_file(request.node, request.owner) {
            // Asking for another kind of lock gives up the one held, whether the other can be had or not.
            let had = if in_guest {
                if held > 0 {
                    host.lock_whole(fd, None, false)?;
                }
                Err(Attempt::Guest)
            } else {
                match host.lock_whole(fd, Some(kind), false) {
                    Ok(()) => Ok(()),
                    Err(error) if error.raw_os_error() == Some(libc::EWOULDBLOCK) => Err(Attempt::Outside),
                    Err(error) => return Err(error),
                }
            };
            let holder = self.enter_holder(request)?;
            holder.ranges.set(range, had.is_ok().then_some(kind));
            return Ok(had.err().unwrap_or(Attempt::Held));
        }
        if in_guest {
            return Ok(Attempt::Guest);
        }
        self.open_for_locks(request)?;
        let holder = self.enter_holder(request)?;
        if let Some(file) = &holder.file {
            match host.lock(file, range, Some(kind)) {
                Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
                    return Ok(Attempt::Outside);
                }
                result => result?,
            }
        }
        holder.ranges.set(range, Some(kind));
        Ok(Attempt::Held)
    }

    /// The owner of a request among those who hold locks.
    fn enter_holder(&mut self, request: &Request) -> io::Result<&mut Holder> {
        if self.locks.holder(request.node, request.owner).is_none() {
            self.locks.files.entry(request.node).or_default().push(Holder {
                owner: request.owner,
                handle: request.handle,
                process: request.process,
                ranges: Ranges::default(),
                file: None,
                access: libc::O_RDONLY,
            });
        }
        let holder = self.locks.holder(request.node, request.owner).ok_or_else(|| errno(libc::ENOLCK))?;
        (holder.handle, holder.process) = (request.handle, request.process);
        Ok(holder)
    }

    /// Sees to it that an owner has an open file that can be locked as it asks.
    fn open_for_locks(&mut self, request: &Request) -> io::Result<()> {
        let (host, max) = (self.host, self.locks.max_owners);
        if let Some(holder) = self.locks.holder(request.node, request.owner) {
            let enough = match request.wanted.kind {
                Kind::Shared => holder.access != libc::O_WRONLY,
                Kind::Exclusive => holder.access != libc::O_RDONLY,
            };
            if enough || holder.file.is_none() {
                return Ok(());
            }
        }
        if self.locks.count_owners() >= max {
            self.locks.drop_idle();
        }
        if self.locks.count_owners() >= max {
            return Err(errno(libc::ENOLCK));
        }
        let handle = self.handles.get(request.handle, request.node)?;
        let fd = handle.file.as_raw_fd();
        let mut access = handle.flags & libc::O_ACCMODE;
        // One open file is to do for all that the owner will ask for. Not for writing where the guest does not, which the host's
        // programs would see.
        let mut file = None;
        if access != libc::O_RDONLY {
            file = host.reopen(fd, libc::O_RDWR).ok();
        }
        match file {
            Some(_) => access = libc::O_RDWR,
            None => file = host.reopen(fd, access).ok(),
        }
        let holder = self.enter_holder(request)?;
        // Only shared locks are held on a file that is open for reading: they can be held twice for a moment.
        if let Some(file) = &file {
            for held in holder.ranges.iter() {
                host.lock(file, held.range, Some(held.kind)).map_err(|_| errno(libc::ENOLCK))?;
            }
        }
        (holder.file, holder.access) = (file, access);
        Ok(())
    }
}
