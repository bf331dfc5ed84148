//! Sparse files: GNU's old header extension and the three pax encodings.

use super::header::{BLOCK, Header, number};
use super::pax::{Pax, decimal};
use super::{Input, Reader, TarError, printable};

/// Pieces that one sparse file may have: sixteen mebibytes of map.
const SEGMENT_CAP: u64 = 1 << 20;

/// A piece of a sparse file that is data; everything between pieces is a hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) struct Segment {
    pub(in super::super) offset: u64,
    pub(in super::super) length: u64,
}

type Map = (u64, Vec<Segment>);

impl<I: Input> Reader<I> {
    /// The map of a type `S` entry: four pieces in the header, 21 in each extension block.
    pub(super) fn old_sparse_map(&mut self, header: Header<'_>, stored: u64, name: &[u8]) -> Result<Map, TarError> {
        let bad = || TarError::Sparse(printable(name));
        let field = |bytes: &[u8]| number(bytes).and_then(|n| u64::try_from(n).ok()).ok_or_else(bad);
        let size = field(&header.block()[483..495])?;
        let mut segments = Vec::new();
        let mut take = |pieces: &[u8]| {
            for piece in pieces.chunks_exact(24) {
                // An unused piece is all zeros.
                if piece[0] != 0 {
                    segments.push(Segment { offset: field(&piece[..12])?, length: field(&piece[12..])? });
                }
            }
            if segments.len() as u64 > SEGMENT_CAP { Err(bad()) } else { Ok(()) }
        };
        take(&header.block()[386..482])?;
        let mut more = header.block()[482] != 0;
        while more {
            let mut block = [0; BLOCK];
            if !self.read_block(&mut block)? {
                return Err(TarError::Truncated);
            }
            take(&block[..504])?;
            more = block[504] != 0;
        }
        checked(size, segments, stored).ok_or_else(bad)
    }

    /// The map that the pax header holds or announces, if it speaks of one.
    pub(super) fn pax_sparse_map(&mut self, pax: &mut Pax, name: &[u8]) -> Result<Option<Map>, TarError> {
        let bad = || TarError::Sparse(printable(name));
        let Some(size) = pax.sparse.size else { return Ok(None) };
        let numbers = match (pax.sparse.major, pax.sparse.minor) {
            (None, None) | (Some(0), Some(0 | 1)) => std::mem::take(&mut pax.sparse.numbers),
            (Some(1), Some(0)) => self.leading_map(&bad)?,
            _ => return Err(bad()),
        };
        let segments = numbers.chunks_exact(2).map(|pair| Segment { offset: pair[0], length: pair[1] }).collect();
        checked(size, segments, self.data).map(Some).ok_or_else(bad)
    }

    /// Version 1.0 puts the map before the data: a count and pairs, a decimal number per line, padded
    /// to a block.
    fn leading_map(&mut self, bad: &dyn Fn() -> TarError) -> Result<Vec<u64>, TarError> {
        let count = self.map_line(bad)?;
        if count > SEGMENT_CAP {
            return Err(bad());
        }
        let numbers = (0..count * 2).map(|_| self.map_line(bad)).collect::<Result<Vec<u64>, _>>()?;
        // Data is padded to blocks and so is the map, so the data's phase is the map's.
        let mut padding = self.data.wrapping_add(self.padding) % BLOCK as u64;
        while padding > 0 {
            let step = self.data()?.len().min(padding as usize);
            if step == 0 {
                return Err(bad());
            }
            self.consume(step);
            padding -= step as u64;
        }
        Ok(numbers)
    }

    fn map_line(&mut self, bad: &dyn Fn() -> TarError) -> Result<u64, TarError> {
        let mut line = Vec::with_capacity(20);
        loop {
            let byte = *self.data()?.first().ok_or_else(bad)?;
            self.consume(1);
            match byte {
                b'\n' => return decimal(&line).map_err(|_| bad()),
                b'0'..=b'9' if line.len() < 20 => line.push(byte),
                _ => return Err(bad()),
            }
        }
    }
}

/// The map, if its pieces are in order, inside the file, and as long together as the data that is stored.
fn checked(size: u64, segments: Vec<Segment>, stored: u64) -> Option<Map> {
    if size > i64::MAX.unsigned_abs() {
        return None;
    }
    let (mut end, mut total) = (0, 0_u64);
    for Segment { offset, length } in &segments {
        if *offset < end {
            return None;
        }
        end = offset.checked_add(*length)?;
        total += length;
    }
    (end <= size && total == stored).then_some((size, segments))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_must_be_ordered_and_complete() {
        let map = |list: &[(u64, u64)]| list.iter().map(|&(offset, length)| Segment { offset, length }).collect();
        assert!(checked(100, map(&[(0, 10), (50, 10), (100, 0)]), 20).is_some());
        assert!(checked(100, map(&[(50, 10), (0, 10)]), 20).is_none(), "out of order");
        assert!(checked(100, map(&[(0, 10), (5, 10)]), 20).is_none(), "overlap");
        assert!(checked(15, map(&[(10, 10)]), 10).is_none(), "beyond the end");
        assert!(checked(100, map(&[(0, 10)]), 11).is_none(), "data left over");
        assert!(checked(u64::MAX, map(&[(u64::MAX, 1)]), 1).is_none(), "overflow");
    }
}
