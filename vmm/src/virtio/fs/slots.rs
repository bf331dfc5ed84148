//! A table of things that keep their number for as long as they are there, and whose number nobody has after them.
//!
//! Places come in blocks, the lowest free place is taken first, and blocks in which nothing is left are given back. So what stays when most
//! has gone keeps little of the table, wherever in it that is.

use std::collections::BTreeSet;

/// Places in a block: a bit each in a word.
const BLOCK: u32 = u64::BITS;

/// The table.
pub(super) struct Slots<T> {
    blocks: Vec<Block<T>>,
    /// Blocks with a free place, given back or not.
    with_room: BTreeSet<u32>,
    /// That of places in blocks which are made anew: nobody had one with it before.
    next_generation: u32,
    len: usize,
}

struct Block<T> {
    /// The places that are taken.
    taken: u64,
    /// That of places which had nobody since the block was last made.
    first_generation: u32,
    /// None, or one for each place.
    entries: Box<[Entry<T>]>,
}

struct Entry<T> {
    /// Tells those apart that have the place one after the other.
    generation: u32,
    value: Option<T>,
}

/// Block and place in it.
fn split(at: u32) -> (usize, usize) {
    ((at / BLOCK) as usize, (at % BLOCK) as usize)
}

impl<T> Block<T> {
    fn new(first_generation: u32) -> Self {
        Self { taken: 0, first_generation, entries: Box::default() }
    }

    fn fill(&mut self, place: usize, generation: Option<u32>, value: T) {
        if self.entries.is_empty() {
            let generation = self.first_generation;
            self.entries = (0..BLOCK).map(|_| Entry { generation, value: None }).collect();
        }
        let entry = &mut self.entries[place];
        entry.generation = generation.unwrap_or(entry.generation);
        entry.value = Some(value);
        self.taken |= 1 << place;
    }
}

impl<T> Slots<T> {
    pub(super) fn new() -> Self {
        Self { blocks: Vec::new(), with_room: BTreeSet::new(), next_generation: 0, len: 0 }
    }

    /// How many things there are.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// All numbers are below.
    pub(super) fn end(&self) -> u32 {
        self.blocks.len() as u32 * BLOCK
    }

    fn entry(&self, at: u32) -> Option<&Entry<T>> {
        let (block, place) = split(at);
        self.blocks.get(block)?.entries.get(place)
    }

    pub(super) fn get(&self, at: u32) -> Option<&T> {
        self.entry(at)?.value.as_ref()
    }

    pub(super) fn get_mut(&mut self, at: u32) -> Option<&mut T> {
        let (block, place) = split(at);
        self.blocks.get_mut(block)?.entries.get_mut(place)?.value.as_mut()
    }

    /// How many had this place before who has it now.
    pub(super) fn generation(&self, at: u32) -> u32 {
        self.entry(at).map_or(0, |entry| entry.generation)
    }

    /// Puts something at the lowest free place.
    pub(super) fn insert(&mut self, value: T) -> u32 {
        let block = self.with_room.first().copied().unwrap_or_else(|| self.grow());
        let place = self.blocks[block as usize].taken.trailing_ones();
        self.fill(block * BLOCK + place, None, value);
        block * BLOCK + place
    }

    /// Puts something at a place of the caller's choice; false if it is taken.
    pub(super) fn insert_at(&mut self, at: u32, generation: u32, value: T) -> bool {
        while at >= self.end() {
            self.grow();
        }
        let is_free = self.get(at).is_none();
        if is_free {
            self.fill(at, Some(generation), value);
        }
        is_free
    }

    fn grow(&mut self) -> u32 {
        let block = self.blocks.len() as u32;
        self.blocks.push(Block::new(self.next_generation));
        self.with_room.insert(block);
        block
    }

    fn fill(&mut self, at: u32, generation: Option<u32>, value: T) {
        let (block, place) = split(at);
        self.blocks[block].fill(place, generation, value);
        if self.blocks[block].taken == u64::MAX {
            self.with_room.remove(&(block as u32));
        }
        self.len += 1;
    }

    /// Takes out what has this number. Who comes to its place has another generation.
    pub(super) fn remove(&mut self, at: u32) -> Option<T> {
        let (block, place) = split(at);
        let entry = self.blocks.get_mut(block)?.entries.get_mut(place)?;
        let value = entry.value.take()?;
        entry.generation = entry.generation.wrapping_add(1);
        self.blocks[block].taken &= !(1 << place);
        self.with_room.insert(block as u32);
        self.len -= 1;
        Some(value)
    }

    /// Each thing with its number and generation, from the lowest on.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, u32, &T)> {
        let entries = |block: &Block<T>| block.entries.len();
        let at = |(block, place): (usize, usize)| block as u32 * BLOCK + place as u32;
        let places = self.blocks.iter().enumerate().flat_map(move |(block, found)| {
            (0..entries(found)).map(move |place| (at((block, place)), &found.entries[place]))
        });
        places.filter_map(|(at, entry)| Some((at, entry.generation, entry.value.as_ref()?)))
    }

    /// Gives back the blocks in which nothing is.
    pub(super) fn shrink(&mut self) {
        for block in self.blocks.iter_mut().filter(|block| block.taken == 0) {
            // No number that was given away comes back.
            let generations = block.entries.iter().map(|entry| entry.generation);
            block.first_generation = generations.max().unwrap_or(block.first_generation);
            block.entries = Box::default();
        }
        while let Some(last) = self.blocks.pop_if(|block| block.taken == 0) {
            self.next_generation = self.next_generation.max(last.first_generation);
        }
        self.with_room.split_off(&(self.blocks.len() as u32));
    }

    /// Blocks that are not given back.
    #[cfg(test)]
    pub(super) fn blocks(&self) -> usize {
        self.blocks.iter().filter(|block| !block.entries.is_empty()).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_free_place_is_taken() {
        let mut slots = Slots::new();
        assert!((0..200).all(|number| slots.insert(number) == number));
        for at in [130, 7, 64] {
            assert_eq!(slots.remove(at), Some(at));
            assert_eq!(slots.remove(at), None);
        }
        assert_eq!((slots.len(), slots.get(7), slots.get(8)), (197, None, Some(&8)));
        assert_eq!([(); 4].map(|()| slots.insert(1000)), [7, 64, 130, 200]);
        assert_eq!((slots.generation(7), slots.generation(8)), (1, 0));
    }

    #[test]
    fn what_stays_keeps_its_block_alone() {
        let mut slots = Slots::new();
        for number in 0..6400 {
            slots.insert(number);
        }
        for at in (0..6400).filter(|at| *at != 6399) {
            slots.remove(at);
        }
        slots.shrink();
        assert_eq!((slots.blocks(), slots.iter().collect::<Vec<_>>()), (1, vec![(6399, 0, &6399)]));
        // Nobody has a number again.
        assert_eq!((slots.insert(1), slots.generation(0)), (0, 1));
    }

    #[test]
    fn nothing_is_left_of_what_has_gone() {
        let mut slots = Slots::new();
        for number in 0..640 {
            slots.insert(number);
        }
        for at in 1..640 {
            slots.remove(at);
        }
        assert_eq!(slots.end(), 640);
        slots.shrink();
        assert_eq!((slots.end(), slots.blocks()), (64, 1));
        // Nobody has a number again, in a block that was there all the time or in another.
        let numbers: Vec<_> = (0..100).map(|number| slots.insert(number)).collect();
        assert_eq!(numbers, (1..101).collect::<Vec<_>>());
        assert!(numbers.iter().all(|at| slots.generation(*at) >= 1));
        assert!(slots.insert_at(639, 0, 0));
    }

    #[test]
    fn a_place_of_ones_own_choice_is_had_once() {
        let mut slots = Slots::new();
        assert!(slots.insert_at(100, 5, 'a') && !slots.insert_at(100, 6, 'b'));
        assert_eq!((slots.insert('c'), slots.get(100), slots.generation(100)), (0, Some(&'a'), 5));
    }
}
