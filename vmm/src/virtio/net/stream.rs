//! A host's end that is a Unix stream socket, with a program behind it that carries packets without any privilege: passt,
//! or whatever else speaks as QEMU's `-netdev stream` does. Each packet has its length before it, 32 bits in network order.
//!
//! The program is trusted no more than the guest is: a length that no packet has ends the connection, since nothing after
//! it could be told apart. There is no virtio header on the wire, so neither side can leave work to the other.
//!
//! Packets are gathered on both ways, so that a system call moves several. What the program does not take at once waits
//! here; when that is more than the longest packet, the guest's queue waits too.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BS;

use super::packet::{ETHERNET_BYTES, HEADER_BYTES};
use super::tap::{Queue, TapError, set_nonblocking};

/// What stands before each packet.
const LENGTH_BYTES: usize = 4;
/// The longest packet that is taken: 16 bits of payload behind an Ethernet header.
const MAX_RECEIVED_BYTES: usize = 65_535 + ETHERNET_BYTES;
/// The longest packet that is sent: passt ends a connection on which a longer one comes.
const MAX_SENT_BYTES: usize = 65_535;
/// Room for packets that were received together. One fits at least, whole.
const INPUT_BYTES: usize = 2 * (LENGTH_BYTES + MAX_RECEIVED_BYTES);
/// Packets wait for the program until they are this much.
const OUTPUT_BYTES: usize = 64 << 10;

/// A connection to a program that carries packets.
pub(super) struct Stream {
    socket: OwnedFd,
    input: Mutex<Input>,
    /// Packets, behind their lengths, that the program has not taken yet.
    output: Mutex<Vec<u8>>,
}

/// What has been received and not been read.
struct Input {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    /// Whether there is anything more to come.
    open: bool,
}

impl Stream {
    /// Checks what `fd` is and prepares it.
    pub(super) fn new(fd: OwnedFd) -> Result<Self, TapError> {
        if !is_socket(&fd).map_err(|source| TapError::Setting { step: "fstat", source })? {
            return Err(TapError::NoSocket);
        }
        set_nonblocking(&fd).map_err(|source| TapError::Setting { step: "O_NONBLOCK", source })?;
        let buffer = vec![0; INPUT_BYTES].into_boxed_slice();
        let input = Input { buffer, start: 0, end: 0, open: true };
        Ok(Self { socket: fd, input: Mutex::new(input), output: Mutex::new(Vec::new()) })
    }

    fn output(&self) -> MutexGuard<'_, Vec<u8>> {
        self.output.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends what waits; `WouldBlock` if not all of it is taken.
    fn send(&self, output: &mut Vec<u8>) -> io::Result<()> {
        let mut sent = 0;
        let result = loop {
            let rest = &output[sent..];
            if rest.is_empty() {
                break Ok(());
            }
            // SAFETY: the buffer is live and of that length.
            let count =
                unsafe { libc::send(self.socket.as_raw_fd(), rest.as_ptr().cast(), rest.len(), libc::MSG_NOSIGNAL) };
            match usize::try_from(count) {
                Ok(count) => sent += count,
                Err(_) => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error => break Err(error),
                },
            }
        };
        output.drain(..sent);
        match result {
            // Whoever reads learns of the end; what is sent from here on is lost, as on any wire.
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => {
                output.clear();
                Err(error)
            }
            result => result,
        }
    }
}

impl Queue for Stream {
    fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    fn features(&self) -> u64 {
        0
    }

    fn set_offloads(&self, _features: u64) -> io::Result<()> {
        Ok(())
    }

    fn set_attached(&self, _attached: bool) -> io::Result<()> {
        Ok(())
    }

    unsafe fn read(&self, iovecs: &[libc::iovec]) -> io::Result<usize> {
        let mut input = self.input.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match input.packet() {
                Ok(Some(packet)) => {
                    // No checksum to fill in, no segments: a header of zeros.
                    let parts = [&[0; HEADER_BYTES][..], packet];
                    // SAFETY: as the caller promises.
                    unsafe { scatter(&parts, iovecs) };
                    let len = packet.len();
                    input.start += LENGTH_BYTES + len;
                    return Ok(HEADER_BYTES + len);
                }
                Ok(None) => input.fill(&self.socket)?,
                Err(len) => {
                    crate::log::warn(format_args!(
                        "the host's side of a network interface announces a packet of {len} bytes, which none has; \
                         the connection to it ends"
                    ));
                    input.open = false;
                    input.start = input.end;
                    // Tells the other side, too.
                    // SAFETY: the descriptor is open.
                    unsafe { libc::shutdown(self.socket.as_raw_fd(), libc::SHUT_RDWR) };
                    return Err(io::ErrorKind::ConnectionAborted.into());
                }
            }
        }
    }

    unsafe fn write(&self, iovecs: &[libc::iovec]) -> io::Result<()> {
        let len: usize = iovecs.iter().map(|part| part.iov_len).sum();
        let len = len.checked_sub(HEADER_BYTES).filter(|len| *len <= MAX_SENT_BYTES);
        let len = len.ok_or(io::ErrorKind::InvalidInput)?;
        let mut output = self.output();
        if output.len() > OUTPUT_BYTES {
            self.send(&mut output)?;
        }
        // At most `MAX_SENT_BYTES`.
        output.extend((len as u32).to_be_bytes());
        // SAFETY: as the caller promises.
        unsafe { gather(iovecs, HEADER_BYTES, &mut output) };
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        let mut output = self.output();
        self.send(&mut output)
    }
}

impl Input {
    /// The next packet, if all of it is here; fails with its length where that is none.
    fn packet(&self) -> Result<Option<&[u8]>, u32> {
        let received = &self.buffer[self.start..self.end];
        let Some((length, rest)) = received.split_first_chunk::<LENGTH_BYTES>() else { return Ok(None) };
        let length = u32::from_be_bytes(*length);
        match usize::try_from(length) {
            Ok(len @ ETHERNET_BYTES..=MAX_RECEIVED_BYTES) => Ok(rest.get(..len)),
            _ => Err(length),
        }
    }

    /// Receives more, with no whole packet here.
    fn fill(&mut self, socket: &OwnedFd) -> io::Result<()> {
        if !self.open {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        self.buffer.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        // What is here is less than a packet, so this is not empty.
        let room = &mut self.buffer[self.end..];
        // SAFETY: the buffer is live and of that length.
        let count = unsafe { libc::recv(socket.as_raw_fd(), room.as_mut_ptr().cast(), room.len(), 0) };
        match usize::try_from(count) {
            Ok(count @ 1..) => {
                self.end += count;
                Ok(())
            }
            Ok(_) => Err(self.lost(&io::ErrorKind::UnexpectedEof.into())),
            Err(_) => match io::Error::last_os_error() {
                error if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Err(error),
                error => Err(self.lost(&error)),
            },
        }
    }

    fn lost(&mut self, why: &io::Error) -> io::Error {
        self.open = false;
        crate::log::warn(format_args!("the host's side of a network interface has gone: {why}"));
        io::ErrorKind::ConnectionAborted.into()
    }
}

fn is_socket(fd: &OwnedFd) -> io::Result<bool> {
    // SAFETY: all-zero is a valid stat, a plain C structure.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open, and the structure live.
    match unsafe { libc::fstat(fd.as_raw_fd(), &raw mut stat) } {
        0 => Ok(stat.st_mode & libc::S_IFMT == libc::S_IFSOCK),
        _ => Err(io::Error::last_os_error()),
    }
}

/// # Safety
///
/// The part must be of memory that stays mapped while the slice lives.
unsafe fn volatile(part: &libc::iovec) -> VolatileSlice<'_, BS<'_, ()>> {
    // SAFETY: as the caller promises.
    unsafe { VolatileSlice::new(part.iov_base.cast(), part.iov_len) }
}

/// Copies `parts`, one behind the other, to where `iovecs` point, as far as there is room.
///
/// # Safety
///
/// `iovecs` must point to memory that stays mapped during the call and may change under everybody's hands.
unsafe fn scatter(parts: &[&[u8]], iovecs: &[libc::iovec]) {
    let mut iovecs = iovecs.iter();
    // SAFETY: as the caller promises.
    let mut next = || iovecs.next().map(|part| unsafe { volatile(part) });
    let mut room = next();
    for part in parts {
        let mut rest = *part;
        while !rest.is_empty() {
            let Some(slice) = room else { return };
            let here = rest.len().min(slice.len());
            slice.copy_from(&rest[..here]);
            rest = &rest[here..];
            // Where all of it is used, an empty rest or an error is the same.
            room = slice.offset(here).ok().filter(|slice| !slice.is_empty()).or_else(&mut next);
        }
    }
}

/// Appends what `iovecs` point to, but for the first `skip` bytes.
///
/// # Safety
///
/// `iovecs` must point to memory that stays mapped during the call and may change under everybody's hands.
unsafe fn gather(iovecs: &[libc::iovec], mut skip: usize, output: &mut Vec<u8>) {
    for part in iovecs {
        // SAFETY: as the caller promises.
        let slice = unsafe { volatile(part) };
        let skipped = skip.min(slice.len());
        skip -= skipped;
        if let Ok(slice) = slice.offset(skipped) {
            let at = output.len();
            output.resize(at + slice.len(), 0);
            slice.copy_to(&mut output[at..]);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use proptest::prelude::*;

    use super::*;

    fn connected() -> (Stream, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Stream::new(ours.into()).unwrap(), theirs)
    }

    /// Reads a packet into buffers of these lengths; answers its bytes without the header, and its announced length.
    fn read(stream: &Stream, lens: &[usize]) -> io::Result<(Vec<u8>, usize)> {
        let mut buffers: Vec<Vec<u8>> = lens.iter().map(|len| vec![0xee; *len]).collect();
        let iovecs: Vec<libc::iovec> = buffers
            .iter_mut()
            .map(|buffer| libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() })
            .collect();
        // SAFETY: the buffers are live.
        let len = unsafe { stream.read(&iovecs) }?;
        let mut bytes = buffers.concat();
        bytes.truncate(len);
        assert!(bytes.iter().take(HEADER_BYTES).all(|byte| *byte == 0), "the header is not empty");
        Ok((bytes.split_off(HEADER_BYTES.min(bytes.len())), len - HEADER_BYTES))
    }

    fn write(stream: &Stream, parts: &[&[u8]]) -> io::Result<()> {
        let iovecs: Vec<libc::iovec> = parts
            .iter()
            .map(|part| libc::iovec { iov_base: part.as_ptr().cast_mut().cast(), iov_len: part.len() })
            .collect();
        // SAFETY: the buffers are live, and nothing writes to them.
        unsafe { stream.write(&iovecs) }
    }

    fn framed(packet: &[u8]) -> Vec<u8> {
        [&u32::try_from(packet.len()).unwrap().to_be_bytes()[..], packet].concat()
    }

    #[test]
    fn packets_that_come_in_pieces_or_together_are_told_apart() {
        let (stream, mut wire) = connected();
        let (first, second) = ([7; 60], [9; 1514]);
        let bytes = [framed(&first), framed(&second)].concat();
        for cut in [1, 3, 4, 5, 63, 64, 66, 68, 1000] {
            wire.write_all(&bytes[..cut]).unwrap();
            if cut < 64 {
                assert_eq!(read(&stream, &[4096]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
            }
            wire.write_all(&bytes[cut..]).unwrap();
            assert_eq!(read(&stream, &[4096]).unwrap().0, first);
            assert_eq!(read(&stream, &[1, 11, 1, 2, 4096]).unwrap().0, second);
            assert_eq!(read(&stream, &[4096]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        }
    }

    #[test]
    fn a_packet_that_does_not_fit_is_told_by_its_length_and_taken_away() {
        let (stream, mut wire) = connected();
        wire.write_all(&framed(&[7; 100])).unwrap();
        wire.write_all(&framed(&[9; 20])).unwrap();
        assert_eq!(read(&stream, &[50]).unwrap().1, 100);
        assert_eq!(read(&stream, &[50]).unwrap(), (vec![9; 20], 20));
    }

    #[test]
    fn the_longest_packet_is_taken_and_a_length_that_none_has_ends_the_connection() {
        for length in [0, 13, 65_535 + 15, u32::MAX] {
            let (stream, mut wire) = connected();
            let longest = vec![5; 65_535 + 14];
            let sender = std::thread::spawn(move || {
                wire.write_all(&framed(&longest)).unwrap();
                wire.write_all(&length.to_be_bytes()).unwrap();
                wire
            });
            let patiently = || loop {
                match read(&stream, &[70_000]) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::yield_now(),
                    result => return result,
                }
            };
            assert_eq!(patiently().unwrap().1, 65_535 + 14);
            assert_eq!(patiently().unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
            let mut wire = sender.join().unwrap();
            assert_eq!(wire.read(&mut [0; 1]).unwrap(), 0, "the other side is not told");
            assert_eq!(patiently().unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
        }
    }

    #[test]
    fn the_end_of_the_other_side_ends_the_connection() {
        let (stream, mut wire) = connected();
        wire.write_all(&framed(&[7; 60])[..30]).unwrap();
        drop(wire);
        assert_eq!(read(&stream, &[4096]).unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
        write(&stream, &[&[0; HEADER_BYTES], &[1; 60]]).unwrap();
        assert_eq!(stream.flush().unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        // Nothing waits for what will never go.
        stream.flush().unwrap();
    }

    #[test]
    fn what_is_sent_has_its_length_before_it_and_no_header() {
        let (stream, mut wire) = connected();
        write(&stream, &[&[0xaa; 5], &[0xaa; 7], &[1; 14], &[], &[2; 46]]).unwrap();
        write(&stream, &[&[[0xaa; HEADER_BYTES].as_slice(), &[3; 60]].concat()]).unwrap();
        stream.flush().unwrap();
        let mut sent = vec![0; 2 * 64];
        wire.read_exact(&mut sent).unwrap();
        assert_eq!(sent, [framed(&[[1; 14].as_slice(), &[2; 46]].concat()), framed(&[3; 60])].concat());
        let long = vec![0; HEADER_BYTES + MAX_SENT_BYTES + 1];
        assert_eq!(write(&stream, &[&long]).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(write(&stream, &[&[0; 3]]).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn a_full_host_holds_packets_up_and_loses_none() {
        let (stream, mut wire) = connected();
        let packet = |number: u32| [&[0; HEADER_BYTES][..], &number.to_be_bytes(), &[6; 1510]].concat();
        let mut written = 0;
        while let Ok(()) = write(&stream, &[&packet(written)]) {
            written += 1;
            assert!(written < 1_000_000, "nothing holds packets up");
        }
        assert_eq!(stream.flush().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert!(stream.output().len() <= OUTPUT_BYTES + LENGTH_BYTES + 1514, "more waits than is allowed");
        let reader = std::thread::spawn(move || {
            for number in 0..written {
                let mut frame = vec![0; LENGTH_BYTES + 1514];
                wire.read_exact(&mut frame).unwrap();
                assert_eq!(frame, framed(&packet(number)[HEADER_BYTES..]));
            }
        });
        while stream.flush().is_err() {
            std::thread::yield_now();
        }
        reader.join().unwrap();
    }

    #[test]
    fn something_else_than_a_socket_is_refused() {
        let null = std::fs::File::open("/dev/null").unwrap();
        assert!(matches!(Stream::new(null.into()), Err(TapError::NoSocket)));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic_or_answer_what_no_packet_is(
            pieces in prop::collection::vec(prop::collection::vec(prop_oneof![Just(0_u8), any::<u8>()], 0..200), 0..8)
        ) {
            let (stream, mut wire) = connected();
            for piece in pieces {
                let _ = wire.write_all(&piece);
                while let Ok((_, len)) = read(&stream, &[64, 64]) {
                    prop_assert!((ETHERNET_BYTES..=MAX_RECEIVED_BYTES).contains(&len));
                }
            }
        }
    }
}
