//! A disk as its driver sees it, on each engine.

use std::io::Write as _;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::super::device::GuestMemory;
use super::super::testing::{DriverQueue, FakeInterrupt, activation, memory};
use super::request::Status;
use super::*;

const HEADER: u64 = 0x2_0000;
const DATA: u64 = 0x4_0000;
const STATUS: u64 = 0x3_0000;
const SIZE: u64 = 1 << 20;

struct Bench {
    memory: GuestMemory,
    driver: DriverQueue,
    interrupt: Arc<FakeInterrupt>,
    block: Block,
    image: File,
}

fn bench(try_uring: bool, read_only: bool, features: u64) -> Bench {
    let image = image();
    let disk = image.try_clone().unwrap();
    bench_of(image, disk, try_uring, read_only, features)
}

fn image() -> File {
    let image = tempfile::tempfile().unwrap();
    image.set_len(SIZE).unwrap();
    image.write_all_at(&[0x11; 4096], 0).unwrap();
    image
}

/// With `disk` being an image that `image` is a way into, too.
fn bench_of(image: File, disk: File, try_uring: bool, read_only: bool, features: u64) -> Bench {
    let memory = memory(0x40_0000);
    let driver = DriverQueue::new(&memory, 0, QUEUE_SIZE);
    let interrupt = Arc::new(FakeInterrupt::default());
    let mut block = Block::with_engine("t", disk, read_only, Some("serial-7"), try_uring).unwrap();
    block.activate(activation(&memory, features, &interrupt, &[&driver])).unwrap();
    Bench { memory, driver, interrupt, block, image }
}

/// Runs a test on both engines.
fn on_each_engine(test: impl Fn(Bench)) {
    for try_uring in [false, true] {
        test(bench(try_uring, false, VIRTIO_BLK_F_FLUSH));
    }
    if uring::forbidden() {
        eprintln!("io_uring is not allowed here: only the threaded engine was tested");
    }
}

impl Bench {
    fn header(&self, kind: u32, sector: u64) {
        self.memory.write_obj(kind, GuestAddress(HEADER)).unwrap();
        self.memory.write_obj(sector, GuestAddress(HEADER + 8)).unwrap();
    }

    fn used(&mut self) -> (u16, u32) {
        self.driver.kick.write(1).unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            if let Some(used) = self.driver.take_used() {
                return used;
            }
            assert!(Instant::now() < deadline, "the device did not answer");
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Sends header and `segments`, then a status byte; returns it and the used length.
    fn request(&mut self, kind: u32, sector: u64, segments: &[(u64, u32, bool)]) -> (u8, u32) {
        self.header(kind, sector);
        self.memory.write_obj(0xff_u8, GuestAddress(STATUS)).unwrap();
        let mut chain = vec![(HEADER, 16, false)];
        chain.extend(segments);
        chain.push((STATUS, 1, true));
        self.driver.add(&chain);
        let (_, len) = self.used();
        (self.memory.read_obj(GuestAddress(STATUS)).unwrap(), len)
    }

    fn fill(&self, at: u64, len: usize, value: u8) {
        self.memory.write_slice(&vec![value; len], GuestAddress(at)).unwrap();
    }

    fn guest(&self, at: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory.read_slice(&mut data, GuestAddress(at)).unwrap();
        data
    }

    fn host(&self, at: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.image.read_exact_at(&mut data, at).unwrap();
        data
    }
}

const OK: u8 = Status::Ok as u8;
const IOERR: u8 = Status::IoError as u8;
const UNSUPP: u8 = Status::Unsupported as u8;

#[test]
fn a_disk_that_was_given_up_has_no_file_and_answers_with_errors() {
    for try_uring in [false, true] {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(SIZE).unwrap();
        let open = || File::options().read(true).write(true).open(file.path()).unwrap();
        let (disk, image) = (open(), open());
        // The lock is the open file's, and is there for as long as that is open.
        disk.lock().unwrap();
        let mut b = bench_of(image, disk, try_uring, false, VIRTIO_BLK_F_FLUSH);
        assert_eq!(b.request(0, 8, &[(DATA, 512, true)]), (OK, 513));
        assert!(b.image.try_lock().is_err());
        assert!(b.block.give_up());
        // A ring's hold on it ends a little after the ring.
        let deadline = Instant::now() + Duration::from_secs(10);
        while b.image.try_lock().is_err() {
            assert!(Instant::now() < deadline, "the file is still open");
            std::thread::sleep(Duration::from_micros(200));
        }
        for kind in [0, 1, 4, 8] {
            assert_eq!(b.request(kind, 8, &[(DATA, 512, kind == 0 || kind == 8)]), (IOERR, 1), "{kind}");
        }
        assert_eq!(b.block.completed(), 5);
        // A pause changes nothing of it.
        b.block.pause();
        b.block.resume();
        assert_eq!(b.request(0, 8, &[(DATA, 512, true)]), (IOERR, 1));
        b.block.deactivate();
        assert!(!b.block.give_up(), "a disk without a driver just goes");
    }
}

#[test]
fn a_disk_stops_while_its_guest_refills_the_queue() {
    // A type that there is not, which no engine sees, and the one for the serial number, which needs none.
    for kind in [99, 8] {
        on_each_engine(|mut b| {
            b.header(kind, 0);
            let head = b.driver.add(&[(HEADER, 16, false), (DATA, 20, true), (STATUS, 1, true)]);
            let (flood, mut block) = (b.driver.flood(head), b.block);
            let answered = flood.during(move || {
                let wait = |block: &Block, answered: u64| {
                    while block.completed() < answered {
                        std::thread::sleep(Duration::from_micros(200));
                    }
                };
                wait(&block, 1000);
                // The engine's, then the one without a file.
                assert!(block.give_up());
                let given_up = block.completed();
                wait(&block, given_up + 1000);
                block.pause();
                block.completed()
            });
            assert!(answered >= 2000);
        });
    }
}

#[test]
fn a_disk_that_is_to_stop_leaves_what_is_in_the_queue() {
    let mut b = bench(false, false, VIRTIO_BLK_F_FLUSH);
    b.block.deactivate();
    let mut driver = DriverQueue::new(&b.memory, 0x10_0000, QUEUE_SIZE);
    b.header(99, 0);
    driver.add(&[(HEADER, 16, false), (STATUS, 1, true)]);
    let mut worker =
        worker::Worker { index: 0, queue: driver.device_end(0, b.interrupt.clone()), shared: b.block.shared.clone() };
    worker.shared.stopping.store(true, Ordering::Release);
    assert!(worker.next().is_none());
    assert!(driver.take_used().is_none());
    worker.shared.stopping.store(false, Ordering::Release);
    assert!(worker.next().is_none(), "answered without an engine");
    assert!(driver.take_used().is_some());
}

#[test]
fn what_is_written_is_read_back() {
    on_each_engine(|mut b| {
        b.fill(DATA, 3000, 0xaa);
        b.fill(DATA + 0x1_0000, 2120, 0xbb);
        let write = [(DATA, 3000, false), (DATA + 0x1_0000, 2120, false)];
        assert_eq!(b.request(1, 8, &write), (OK, 1));
        assert_eq!(b.request(4, 0, &[]), (OK, 1));
        assert_eq!(b.host(4096, 3000), [0xaa; 3000]);
        assert_eq!(b.host(7096, 2120), [0xbb; 2120]);
        assert_eq!(b.host(0, 4096), [0x11; 4096]);
        assert_eq!(b.request(0, 8, &[(DATA, 1, true), (DATA + 0x2_0000, 5119, true)]), (OK, 5121));
        assert_eq!(b.guest(DATA + 0x2_0000, 2999), [0xaa; 2999]);
        assert_eq!(b.guest(DATA + 0x2_0000 + 2999, 2120), [0xbb; 2120]);
        assert_eq!(b.block.completed(), 3);
        assert_eq!(b.request(0, 2048, &[]), (OK, 1), "a transfer of nothing");
        assert!(!b.interrupt.queues.lock().unwrap().is_empty());
        assert!(b.interrupt.resets.lock().unwrap().is_empty());
    });
}

#[test]
fn many_requests_at_once_are_all_answered() {
    on_each_engine(|mut b| {
        let count = 60_u64;
        b.fill(STATUS, 64, 0xff);
        b.fill(DATA, 60 * 512, 0);
        b.header(0, 0);
        for i in 0..count {
            b.driver.add(&[(HEADER, 16, false), (DATA + i * 512, 512, true), (STATUS + i, 1, true)]);
        }
        let mut heads: Vec<_> = (0..count).map(|_| b.used().0).collect();
        heads.sort_unstable();
        heads.dedup();
        assert_eq!(heads.len(), 60);
        assert_eq!(b.guest(STATUS, 60), [OK; 60]);
        assert_eq!(b.guest(DATA, 60 * 512), vec![0x11; 60 * 512]);
    });
}

#[test]
fn the_serial_number_is_padded() {
    on_each_engine(|mut b| {
        assert_eq!(b.request(8, 0, &[(DATA, 20, true)]), (OK, 21));
        assert_eq!(b.guest(DATA, 20), *b"serial-7\0\0\0\0\0\0\0\0\0\0\0\0");
        assert_eq!(b.request(8, 0, &[(DATA, 4, true)]), (OK, 5));
    });
}

#[test]
fn ranges_are_discarded_and_zeroed() {
    on_each_engine(|mut b| {
        for (i, value) in [(0, 1_u64), (8, 2), (16, 4), (24, 1 << 32 | 1)] {
            b.memory.write_obj(value, GuestAddress(DATA + i)).unwrap();
        }
        // Sectors 1 and 2, then sector 4 with unmap.
        assert_eq!(b.request(13, 0, &[(DATA, 32, false)]), (OK, 1));
        let mut expected = vec![0x11; 4096];
        expected[512..1536].fill(0);
        expected[2048..2560].fill(0);
        assert_eq!(b.host(0, 4096), expected);
        assert_eq!(b.request(11, 0, &[(DATA, 16, false)]), (OK, 1));
        assert_eq!(b.request(11, 0, &[(DATA, 32, false)]), (UNSUPP, 1), "a discard has no unmap flag");
        assert_eq!(b.request(11, 0, &[(DATA, 17, false)]), (IOERR, 1));
    });
}

#[test]
fn broken_requests_are_answered_and_wedge_nothing() {
    on_each_engine(|mut b| {
        assert_eq!(b.request(0, 2048, &[(DATA, 512, true)]).0, IOERR);
        assert_eq!(b.request(0, u64::MAX, &[(DATA, 512, true)]).0, IOERR);
        assert_eq!(b.request(1, 2047, &[(DATA, 1024, false)]).0, IOERR);
        assert_eq!(b.request(0, 0, &[(DATA, 100, true)]).0, IOERR);
        assert_eq!(b.request(0, 0, &[(DATA, 512, false)]).0, OK, "a read with nowhere to read to");
        assert_eq!(b.request(77, 0, &[]).0, UNSUPP);
        // No status; a status with no header; nothing to write at all.
        for chain in [vec![(HEADER, 16, false)], vec![(STATUS, 1, true)], vec![(HEADER, 3, false), (STATUS, 1, true)]] {
            b.driver.add(&chain);
            b.used();
        }
        // A length that wraps round the whole of memory, many times over.
        let vast: Vec<_> = std::iter::repeat_n((0, 0x40_0000, true), 200).collect();
        assert_eq!(b.request(0, 0, &vast).0, IOERR);
        assert_eq!(b.request(0, 0, &[(DATA, 512, true)]), (OK, 513));
    });
}

#[test]
fn a_chain_outside_memory_stops_the_queue_only() {
    on_each_engine(|mut b| {
        b.header(0, 0);
        b.driver.add(&[(HEADER, 16, false), (0x100_0000, 512, true), (STATUS, 1, true)]);
        b.driver.kick.write(1).unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        while b.interrupt.resets.lock().unwrap().is_empty() {
            assert!(Instant::now() < deadline);
            std::thread::sleep(Duration::from_millis(1));
        }
        b.block.deactivate();
    });
}

#[test]
fn a_file_that_shrinks_gives_errors() {
    on_each_engine(|mut b| {
        b.image.set_len(8192 + 100).unwrap();
        assert_eq!(b.request(0, 1000, &[(DATA, 512, true)]), (IOERR, 1));
        assert_eq!(b.request(0, 15, &[(DATA, 1024, true)]), (IOERR, 1));
        assert_eq!(b.request(0, 15, &[(DATA, 512, true)]), (OK, 513));
    });
}

#[test]
fn a_disk_that_is_full_gives_errors() {
    let Ok(full) = File::options().read(true).write(true).open("/dev/full") else { return };
    // `/dev/full` is no disk, but its error is that of one.
    let mut full = full;
    let error = full.write_all(b"x").unwrap_err();
    assert_eq!(worker::status_of(Err(error)), Status::IoError);
}

#[test]
fn a_read_only_disk_is_never_written() {
    for try_uring in [false, true] {
        let mut b = bench(try_uring, true, VIRTIO_BLK_F_RO);
        assert_eq!(b.block.features() & (VIRTIO_BLK_F_RO | VIRTIO_BLK_F_DISCARD), VIRTIO_BLK_F_RO);
        b.fill(DATA, 512, 0);
        b.memory.write_obj(1_u32, GuestAddress(DATA + 8)).unwrap();
        assert_eq!(b.request(1, 0, &[(DATA, 512, false)]).0, IOERR);
        assert_eq!(b.request(11, 0, &[(DATA, 16, false)]).0, IOERR);
        assert_eq!(b.request(13, 0, &[(DATA, 16, false)]).0, IOERR);
        assert_eq!(b.request(4, 0, &[]).0, OK);
        assert_eq!(b.host(0, 512), [0x11; 512]);
    }
}

#[test]
fn a_paused_disk_leaves_the_queue_alone_and_goes_on() {
    on_each_engine(|mut b| {
        assert_eq!(b.request(0, 0, &[(DATA, 512, true)]).0, OK);
        b.block.pause();
        b.header(0, 0);
        b.driver.add(&[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)]);
        b.driver.kick.write(1).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(b.driver.take_used(), None);
        let state = b.block.save();
        assert_eq!(state.queues[0].as_ref().map(|queue| queue.next_avail), Some(1));
        b.block.resume();
        b.used();
        let mut copy = Block::new("copy", b.image.try_clone().unwrap(), false, None).unwrap();
        copy.restore(&state).unwrap();
        assert!(copy.restore(&DeviceState { queues: vec![], private: vec![9] }).is_err());
    });
}

#[test]
fn the_cache_mode_follows_the_driver() {
    for try_uring in [false, true] {
        let mut b = bench(try_uring, false, VIRTIO_BLK_F_CONFIG_WCE | VIRTIO_BLK_F_FLUSH);
        let mode = |block: &Block| {
            let mut mode = [9];
            block.read_config(32, &mut mode);
            mode[0]
        };
        assert_eq!(mode(&b.block), 1);
        b.block.write_config(32, &[0]);
        b.block.write_config(0, &[0]);
        assert_eq!(mode(&b.block), 0);
        b.fill(DATA, 512, 0xcc);
        assert_eq!(b.request(1, 3, &[(DATA, 512, false)]).0, OK);
        assert_eq!(b.host(3 * 512, 512), [0xcc; 512]);
        b.block.deactivate();
        assert_eq!(mode(&b.block), 1);
        let without_flush = bench(try_uring, false, 0);
        assert_eq!(mode(&without_flush.block), 0);
    }
}

#[test]
fn the_configuration_tells_the_geometry() {
    let b = bench(false, false, 0);
    let mut space = [0xff; 64];
    b.block.read_config(0, &mut space);
    assert_eq!(space[..8], 2048_u64.to_le_bytes());
    assert_eq!(space[12..16], 254_u32.to_le_bytes());
    assert_eq!(space[20..24], 512_u32.to_le_bytes());
    assert_eq!((space[24], space[34], space[56], space[60]), (3, 1, 1, 0));
    assert!(matches!(
        Block::new("t", tempfile::tempfile().unwrap(), false, Some("123456789012345678901")),
        Err(BlockError::SerialTooLong)
    ));
}

#[test]
fn each_queue_is_served_also_after_a_pause_and_the_driver_need_not_want_all() {
    for try_uring in [false, true] {
        let image = tempfile::tempfile().unwrap();
        image.set_len(SIZE).unwrap();
        let memory = memory(0x40_0000);
        let mut others = [0x10_0000, 0x20_0000].map(|base| DriverQueue::new(&memory, base, QUEUE_SIZE));
        let driver = DriverQueue::new(&memory, 0, QUEUE_SIZE);
        let interrupt = Arc::new(FakeInterrupt::default());
        let block = Block::with_engine("t", image.try_clone().unwrap(), false, None, try_uring).unwrap().with_queues(4);
        assert_eq!(block.queue_sizes(), [QUEUE_SIZE; 4]);
        let mut count = [0; 2];
        block.read_config(34, &mut count);
        assert_eq!(u16::from_le_bytes(count), 4);
        let mut bench = Bench { memory, driver, interrupt, block, image };
        let end = |driver: &DriverQueue, index| Some(driver.device_end(index, bench.interrupt.clone()));
        // The third is left out.
        let ends = vec![end(&bench.driver, 0), end(&others[0], 1), None, end(&others[1], 3)];
        let activation = Activation::new(VIRTIO_BLK_F_MQ, bench.memory.clone(), bench.interrupt.clone(), ends);
        bench.block.activate(activation).unwrap();
        for value in 1..=6 {
            bench.fill(DATA, 512, value);
            assert_eq!(bench.request(1, value.into(), &[(DATA, 512, false)]).0, OK);
            assert_eq!(bench.host(512 * u64::from(value), 512), [value; 512]);
            // Each queue comes twice, the second time after a pause.
            std::mem::swap(&mut bench.driver, &mut others[usize::from(value) % 2]);
            if value == 3 {
                bench.block.pause();
                let active: Vec<bool> = bench.block.save().queues.iter().map(Option::is_some).collect();
                assert_eq!(active, [true, true, false, true]);
                bench.block.resume();
            }
        }
    }
}

/// Runs a test on both engines with a disk that goes past the page cache, where the file system of temporary files has that.
fn on_each_engine_direct(test: impl Fn(Bench)) {
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::OpenOptionsExt;
    for try_uring in [false, true] {
        let image = image();
        let path = format!("/proc/self/fd/{}", image.as_raw_fd());
        let opened = File::options().read(true).write(true).custom_flags(libc::O_DIRECT).open(path);
        let disk = match opened {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                eprintln!("temporary files have no O_DIRECT here: nothing was tested");
                return;
            }
            opened => opened.unwrap(),
        };
        test(bench_of(image, disk, try_uring, false, VIRTIO_BLK_F_FLUSH));
    }
}

#[test]
fn past_the_page_cache_any_memory_of_the_guest_will_do() {
    on_each_engine_direct(|mut b| {
        // As it should be, at an odd address, and in odd pieces.
        b.fill(DATA, 0x8000, 0);
        let whole = [(DATA, 4096_u32)];
        let odd = [(DATA + 0x2001, 4096)];
        let pieces = [(DATA + 0x4003, 100), (DATA + 0x5000, 3000), (DATA + 0x6007, 996)];
        for (value, parts) in [(0xa1, &whole[..]), (0xa2, &odd), (0xa3, &pieces)] {
            let chain = |writable| parts.iter().map(|(at, len)| (*at, *len, writable)).collect::<Vec<_>>();
            for (at, len) in parts {
                b.fill(*at, *len as usize, value);
            }
            assert_eq!(b.request(1, 16, &chain(false)), (OK, 1));
            assert_eq!(b.request(4, 0, &[]), (OK, 1));
            assert_eq!(b.host(8192, 4096), [value; 4096]);
            for (at, len) in parts {
                b.fill(*at, *len as usize, 0);
            }
            assert_eq!(b.request(0, 16, &chain(true)), (OK, 4097));
            for (at, len) in parts {
                assert_eq!(b.guest(*at, *len as usize), vec![value; *len as usize]);
            }
        }
        // More than goes through the VMM's memory at a time.
        b.fill(DATA + 1, 0x2_8000, 0xb4);
        assert_eq!(b.request(1, 512, &[(DATA + 1, 0x2_8000, false)]), (OK, 1));
        assert_eq!(b.host(512 * 512, 0x2_8000), vec![0xb4; 0x2_8000]);
        assert_eq!(b.request(0, 512, &[(DATA + 0x10_0001, 0x2_8000, true)]), (OK, 0x2_8001));
        assert_eq!(b.guest(DATA + 0x10_0001, 0x2_8000), vec![0xb4; 0x2_8000]);
    });
}

#[test]
fn past_the_page_cache_parts_of_blocks_are_errors_and_wedge_nothing() {
    on_each_engine_direct(|mut b| {
        let mut block = [0; 4];
        b.block.read_config(20, &mut block);
        let block = u64::from(u32::from_le_bytes(block));
        assert!([512, 1024, 2048, 4096].contains(&block), "{block}");
        assert_eq!(b.request(1, 0, &[(DATA, 100, false)]).0, IOERR);
        if block > 512 {
            assert_eq!(b.request(0, 1, &[(DATA, block as u32, true)]).0, IOERR);
            assert_eq!(b.request(1, 0, &[(DATA, 512, false)]).0, IOERR);
        }
        // Zeroes are no transfer, and need no whole blocks where the host does not write them.
        b.memory.write_obj(1_u64, GuestAddress(DATA)).unwrap();
        b.memory.write_obj(1_u64, GuestAddress(DATA + 8)).unwrap();
        b.request(13, 0, &[(DATA, 16, false)]);
        b.image.set_len(8192 + 100).unwrap();
        assert_eq!(b.request(0, 16, &[(DATA, 4096, true)]), (IOERR, 1));
        assert_eq!(b.request(0, 16, &[(DATA + 1, 4096, true)]), (IOERR, 1));
        assert_eq!(b.request(0, 32, &[(DATA + 1, 4096, true)]), (IOERR, 1));
        assert_eq!(b.request(0, 8, &[(DATA, 4096, true)]), (OK, 4097));
    });
}

#[test]
fn a_file_that_grew_is_told_once_and_used_at_once() {
    on_each_engine(|mut b| {
        let told = |b: &Bench| *b.interrupt.configs.lock().unwrap();
        assert_eq!((b.block.resize().unwrap(), told(&b)), (SIZE, 0), "as large as before");
        assert_eq!(b.request(0, 2048, &[(DATA, 512, true)]).0, IOERR);
        b.image.set_len(SIZE + 1024 + 100).unwrap();
        assert_eq!(b.request(0, 2048, &[(DATA, 512, true)]).0, IOERR, "nobody has said so yet");
        assert_eq!((b.block.resize().unwrap(), told(&b)), (SIZE + 1024, 1));
        let mut capacity = [0; 8];
        b.block.read_config(0, &mut capacity);
        assert_eq!(u64::from_le_bytes(capacity), 2050);
        assert_eq!(b.request(0, 2049, &[(DATA, 512, true)]), (OK, 513));
        assert_eq!(b.request(0, 2050, &[(DATA, 512, true)]).0, IOERR);
        // It does not shrink.
        b.image.set_len(SIZE).unwrap();
        let error = b.block.resize().unwrap_err().to_string();
        assert!(error.contains("1048576") && error.contains("1049600"), "{error}");
        assert_eq!(told(&b), 1);
        assert_eq!(b.request(0, 2049, &[(DATA, 512, true)]), (IOERR, 1));
        // Without a driver there is nobody to tell.
        b.block.deactivate();
        b.image.set_len(2 * SIZE).unwrap();
        assert_eq!((b.block.resize().unwrap(), told(&b)), (2 * SIZE, 1));
    });
}
