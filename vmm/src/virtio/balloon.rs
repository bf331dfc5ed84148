//! The traditional memory balloon (virtio 1.3, section 5.5), for one thing: the guest reports the pages that it no
//! longer uses (section 5.5.6.7), and the host takes them back. What a guest freed costs the host nothing then.
//!
//! The host never asks for memory: the balloon's target size stays 0, and what the guest puts into the balloon by
//! itself only goes back and forth.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::epoll::EventSet;

use super::device::{
    ActivateError, Activation, DeviceKind, DeviceState, RestoreError, VirtioDevice, read_config_bytes,
};
use super::queue::{Chain, VirtQueue};
use crate::arch::layout::PAGE_SIZE;
use crate::event_loop::{EventHandler, EventLoop, Registration, Watcher};

/// `VIRTIO_BALLOON_F_REPORTING` (section 5.5.3): the guest reports free pages.
const REPORTING: u64 = 1 << 5;

/// `inflateq`, `deflateq` and `reporting_vq`. Linux reports 32 blocks at once, and not at all on a shorter queue.
///
/// Section 5.5.2 gives `reporting_vq` index 4, but Linux counts only the queues of features that were agreed on, and other
/// VMMs follow it: with neither statistics nor hints it is the third.
const QUEUE_SIZES: [u16; 3] = [32; 3];
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const REPORT: usize = 2;

/// Where `actual` lies in the configuration space (section 5.5.4), behind `num_pages`: what the guest says it has put into
/// the balloon, in pages of 4 KiB.
const ACTUAL: usize = 4;
/// Both fields.
const CONFIG_LEN: usize = 8;

/// Most bytes taken back for one report; the rest stays where it is, as reports oblige the device to nothing. Linux
/// reports 32 blocks of at most 4 MiB; a guest that reports more would only keep the other devices waiting.
const MAX_REPORT_BYTES: usize = 128 << 20;
/// Requests served before other devices get their turn.
const BATCH: usize = 4;

/// The device.
pub struct Balloon {
    event_loop: Arc<EventLoop>,
    completed: Arc<AtomicU64>,
    actual: [u8; CONFIG_LEN - ACTUAL],
    active: Option<(Arc<Mutex<Worker>>, Registration)>,
}

struct Worker {
    /// By index. The last is `None` without [`REPORTING`].
    queues: [Option<VirtQueue>; QUEUE_SIZES.len()],
    completed: Arc<AtomicU64>,
}

impl Balloon {
    /// An empty balloon, served by `event_loop`.
    #[must_use]
    pub fn new(event_loop: Arc<EventLoop>) -> Self {
        Self { event_loop, completed: Arc::default(), actual: [0; CONFIG_LEN - ACTUAL], active: None }
    }
}

impl VirtioDevice for Balloon {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Balloon
    }

    fn features(&self) -> u64 {
        REPORTING
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut space = [0; CONFIG_LEN];
        space[ACTUAL..].copy_from_slice(&self.actual);
        read_config_bytes(&space, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        for (at, place) in (ACTUAL as u64..).zip(&mut self.actual) {
            let byte = at.checked_sub(offset).and_then(|at| data.get(usize::try_from(at).ok()?));
            *place = byte.copied().unwrap_or(*place);
        }
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let reporting = activation.features & REPORTING != 0;
        let worker = Worker {
            queues: [
                Some(activation.take_queue(INFLATE as u16)?),
                Some(activation.take_queue(DEFLATE as u16)?),
                if reporting { Some(activation.take_queue(REPORT as u16)?) } else { None },
            ],
            completed: self.completed.clone(),
        };
        let kicks: Vec<_> = worker.kicks().collect();
        let worker = Arc::new(Mutex::new(worker));
        let registration = self.event_loop.add(worker.clone());
        for &(tag, kick) in &kicks {
            registration
                .watcher()
                .watch(kick, tag, EventSet::IN)
                .map_err(|source| ActivateError::Host { step: "cannot watch the queues", source })?;
        }
        {
            let mut worker = worker.lock().unwrap_or_else(PoisonError::into_inner);
            for (tag, _) in kicks {
                worker.serve(tag as usize);
            }
        }
        self.active = Some((worker, registration));
        Ok(())
    }

    fn deactivate(&mut self) {
        self.actual.fill(0);
        if let Some((worker, registration)) = self.active.take() {
            for (_, kick) in worker.lock().unwrap_or_else(PoisonError::into_inner).kicks() {
                registration.watcher().forget(kick);
            }
        }
    }

    fn save(&self) -> DeviceState {
        let queues = match &self.active {
            Some((worker, _)) => {
                let worker = worker.lock().unwrap_or_else(PoisonError::into_inner);
                worker.queues.iter().map(|queue| queue.as_ref().map(VirtQueue::state)).collect()
            }
            None => vec![None; QUEUE_SIZES.len()],
        };
        DeviceState { queues, private: self.actual.to_vec() }
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let actual = state.private.as_slice();
        self.actual = actual.try_into().map_err(|_| RestoreError::Damaged(DeviceKind::Balloon))?;
        Ok(())
    }

    fn completed(&self) -> u64 {
        self.completed.load(Ordering::Relaxed)
    }
}

impl EventHandler for Worker {
    fn ready(&mut self, tag: u32, _events: EventSet, _watcher: &Watcher) {
        let index = tag as usize;
        if let Some(queue) = self.queues.get(index).and_then(Option::as_ref) {
            queue.clear_kick();
            self.serve(index);
        }
    }
}

impl Worker {
    /// The queues that there are, each with the descriptor of its notification.
    fn kicks(&self) -> impl Iterator<Item = (u32, RawFd)> + '_ {
        (0..).zip(&self.queues).filter_map(|(tag, queue)| Some((tag, queue.as_ref()?.kick().as_raw_fd())))
    }

    fn serve(&mut self, index: usize) {
        let Some(queue) = &mut self.queues[index] else { return };
        for served in 0.. {
            if served == BATCH {
                // Come back after the others.
                let _ = queue.kick().write(1);
                break;
            }
            let Some(chain) = queue.pop() else { break };
            if index == REPORT {
                take_back(&chain);
            }
            // Nothing is written: what the pages hold from now on is undefined (section 5.5.6.7).
            queue.push(chain.head(), 0);
            self.completed.fetch_add(1, Ordering::Relaxed);
        }
        queue.notify();
    }
}

/// Frees the host's memory behind each whole page that the chain reports.
///
/// The pages read as zero from then on or, where a file lies under them (the guest's kernel), as the file does. The guest does
/// not rely on either before it writes to them. One that reports what it still uses harms itself alone.
fn take_back(chain: &Chain) {
    for segment in chain.writable_iovecs(0, MAX_REPORT_BYTES) {
        let Some((lead, len)) = whole_pages(segment.iov_base.addr(), segment.iov_len) else { continue };
        // A host that does not take the advice keeps the pages, which is its right.
        // SAFETY: the range lies in the segment, thus in guest memory, which the chain keeps mapped and which nothing but raw
        // and volatile accesses refer to. It stays readable and writable, only its contents change.
        unsafe { libc::madvise(segment.iov_base.byte_add(lead), len, libc::MADV_DONTNEED) };
    }
}

/// The whole pages in `len` bytes from `start` on: how far behind `start` they begin, and how many bytes they are.
fn whole_pages(start: usize, len: usize) -> Option<(usize, usize)> {
    let page = PAGE_SIZE as usize;
    let lead = start.wrapping_neg() % page;
    let whole = len.checked_sub(lead)? / page * page;
    (whole > 0).then_some((lead, whole))
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::super::device::GuestMemory;
    use super::super::testing::{DriverQueue, FakeInterrupt, activation, memory};
    use super::*;
    use crate::memory::resident_bytes;

    const SIZE: usize = 0x40_0000;
    const PAGES: u64 = 0x10_0000;
    const MARK: u8 = 0xa5;

    struct Bench {
        memory: GuestMemory,
        queues: [DriverQueue; 3],
        interrupt: Arc<FakeInterrupt>,
        balloon: Balloon,
    }

    /// A balloon that is not active yet, and memory whose upper part, from [`PAGES`] on, is in use.
    fn bench() -> Bench {
        let memory = memory(SIZE);
        memory.write_slice(&vec![MARK; SIZE - PAGES as usize], GuestAddress(PAGES)).unwrap();
        let queues = [0x1_0000, 0x2_0000, 0x3_0000].map(|base| DriverQueue::new(&memory, base, 32));
        Bench { memory, queues, interrupt: Arc::default(), balloon: Balloon::new(EventLoop::new().unwrap()) }
    }

    impl Bench {
        fn report(&mut self, segments: &[(u64, u32, bool)]) -> u16 {
            self.queues[REPORT].add(segments)
        }

        fn activate(&mut self, features: u64) -> Result<(), ActivateError> {
            let queues: Vec<_> = self.queues.iter().collect();
            self.balloon.activate(activation(&self.memory, features, &self.interrupt, &queues))
        }

        /// Which pages from [`PAGES`] on no longer hold the mark, all of them or none of their bytes.
        fn taken(&self) -> Vec<u64> {
            let mut page = [0; PAGE_SIZE as usize];
            let mut taken = Vec::new();
            for at in (PAGES..SIZE as u64).step_by(page.len()) {
                self.memory.read_slice(&mut page, GuestAddress(at)).unwrap();
                if page == [0; PAGE_SIZE as usize] {
                    taken.push((at - PAGES) / PAGE_SIZE);
                } else {
                    assert_eq!(page, [MARK; PAGE_SIZE as usize]);
                }
            }
            taken
        }
    }

    #[test]
    fn reported_pages_go_back_to_the_host() {
        let mut b = bench();
        let before = resident_bytes(&b.memory, std::slice::from_ref(&(0..u64::MAX))).unwrap();
        let head = b.report(&[(PAGES, 0x20_0000, true), (PAGES + 0x28_0000, 0x1_0000, true)]);
        b.activate(REPORTING).unwrap();
        let after = resident_bytes(&b.memory, std::slice::from_ref(&(0..u64::MAX))).unwrap();
        assert!(before - after >= 0x20_0000, "{before} {after}");
        assert_eq!(b.taken(), (0..0x200).chain(0x280..0x290).collect::<Vec<_>>());
        assert_eq!(b.queues[REPORT].take_used(), Some((head, 0)));
        assert_eq!(*b.interrupt.queues.lock().unwrap(), [REPORT as u16]);
        assert_eq!(b.balloon.completed(), 1);
    }

    #[test]
    fn pages_reported_in_part_stay() {
        let mut b = bench();
        b.report(&[(PAGES + 1, 0x1fff, true), (PAGES + 0x3fff, 0x1002, true), (PAGES + 0x6800, 0x800, true)]);
        b.report(&[(PAGES + 0x7001, 0xffe, true), (PAGES + 0x9fff, 1, true), (PAGES + 0xa000, 0, true)]);
        b.activate(REPORTING).unwrap();
        assert_eq!(b.taken(), [1, 4]);
        assert_eq!(b.balloon.completed(), 2);
    }

    #[test]
    fn readable_segments_are_no_reports() {
        let mut b = bench();
        b.report(&[(PAGES, 0x1000, false)]);
        b.report(&[(PAGES + 0x1000, 0x1000, false), (PAGES + 0x2000, 0x1000, true)]);
        b.activate(REPORTING).unwrap();
        assert_eq!(b.taken(), [2]);
    }

    #[test]
    fn a_report_outside_memory_breaks_the_queue_and_nothing_else() {
        for (address, len) in [(SIZE as u64, 0x1000), (SIZE as u64 - 0x1000, 0x2000), (u64::MAX - 0xfff, u32::MAX)] {
            let mut b = bench();
            b.report(&[(PAGES, 0x1000, true), (address, len, true)]);
            b.activate(REPORTING).unwrap();
            assert!(b.taken().is_empty());
            assert_eq!(b.interrupt.resets.lock().unwrap().len(), 1);
            assert_eq!(b.queues[REPORT].take_used(), None);
        }
    }

    #[test]
    fn a_report_of_the_ring_itself_does_no_harm() {
        let mut b = bench();
        b.report(&[(0, SIZE as u32, true)]);
        b.activate(REPORTING).unwrap();
        assert_eq!(b.taken().len() as u64, (SIZE as u64 - PAGES) / PAGE_SIZE);
    }

    #[test]
    fn reports_have_a_bound_and_take_turns_with_other_devices() {
        let memory = memory(MAX_REPORT_BYTES + 0x20_0000);
        let mut queues = [0x1_0000, 0x2_0000, 0x3_0000].map(|base| DriverQueue::new(&memory, base, 32));
        let beyond = GuestAddress(PAGES + MAX_REPORT_BYTES as u64);
        memory.write_obj(MARK, beyond).unwrap();
        queues[REPORT].add(&[(PAGES, MAX_REPORT_BYTES as u32, true), (beyond.0, 0x1000, true)]);
        for _ in 0..BATCH {
            queues[REPORT].add(&[(PAGES, 0x1000, true)]);
        }
        let mut balloon = Balloon::new(EventLoop::new().unwrap());
        let ends: Vec<_> = queues.iter().collect();
        balloon.activate(activation(&memory, REPORTING, &Arc::default(), &ends)).unwrap();
        assert_eq!(memory.read_obj::<u8>(beyond).unwrap(), MARK);
        assert_eq!(balloon.completed(), BATCH as u64);
        // It told itself to come back.
        assert_eq!(queues[REPORT].kick.read().unwrap(), 1);
    }

    #[test]
    fn what_goes_into_the_balloon_and_out_of_it_stays_in_memory() {
        let mut b = bench();
        let frames: Vec<u8> = [PAGES as u32 / 4096, u32::MAX].into_iter().flat_map(u32::to_le_bytes).collect();
        b.memory.write_slice(&frames, GuestAddress(0x8_0000)).unwrap();
        for index in [INFLATE, DEFLATE] {
            b.queues[index].add(&[(0x8_0000, 8, false)]);
            b.queues[index].add(&[(PAGES, 0x1000, true)]);
            b.queues[index].add(&[(0x8_0000, 0, false)]);
        }
        b.activate(REPORTING).unwrap();
        assert!(b.taken().is_empty());
        assert_eq!(b.balloon.completed(), 6);
        assert_eq!(b.queues[DEFLATE].take_used(), Some((0, 0)));
    }

    #[test]
    fn without_the_feature_there_are_no_reports() {
        let mut b = bench();
        b.report(&[(PAGES, 0x1000, true)]);
        b.activate(0).unwrap();
        assert!(b.taken().is_empty());
        assert_eq!(b.balloon.save().queues.iter().map(Option::is_some).collect::<Vec<_>>(), [true, true, false]);
    }

    #[test]
    fn the_reporting_queue_is_needed_with_its_feature() {
        let mut b = bench();
        let queues: Vec<_> = b.queues[..2].iter().collect();
        let missing = b.balloon.activate(activation(&b.memory, REPORTING, &b.interrupt, &queues));
        assert!(matches!(missing, Err(ActivateError::MissingQueue(2))));
    }

    #[test]
    fn only_the_actual_size_can_be_written() {
        let mut balloon = Balloon::new(EventLoop::new().unwrap());
        let space = |balloon: &Balloon| {
            let mut space = [0xff; 12];
            balloon.read_config(0, &mut space);
            space
        };
        balloon.write_config(0, &[1; 4]);
        balloon.write_config(8, &[1; 4]);
        balloon.write_config(u64::MAX - 1, &[1; 2]);
        assert_eq!(space(&balloon), [0; 12]);
        balloon.write_config(2, &[1, 2, 3, 4]);
        balloon.write_config(7, &[5, 6]);
        assert_eq!(space(&balloon), [0, 0, 0, 0, 3, 4, 0, 5, 0, 0, 0, 0]);
        let mut byte = [0xff];
        balloon.read_config(u64::MAX, &mut byte);
        assert_eq!(byte, [0]);
        balloon.deactivate();
        assert_eq!(space(&balloon), [0; 12]);
    }

    #[test]
    fn a_copy_goes_on_where_the_device_was() {
        let mut b = bench();
        b.report(&[(PAGES, 0x1000, true)]);
        b.activate(REPORTING).unwrap();
        b.balloon.write_config(4, &7u32.to_le_bytes());
        let state = b.balloon.save();
        assert_eq!(state.queues[REPORT].as_ref().unwrap().next_avail, 1);
        let mut copy = Balloon::new(EventLoop::new().unwrap());
        copy.restore(&state).unwrap();
        let mut actual = [0; 4];
        copy.read_config(4, &mut actual);
        assert_eq!(u32::from_le_bytes(actual), 7);
        let damaged = DeviceState { private: vec![0; 5], ..state };
        assert!(matches!(copy.restore(&damaged), Err(RestoreError::Damaged(DeviceKind::Balloon))));
    }
}
