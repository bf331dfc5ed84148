//! An interface as its driver sees it, with a pair of sockets for the tap: one packet in, one packet out.

use std::os::unix::net::UnixDatagram;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::super::device::GuestMemory;
use super::super::testing::{DriverQueue, FakeInterrupt, NEXT, WRITE, activation, memory};
use super::*;

const BUFFERS: u64 = 0x10_0000;
const ANSWER: u64 = 0xf_0000;
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const ALL: u64 = feature::MRG_RXBUF | feature::CTRL_VQ | feature::STATUS | feature::GUEST_CSUM | feature::GUEST_TSO4;

/// A tap that is a socket, and notes what it is told.
struct FakeTap {
    socket: UnixDatagram,
    offloads: Arc<AtomicU64>,
    attached: Arc<AtomicBool>,
}

impl Queue for FakeTap {
    fn fd(&self) -> std::os::fd::RawFd {
        std::os::fd::AsRawFd::as_raw_fd(&self.socket)
    }

    fn features(&self) -> u64 {
        feature::CSUM | feature::CTRL_GUEST_OFFLOADS | feature::ALL_GUEST_OFFLOADS | feature::HOST_USO
    }

    fn set_offloads(&self, features: u64) -> io::Result<()> {
        self.offloads.store(features, Ordering::SeqCst);
        Ok(())
    }

    fn set_attached(&self, attached: bool) -> io::Result<()> {
        assert_ne!(self.attached.swap(attached, Ordering::SeqCst), attached, "the kernel refuses this");
        Ok(())
    }
}

/// The host's side of a fake tap.
struct Wire {
    socket: UnixDatagram,
    offloads: Arc<AtomicU64>,
    attached: Arc<AtomicBool>,
}

fn wire() -> (Box<dyn Queue>, Wire) {
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    theirs.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let (offloads, attached) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(true)));
    let tap = FakeTap { socket: ours, offloads: offloads.clone(), attached: attached.clone() };
    (Box::new(tap), Wire { socket: theirs, offloads, attached })
}

struct Bench {
    memory: GuestMemory,
    rx: DriverQueue,
    tx: DriverQueue,
    control: DriverQueue,
    interrupt: Arc<FakeInterrupt>,
    net: Net,
    wires: Vec<Wire>,
}

fn bench_with(features: u64, pairs: usize) -> Bench {
    let memory = memory(0x80_0000);
    let queue = |at, size| DriverQueue::new(&memory, at, size);
    let (rx, tx) = (queue(0, QUEUE_SIZE), queue(0x1_0000, QUEUE_SIZE));
    let control = queue(0x2_0000, CONTROL_QUEUE_SIZE);
    let others: Vec<_> = (0..2 * (pairs as u64 - 1)).map(|i| queue(0x3_0000 + i * 0x1_0000, QUEUE_SIZE)).collect();
    let interrupt = Arc::new(FakeInterrupt::default());
    let (taps, wires): (Vec<_>, Vec<_>) = (0..pairs).map(|_| wire()).unzip();
    let mut net = Net::with_queues("t", taps, MAC, Some(1500)).unwrap();
    let queues: Vec<_> = [&rx, &tx].into_iter().chain(&others).chain([&control]).collect();
    net.activate(activation(&memory, features, &interrupt, &queues)).unwrap();
    Bench { memory, rx, tx, control, interrupt, net, wires }
}

fn bench(features: u64) -> Bench {
    bench_with(features, 1)
}

fn wait_used(queue: &mut DriverQueue) -> (u16, u32) {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        if let Some(used) = queue.take_used() {
            return used;
        }
        assert!(Instant::now() < deadline, "the device did not answer");
        std::thread::sleep(Duration::from_micros(200));
    }
}

impl Bench {
    fn guest(&self, at: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory.read_slice(&mut data, GuestAddress(at)).unwrap();
        data
    }

    /// Lends buffers of `len` bytes each, one behind the other.
    fn lend(&mut self, count: u64, len: u32) {
        for index in 0..count {
            self.rx.add(&[(BUFFERS + index * u64::from(len), len, true)]);
        }
        self.rx.kick.write(1).unwrap();
    }

    fn send(&mut self, segments: &[(u64, u32, bool)]) {
        self.tx.add(segments);
        self.tx.kick.write(1).unwrap();
    }

    fn received(&self) -> Vec<u8> {
        let mut packet = vec![0; 0x2_0000];
        let len = self.wires[0].socket.recv(&mut packet).unwrap();
        packet.truncate(len);
        packet
    }

    fn command(&mut self, bytes: &[u8]) -> u8 {
        self.memory.write_slice(bytes, GuestAddress(BUFFERS)).unwrap();
        self.memory.write_obj(0xee_u8, GuestAddress(ANSWER)).unwrap();
        self.control.add(&[(BUFFERS, bytes.len() as u32, false), (ANSWER, 1, true)]);
        self.control.kick.write(1).unwrap();
        assert_eq!(wait_used(&mut self.control).1, 1);
        self.memory.read_obj(GuestAddress(ANSWER)).unwrap()
    }

    fn counter(&self, name: &str) -> u64 {
        self.net.counters().into_iter().find(|(other, _)| *other == name).unwrap().1
    }
}

/// A packet of `len` bytes behind a header of 12.
fn packet(len: usize) -> Vec<u8> {
    let mut packet = vec![0; 12];
    packet[0] = 1;
    packet.extend((0..len).map(|i| i as u8));
    packet
}

#[test]
fn a_packet_goes_out_as_it_is() {
    let mut b = bench(ALL);
    let sent = packet(100);
    b.memory.write_slice(&sent, GuestAddress(BUFFERS)).unwrap();
    b.send(&[(BUFFERS, 12, false), (BUFFERS + 12, 60, false), (BUFFERS + 72, 40, false)]);
    assert_eq!(b.received(), sent);
    assert_eq!(wait_used(&mut b.tx), (0, 0));
    assert_eq!((b.net.completed(), b.counter("tx_packets"), b.counter("tx_bytes")), (1, 1, 112));
}

#[test]
fn packets_of_impossible_length_are_lost_not_sent() {
    let mut b = bench(ALL);
    for segments in [
        &[(BUFFERS, 12, false)][..],
        &[(BUFFERS, 25, false)],
        &[(BUFFERS, 65_571, false)],
        &[(BUFFERS, 100, true)],
        &[(BUFFERS, 100, false), (BUFFERS, 1, true)],
    ] {
        b.send(segments);
        assert_eq!(wait_used(&mut b.tx).1, 0);
    }
    b.send(&[(BUFFERS, 26, false)]);
    assert_eq!(b.received().len(), 26);
    wait_used(&mut b.tx);
    assert_eq!((b.counter("tx_dropped"), b.counter("tx_packets")), (5, 1));
    assert!(b.interrupt.resets.lock().unwrap().is_empty());
}

#[test]
fn a_packet_comes_in_across_buffers() {
    let mut b = bench(ALL);
    b.lend(64, 1536);
    let sent = packet(4000);
    b.wires[0].socket.send(&sent).unwrap();
    assert_eq!(wait_used(&mut b.rx), (0, 1536));
    // All parts are there once the first is.
    assert_eq!(b.rx.take_used(), Some((1, 1536)));
    assert_eq!(b.rx.take_used(), Some((2, 4012 - 2 * 1536)));
    let mut expected = sent;
    expected[10..12].copy_from_slice(&3_u16.to_le_bytes());
    assert_eq!(b.guest(BUFFERS, 4012), expected);
    // The next packet starts in the next buffer.
    b.wires[0].socket.send(&packet(50)).unwrap();
    assert_eq!(wait_used(&mut b.rx), (3, 62));
    assert_eq!(b.guest(BUFFERS + 3 * 1536 + 10, 2), [1, 0]);
}

#[test]
fn without_merging_a_packet_has_one_buffer() {
    let mut b = bench(0);
    b.lend(2, 1540);
    b.wires[0].socket.send(&packet(1500)).unwrap();
    assert_eq!(wait_used(&mut b.rx), (0, 1512));
    // A driver that takes no missing checksums is not told of any.
    let mut expected = packet(1500);
    (expected[0], expected[10]) = (0, 1);
    assert_eq!(b.guest(BUFFERS, 1512), expected);
    b.wires[0].socket.send(&packet(10)).unwrap();
    assert_eq!(wait_used(&mut b.rx), (1, 22));
}

#[test]
fn packets_wait_until_there_is_room_for_the_longest() {
    let mut b = bench(ALL);
    b.wires[0].socket.send(&packet(50)).unwrap();
    b.lend(42, 1536);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(b.rx.take_used(), None);
    b.lend(1, 1536);
    assert_eq!(wait_used(&mut b.rx), (0, 62));
}

#[test]
fn buffers_without_room_for_a_header_go_back_empty() {
    let mut b = bench(feature::MRG_RXBUF);
    b.rx.add(&[(BUFFERS, 11, true)]);
    b.rx.add(&[(BUFFERS, 64, false)]);
    b.rx.add(&[(BUFFERS, 0x1000, true)]);
    b.rx.kick.write(1).unwrap();
    b.wires[0].socket.send(&packet(50)).unwrap();
    assert_eq!([(); 3].map(|()| wait_used(&mut b.rx)), [(0, 0), (1, 0), (2, 62)]);
}

#[test]
fn a_host_that_is_full_delays_packets_and_loses_none() {
    let mut b = bench(ALL);
    b.memory.write_slice(&packet(100), GuestAddress(BUFFERS)).unwrap();
    // A socket holds fewer than this.
    for _ in 0..250 {
        b.tx.add(&[(BUFFERS, 112, false)]);
    }
    b.tx.kick.write(1).unwrap();
    for _ in 0..250 {
        assert_eq!(b.received().len(), 112);
    }
    for _ in 0..250 {
        wait_used(&mut b.tx);
    }
    assert_eq!((b.counter("tx_packets"), b.counter("tx_dropped")), (250, 0));
}

#[test]
fn a_paused_interface_holds_nothing_and_goes_on() {
    let mut b = bench(ALL);
    b.lend(64, 1536);
    b.wires[0].socket.send(&packet(50)).unwrap();
    assert_eq!(wait_used(&mut b.rx), (0, 62));
    b.net.pause();
    b.wires[0].socket.send(&packet(60)).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(b.rx.take_used(), None);
    let state = b.net.save();
    assert_eq!(state.queues[0].as_ref().map(|queue| (queue.next_avail, queue.next_used)), Some((1, 1)));
    assert!(state.queues[1].is_some() && state.queues[2].is_some());
    b.net.resume();
    assert_eq!(wait_used(&mut b.rx), (1, 72));

    let (tap, wire) = wire();
    let mut copy = Net::with_queues("copy", vec![tap], [2, 9, 9, 9, 9, 9], Some(1500)).unwrap();
    copy.restore(&state).unwrap();
    let mut mac = [0; 6];
    copy.read_config(0, &mut mac);
    assert_eq!(mac, MAC);
    copy.activate(activation(&b.memory, ALL, &b.interrupt, &[&b.rx, &b.tx, &b.control])).unwrap();
    assert_eq!(wire.offloads.load(Ordering::SeqCst), ALL & feature::ALL_GUEST_OFFLOADS);
    for damaged in [vec![], vec![STATE_VERSION], vec![9; STATE_BYTES], vec![STATE_VERSION; STATE_BYTES + 1]] {
        assert!(copy.restore(&DeviceState { queues: vec![], private: damaged }).is_err());
    }
}

#[test]
fn the_driver_sets_address_and_offloads() {
    let mut b = bench(ALL | feature::CTRL_MAC_ADDR | feature::CTRL_GUEST_OFFLOADS);
    assert_eq!(b.command(&[1, 1, 2, 0, 0, 0, 0, 7]), control::OK);
    let mut mac = [0; 6];
    b.net.read_config(0, &mut mac);
    assert_eq!(mac, [2, 0, 0, 0, 0, 7]);
    assert_eq!(b.command(&[1, 1, 3, 0, 0, 0, 0, 7]), control::ERROR);
    assert_eq!(b.command(&[0, 0, 1]), control::OK);
    assert_ne!(b.net.features() & feature::CTRL_VLAN, 0);
    for (command, answer) in
        [(&[2, 0, 7, 0][..], control::OK), (&[2, 1, 7, 0], control::OK), (&[2, 0, 7], control::ERROR)]
    {
        assert_eq!(b.command(command), answer, "{command:?}");
    }
    assert_eq!(b.command(&[5, 0, 2, 0, 0, 0, 0, 0, 0, 0]), control::OK);
    assert_eq!(b.wires[0].offloads.load(Ordering::SeqCst), feature::GUEST_CSUM);
    // What was not agreed on is not given.
    assert_eq!(b.command(&[5, 0, 2, 1, 0, 0, 0, 0, 0, 0]), control::ERROR);
    assert_eq!(b.command(&[4, 0, 1, 0]), control::ERROR);
    assert_eq!(b.command(&[0xff; 1500]), control::ERROR);
    b.net.deactivate();
    b.net.read_config(0, &mut mac);
    assert_eq!(mac, MAC);
}

#[test]
fn queue_pairs_are_used_when_the_driver_says_so() {
    let mut b = bench_with(ALL | feature::MQ, 3);
    let attached = |b: &Bench| b.wires.iter().map(|wire| wire.attached.load(Ordering::SeqCst)).collect::<Vec<_>>();
    assert_eq!(attached(&b), [true, false, false]);
    assert_eq!(b.command(&[4, 0, 3, 0]), control::OK);
    assert_eq!(attached(&b), [true; 3]);
    assert_eq!(b.command(&[4, 0, 4, 0]), control::ERROR);
    assert_eq!(b.command(&[4, 0, 0, 0]), control::ERROR);
    assert_eq!(b.command(&[4, 0, 2, 0]), control::OK);
    assert_eq!(attached(&b), [true, true, false]);
    b.net.pause();
    assert_eq!(b.net.save().queues.len(), 7);
    assert!(b.net.save().queues.iter().all(Option::is_some));
    b.net.resume();
    b.net.deactivate();
}

#[test]
fn the_configuration_tells_address_link_and_pairs() {
    let b = bench_with(0, 2);
    let mut space = [0xff; 16];
    b.net.read_config(0, &mut space);
    assert_eq!(space[..6], MAC);
    assert_eq!(space[6..], [1, 0, 2, 0, 0xdc, 0x05, 0, 0, 0, 0]);
    assert_ne!(b.net.features() & feature::MQ, 0);
    assert_eq!(b.net.queue_sizes().len(), 5);
}

#[test]
fn the_driver_hears_of_a_link_that_goes_down_and_comes_up_once_each() {
    for (features, heard) in [(feature::STATUS, 1), (0, 0)] {
        let mut b = bench(features);
        let status = |net: &Net| net.config()[6];
        assert!(b.net.set_link(true));
        assert_eq!((status(&b.net), *b.interrupt.configs.lock().unwrap()), (1, 0));
        for _ in 0..2 {
            assert!(b.net.set_link(false));
            assert_eq!((status(&b.net), *b.interrupt.configs.lock().unwrap()), (0, heard));
        }
        // Another driver finds it as it is.
        b.net.deactivate();
        assert_eq!(status(&b.net), 0);
        b.net.set_link(true);
        assert_eq!((status(&b.net), *b.interrupt.configs.lock().unwrap()), (1, heard));
    }
}

/// How often the thread of this name has gone to sleep.
fn sleeps(thread: &str) -> Option<u64> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let read = |task: &std::path::Path, file: &str| std::fs::read_to_string(task.join(file)).unwrap_or_default();
    let task = tasks.map(|task| task.unwrap().path()).find(|task| read(task, "comm").trim() == thread)?;
    let status = read(&task, "status");
    let count = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))?;
    count.trim().parse().ok()
}

#[test]
fn an_idle_interface_wakes_nobody() {
    let memory = memory(0x80_0000);
    let interrupt = Arc::new(FakeInterrupt::default());
    let mut rx = DriverQueue::new(&memory, 0, QUEUE_SIZE);
    let tx = DriverQueue::new(&memory, 0x1_0000, QUEUE_SIZE);
    let (tap, wire) = wire();
    let mut net = Net::with_queues("idle", vec![tap], MAC, None).unwrap();
    net.activate(activation(&memory, ALL, &interrupt, &[&rx, &tx])).unwrap();
    let settle = || std::thread::sleep(Duration::from_millis(50));
    // Without buffers, even with a packet waiting; then with buffers and nothing to put into them.
    wire.socket.send(&packet(50)).unwrap();
    settle();
    for lend in [true, false] {
        let before = sleeps("net-idle-0").unwrap();
        settle();
        assert_eq!(sleeps("net-idle-0"), Some(before));
        if lend {
            for index in 0..64 {
                rx.add(&[(BUFFERS + index * 1536, 1536, true)]);
            }
            rx.kick.write(1).unwrap();
            wait_used(&mut rx);
            settle();
        }
    }
}

#[test]
fn a_missing_queue_is_an_error() {
    let memory = memory(0x10_0000);
    let interrupt = Arc::new(FakeInterrupt::default());
    let rx = DriverQueue::new(&memory, 0, QUEUE_SIZE);
    let (tap, _wire) = wire();
    let mut net = Net::with_queues("t", vec![tap], MAC, None).unwrap();
    assert_eq!(net.features() & feature::MTU, 0);
    assert!(matches!(net.activate(activation(&memory, 0, &interrupt, &[&rx])), Err(ActivateError::MissingQueue(1))));
}

#[test]
fn packets_go_and_a_device_stops_while_its_guest_refills_the_control_queue() {
    let mut b = bench(ALL);
    b.memory.write_slice(&[0, 0, 1], GuestAddress(BUFFERS)).unwrap();
    let head = b.control.add(&[(BUFFERS, 3, false), (ANSWER, 1, true)]);
    let flood = b.control.flood(head);
    wait_used(&mut b.control);
    b.send(&[(BUFFERS + 0x1000, 12 + 100, false)]);
    flood.during(move || {
        assert_eq!(b.received().len(), 112);
        b.net.pause();
        b.net.deactivate();
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever a driver puts into its rings: nothing breaks but its own queues, and the device can be stopped.
    #[test]
    fn hostile_rings_leave_the_device_sound(
        descriptors in prop::collection::vec((any::<u32>(), any::<u32>(), 0u16..8, 0u16..20), 1..16),
        heads in prop::collection::vec(0u16..20, 1..16),
        features in any::<u64>(),
        packets in prop::collection::vec(0usize..3000, 0..8),
    ) {
        let features = features & (ALL | feature::CTRL_MAC_ADDR | feature::CTRL_GUEST_OFFLOADS | feature::CTRL_RX | feature::CTRL_VLAN);
        let mut b = bench(features);
        for (index, &(address, len, flags, next)) in (0..).zip(&descriptors) {
            // Mostly in memory and short, now and then not.
            let (address, len) = match len % 8 {
                0 => (u64::from(address), len),
                _ => (BUFFERS + u64::from(address % 0x1000), len % 5000),
            };
            for queue in [&b.rx, &b.tx, &b.control] {
                queue.write_descriptor(index, address, len, flags & (NEXT | WRITE | 4), next);
            }
        }
        for &head in &heads {
            for queue in [&mut b.rx, &mut b.tx, &mut b.control] {
                queue.offer(head);
            }
        }
        for len in packets {
            let _ = b.wires[0].socket.send(&packet(len));
        }
        for queue in [&b.rx, &b.tx, &b.control] {
            queue.kick.write(1).unwrap();
        }
        b.net.pause();
        b.net.save();
        b.net.resume();
        b.net.deactivate();
        b.net.completed();
    }
}

#[test]
fn a_stream_carries_packets_and_offers_nothing_that_needs_headers() {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    theirs.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let memory = memory(0x80_0000);
    let queue = |at, size| DriverQueue::new(&memory, at, size);
    let (mut rx, mut tx) = (queue(0, QUEUE_SIZE), queue(0x1_0000, QUEUE_SIZE));
    let control = queue(0x2_0000, CONTROL_QUEUE_SIZE);
    let interrupt = Arc::new(FakeInterrupt::default());
    let mut net = Net::over_stream("t", ours.into(), MAC, Some(65_520)).unwrap();
    let offered = net.features();
    let offloads = feature::CSUM | feature::HOST_TSO4 | feature::HOST_TSO6 | feature::HOST_USO;
    assert_eq!(offered & (offloads | feature::ALL_GUEST_OFFLOADS | feature::CTRL_GUEST_OFFLOADS), 0, "{offered:#x}");
    net.activate(activation(&memory, offered & !feature::MQ, &interrupt, &[&rx, &tx, &control])).unwrap();

    // More than the socket holds, from a guest that kicks once and then waits.
    let count = u64::from(QUEUE_SIZE);
    let packet = |number: u64| vec![number as u8; 8000];
    for number in 0..count {
        let at = BUFFERS + number * 0x4000;
        memory.write_slice(&[&[0; 12][..], &packet(number)].concat(), GuestAddress(at)).unwrap();
        tx.add(&[(at, 8012, false)]);
    }
    tx.kick.write(1).unwrap();
    let mut wire = &theirs;
    for number in 0..count {
        let mut frame = vec![0; 8004];
        std::io::Read::read_exact(&mut wire, &mut frame).unwrap();
        assert_eq!((&frame[..4], &frame[4..]), (&8000_u32.to_be_bytes()[..], &packet(number)[..]));
    }
    for _ in 0..count {
        wait_used(&mut tx);
    }

    rx.add(&[(BUFFERS, 2048, true)]);
    for index in 1..40 {
        rx.add(&[(BUFFERS + index * 2048, 2048, true)]);
    }
    rx.kick.write(1).unwrap();
    std::io::Write::write_all(&mut wire, &[&3000_u32.to_be_bytes()[..], &[7; 3000]].concat()).unwrap();
    assert_eq!((wait_used(&mut rx).1, wait_used(&mut rx).1), (2048, 12 + 3000 - 2048));
    let mut header = [0xee; 12];
    memory.read_slice(&mut header, GuestAddress(BUFFERS)).unwrap();
    assert_eq!(header, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0]);

    // The end of the other side is a cable that is out.
    drop(theirs);
    let mut status = [0; 2];
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        net.read_config(6, &mut status);
        if status == [0, 0] {
            break;
        }
        assert!(Instant::now() < deadline, "the link is still up");
        std::thread::yield_now();
    }
    assert!(net.set_link(true));
    assert_eq!(net.config()[6], 0, "what is gone is up");
}
