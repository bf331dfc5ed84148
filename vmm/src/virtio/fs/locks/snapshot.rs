//! What of a share's locks goes into a saved VM: what is held and who waits. The copy takes the locks again; one that somebody else
//! has by then is lost, which its owner is not told, as with a server of files that was away. Who waited waits again.
//!
//! The form, all integers little-endian: number of stretches held (u32), for each its lock; number of requests that wait (u32), for each
//! its lock, and [where its answer goes](Answer::save).
//! A lock is node's slot and whether it is of flock (u32), owner, handle, start and end (u64), whether it is exclusive and process (u32).

use super::super::inodes::Slot;
use super::super::snapshot::Input;
use super::super::state::State;
use super::super::waiting::Answer;
use super::ranges::{Kind, Range, Segment};
use super::{Locks, MAX_SEGMENTS, MAX_WAITING, Owner, Request};

/// Locks to take, and requests to serve, once the files are open again.
#[derive(Default)]
pub(in super::super) struct SavedLocks {
    held: Vec<Request>,
    waiting: Vec<(Request, Answer)>,
}

fn put(out: &mut Vec<u8>, value: usize) {
    out.extend((value as u32).to_le_bytes());
}

impl Request {
    fn save(&self, out: &mut Vec<u8>) {
        let (owner, whole) = match self.owner {
            Owner::Bytes(owner) => (owner, 0),
            Owner::Whole(handle) => (handle, 1),
        };
        put(out, self.node.0 as usize);
        put(out, whole);
        for value in [owner, self.handle, self.wanted.range.start(), self.wanted.range.end()] {
            out.extend(value.to_le_bytes());
        }
        put(out, usize::from(self.wanted.kind == Kind::Exclusive));
        put(out, self.process as usize);
    }

    fn parse(input: &mut Input<'_>) -> Option<Self> {
        let (node, whole) = (Slot(input.u32()?), input.u32()? != 0);
        let (owner, handle) = (input.u64()?, input.u64()?);
        let range = Range::new(input.u64()?, input.u64()?)?;
        let kind = if input.u32()? == 0 { Kind::Shared } else { Kind::Exclusive };
        let owner = if whole { Owner::Whole(owner) } else { Owner::Bytes(owner) };
        Some(Self { node, handle, owner, wanted: Segment { range, kind }, process: input.u32()? })
    }
}

impl Locks {
    /// Adds what [`SavedLocks::parse`] takes.
    pub(in super::super) fn save(&self, out: &mut Vec<u8>) {
        let held: Vec<Request> = self
            .iter()
            .flat_map(|(node, holder)| {
                let (owner, handle, process) = (holder.owner, holder.handle, holder.process);
                holder.ranges.iter().map(move |wanted| Request { node, handle, owner, wanted, process })
            })
            .collect();
        put(out, held.len());
        for request in held {
            request.save(out);
        }
        put(out, self.waiting.len());
        for waiter in &self.waiting {
            waiter.request.save(out);
            waiter.answer.save(out);
        }
    }
}

impl SavedLocks {
    /// `None` if it does not parse.
    pub(in super::super) fn parse(input: &mut Input<'_>) -> Option<Self> {
        let mut saved = Self::default();
        let held = input.u32()? as usize;
        let most = 2 * MAX_SEGMENTS;
        for _ in 0..(held <= most).then_some(held)? {
            saved.held.push(Request::parse(input)?);
        }
        let waiting = input.u32()? as usize;
        for _ in 0..(waiting <= MAX_WAITING).then_some(waiting)? {
            let request = Request::parse(input)?;
            saved.waiting.push((request, Answer::parse(input)?));
        }
        Some(saved)
    }
}

impl State {
    /// Takes the locks that were saved, as far as they can be had, and has those wait who waited.
    pub(in super::super) fn lock_saved(&mut self) {
        let saved = std::mem::take(&mut self.saved_locks);
        let is_open = |state: &mut Self, request: &Request| state.handles.get(request.handle, request.node).is_ok();
        let mut lost = 0;
        for request in &saved.held {
            if !is_open(self, request) || self.lock(request).is_err() {
                lost += 1;
            }
        }
        if lost > 0 {
            crate::log::warn(format_args!("{lost} locks that the VM had when it was saved are somebody else's now"));
        }
        for (request, answer) in saved.waiting {
            let result = if is_open(self, &request) {
                self.lock_or_wait(&request, || answer.clone())
            } else {
                Some(Err(super::super::state::errno(libc::EBADF)))
            };
            if let Some(result) = result {
                self.locks.answer(answer, result);
            }
        }
    }
}
