//! What of a share's watches goes into a saved VM: what is watched, and the request that waits. The copy watches its own files and tells
//! those who watch that they have missed what happened meanwhile.
//!
//! The form, all integers little-endian: number of watched files (u32), for each its node's slot and what it is watched for (u32); whether
//! a request waits (u32), and [where its answer goes](Answer::save).

use super::super::inodes::Slot;
use super::super::snapshot::Input;
use super::super::state::State;
use super::super::waiting::Answer;
use super::{MAX_WATCHED, Watches};

/// Files to watch, and a request to answer, once the files are found.
#[derive(Default)]
pub(in super::super) struct SavedWatches {
    watched: Vec<(Slot, u32)>,
    waiting: Option<Answer>,
}

impl Watches {
    /// Adds what [`SavedWatches::parse`] takes.
    pub(in super::super) fn save(&self, out: &mut Vec<u8>) {
        out.extend((self.watched.len() as u32).to_le_bytes());
        for (slot, watched) in &self.watched {
            out.extend(slot.0.to_le_bytes());
            out.extend(watched.mask.to_le_bytes());
        }
        out.extend(u32::from(self.waiting.is_some()).to_le_bytes());
        if let Some(answer) = &self.waiting {
            answer.save(out);
        }
    }
}

impl SavedWatches {
    /// `None` if it does not parse.
    pub(in super::super) fn parse(input: &mut Input<'_>) -> Option<Self> {
        let mut saved = Self::default();
        let count = input.u32()? as usize;
        for _ in 0..(count <= MAX_WATCHED).then_some(count)? {
            saved.watched.push((Slot(input.u32()?), input.u32()?));
        }
        if input.u32()? != 0 {
            saved.waiting = Some(Answer::parse(input)?);
        }
        Some(saved)
    }
}

impl State {
    /// Watches what was watched, as far as it is found.
    pub(in super::super) fn watch_saved(&mut self) {
        let SavedWatches { watched, waiting } = std::mem::take(&mut self.saved_watches);
        self.watches.waiting = waiting;
        for (slot, mask) in watched {
            if let Err(error) = self.start_watching(slot, mask) {
                self.watches.warn(&error);
            }
        }
        self.lose_events();
    }
}
