"""Mappings, sockets, FIFOs, devices; statistics and times."""

import ctypes
import fcntl
import mmap
import os
import socket
import stat
import struct
import time

from observe import *


# Mapping.

@case
def shared_mappings(t):
    write("f", b"." * (2 * PAGE + 100))
    fd = os.open("f", os.O_RDWR)
    view = mmap.mmap(fd, 0)
    view[5:8] = b"map"
    t("read_sees", os.pread, fd, 10, 0)
    t("write", os.pwrite, fd, b"write", PAGE + 10)
    t("map_sees", lambda: bytes(view[PAGE + 8:PAGE + 17]))
    t("sync", view.flush)
    t("other_open", lambda: read("f")[5:8])

    def child():
        mine = mmap.mmap(os.open("f", os.O_RDWR), 0)
        said = bytes(mine[0:10])
        mine[0:5] = b"child"
        return said

    t.by("child", None, child)
    t("child_seen", lambda: bytes(view[0:10]))
    t("child_read", os.pread, fd, 10, 0)
    t("tail", lambda: bytes(mmap.mmap(fd, 0)[2 * PAGE + 98:]))
    whole = mmap.mmap(fd, 0)
    os.ftruncate(fd, PAGE)
    t.by("beyond_end", None, lambda: whole[PAGE + 1])
    os.ftruncate(fd, 3 * PAGE)
    t("grown", lambda: whole[PAGE + 1])
    view.flush()
    t("moves", what_moves, "f", lambda: (view.__setitem__(0, 65), view.flush()))
    os.close(fd)
    view[1:2] = b"Z"
    view.flush()
    t("after_close", lambda: read("f")[:2])
    os.unlink("f")
    view[2:3] = b"Y"
    t("after_unlink", view.flush)
    write("h", b"h" * PAGE)
    t("rdonly_shared", lambda: mmap.mmap(os.open("h", os.O_RDONLY), PAGE, mmap.MAP_SHARED, mmap.PROT_WRITE) and None)
    t("wronly", lambda: mmap.mmap(os.open("h", os.O_WRONLY), PAGE, mmap.MAP_SHARED, mmap.PROT_READ) and None)
    t("dir", lambda: mmap.mmap(os.open(".", os.O_RDONLY), PAGE, mmap.MAP_SHARED, mmap.PROT_READ) and None)


@case
def private_mappings(t):
    write("f", b"f" * PAGE)
    fd = os.open("f", os.O_RDONLY)
    view = mmap.mmap(fd, PAGE, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    t("look", lambda: bytes(view[:4]))
    view[0:4] = b"mine"
    t("file", read, "f")
    t("mine", lambda: bytes(view[:6]))
    whole = mmap.mmap(fd, PAGE, mmap.MAP_PRIVATE, mmap.PROT_READ)
    os.unlink("f")
    t("unlinked", lambda: bytes(whole[:4]))


# Special files.

@case
def sockets(t):
    server = socket.socket(socket.AF_UNIX)
    t("bind", server.bind, "u")
    t("look", os.lstat, "u")
    client = socket.socket(socket.AF_UNIX)
    t("no_listener", client.connect, "u")
    t("bind_again", lambda: socket.socket(socket.AF_UNIX).bind("u"))
    server.listen()

    def talk():
        mine = socket.socket(socket.AF_UNIX)
        mine.connect("u")
        mine.send(b"over the share")
        return mine.recv(20)

    partner = Partner(talk)
    partner.start()
    connection, _ = server.accept()
    t("received", connection.recv, 20)
    connection.send(b"and back")
    t.say("answered", partner.said())
    partner.end()
    os.chmod("u", 0o600)
    t.by("not_allowed", ANN, lambda: socket.socket(socket.AF_UNIX).connect("u"))
    t("open", touch, "u", os.O_RDONLY)
    os.rename("u", "v")
    t("renamed", lambda: socket.socket(socket.AF_UNIX).connect("v"))
    os.link("v", "w")
    t("linked", lambda: socket.socket(socket.AF_UNIX).connect("w"))
    write("f", b"")
    t("to_file", lambda: socket.socket(socket.AF_UNIX).connect("f"))
    t("to_nothing", lambda: socket.socket(socket.AF_UNIX).connect("none"))
    datagrams = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    datagrams.bind("d")
    t("wrong_type", lambda: socket.socket(socket.AF_UNIX).connect("d"))
    socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b"datagram", "d")
    t("datagram", datagrams.recv, 20)
    os.unlink("v")
    os.unlink("w")
    t("unlinked", lambda: socket.socket(socket.AF_UNIX).connect("v"))
    t("mknod", os.mknod, "n", stat.S_IFSOCK | 0o644)
    t("mknod_connect", lambda: socket.socket(socket.AF_UNIX).connect("n"))


@case
def fifos(t):
    t("make", os.mkfifo, "p", 0o640)
    t("look", os.lstat, "p")
    t("again", os.mkfifo, "p")
    t("no_reader", touch, "p", os.O_WRONLY | os.O_NONBLOCK)
    reader = t.open("reader", "p", os.O_RDONLY | os.O_NONBLOCK)
    t("nothing", os.read, reader, 5)
    partner = Partner(lambda: write("p", b"through the pipe", os.O_WRONLY))
    t.say("written", partner.step())
    t("read", os.read, reader, 50)
    t("end", os.read, reader, 50)
    partner.end()
    t("seek", os.lseek, reader, 0, 0)
    t("size", os.fstat, reader)
    os.close(reader)
    partner = Partner(lambda: read("p"))
    partner.start()
    t("waits", partner.waits)
    t("meet", write, "p", b"met", os.O_WRONLY)
    t("met", partner.said)
    partner.end()
    t.by("not_allowed", ANN, touch, "p", os.O_RDONLY | os.O_NONBLOCK)
    both_ends = t.open("both", "p", os.O_RDWR)
    t("echo", lambda: (os.write(both_ends, b"echo"), os.read(both_ends, 10))[1])
    os.unlink("p")
    t("unlinked", lambda: (os.write(both_ends, b"on"), os.read(both_ends, 10))[1])


@case
def device_nodes(t):
    for label, kind, major, minor in (("null", stat.S_IFCHR, 1, 3), ("disk", stat.S_IFBLK, 7, 300), ("far", stat.S_IFCHR, 4095, 1048575)):
        t(label, os.mknod, label, kind | 0o600, os.makedev(major, minor))
        t(label + "_look", os.lstat, label)
        t(label + "_number", lambda: (os.major(os.lstat(label).st_rdev), os.minor(os.lstat(label).st_rdev)))
    t("there", os.mknod, "null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    t("write", write, "null", b"x", os.O_WRONLY)
    os.umask(0o027)
    t("masked", os.mknod, "masked", stat.S_IFBLK | 0o6666, os.makedev(7, 300))
    t("masked_look", os.lstat, "masked")
    os.mkdir("d")
    os.chown("d", 5, 6)
    os.chmod("d", 0o2777)
    t("of_group", os.mknod, "d/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    t("of_group_look", os.lstat, "d/null")
    t("change", lambda: (os.chown("d/null", 7, 8), os.chmod("d/null", 0o640), os.rename("d/null", "moved")))
    t("changed", os.lstat, "moved")
    t("link", os.link, "moved", "linked")
    t("attribute", os.setxattr, "moved", "user.a", b"1")
    t("unlink", lambda: (os.unlink("moved"), os.unlink("linked")))
    t("names", names)


@case
def other_nodes(t):
    t("whiteout", os.mknod, "whiteout", stat.S_IFCHR | 0o600, 0)
    t("whiteout_look", os.lstat, "whiteout")
    t("whiteout_number", lambda: os.lstat("whiteout").st_rdev)
    t("again", os.mknod, "whiteout", stat.S_IFCHR | 0o600, 0)
    t("exists", os.mknod, "whiteout", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    t("regular", os.mknod, "f", stat.S_IFREG | 0o604)
    t("regular_look", os.lstat, "f")
    t("directory", os.mknod, "d", stat.S_IFDIR | 0o700)
    t("strange", os.mknod, "x", 0o160000)
    os.chmod(".", 0o777)
    t.by("by_user", ANN, os.mknod, "u", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    t.by("regular_by_user", ANN, os.mknod, "r", stat.S_IFREG | 0o600)
    t.by("whiteout_by_user", ANN, os.mknod, "w", stat.S_IFCHR | 0o600, 0)
    t("rename", os.rename, "whiteout", "moved")
    t("chmod", os.chmod, "moved", 0o640)
    t("unlink", os.unlink, "moved")
    t("names", names)


@case
def file_system_statistics(t):
    st = os.statvfs(".")
    t.say("names", st.f_namemax)
    t.say("block", (st.f_bsize, st.f_frsize))
    t.say("blocks", (st.f_blocks, st.f_files))
    t.say("sane", st.f_blocks >= st.f_bfree >= st.f_bavail > 0 and st.f_files >= st.f_ffree > 0)
    fd = os.open(".", os.O_RDONLY)
    t("by_fd", lambda: os.fstatvfs(fd).f_blocks == st.f_blocks)
    t("missing", os.statvfs, "none")
    t("path_limits", lambda: [os.pathconf(".", name) for name in ("PC_NAME_MAX", "PC_PATH_MAX", "PC_NO_TRUNC", "PC_CHOWN_RESTRICTED")])
    touch("f")
    t("block_of_file", lambda: os.lstat("f").st_blksize)


@case
def times_set(t):
    def times(path, follow=False):
        st = os.stat(path, follow_symlinks=follow)
        return f"{st.st_atime_ns},{st.st_mtime_ns}"

    def set_raw(path, atime, mtime, flags=0):
        call("utimensat", AT_FDCWD, path, struct.pack("qqqq", *atime, *mtime), flags)

    make("f", 0o644, ANN[0], ANN[1])
    t("exact", os.utime, "f", ns=(1_234_567_890_123_456_789, 987_654_321_012_345_678))
    t("read", times, "f")
    t("omit_access", set_raw, "f", (0, UTIME_OMIT), (5, 6))
    t("omit_read", times, "f")
    t("omit_other", set_raw, "f", (7, 8), (0, UTIME_OMIT))
    t("other_read", times, "f")
    before = time.time() - 5
    t("now", set_raw, "f", (0, UTIME_NOW), (0, UTIME_OMIT))
    t("is_now", lambda: before < os.stat("f").st_atime < before + 60)
    t("rest_stays", lambda: os.stat("f").st_mtime_ns)
    t("omit_both", what_moves, "f", set_raw, "f", (0, UTIME_OMIT), (0, UTIME_OMIT))
    t("one_moves", what_moves, "f", set_raw, "f", (0, UTIME_OMIT), (1, 1))
    t("bad_nanoseconds", set_raw, "f", (0, 1_000_000_000), (0, 0))
    t("before_1970", set_raw, "f", (-100, 5), (-1, 999_999_999))
    t("before_read", times, "f")
    for label, seconds in (("2038", 1 << 31), ("2106", 1 << 32), ("2446", (1 << 34) - (1 << 31)), ("far", 1 << 40), ("long_ago", -(1 << 40))):
        t(label, set_raw, "f", (seconds, 0), (seconds, 1))
        t(label + "_read", times, "f")
    os.symlink("f", "s")
    t("link", os.utime, "s", ns=(11, 22), follow_symlinks=False)
    t("link_mtime", lambda: os.lstat("s").st_mtime_ns)
    t("by_owner", lambda: in_child(ANN, os.utime, "f", ns=(1, 1)))
    t.by("by_other", BOB, os.utime, "f", ns=(1, 1))
    t.by("now_by_other", BOB, os.utime, "f")
    os.chmod("f", 0o666)
    t.by("now_by_writer", BOB, os.utime, "f")
    t.by("set_by_writer", BOB, os.utime, "f", ns=(1, 1))
    t.by("half_by_writer", BOB, set_raw, "f", (0, UTIME_NOW), (0, UTIME_OMIT))
    t("missing", os.utime, "none")
    fd = os.open("f", os.O_RDONLY)
    t("by_fd", os.utime, fd, ns=(33, 44))
    t("by_fd_read", times, "f")
    os.mkdir("d")
    t("dir", os.utime, "d", ns=(55, 66))
    t("dir_read", times, "d")
    write("f", b"x", os.O_WRONLY)
    t("write_over", lambda: os.stat("f").st_mtime > before)


@case
def times_that_move(t):
    write("f", b"x")
    os.mkdir("d")
    os.symlink("f", "s")
    fd = os.open("f", os.O_RDWR)
    t("write", what_moves, "f", os.pwrite, fd, b"y", 0)
    t("write_nothing", what_moves, "f", os.pwrite, fd, b"", 0)
    t("stat", what_moves, "f", os.stat, "f")
    t("open", what_moves, "f", touch, "f", os.O_RDWR)
    t("chmod_same", what_moves, "f", os.chmod, "f", 0o644)
    t("create", what_moves, "d", touch, "d/f")
    t("open_in", what_moves, "d", touch, "d/f")
    t("symlink", what_moves, "d", os.symlink, "x", "d/s")
    t("mkdir", what_moves, "d", os.mkdir, "d/d")
    t("rename_in", what_moves, "d", os.rename, "d/f", "d/g")
    t("rename_out", what_moves, "d", os.rename, "d/g", "g")
    t("rename_into", what_moves, "d", os.rename, "g", "d/g")
    t("failed_create", what_moves, "d", outcome, os.mkdir, "d/d")
    t("deeper", what_moves, "d", touch, "d/d/x")
    t("rmdir_full", what_moves, "d", outcome, os.rmdir, "d/d")
    t("fsync", what_moves, "f", os.fsync, fd)
    t("lock", what_moves, "f", fcntl.flock, fd, fcntl.LOCK_EX)


@case
def times_of_reading(t):
    write("f", b"x" * 100)
    os.mkdir("d")
    touch("d/f")
    os.utime("f", ns=(1_000_000_000, 2_000_000_000))
    os.utime("d", ns=(1_000_000_000, 2_000_000_000))
    t("read", what_moves, "f", read, "f")
    t("list", what_moves, "d", os.listdir, "d")
    fd = os.open("f", os.O_RDONLY | os.O_NOATIME)
    os.utime("f", ns=(1_000_000_000, 2_000_000_000))
    t("no_atime", what_moves, "f", os.read, fd, 10)
    os.chown("f", ANN[0], -1)
    t.by("no_atime_by_other", BOB, touch, "f", os.O_RDONLY | os.O_NOATIME)


@case
def birth(t):
    def born(path):
        buffer = ctypes.create_string_buffer(256)
        call("statx", AT_FDCWD, path, 0x100, 0xfff, buffer)
        mask, = struct.unpack_from("I", buffer, 0)
        seconds, nanoseconds = struct.unpack_from("qI", buffer, 80)
        return bool(mask & 0x800), seconds + nanoseconds / 1e9

    before = time.time() - 5
    touch("f")
    known, first = born("f")
    t.say("known", known)
    t.say("sane", before < first < before + 60)
    time.sleep(TICK)
    write("f", b"x", os.O_WRONLY)
    os.rename("f", "g")
    t.say("stays", born("g")[1] == first)
