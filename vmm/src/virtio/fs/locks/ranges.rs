//! The locks of one owner on one file: stretches of bytes, none of which overlap.

/// How a lock is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Kind {
    /// By any number of owners at once (`F_RDLCK`, `LOCK_SH`).
    Shared,
    /// By one alone (`F_WRLCK`, `LOCK_EX`).
    Exclusive,
}

/// Bytes from `start` to `end`, both of them included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) struct Range {
    start: u64,
    end: u64,
}

/// Bytes that are locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) struct Segment {
    pub(in super::super) range: Range,
    pub(in super::super) kind: Kind,
}

/// The table, in order of place; neighbours of one kind are one segment.
#[derive(Debug, Default, PartialEq, Eq)]
pub(in super::super) struct Ranges(Vec<Segment>);

impl Range {
    /// A whole file, whatever its length will be.
    pub(in super::super) const ALL: Self = Self { start: 0, end: i64::MAX as u64 };

    /// `None` for what ends before it starts or beyond what a file can have.
    pub(in super::super) fn new(start: u64, end: u64) -> Option<Self> {
        (start <= end && end <= Self::ALL.end).then_some(Self { start, end })
    }

    pub(in super::super) fn start(self) -> u64 {
        self.start
    }

    pub(in super::super) fn end(self) -> u64 {
        self.end
    }

    fn overlaps(self, other: Self) -> bool {
        self.start <= other.end && other.start <= self.end
    }
}

impl Segment {
    /// Whether two owners cannot hold both.
    fn conflicts(&self, other: &Self) -> bool {
        let alone = self.kind == Kind::Exclusive || other.kind == Kind::Exclusive;
        alone && self.range.overlaps(other.range)
    }
}

impl Ranges {
    pub(in super::super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(in super::super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(in super::super) fn iter(&self) -> impl Iterator<Item = Segment> {
        self.0.iter().copied()
    }

    /// The first segment here that another owner's `wanted` conflicts with.
    pub(in super::super) fn conflict(&self, wanted: &Segment) -> Option<Segment> {
        self.iter().find(|held| held.conflicts(wanted))
    }

    /// Makes `range` what is wanted, whatever of it was held in which way; `None` is not at all.
    pub(in super::super) fn set(&mut self, range: Range, kind: Option<Kind>) {
        let mut next: Vec<Segment> = Vec::with_capacity(self.0.len() + 2);
        let before = self.0.iter().filter_map(|held| {
            let end = held.range.end.min(range.start.checked_sub(1)?);
            Some(Segment { range: Range::new(held.range.start, end)?, ..*held })
        });
        let after = self.0.iter().filter_map(|held| {
            let start = held.range.start.max(range.end + 1);
            Some(Segment { range: Range::new(start, held.range.end)?, ..*held })
        });
        let wanted = kind.map(|kind| Segment { range, kind });
        for segment in before.chain(wanted).chain(after) {
            match next.last_mut() {
                Some(last) if last.kind == segment.kind && last.range.end + 1 == segment.range.start => {
                    last.range.end = segment.range.end;
                }
                _ => next.push(segment),
            }
        }
        self.0 = next;
    }

    /// What to do to a file's real locks in `range` so that they are what stands here.
    pub(in super::super) fn within(&self, range: Range) -> Vec<(Range, Option<Kind>)> {
        let mut steps = vec![(range, None)];
        for held in self.iter().filter(|held| held.range.overlaps(range)) {
            let start = held.range.start.max(range.start);
            let end = held.range.end.min(range.end);
            let Some((rest, _)) = steps.pop() else { break };
            steps.extend(start.checked_sub(1).and_then(|end| Range::new(rest.start, end)).map(|gap| (gap, None)));
            steps.push((Range { start, end }, Some(held.kind)));
            match Range::new(end + 1, range.end) {
                Some(rest) => steps.push((rest, None)),
                None => break,
            }
        }
        steps
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BYTES: u64 = 24;

    fn any_kind() -> impl Strategy<Value = Option<Kind>> {
        prop_oneof![Just(None), Just(Some(Kind::Shared)), Just(Some(Kind::Exclusive))]
    }

    fn at(ranges: &Ranges, byte: u64) -> Option<Kind> {
        let byte = Range { start: byte, end: byte };
        ranges.iter().find(|held| held.range.overlaps(byte)).map(|held| held.kind)
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// The model: how each byte is held.
        #[test]
        fn every_byte_is_held_as_it_was_set_last(
            steps in proptest::collection::vec((0..BYTES, 0..BYTES, any_kind()), 1..30),
            asked in (0..BYTES, 0..BYTES),
        ) {
            let mut ranges = Ranges::default();
            let mut model = [None; BYTES as usize];
            for (a, b, kind) in steps {
                let range = Range::new(a.min(b), a.max(b)).unwrap();
                ranges.set(range, kind);
                model[range.start as usize..=range.end as usize].fill(kind);
                for byte in 0..BYTES {
                    prop_assert_eq!(at(&ranges, byte), model[byte as usize]);
                }
                for pair in ranges.0.windows(2) {
                    prop_assert!(pair[0].range.end < pair[1].range.start);
                    let touch = pair[0].range.end + 1 == pair[1].range.start;
                    prop_assert!(!touch || pair[0].kind != pair[1].kind);
                }
            }
            let range = Range::new(asked.0.min(asked.1), asked.0.max(asked.1)).unwrap();
            let mut byte = range.start;
            for (part, kind) in ranges.within(range) {
                prop_assert_eq!(part.start, byte);
                for inside in part.start..=part.end {
                    prop_assert_eq!(model[inside as usize], kind);
                }
                byte = part.end + 1;
            }
            prop_assert_eq!(byte, range.end + 1);
            for kind in [Kind::Shared, Kind::Exclusive] {
                let conflict = model[range.start as usize..=range.end as usize]
                    .iter()
                    .flatten()
                    .any(|held| *held == Kind::Exclusive || kind == Kind::Exclusive);
                prop_assert_eq!(ranges.conflict(&Segment { range, kind }).is_some(), conflict);
            }
        }
    }

    #[test]
    fn ranges_end_where_files_end() {
        assert!(Range::new(5, 4).is_none());
        assert!(Range::new(0, u64::MAX).is_none());
        assert!(Range::new(u64::MAX, u64::MAX).is_none());
        let mut ranges = Ranges::default();
        ranges.set(Range::ALL, Some(Kind::Shared));
        ranges.set(Range::new(Range::ALL.end, Range::ALL.end).unwrap(), Some(Kind::Exclusive));
        assert_eq!(ranges.len(), 2);
        assert_eq!(ranges.within(Range::ALL).len(), 2);
        ranges.set(Range::ALL, None);
        assert!(ranges.is_empty());
    }
}
