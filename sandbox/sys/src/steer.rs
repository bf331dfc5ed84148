//! Steers new connections and datagrams to any port of a namespace's loopback addresses to sockets of the caller's choice, by a program of
//! type `BPF_PROG_TYPE_SK_LOOKUP` (`Documentation/bpf/prog_sk_lookup.rst` of Linux, from 5.9 on).
//!
//! Program and maps live as long as the link, and the link as long as its descriptor.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

// Commands, types and helpers (`<linux/bpf.h>`).
const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_MAP_DELETE_ELEM: libc::c_int = 3;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_MAP_TYPE_HASH: u32 = 1;
const BPF_MAP_TYPE_SOCKMAP: u32 = 15;
const BPF_PROG_TYPE_SK_LOOKUP: u32 = 30;
const BPF_SK_LOOKUP: u32 = 36;
const MAP_LOOKUP_ELEM: i32 = 1;
const SK_RELEASE: i32 = 86;
const SK_ASSIGN: i32 = 124;
/// A 64-bit constant that stands for a map's descriptor.
const PSEUDO_MAP_FD: u8 = 1;

// Offsets in `struct bpf_sk_lookup`.
const FAMILY: i16 = 8;
const PROTOCOL: i16 = 12;
const LOCAL_IP4: i16 = 40;
const LOCAL_IP6: i16 = 44;
const LOCAL_PORT: i16 = 60;

/// The map's places: a socket for each family, those of UDP behind those of TCP.
const IPV4: i32 = 0;
const IPV6: i32 = 1;
const UDP: i32 = 2;
const PLACES: u32 = 4;
/// Most ports whose datagrams are not steered: one for each client at a time.
const MAX_PASSED: u32 = 1024;

/// Where to steer, sockets of a namespace; of a family that it lacks there are none.
#[derive(Clone, Copy, Debug)]
pub struct Targets<'a> {
    /// A listening TCP socket of IPv4.
    pub tcp4: BorrowedFd<'a>,
    /// Of IPv6.
    pub tcp6: Option<BorrowedFd<'a>>,
    /// A bound UDP socket of IPv4.
    pub udp4: Option<BorrowedFd<'a>>,
    /// Of IPv6.
    pub udp6: Option<BorrowedFd<'a>>,
}

/// Steering, until this is dropped.
#[derive(Debug)]
pub struct Steering {
    _link: OwnedFd,
    passed: OwnedFd,
}

impl Steering {
    /// Steers no datagrams to this port any more: a client has it, and is to get its answers.
    ///
    /// # Errors
    ///
    /// `E2BIG` where there are too many of them.
    pub fn pass(&self, port: u16) -> io::Result<()> {
        put(&self.passed, i32::from(port), 1_u32)
    }

    /// Steers datagrams to this port again.
    ///
    /// # Errors
    ///
    /// `ENOENT` where they were steered.
    pub fn steer(&self, port: u16) -> io::Result<()> {
        let key = u32::from(port);
        let delete = MapUpdate {
            map_fd: self.passed.as_raw_fd() as u32,
            padding: 0,
            key: (&raw const key) as u64,
            value: 0,
            flags: 0,
        };
        // SAFETY: the attributes are those of the command; the key has the map's size and lives through the call.
        unsafe { bpf(BPF_MAP_DELETE_ELEM, &delete) }.map(drop)
    }
}

/// One instruction: `struct bpf_insn`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Instruction {
    code: u8,
    /// The destination register in the low nibble, the source in the high one.
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// `union bpf_attr` for `BPF_MAP_CREATE`, as far as it is used; the kernel takes the rest as zero.
#[repr(C)]
struct MapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
}

/// For `BPF_MAP_UPDATE_ELEM` and `BPF_MAP_DELETE_ELEM`.
#[repr(C)]
struct MapUpdate {
    map_fd: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// For `BPF_PROG_LOAD`.
#[repr(C)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
}

/// For `BPF_LINK_CREATE`.
#[repr(C)]
struct LinkCreate {
    prog_fd: u32,
    target_fd: u32,
    attach_type: u32,
    flags: u32,
}

/// Steers connections and datagrams to 127.0.0.0/8 and ::1 in the network namespace to these sockets, which must be in it, as
/// long as what is returned is open. An accepted connection's own address has the port that was asked for.
///
/// # Errors
///
/// `EINVAL` from kernels before 5.9, `EPERM` without `CAP_BPF` and `CAP_NET_ADMIN`.
pub fn steer_loopback(namespace: BorrowedFd<'_>, targets: Targets<'_>) -> io::Result<Steering> {
    let map = |map_type, value_size, max_entries| {
        let create = MapCreate { map_type, key_size: 4, value_size, max_entries };
        // SAFETY: the attributes are those of the command.
        unsafe { make(BPF_MAP_CREATE, &create) }
    };
    let sockets = map(BPF_MAP_TYPE_SOCKMAP, 8, PLACES)?;
    let passed = map(BPF_MAP_TYPE_HASH, 4, MAX_PASSED)?;
    let Targets { tcp4, tcp6, udp4, udp6 } = targets;
    let places = [(IPV4, Some(tcp4)), (IPV6, tcp6), (UDP + IPV4, udp4), (UDP + IPV6, udp6)];
    for (place, socket) in places {
        if let Some(socket) = socket {
            put(&sockets, place, socket.as_raw_fd() as u64)?;
        }
    }
    let program = program(sockets.as_raw_fd(), passed.as_raw_fd());
    let load = ProgLoad {
        prog_type: BPF_PROG_TYPE_SK_LOOKUP,
        insn_cnt: program.len() as u32,
        insns: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kern_version: 0,
        prog_flags: 0,
        prog_name: *b"hull_loopback\0\0\0",
        prog_ifindex: 0,
        expected_attach_type: BPF_SK_LOOKUP,
    };
    // SAFETY: the attributes are those of the command; the program and the licence, a C string, live through the call.
    let program = unsafe { make(BPF_PROG_LOAD, &load) }?;
    let link = LinkCreate {
        prog_fd: program.as_raw_fd() as u32,
        target_fd: namespace.as_raw_fd() as u32,
        attach_type: BPF_SK_LOOKUP,
        flags: 0,
    };
    // SAFETY: the attributes are those of the command.
    let link = unsafe { make(BPF_LINK_CREATE, &link) }?;
    Ok(Steering { _link: link, passed })
}

/// Puts a value of the map's size into it.
fn put<T>(map: &OwnedFd, key: i32, value: T) -> io::Result<()> {
    let update = MapUpdate {
        map_fd: map.as_fd().as_raw_fd() as u32,
        padding: 0,
        key: (&raw const key) as u64,
        value: (&raw const value) as u64,
        flags: 0,
    };
    // SAFETY: the attributes are those of the command; key and value have the map's sizes and live through the call.
    unsafe { bpf(BPF_MAP_UPDATE_ELEM, &update) }.map(drop)
}

/// Calls bpf(2) for a command that makes a descriptor.
///
/// # Safety
///
/// `attributes` must be those of the command, and what they point to must be valid during the call.
unsafe fn make<T>(command: libc::c_int, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: as the caller promises.
    let fd = unsafe { bpf(command, attributes) }?;
    // SAFETY: the call has just made this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// # Safety
///
/// As for [`make`].
unsafe fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<libc::c_int> {
    // SAFETY: as the caller promises; the kernel reads no more than the given size.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw const *attributes, size_of::<T>()) };
    // Descriptors and 0 are small.
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as libc::c_int) }
}

/// The program: looks at protocol and local address, picks the socket of both, lets everything pass. What goes to a port that
/// is among those to be passed is let alone.
fn program(sockets: libc::c_int, passed: libc::c_int) -> Vec<Instruction> {
    const FAMILIES: &str = "families";
    const PASS: &str = "pass";
    const ASSIGN: &str = "assign";
    let mut code = Code::default();
    // Register 6 keeps the context.
    code.add(0xbf, 6, 1, 0, 0);
    // Register 7 has the place.
    code.add(0xb7, 7, 0, 0, 0);
    code.load(2, PROTOCOL);
    code.jump(0x15, 2, libc::IPPROTO_TCP, FAMILIES);
    code.jump(0x55, 2, libc::IPPROTO_UDP, PASS);
    code.load(3, LOCAL_PORT);
    code.look_up(passed, 3);
    code.jump(0x55, 0, 0, PASS);
    code.add(0xb7, 7, 0, 0, UDP);
    code.label(FAMILIES);
    code.load(2, FAMILY);
    code.jump(0x15, 2, libc::AF_INET, "ipv4");
    code.jump(0x55, 2, libc::AF_INET6, PASS);
    // ::1, word by word in network order.
    for (word, value) in [(0, 0), (1, 0), (2, 0), (3, 1_i32.to_be())] {
        code.load(3, LOCAL_IP6 + 4 * word);
        code.jump(0x55, 3, value, PASS);
    }
    code.add(0x07, 7, 0, 0, IPV6);
    code.jump(0x05, 0, 0, ASSIGN);
    code.label("ipv4");
    // 127.0.0.0/8: the first byte, which is the lowest of the word.
    code.load(3, LOCAL_IP4);
    code.add(0x57, 3, 0, 0, 0xff);
    code.jump(0x55, 3, 127, PASS);
    code.label(ASSIGN);
    code.look_up(sockets, 7);
    code.jump(0x15, 0, 0, PASS);
    code.add(0xbf, 7, 0, 0, 0);
    code.add(0xbf, 1, 6, 0, 0);
    code.add(0xbf, 2, 7, 0, 0);
    code.add(0xb7, 3, 0, 0, 0);
    code.add(0x85, 0, 0, 0, SK_ASSIGN);
    code.add(0xbf, 1, 7, 0, 0);
    code.add(0x85, 0, 0, 0, SK_RELEASE);
    code.label(PASS);
    // `SK_PASS`, also where nothing was assigned: the ordinary lookup follows then.
    code.add(0xb7, 0, 0, 0, 1);
    code.add(0x95, 0, 0, 0, 0);
    code.finish()
}

/// Instructions with jumps to labels.
#[derive(Default)]
struct Code {
    instructions: Vec<Instruction>,
    labels: Vec<(&'static str, usize)>,
    jumps: Vec<(&'static str, usize)>,
}

impl Code {
    fn add(&mut self, code: u8, to: u8, from: u8, offset: i16, immediate: i32) {
        self.instructions.push(Instruction { code, registers: from << 4 | to, offset, immediate });
    }

    /// Loads a word of the context.
    fn load(&mut self, to: u8, offset: i16) {
        self.add(0x61, to, 6, offset, 0);
    }

    /// Looks up what the register has in a map; the answer is in register 0.
    fn look_up(&mut self, map: libc::c_int, key: u8) {
        // The key goes to the stack.
        self.add(0x63, 10, key, -4, 0);
        self.add(0x18, 1, PSEUDO_MAP_FD, 0, map);
        self.add(0, 0, 0, 0, 0);
        self.add(0xbf, 2, 10, 0, 0);
        self.add(0x07, 2, 0, 0, -4);
        self.add(0x85, 0, 0, 0, MAP_LOOKUP_ELEM);
    }

    /// Jumps if the register compares with the number as `code` says.
    fn jump(&mut self, code: u8, register: u8, number: i32, label: &'static str) {
        self.jumps.push((label, self.instructions.len()));
        self.add(code, register, 0, 0, number);
    }

    fn label(&mut self, label: &'static str) {
        self.labels.push((label, self.instructions.len()));
    }

    fn finish(mut self) -> Vec<Instruction> {
        for (label, at) in self.jumps {
            if let Some((_, target)) = self.labels.iter().find(|(other, _)| *other == label) {
                // Counted from the next instruction; the program has some 60.
                self.instructions[at].offset = (*target as i16) - (at as i16) - 1;
            }
        }
        self.instructions
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_jump_leads_forward_into_the_program() {
        let program = program(3, 4);
        let is_jump = |instruction: &&Instruction| matches!(instruction.code, 0x05 | 0x15 | 0x55);
        assert_eq!(program.iter().filter(is_jump).count(), 12);
        for (at, instruction) in program.iter().enumerate().filter(|(_, instruction)| is_jump(instruction)) {
            assert!(instruction.offset > 0 && at + (instruction.offset as usize) < program.len() - 1, "{at}");
        }
    }
}
