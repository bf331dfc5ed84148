//! The device against a guest's end made of bare queues, and a host's end of real sockets.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proptest::prelude::*;
use vm_memory::{ByteValued, Bytes, GuestAddress};
use vmm_sys_util::epoll::EventSet;

use super::mux::{MAX_STREAMS, Mux, Queues, TAG_LISTENER, TAG_RECEIVE, TAG_TRANSMIT};
use super::packet::{HEADER_BYTES, HOST_CID, Header, TYPE_STREAM, op, shutdown};
use super::stream::BUFFER_BYTES;
use crate::event_loop::{EventHandler, EventLoop, Registration};
use crate::virtio::device::GuestMemory;
use crate::virtio::testing::{DriverQueue, FakeInterrupt, memory};

const CID: u32 = 3;
const PORT: u32 = 1024;
const READY_PORT: u32 = 7;
const QUEUE: u16 = 128;
const RECEIVE_BUFFERS: u64 = 0x10_0000;
const RECEIVE_BYTES: u32 = 4096;
const TRANSMIT_BUFFER: u64 = 0x20_0000;

/// A guest's end, and the means to run the device.
struct Bench {
    memory: GuestMemory,
    receive: DriverQueue,
    transmit: DriverQueue,
    mux: Arc<Mutex<Mux>>,
    registration: Registration,
    /// The host's end of the port that the guest may connect to.
    ready: UnixStream,
    interrupt: Arc<FakeInterrupt>,
    path: std::path::PathBuf,
    event_loop: Arc<EventLoop>,
    _directory: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let memory = memory(0x40_0000);
        let receive = DriverQueue::new(&memory, 0x1_0000, QUEUE);
        let transmit = DriverQueue::new(&memory, 0x2_0000, QUEUE);
        let event = DriverQueue::new(&memory, 0x3_0000, 8);
        let interrupt = Arc::new(FakeInterrupt::default());
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let (ready, far) = UnixStream::pair().unwrap();
        let queues = Queues {
            receive: receive.device_end(0, interrupt.clone()),
            transmit: transmit.device_end(1, interrupt.clone()),
            event: event.device_end(2, interrupt.clone()),
        };
        let ports = HashMap::from([(READY_PORT, far)]);
        let mux = Arc::new(Mutex::new(Mux::new(queues, CID, Arc::new(listener), ports, Arc::default())));
        let event_loop = EventLoop::new().unwrap();
        let registration = event_loop.add(mux.clone());
        mux.lock().unwrap().start(registration.watcher()).unwrap();
        let mut bench = Self {
            memory,
            receive,
            transmit,
            mux,
            registration,
            ready,
            interrupt,
            path,
            event_loop,
            _directory: directory,
        };
        for index in 0..u64::from(QUEUE) {
            bench.receive.add(&[(RECEIVE_BUFFERS + index * u64::from(RECEIVE_BYTES), RECEIVE_BYTES, true)]);
        }
        bench
    }

    /// Lets the device do what there is to do.
    fn turn(&mut self) {
        for _ in 0..4 {
            self.mux.lock().unwrap().ready(TAG_LISTENER, EventSet::IN, self.registration.watcher());
            self.mux.lock().unwrap().ready(TAG_RECEIVE, EventSet::IN, self.registration.watcher());
            self.mux.lock().unwrap().ready(TAG_TRANSMIT, EventSet::IN, self.registration.watcher());
            // Tags of connections, whatever happened to them.
            for tag in 4..4 + 16 {
                self.event(tag, EventSet::IN | EventSet::OUT);
            }
        }
    }

    fn event(&mut self, tag: u32, events: EventSet) {
        self.mux.lock().unwrap().ready(tag, events, self.registration.watcher());
    }

    /// The next packet to the guest, whose buffer goes back to the device.
    fn receive(&mut self) -> Option<(Header, Vec<u8>)> {
        self.turn();
        let (head, len) = self.receive.take_used()?;
        let at = RECEIVE_BUFFERS + u64::from(head) * u64::from(RECEIVE_BYTES);
        let header: Header = self.memory.read_obj(GuestAddress(at)).unwrap();
        let mut payload = vec![0; { header.len } as usize];
        assert_eq!(len as usize, HEADER_BYTES + payload.len());
        self.memory.read_slice(&mut payload, GuestAddress(at + HEADER_BYTES as u64)).unwrap();
        self.receive.offer(head);
        Some((header, payload))
    }

    fn expect(&mut self, op: u16) -> (Header, Vec<u8>) {
        let (header, payload) = self.receive().unwrap_or_else(|| panic!("no packet where {op} is due"));
        assert_eq!({ header.op }, op, "{header:?}");
        assert_eq!(({ header.src_cid }, { header.dst_cid }), (HOST_CID, u64::from(CID)));
        (header, payload)
    }

    fn send(&mut self, header: Header, payload: &[u8]) {
        self.memory.write_slice(header.as_slice(), GuestAddress(TRANSMIT_BUFFER)).unwrap();
        let at = TRANSMIT_BUFFER + HEADER_BYTES as u64;
        self.memory.write_slice(payload, GuestAddress(at)).unwrap();
        // Header and payload apart, and the payload in two pieces: no framing may matter.
        let half = payload.len() as u32 / 2;
        let mut segments = vec![(TRANSMIT_BUFFER, HEADER_BYTES as u32, false)];
        if !payload.is_empty() {
            segments.push((at, half, false));
            segments.push((at + u64::from(half), payload.len() as u32 - half, false));
        }
        self.transmit.add(&segments);
        self.turn();
        assert!(self.transmit.take_used().is_some());
    }

    /// A packet of the guest's on the connection that `to_guest` came on.
    fn reply(&mut self, to_guest: &Header, op: u16, payload: &[u8]) {
        self.send(packet(to_guest, op, payload.len()), payload);
    }

    /// A connection from the host, established.
    fn connect(&mut self) -> (UnixStream, Header) {
        let mut client = UnixStream::connect(&self.path).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        client.write_all(format!("CONNECT {PORT}\n").as_bytes()).unwrap();
        let (request, _) = self.expect(op::REQUEST);
        assert_eq!({ request.dst_port }, PORT);
        self.reply(&request, op::RESPONSE, &[]);
        let answer = format!("OK {}\n", { request.src_port });
        let mut seen = vec![0; answer.len()];
        client.read_exact(&mut seen).unwrap();
        assert_eq!(seen, answer.as_bytes());
        (client, request)
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.mux.lock().unwrap().stop(self.registration.watcher());
        self.event_loop.stop();
    }
}

fn packet(to_guest: &Header, op: u16, len: usize) -> Header {
    Header {
        src_cid: u64::from(CID),
        dst_cid: HOST_CID,
        src_port: to_guest.dst_port,
        dst_port: to_guest.src_port,
        len: len as u32,
        kind: TYPE_STREAM,
        op,
        buf_alloc: 0x4_0000,
        ..Header::default()
    }
}

fn assert_closed(stream: &mut UnixStream) {
    let mut byte = [0];
    assert!(matches!(stream.read(&mut byte), Ok(0) | Err(_)));
}

#[test]
fn bytes_pass_both_ways() {
    let mut b = Bench::new();
    let (mut client, request) = b.connect();
    client.write_all(b"to the guest").unwrap();
    assert_eq!(b.expect(op::RW).1, b"to the guest");
    b.reply(&request, op::RW, b"to the host");
    let mut text = [0; 11];
    client.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"to the host");
    assert!(b.interrupt.resets.lock().unwrap().is_empty());
}

#[test]
fn what_follows_the_greeting_at_once_is_not_lost() {
    let mut b = Bench::new();
    let mut client = UnixStream::connect(&b.path).unwrap();
    client.write_all(b"CONNECT 1024\nhello").unwrap();
    let (request, _) = b.expect(op::REQUEST);
    b.reply(&request, op::RESPONSE, &[]);
    assert_eq!(b.expect(op::RW).1, b"hello");
}

#[test]
fn a_refused_connection_is_closed() {
    let mut b = Bench::new();
    let mut client = UnixStream::connect(&b.path).unwrap();
    client.write_all(b"CONNECT 1024\n").unwrap();
    let (request, _) = b.expect(op::REQUEST);
    b.reply(&request, op::RST, &[]);
    assert_closed(&mut client);
}

#[test]
fn a_bad_greeting_is_closed_without_a_word_to_the_guest() {
    for greeting in ["GET / HTTP/1.1\r\n\r\n", "CONNECT x\n", "CONNECT 1234567890123456"] {
        let mut b = Bench::new();
        let mut client = UnixStream::connect(&b.path).unwrap();
        client.write_all(greeting.as_bytes()).unwrap();
        assert_eq!(b.receive(), None);
        assert_closed(&mut client);
    }
}

#[test]
fn the_hosts_half_close_comes_after_its_last_byte() {
    let mut b = Bench::new();
    let (mut client, request) = b.connect();
    client.write_all(&[7; 10_000]).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut received = 0;
    let end = loop {
        let (header, payload) = b.receive().unwrap();
        if header.op != op::RW {
            break header;
        }
        received += payload.len();
    };
    assert_eq!(received, 10_000);
    assert_eq!(({ end.op }, { end.flags }), (op::SHUTDOWN, shutdown::SEND));
    // The other direction still works.
    b.reply(&request, op::RW, b"late");
    let mut text = [0; 4];
    client.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"late");
}

#[test]
fn the_guests_half_close_comes_after_its_last_byte() {
    let mut b = Bench::new();
    let (mut client, request) = b.connect();
    b.reply(&request, op::RW, b"last");
    let mut end = packet(&request, op::SHUTDOWN, 0);
    end.flags = shutdown::SEND;
    b.send(end, &[]);
    let mut text = Vec::new();
    client.read_to_end(&mut text).unwrap();
    assert_eq!(text, b"last");
    // The other direction still works.
    client.write_all(b"answer").unwrap();
    assert_eq!(b.expect(op::RW).1, b"answer");
    drop(client);
    let (end, _) = b.expect(op::SHUTDOWN);
    assert_eq!({ end.flags }, shutdown::BOTH);
}

#[test]
fn a_host_that_closes_ends_the_connection() {
    let mut b = Bench::new();
    let (client, request) = b.connect();
    drop(client);
    b.event(4, EventSet::IN | EventSet::HANG_UP);
    let (end, _) = b.expect(op::SHUTDOWN);
    assert_eq!({ end.flags }, shutdown::BOTH);
    b.reply(&request, op::RST, &[]);
    assert_eq!(b.receive(), None);
    // Its place is free again: bytes on it are refused.
    b.reply(&request, op::RW, b"x");
    b.expect(op::RST);
}

#[test]
fn a_guest_that_closes_is_confirmed_and_its_bytes_arrive() {
    let mut b = Bench::new();
    let (mut client, request) = b.connect();
    // More than the socket takes at once, so that some is kept.
    let chunk = vec![9; 32 * 1024];
    let mut sent = 0;
    while sent < 3 * chunk.len() {
        b.reply(&request, op::RW, &chunk);
        sent += chunk.len();
    }
    let mut end = packet(&request, op::SHUTDOWN, 0);
    end.flags = shutdown::BOTH;
    b.send(end, &[]);
    while b.expect_any().op != op::RST {}
    let reader = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        client.read_to_end(&mut bytes).unwrap();
        bytes.len()
    });
    while !reader.is_finished() {
        b.turn();
    }
    assert_eq!(reader.join().unwrap(), sent);
}

impl Bench {
    fn expect_any(&mut self) -> Header {
        self.receive().expect("a packet is due").0
    }
}

#[test]
fn a_guest_may_send_what_fits_and_no_more() {
    let mut b = Bench::new();
    let (client, request) = b.connect();
    let chunk = vec![1; 64 * 1024];
    // Until the socket is full, bytes pass through; then they are kept, and when that is full, the guest has gone too far.
    let mut refused = false;
    let mut unread = 0;
    for _ in 0..64 {
        b.reply(&request, op::RW, &chunk);
        while let Some((header, _)) = b.receive() {
            refused |= header.op == op::RST;
        }
        if refused {
            break;
        }
        unread += chunk.len();
    }
    assert!(refused);
    assert!(unread >= BUFFER_BYTES as usize);
    drop(client);
}

#[test]
fn the_guest_is_told_of_room() {
    let mut b = Bench::new();
    let (mut client, request) = b.connect();
    let chunk = vec![1; 32 * 1024];
    let mut told = 0;
    let mut data = vec![0; chunk.len()];
    for round in 1..=32u32 {
        b.reply(&request, op::RW, &chunk);
        client.read_exact(&mut data).unwrap();
        while let Some((header, _)) = b.receive() {
            assert_eq!({ header.op }, op::CREDIT_UPDATE);
            told = header.fwd_cnt;
        }
        assert!(round * 32 * 1024 - told < BUFFER_BYTES, "the guest would have to stop");
    }
}

#[test]
fn nothing_is_sent_that_the_guest_has_no_room_for() {
    let mut b = Bench::new();
    let (mut client, request) = b.connect();
    let mut credit = packet(&request, op::CREDIT_UPDATE, 0);
    credit.buf_alloc = 100;
    b.send(credit, &[]);
    client.write_all(&[5; 300]).unwrap();
    assert_eq!(b.expect(op::RW).1.len(), 100);
    assert_eq!(b.receive(), None);
    credit.fwd_cnt = 60;
    b.send(credit, &[]);
    assert_eq!(b.expect(op::RW).1.len(), 60);
    // A guest that counts backwards, or claims more than it got, gets nothing.
    for nonsense in [0, 1_000_000] {
        credit.fwd_cnt = nonsense;
        b.send(credit, &[]);
        assert_eq!(b.receive(), None);
    }
}

#[test]
fn every_connection_gets_its_turn() {
    let mut b = Bench::new();
    let mut clients: Vec<_> = (0..4).map(|_| b.connect()).collect();
    for (client, _) in &mut clients {
        client.write_all(&[1; 20_000]).unwrap();
    }
    // All become readable before anyone gets to send.
    for index in 0..4 {
        b.mux.lock().unwrap().host_event(index, EventSet::IN, b.registration.watcher());
    }
    let mut first = Vec::new();
    for _ in 0..4 {
        first.push(b.expect(op::RW).0.src_port);
    }
    first.sort_unstable();
    first.dedup();
    assert_eq!(first.len(), 4, "one packet each before anyone's second");
}

#[test]
fn the_guest_reaches_only_open_ports_and_those_once() {
    let mut b = Bench::new();
    let request = |host: u32, guest: u32| Header {
        src_cid: u64::from(CID),
        dst_cid: HOST_CID,
        src_port: guest,
        dst_port: host,
        kind: TYPE_STREAM,
        op: op::REQUEST,
        buf_alloc: 4096,
        ..Header::default()
    };
    b.send(request(8, 50), &[]);
    b.expect(op::RST);
    b.send(request(READY_PORT, 51), &[]);
    let (response, _) = b.expect(op::RESPONSE);
    b.reply(&response, op::RW, b"ready");
    let mut text = [0; 5];
    b.ready.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"ready");
    b.send(request(READY_PORT, 52), &[]);
    let (refusal, _) = b.expect(op::RST);
    assert_eq!({ refusal.dst_port }, 52);
}

#[test]
fn packets_of_strangers_and_other_kinds_do_no_harm() {
    let mut b = Bench::new();
    let (mut client, request) = b.connect();
    let mut stranger = packet(&request, op::RST, 0);
    stranger.src_cid = 99;
    b.send(stranger, &[]);
    let mut elsewhere = packet(&request, op::RST, 0);
    elsewhere.dst_cid = 1;
    b.send(elsewhere, &[]);
    client.write_all(b"alive").unwrap();
    assert_eq!(b.expect(op::RW).1, b"alive");
    let mut seqpacket = packet(&request, op::RW, 0);
    seqpacket.kind = 2;
    b.send(seqpacket, &[]);
    b.expect(op::RST);
    assert_closed(&mut client);
}

#[test]
fn a_packet_that_claims_more_than_it_has_resets_its_connection() {
    let mut b = Bench::new();
    let (mut client, request) = b.connect();
    b.send(packet(&request, op::RW, 100), b"short");
    b.expect(op::RST);
    assert_closed(&mut client);
}

#[test]
fn a_packet_without_a_whole_header_breaks_the_queue() {
    let mut b = Bench::new();
    b.transmit.add(&[(TRANSMIT_BUFFER, 43, false)]);
    b.turn();
    assert_eq!(b.interrupt.resets.lock().unwrap().len(), 1);
}

#[test]
fn refusals_wait_for_buffers_and_hold_back_the_guest() {
    let mut b = Bench::new();
    // The guest leaves the device without buffers.
    let mut taken = 0;
    b.mux.lock().unwrap().queues.receive.fail("test");
    let mut stray = packet(&Header { src_port: 1, dst_port: 2, ..Header::default() }, op::RW, 0);
    for port in 0..QUEUE {
        stray.src_port = u32::from(port);
        b.memory.write_slice(stray.as_slice(), GuestAddress(TRANSMIT_BUFFER)).unwrap();
        b.transmit.add(&[(TRANSMIT_BUFFER, HEADER_BYTES as u32, false)]);
        b.turn();
        while b.transmit.take_used().is_some() {
            taken += 1;
        }
    }
    assert_eq!(taken, 64);
}

#[test]
fn clients_beyond_the_limit_wait() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a valid structure to write to and read from.
    unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit);
        limit.rlim_cur = limit.rlim_max;
        libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
    }
    if limit.rlim_max < 4096 {
        eprintln!("skipped: the descriptor limit is too low");
        return;
    }
    let mut b = Bench::new();
    let mut clients = Vec::new();
    for _ in 0..MAX_STREAMS {
        clients.push(UnixStream::connect(&b.path).unwrap());
        b.event(TAG_LISTENER, EventSet::IN);
    }
    let mut late = UnixStream::connect(&b.path).unwrap();
    late.write_all(b"CONNECT 9\n").unwrap();
    b.event(TAG_LISTENER, EventSet::IN);
    assert_eq!(b.receive(), None);
    // One leaves; the one that waited is served.
    clients.remove(3);
    b.event(4 + 3, EventSet::IN | EventSet::HANG_UP);
    assert_eq!({ b.expect(op::REQUEST).0.dst_port }, 9);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever a guest sends, in whatever state connections are: the device lives on, and answers.
    #[test]
    fn any_packets_leave_the_device_sound(
        packets in prop::collection::vec(
            (0u16..10, 0usize..4, any::<u32>(), any::<u32>(), any::<u32>(), 0u32..300, 0usize..200, any::<u16>()),
            1..80,
        )
    ) {
        let mut b = Bench::new();
        let mut connections: Vec<_> = (0..3).map(|_| b.connect()).collect();
        for (operation, which, flags, buf_alloc, fwd_cnt, len, payload, kind) in packets {
            let mut header = match connections.get(which) {
                Some((_, request)) => packet(request, operation, 0),
                None => packet(&Header { src_port: fwd_cnt, dst_port: flags, ..Header::default() }, operation, 0),
            };
            header.flags = flags & 3;
            header.buf_alloc = buf_alloc;
            header.fwd_cnt = fwd_cnt;
            header.len = len;
            header.kind = if kind % 8 == 0 { kind } else { TYPE_STREAM };
            b.send(header, &vec![3; payload]);
            if let Some((client, _)) = connections.get_mut(which) {
                let _ = client.write(&[1; 100]);
            }
            while b.receive().is_some() {}
        }
        prop_assert!(b.interrupt.resets.lock().unwrap().is_empty());
        // It still takes new connections.
        b.connect();
    }
}
