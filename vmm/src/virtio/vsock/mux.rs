//! All connections of the device over its queues: takes the guest's packets apart, and gives every connection its turn to
//! send.
//!
//! Connections that have something for the guest stand in a line; each sends one packet and goes to the end of it. Work
//! is bounded on every wake-up, and so is what the guest can make the host remember: connections, bytes of each, and
//! refusals not yet sent.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vmm_sys_util::epoll::EventSet;

use super::packet::{HEADER_BYTES, HOST_CID, Header, Ports, TYPE_STREAM, op};
use super::stream::{Fate, Phase, Produced, Stream, header};
use crate::event_loop::{EventHandler, Watcher};
use crate::virtio::queue::{Chain, VirtQueue};

/// Most connections at a time. Each holds a descriptor and at most 128 KiB of what its host end does not read.
pub const MAX_STREAMS: usize = 1023;
/// Most refusals that wait for a buffer; beyond, the guest's packets wait.
const MAX_RESETS: usize = 64;
/// Packets taken, and sent, before other devices get their turn.
const BATCH: usize = 128;
/// Clients accepted before others get their turn.
const ACCEPT_BATCH: usize = 16;
/// The first port used for the host's end of connections; the lower ones are for services.
const FIRST_HOST_PORT: u32 = 1 << 30;
/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` (section 5.10.6.7).
const EVENT_TRANSPORT_RESET: [u8; 4] = [0; 4];

/// What the loop reports.
pub const TAG_RECEIVE: u32 = 0;
/// The guest made packets available.
pub const TAG_TRANSMIT: u32 = 1;
/// The guest made buffers for events available.
pub const TAG_EVENT: u32 = 2;
/// A client wants to connect.
pub const TAG_LISTENER: u32 = 3;
/// A connection's socket; its index is added.
const TAG_STREAMS: u32 = 4;

/// The three queues (section 5.10.2).
pub struct Queues {
    /// Packets to the guest.
    pub receive: VirtQueue,
    /// Packets from the guest.
    pub transmit: VirtQueue,
    /// Events to the guest.
    pub event: VirtQueue,
}

/// Ports of the host that the guest may connect to, and what it then reaches.
pub type GuestPorts = HashMap<u32, UnixStream>;

/// The device at work.
pub struct Mux {
    pub(super) queues: Queues,
    guest_cid: u32,
    listener: Arc<UnixListener>,
    listening: bool,
    pub(super) guest_ports: GuestPorts,
    streams: Vec<Option<Stream>>,
    by_ports: HashMap<Ports, usize>,
    /// Connections that may have something to send, each once.
    line: VecDeque<usize>,
    in_line: Vec<bool>,
    /// Refusals to send.
    resets: VecDeque<Ports>,
    next_host_port: u32,
    completed: Arc<AtomicU64>,
}

impl Mux {
    /// A device without connections.
    #[must_use]
    pub fn new(
        queues: Queues,
        guest_cid: u32,
        listener: Arc<UnixListener>,
        guest_ports: GuestPorts,
        completed: Arc<AtomicU64>,
    ) -> Self {
        Self {
            queues,
            guest_cid,
            listener,
            listening: false,
            guest_ports,
            streams: Vec::new(),
            by_ports: HashMap::new(),
            line: VecDeque::new(),
            in_line: Vec::new(),
            resets: VecDeque::new(),
            next_host_port: FIRST_HOST_PORT,
            completed,
        }
    }

    /// Starts to watch the queues and the listener, and serves what is there.
    ///
    /// # Errors
    ///
    /// When a descriptor cannot be watched.
    pub fn start(&mut self, watcher: &Watcher) -> io::Result<()> {
        for (queue, tag) in self.kicks() {
            watcher.watch(queue, tag, EventSet::IN)?;
        }
        self.listen(watcher, true);
        self.transmit(watcher);
        self.send(watcher);
        Ok(())
    }

    /// Forgets all descriptors and closes all connections.
    pub fn stop(&mut self, watcher: &Watcher) {
        for (queue, _) in self.kicks() {
            watcher.forget(queue);
        }
        self.listen(watcher, false);
        for stream in self.streams.iter().flatten() {
            if let Some(socket) = stream.socket() {
                watcher.forget(socket.as_raw_fd());
            }
        }
        self.streams.clear();
        self.by_ports.clear();
        self.line.clear();
        self.in_line.clear();
        self.resets.clear();
    }

    fn kicks(&self) -> [(i32, u32); 3] {
        let Queues { receive, transmit, event } = &self.queues;
        [
            (receive.kick().as_raw_fd(), TAG_RECEIVE),
            (transmit.kick().as_raw_fd(), TAG_TRANSMIT),
            (event.kick().as_raw_fd(), TAG_EVENT),
        ]
    }

    /// Tells the guest that all its connections are gone, as after it was restored from a snapshot.
    pub fn send_transport_reset(&mut self) {
        let event = &mut self.queues.event;
        if let Some(chain) = event.pop() {
            let len = chain.write_at(0, &EVENT_TRANSPORT_RESET);
            // Four.
            event.push(chain.head(), len as u32);
            event.notify();
        }
    }

    // ---- connections

    fn count(&self) -> usize {
        self.streams.iter().flatten().count()
    }

    fn listen(&mut self, watcher: &Watcher, on: bool) {
        if on == self.listening {
            return;
        }
        let fd = self.listener.as_raw_fd();
        if on {
            if let Err(error) = watcher.watch(fd, TAG_LISTENER, EventSet::IN) {
                crate::log::warn(format_args!("the vsock listener cannot be watched: {error}"));
                return;
            }
        } else {
            watcher.forget(fd);
        }
        self.listening = on;
    }

    fn accept(&mut self, watcher: &Watcher) {
        for _ in 0..ACCEPT_BATCH {
            if self.count() >= MAX_STREAMS {
                // Until a connection ends.
                self.listen(watcher, false);
                return;
            }
            // No more clients, or no more descriptors: the latter is tried again when a connection ends.
            let socket = match self.listener.accept() {
                Ok((socket, _)) => socket,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    crate::log::warn(format_args!("cannot accept a vsock client: {error}"));
                    if self.count() > 0 {
                        self.listen(watcher, false);
                    }
                    return;
                }
            };
            if socket.set_nonblocking(true).is_err() {
                continue;
            }
            let host_port = self.free_host_port();
            let index = self.insert(Stream::greeting(socket, host_port), watcher);
            // The greeting may be there already.
            self.host_event(index, EventSet::IN, watcher);
        }
    }

    fn free_host_port(&mut self) -> u32 {
        // Two billion ports and a thousand connections: the first or second try is free.
        loop {
            let port = self.next_host_port;
            self.next_host_port = if port >= u32::MAX - 1 { FIRST_HOST_PORT } else { port + 1 };
            if !self.streams.iter().flatten().any(|stream| stream.ports().host == port) {
                return port;
            }
        }
    }

    fn insert(&mut self, stream: Stream, watcher: &Watcher) -> usize {
        let index = self.streams.iter().position(Option::is_none).unwrap_or_else(|| {
            self.streams.push(None);
            self.in_line.push(false);
            self.streams.len() - 1
        });
        if let Some(socket) = stream.socket() {
            // Edge-triggered: a connection that waits for the other side must not keep the loop awake.
            let events = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
            // At most 1,023 connections.
            let tag = TAG_STREAMS + index as u32;
            if let Err(error) = watcher.watch(socket.as_raw_fd(), tag, events) {
                crate::log::warn(format_args!("a vsock connection cannot be watched: {error}"));
            }
        }
        self.streams[index] = Some(stream);
        index
    }

    /// Takes a connection out of the table.
    fn remove(&mut self, index: usize, watcher: &Watcher) {
        let Some(stream) = self.streams.get_mut(index).and_then(Option::take) else { return };
        if let Some(socket) = stream.socket() {
            watcher.forget(socket.as_raw_fd());
        }
        if self.by_ports.get(&stream.ports()) == Some(&index) {
            self.by_ports.remove(&stream.ports());
        }
        self.listen(watcher, true);
    }

    /// Does to a connection what came of an event.
    fn settle(&mut self, index: usize, fate: Fate, watcher: &Watcher) {
        let Some(stream) = self.streams.get_mut(index).and_then(Option::as_mut) else { return };
        let ports = stream.ports();
        match fate {
            Fate::Over => self.remove(index, watcher),
            Fate::Reset => {
                self.resets.push_back(ports);
                self.by_ports.remove(&ports);
                // The host may still have to read what the guest sent.
                if stream.phase() != Phase::Draining {
                    self.remove(index, watcher);
                }
            }
            Fate::Lives => {
                if stream.phase() == Phase::Draining {
                    self.by_ports.remove(&ports);
                } else if stream.phase() != Phase::Greeting {
                    self.by_ports.entry(ports).or_insert(index);
                }
                if stream.wants_to_send() {
                    self.queue_up(index);
                }
            }
        }
    }

    fn queue_up(&mut self, index: usize) {
        if !std::mem::replace(&mut self.in_line[index], true) {
            self.line.push_back(index);
        }
    }

    pub(super) fn host_event(&mut self, index: usize, events: EventSet, watcher: &Watcher) {
        let Some(stream) = self.streams.get_mut(index).and_then(Option::as_mut) else { return };
        let readable = events.intersects(EventSet::IN | EventSet::READ_HANG_UP);
        let hung_up = events.intersects(EventSet::HANG_UP | EventSet::ERROR);
        let fate = stream.host_event(readable, events.contains(EventSet::OUT), hung_up);
        self.settle(index, fate, watcher);
    }

    // ---- from the guest

    /// Serves the guest's packets, as long as refusals have room.
    fn transmit(&mut self, watcher: &Watcher) {
        for taken in 0.. {
            if taken == BATCH {
                let _ = self.queues.transmit.kick().write(1);
                break;
            }
            if self.resets.len() >= MAX_RESETS {
                break;
            }
            let Some(chain) = self.queues.transmit.pop() else { break };
            let Some(header) = Header::read(&chain) else {
                self.queues.transmit.fail("a packet is shorter than its header");
                break;
            };
            self.packet(&header, &chain, watcher);
            self.queues.transmit.push(chain.head(), 0);
            self.completed.fetch_add(1, Ordering::Relaxed);
        }
        self.queues.transmit.notify();
    }

    fn packet(&mut self, header: &Header, chain: &Chain, watcher: &Watcher) {
        if header.src_cid != u64::from(self.guest_cid) || header.dst_cid != HOST_CID {
            // From nobody, or to nobody that is here.
            return;
        }
        let ports = Ports { host: header.dst_port, guest: header.src_port };
        let sound = header.kind == TYPE_STREAM && header.len as usize <= chain.readable_len() - HEADER_BYTES;
        match self.by_ports.get(&ports).copied() {
            Some(index) => {
                let Some(stream) = self.streams.get_mut(index).and_then(Option::as_mut) else { return };
                let fate = if sound { stream.packet(header, chain) } else { Fate::Reset };
                self.settle(index, fate, watcher);
            }
            None if sound && header.op == op::REQUEST => self.guest_request(ports, header, watcher),
            // Nothing answers a refusal.
            None if header.op == op::RST => {}
            None => self.resets.push_back(ports),
        }
    }

    /// The guest wants a connection: granted once for every port that the configuration opens.
    fn guest_request(&mut self, ports: Ports, header: &Header, watcher: &Watcher) {
        if self.count() >= MAX_STREAMS {
            self.resets.push_back(ports);
            return;
        }
        match self.guest_ports.remove(&ports.host) {
            Some(socket) if socket.set_nonblocking(true).is_ok() => {
                let index = self.insert(Stream::accepted(socket, ports, header), watcher);
                self.by_ports.insert(ports, index);
                self.queue_up(index);
            }
            _ => self.resets.push_back(ports),
        }
    }

    // ---- to the guest

    /// Sends what is to be sent, as long as the guest has buffers.
    fn send(&mut self, watcher: &Watcher) {
        let blocked = self.resets.len() >= MAX_RESETS;
        let mut sent = 0;
        while !(self.resets.is_empty() && self.line.is_empty()) {
            if sent == BATCH {
                let _ = self.queues.receive.kick().write(1);
                break;
            }
            let Some(chain) = self.queues.receive.pop() else { break };
            if chain.writable_len() <= HEADER_BYTES {
                self.queues.receive.fail("a buffer has no room for a packet");
                break;
            }
            match self.fill(&chain, watcher) {
                Some(len) => self.queues.receive.push(chain.head(), len),
                None => {
                    self.queues.receive.undo_pop();
                    break;
                }
            }
            sent += 1;
            self.completed.fetch_add(1, Ordering::Relaxed);
        }
        self.queues.receive.notify();
        if blocked && self.resets.len() < MAX_RESETS {
            // The guest's packets waited for this.
            let _ = self.queues.transmit.kick().write(1);
        }
    }

    /// Makes one packet: a refusal, or of the first in line that has one.
    fn fill(&mut self, chain: &Chain, watcher: &Watcher) -> Option<u32> {
        if let Some(ports) = self.resets.pop_front() {
            header(self.guest_cid, ports, op::RST).write(chain);
            return Some(HEADER_BYTES as u32);
        }
        while let Some(index) = self.line.pop_front() {
            self.in_line[index] = false;
            let Some(stream) = self.streams[index].as_mut() else { continue };
            let produced = stream.produce(self.guest_cid, chain);
            if let Some(socket) = stream.take_finished_socket() {
                watcher.forget(socket.as_raw_fd());
            }
            if stream.wants_to_send() {
                self.queue_up(index);
            }
            if let Produced::Packet(len) = produced {
                return Some(len);
            }
        }
        None
    }
}

impl EventHandler for Mux {
    fn ready(&mut self, tag: u32, events: EventSet, watcher: &Watcher) {
        match tag {
            TAG_RECEIVE => self.queues.receive.clear_kick(),
            TAG_TRANSMIT => {
                self.queues.transmit.clear_kick();
                self.transmit(watcher);
            }
            TAG_EVENT => self.queues.event.clear_kick(),
            TAG_LISTENER => self.accept(watcher),
            stream => self.host_event((stream - TAG_STREAMS) as usize, events, watcher),
        }
        self.send(watcher);
    }
}
