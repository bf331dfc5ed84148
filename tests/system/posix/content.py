"""What is in files: ranges, holes, sizes, copies."""

import os
import resource
import signal

from observe import *


@case
def holes(t):
    fd = os.open("f", os.O_RDWR | os.O_CREAT)
    t("write", os.pwrite, fd, b"x" * PAGE, 1 << 20)
    t("few_blocks", lambda: os.fstat(fd).st_blocks <= 16)
    t("data", os.lseek, fd, 0, os.SEEK_DATA)
    t("hole", os.lseek, fd, 0, os.SEEK_HOLE)
    t("hole_after", os.lseek, fd, 1 << 20, os.SEEK_HOLE)
    t("data_inside", os.lseek, fd, (1 << 20) + 5, os.SEEK_DATA)
    t("beyond_data", os.lseek, fd, (1 << 20) + PAGE, os.SEEK_DATA)
    t("beyond_hole", os.lseek, fd, 1 << 30, os.SEEK_HOLE)
    t("negative", os.lseek, fd, -1, os.SEEK_DATA)
    t("end", os.lseek, fd, 0, os.SEEK_END)
    t("punch", call, "fallocate", fd, PUNCH_HOLE | KEEP_SIZE, 1 << 20, PAGE)
    t("punched", os.lseek, fd, 0, os.SEEK_DATA)
    t("zeros", os.pread, fd, 4, 1 << 20)
    t("size", os.fstat, fd)
    t("no_blocks", lambda: os.fstat(fd).st_blocks)
    os.pwrite(fd, b"abcdefgh" * PAGE, 0)
    t("punch_part", call, "fallocate", fd, PUNCH_HOLE | KEEP_SIZE, 100, 2 * PAGE)
    t("before", os.pread, fd, 8, 96)
    t("after", os.pread, fd, 8, 2 * PAGE + 96)
    t("grow", os.ftruncate, fd, 1 << 33)
    t("grown", os.fstat, fd)
    t("far", os.pwrite, fd, b"end", (1 << 33) - 3)
    t("far_read", os.pread, fd, 10, (1 << 33) - 5)
    empty = os.open("e", os.O_RDWR | os.O_CREAT)
    t("empty_data", os.lseek, empty, 0, os.SEEK_DATA)
    t("empty_hole", os.lseek, empty, 0, os.SEEK_HOLE)
    t("dir", lambda: os.lseek(os.open(".", os.O_RDONLY), 0, 99))


@case
def allocation(t):
    fd = os.open("f", os.O_RDWR | os.O_CREAT)
    t("keep", call, "fallocate", fd, KEEP_SIZE, 0, 64 << 10)
    t("keep_look", os.fstat, fd)
    t("blocks", lambda: os.fstat(fd).st_blocks)
    t("extend", call, "fallocate", fd, 0, 0, 100 << 10)
    t("extend_look", os.fstat, fd)
    t("read", os.pread, fd, 4, 50 << 10)
    os.pwrite(fd, b"x" * PAGE, 0)
    t("zero", call, "fallocate", fd, ZERO_RANGE, 10, 100)
    t("zeroed", os.pread, fd, 6, 8)
    t("zero_keep", call, "fallocate", fd, ZERO_RANGE | KEEP_SIZE, 100 << 10, 100 << 10)
    t("zero_keep_look", os.fstat, fd)
    t("zero_extend", call, "fallocate", fd, ZERO_RANGE, 100 << 10, 20 << 10)
    t("zero_extend_look", os.fstat, fd)
    t("punch_alone", call, "fallocate", fd, PUNCH_HOLE, 0, PAGE)
    t("unknown", call, "fallocate", fd, 1 << 20, 0, PAGE)
    t("nothing", call, "fallocate", fd, 0, 0, 0)
    t("negative", call, "fallocate", fd, 0, -1, 10)
    t("too_far", call, "fallocate", fd, 0, 1 << 62, 1 << 62)
    t("beyond_limit", call, "fallocate", fd, 0, 1 << 45, PAGE)
    t("punch_beyond", call, "fallocate", fd, PUNCH_HOLE | KEEP_SIZE, 1 << 30, PAGE)
    t("look", os.fstat, fd)
    t("rdonly", lambda: call("fallocate", os.open("f", os.O_RDONLY), 0, 0, PAGE))
    t("dir", lambda: call("fallocate", os.open(".", os.O_RDONLY), 0, 0, PAGE))
    t("moves", what_moves, "f", call, "fallocate", fd, 0, 0, 200 << 10)


def while_another_writes_through_a_mapping(path):
    """Inserts in front of what a child keeps changing through a mapping: it moves, and what it moves to is as it was."""
    write(path, b"a" * PAGE + b"b" * PAGE)
    fd = os.open(path, os.O_RDWR)
    child = os.fork()
    if child == 0:
        mapped = mmap.mmap(fd, 2 * PAGE, mmap.MAP_SHARED)
        while True:
            mapped[PAGE] = (mapped[PAGE] + 1) % 256
    try:
        for _ in range(20):
            call("fallocate", fd, INSERT_RANGE, 0, PAGE)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    os.fsync(fd)
    # The page that the child wrote to is any by now; of all others it has changed one byte at most.
    with open(path, "rb") as file:
        content = file.read()
    strange = [at for at in range(0, len(content), PAGE) if content[at + 1:at + PAGE].strip(b"\0") not in
               (b"", b"a" * (PAGE - 1), b"b" * (PAGE - 1))]
    return len(content) // PAGE, strange


@case
def collapse_and_insert(t):
    fd = os.open("f", os.O_RDWR | os.O_CREAT)
    os.write(fd, b"a" * PAGE + b"b" * PAGE + b"c" * PAGE)
    os.fsync(fd)
    mapped = mmap.mmap(fd, 3 * PAGE, mmap.MAP_SHARED)
    mapped[0], mapped[2 * PAGE] = ord("A"), ord("C")
    t("collapse", call, "fallocate", fd, COLLAPSE_RANGE, PAGE, PAGE)
    t("collapsed", lambda: (os.fstat(fd).st_size, os.pread(fd, 3, 0), os.pread(fd, 3, PAGE), os.pread(fd, 3, 2 * PAGE)))
    t("mapped", lambda: bytes(mapped[PAGE:PAGE + 3]))
    t("insert", call, "fallocate", fd, INSERT_RANGE, 0, 2 * PAGE)
    t("inserted", lambda: (os.fstat(fd).st_size, os.pread(fd, 3, 0), os.pread(fd, 3, 2 * PAGE), os.pread(fd, 3, 3 * PAGE)))
    t("mapped_again", lambda: bytes(mapped[2 * PAGE:2 * PAGE + 3]))
    t("write", os.pwrite, fd, b"new", PAGE)
    t("written", os.pread, fd, 3, PAGE)
    for name, mode, offset, length in (("end", COLLAPSE_RANGE, 3 * PAGE, PAGE), ("beyond", INSERT_RANGE, 100 * PAGE, PAGE),
                                       ("unaligned", COLLAPSE_RANGE, 1, PAGE), ("odd", INSERT_RANGE, PAGE, 10),
                                       ("both", COLLAPSE_RANGE | INSERT_RANGE, PAGE, PAGE), ("nothing", COLLAPSE_RANGE, PAGE, 0),
                                       ("keep", COLLAPSE_RANGE | KEEP_SIZE, PAGE, PAGE)):
        t(name, call, "fallocate", fd, mode, offset, length)
    t("size", lambda: os.fstat(fd).st_size)
    t("together", while_another_writes_through_a_mapping, "g")
    t("rdonly", lambda: call("fallocate", os.open("f", os.O_RDONLY), COLLAPSE_RANGE, PAGE, PAGE))
    t("directory", lambda: call("fallocate", os.open(".", os.O_RDONLY), COLLAPSE_RANGE, PAGE, PAGE))


@case
def copying(t):
    write("f", b"0123456789")
    source, target = os.open("f", os.O_RDWR), os.open("g", os.O_RDWR | os.O_CREAT)
    t("copy", os.copy_file_range, source, target, 5, 2, 1)
    t("result", read, "g")
    t("to_end", os.copy_file_range, source, target, 100, 5, 0)
    t("at_end", os.copy_file_range, source, target, 10, 10, 0)
    t("beyond", os.copy_file_range, source, target, 10, 50, 0)
    t("by_position", os.copy_file_range, source, target, 3)
    t("positions", lambda: (os.lseek(source, 0, 1), os.lseek(target, 0, 1)))
    t("overlap", os.copy_file_range, source, source, 5, 0, 2)
    t("apart", os.copy_file_range, source, source, 3, 0, 10)
    t("grown", read, "f")
    t("rdonly_target", lambda: os.copy_file_range(source, os.open("g", os.O_RDONLY), 3))
    t("append_target", lambda: os.copy_file_range(source, os.open("g", os.O_WRONLY | os.O_APPEND), 3))
    t("wronly_source", lambda: os.copy_file_range(os.open("f", os.O_WRONLY), target, 3))
    t("dir", lambda: os.copy_file_range(os.open(".", os.O_RDONLY), target, 3))
    t("flags", lambda: call("copy_file_range", source, None, target, None, 3, 1))
    os.lseek(source, 0, 0)
    t("sendfile", os.sendfile, target, source, 0, 6)
    reading, writing = os.pipe()
    t("splice_in", os.splice, source, writing, 6, 0)
    t("splice_out", os.splice, reading, target, 6, None, 20)
    t("spliced", read, "g")
    t("moves", what_moves, "g", os.copy_file_range, source, target, 3, 0, 0)


@case
def truncation(t):
    write("f", b"0123456789")
    t("grow", os.truncate, "f", 20)
    t("grown", read, "f")
    t("shrink", os.truncate, "f", 3)
    t("grow_again", os.truncate, "f", 6)
    t("zeros", read, "f")
    fd = os.open("f", os.O_RDWR)
    t("by_fd", os.ftruncate, fd, 2)
    t("look", os.fstat, fd)
    t("negative", os.truncate, "f", -1)
    t("rdonly", lambda: os.ftruncate(os.open("f", os.O_RDONLY), 1))
    os.mkfifo("p")
    t("fifo", os.truncate, "p", 0)
    t("missing", os.truncate, "none", 0)
    t("limit", os.truncate, "f", 1 << 45)
    t("far_limit", os.truncate, "f", (1 << 63) - 1)
    t("limit_write", os.pwrite, fd, b"x", 1 << 45)
    t("unharmed", os.fstat, fd)
    t("same_moves", what_moves, "f", os.truncate, "f", 2)
    t("moves", what_moves, "f", os.truncate, "f", 1)
    make("closed", 0o444, data=b"x")
    t.by("not_allowed", ANN, os.truncate, "closed", 0)
    write("tail", b"z" * 5000)
    os.truncate("tail", 10)
    os.truncate("tail", 5000)
    t("tail", lambda: read("tail").count(0))


@case
def vectors(t):
    fd = os.open("f", os.O_RDWR | os.O_CREAT)
    t("writev", os.writev, fd, [b"one", b"", b"two"])
    t("pwritev", os.pwritev, fd, [b"AB", b"C"], 10)
    t("synced", os.pwritev, fd, [b"D"], 13, os.RWF_DSYNC)
    t("content", read, "f")
    one, two = bytearray(4), bytearray(30)
    t("preadv", os.preadv, fd, [one, two], 1)
    t("parts", lambda: bytes(one) + bytes(two[:9]))
    t("beyond", os.preadv, fd, [one], 100)
    t("negative", os.pread, fd, 1, -5)
    t("negative_write", os.pwrite, fd, b"x", -5)
    t("position", os.lseek, fd, 0, os.SEEK_CUR)
    t("seek_negative", os.lseek, fd, -100, os.SEEK_SET)
    t("seek_far", os.lseek, fd, 1 << 40, os.SEEK_SET)
    t("read_far", os.read, fd, 5)
    t("append_flag", os.pwritev, fd, [b"end"], 0, 0x10)
    t("result", read, "f")
    t("rdonly", lambda: os.write(os.open("f", os.O_RDONLY), b"x"))
    t("wronly", lambda: os.read(os.open("f", os.O_WRONLY), 1))
    t("many", lambda: os.writev(fd, [b"x"] * 1024))
    t("unknown_flag", os.preadv, fd, [one], 0, 1 << 20)


@case
def reading_without_waiting(t):
    write("f", b"x" * PAGE)
    fd = os.open("f", os.O_RDONLY)
    os.pread(fd, PAGE, 0)
    t("read", os.preadv, fd, [bytearray(4)], 0, os.RWF_NOWAIT)


@case
def large_files(t):
    fd = os.open("f", os.O_RDWR | os.O_CREAT)
    data = bytes(range(256)) * 4096
    t("write", os.write, fd, data)
    t("whole", lambda: os.pread(fd, 1 << 21, 0) == data)
    t("odd", lambda: os.pread(fd, 300_001, 100_003) == data[100_003:400_004])
    t("over_end", lambda: len(os.pread(fd, 1 << 20, (1 << 20) - 10)))
    t("patch", os.pwrite, fd, b"P" * 9000, 4000)
    t("patched", lambda: os.pread(fd, 1 << 21, 0) == data[:4000] + b"P" * 9000 + data[13_000:])
    t("far", os.pwrite, fd, b"far", 5 << 30)
    t("far_look", os.fstat, fd)
    t("far_read", os.pread, fd, 10, (5 << 30) - 4)
    t("end", os.lseek, fd, -3, os.SEEK_END)
    t("last", os.read, fd, 10)


@case
def file_size_limit(t):
    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        fd = os.open("f", os.O_RDWR | os.O_CREAT)
        said = [outcome(work)[0] for work in (
            lambda: os.write(fd, b"x" * 600), lambda: os.write(fd, b"x" * 600), lambda: os.write(fd, b"x"),
            lambda: os.ftruncate(fd, 2000), lambda: os.ftruncate(fd, 900), lambda: os.pwrite(fd, b"x", 1000),
            lambda: call("fallocate", fd, 0, 0, 2000))]
        return ",".join(said)

    def killed():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        write("g", b"x" * 10)
        write("g", b"x", os.O_WRONLY | os.O_APPEND)

    t.by("limited", None, limited)
    t("look", os.lstat, "f")
    t.by("killed", None, killed)
