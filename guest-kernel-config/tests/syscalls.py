"""System calls that programs in containers make: each test calls one and looks at what comes back."""

import ctypes
import mmap
import os
import socket
import struct
import sys

libc = ctypes.CDLL(None, use_errno=True)


def syscall(number, *args):
    result = libc.syscall(ctypes.c_long(number), *(ctypes.c_void_p(a) if isinstance(a, int) else a for a in args))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def bpf(command, data):
    buffer = ctypes.create_string_buffer(data + bytes(128 - len(data)), 128)
    return syscall(321, command, buffer, 128)


def test_io_uring():
    assert syscall(425, 8, ctypes.create_string_buffer(120)) > 0


def test_userfaultfd():
    assert syscall(323, os.O_CLOEXEC) > 0


def test_memfd():
    assert os.memfd_create("t", os.MFD_ALLOW_SEALING) > 0


def test_memfd_secret():
    assert syscall(447, 0) > 0


def test_landlock():
    assert syscall(444, 0, 0, 1) >= 4


def test_keys():
    assert syscall(250, 0, -3 & 0xFFFFFFFF, 1) > 0  # KEYCTL_GET_KEYRING_ID of the session, made if missing


def test_aio():
    context = ctypes.c_ulong(0)
    syscall(206, 8, ctypes.byref(context))


def test_posix_queue():
    assert syscall(240, ctypes.c_char_p(b"hull"), os.O_RDWR | os.O_CREAT, 0o600, 0) > 0


def test_sysv_ipc():
    for number, args in ((29, (0, 4096, 0o1600)), (64, (0, 1, 0o1600)), (68, (0, 0o1600))):
        assert syscall(number, *args) >= 0


def test_inotify_and_fanotify():
    assert syscall(294, 0) > 0
    assert syscall(300, 0, 0) > 0


def test_kcmp():
    assert syscall(312, os.getpid(), os.getpid(), 0, 1, 1) == 0


def test_pidfd_and_clone3():
    assert os.pidfd_open(os.getpid()) > 0
    try:
        syscall(435, 0, 0)
    except OSError as error:
        assert error.errno == 22, error


def test_open_by_handle():
    handle = ctypes.create_string_buffer(struct.pack("Ii", 120, 0) + bytes(120))
    mount = ctypes.c_int()
    syscall(303, -100 & 0xFFFFFFFF, ctypes.c_char_p(b"/etc/passwd"), handle, ctypes.byref(mount), 0)


def test_membarrier_rseq_cachestat():
    assert syscall(324, 0, 0, 0) > 0


def test_perf_events():
    attr = struct.pack("IIQ", 1, 112, 0) + bytes(96)  # software CPU clock
    assert syscall(298, ctypes.create_string_buffer(attr), 0, -1 & 0xFFFFFFFF, -1 & 0xFFFFFFFF, 0) > 0


def test_seccomp_filter_is_compiled():
    assert open("/proc/sys/net/core/bpf_jit_enable").read().strip() == "1"
    libc.prctl(38, 1, 0, 0, 0)
    allow = struct.pack("HBBI", 6, 0, 0, 0x7FFF0000)
    code = ctypes.create_string_buffer(allow)
    program = struct.pack("HxxxxxxQ", 1, ctypes.addressof(code))
    assert syscall(317, 1, 0, ctypes.create_string_buffer(program)) == 0


def test_seccomp_notification():
    libc.prctl(38, 1, 0, 0, 0)
    code = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0x7FFF0000))
    program = struct.pack("HxxxxxxQ", 1, ctypes.addressof(code))
    assert syscall(317, 1, 8, ctypes.create_string_buffer(program)) > 0


def load_program(kind, attach):
    exit_with_1 = struct.pack("BBhi", 0xB7, 0, 0, 1) + struct.pack("BBhi", 0x95, 0, 0, 0)
    code = ctypes.create_string_buffer(exit_with_1)
    name = ctypes.create_string_buffer(b"GPL")
    attr = struct.pack("IIQQIIQII", kind, 2, ctypes.addressof(code), ctypes.addressof(name), 0, 0, 0, 0, 0)
    attr += bytes(16) + struct.pack("II", 0, attach)
    return bpf(5, attr)


def test_bpf_device_control_of_a_cgroup():
    os.makedirs("/sys/fs/cgroup/dev", exist_ok=True)
    cgroup = os.open("/sys/fs/cgroup/dev", os.O_RDONLY)
    program = load_program(15, 6)
    bpf(8, struct.pack("IIII", cgroup, program, 6, 2))


def test_bpf_socket_hooks_of_a_cgroup():
    os.makedirs("/sys/fs/cgroup/sock", exist_ok=True)
    cgroup = os.open("/sys/fs/cgroup/sock", os.O_RDONLY)
    bpf(8, struct.pack("IIII", cgroup, load_program(18, 10), 10, 2))  # connect4


def test_bpf_map():
    assert bpf(0, struct.pack("IIIII", 1, 4, 4, 8, 0)) > 0


def test_vsock_loopback():
    server = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    server.bind((socket.VMADDR_CID_ANY, 1024))
    server.listen()
    client = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    client.connect((1, 1024))
    client.send(b"x")
    assert server.accept()[0].recv(1) == b"x"


def test_unix_inet_inet6_packet_netlink_xdp():
    for family, kind in ((1, 1), (2, 2), (10, 2), (17, 3), (16, 3), (44, 3)):
        socket.socket(family, kind)


def test_sctp_and_mptcp():
    socket.socket(socket.AF_INET, socket.SOCK_STREAM, 132)
    socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)


def test_kernel_tls():
    server = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(server.getsockname())
    client.setsockopt(6, 31, b"tls")  # TCP_ULP


def test_reuseport_and_zero_copy():
    s = socket.socket()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    s.setsockopt(socket.SOL_SOCKET, 60, 1)


def test_madvise_huge_and_collapse():
    memory = mmap.mmap(-1, 8 << 20)
    memory.madvise(14)


def test_named_memory():
    memory = mmap.mmap(-1, 4096)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    name = ctypes.create_string_buffer(b"hull")
    assert libc.prctl(0x53564D41, 0, ctypes.c_ulong(address), ctypes.c_ulong(4096), name) == 0


def test_process_vm_readv():
    buffer = ctypes.create_string_buffer(b"hello")
    target = ctypes.create_string_buffer(5)
    local = struct.pack("QQ", ctypes.addressof(target), 5)
    remote = struct.pack("QQ", ctypes.addressof(buffer), 5)
    assert syscall(310, os.getpid(), ctypes.c_char_p(local), 1, ctypes.c_char_p(remote), 1, 0) == 5


def test_taskstats_family():
    s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 16)
    name = b"TASKSTATS\0"
    attribute = struct.pack("HH", 4 + len(name), 2) + name + bytes(-len(name) % 4)
    s.send(struct.pack("IHHII", 20 + len(attribute), 16, 1, 1, 0) + struct.pack("BBH", 3, 1, 0) + attribute)
    assert struct.unpack_from("H", s.recv(4096), 4)[0] == 16


def test_process_io_counters():
    assert "read_bytes" in open("/proc/self/io").read()


def test_soft_dirty_for_checkpoints():
    open("/proc/self/clear_refs", "w").write("4")


globals()[sys.argv[1]]()
