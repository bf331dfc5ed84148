"""Syncing, programs, watches, leases, requests, and a read-only view of a tree that somebody else made."""

import errno
import fcntl
import mmap
import os
import select
import signal
import socket
import stat
import struct
import time

from attributes import ACCESS, FOR_ANN
from observe import *


@case
def syncing(t):
    fd = os.open("f", os.O_RDWR | os.O_CREAT)
    os.write(fd, b"x")
    t("fsync", os.fsync, fd)
    t("fdatasync", os.fdatasync, fd)
    t("rdonly", lambda: os.fsync(os.open("f", os.O_RDONLY)))
    directory = os.open(".", os.O_RDONLY)
    t("dir", os.fsync, directory)
    t("dir_data", os.fdatasync, directory)
    t("syncfs", call, "syncfs", fd)
    t("syncfs_dir", call, "syncfs", directory)
    t("range", call, "sync_file_range", fd, 0, 0, 7)
    t("advise", os.posix_fadvise, fd, 0, 0, os.POSIX_FADV_DONTNEED)
    t("readahead", call, "readahead", fd, 0, 4096)
    t("path", lambda: os.fsync(os.open("f", os.O_PATH)))
    os.mkfifo("p")
    t("fifo", lambda: os.fsync(os.open("p", os.O_RDWR)))
    t("sync_flag", write, "g", b"x", os.O_CREAT | os.O_WRONLY | os.O_SYNC)
    t("dsync_flag", write, "h", b"x", os.O_CREAT | os.O_WRONLY | os.O_DSYNC)
    t("closed", os.fsync, 999)


# Programs, watches, leases, flags.

def copy_program(name, mode=0o755):
    with open("/bin/sleep", "rb") as source:
        write(name, source.read())
    os.chmod(name, mode)


@case
def programs(t):
    def run(path, *args):
        pid = os.fork()
        if pid == 0:
            try:
                os.execv(path, [path, *args])
            except OSError as error:
                os._exit(100 + error.errno)
        status = os.waitpid(pid, 0)[1]
        code = os.waitstatus_to_exitcode(status)
        return errno.errorcode[code - 100] if code > 100 else code

    copy_program("sleep")
    t("run", run, "./sleep", "0")
    pid = os.fork()
    if pid == 0:
        try:
            os.execv("./sleep", ["sleep", "100"])
        finally:
            os._exit(1)
    while not os.readlink(f"/proc/{pid}/exe").endswith("/programs/sleep"):
        time.sleep(0.01)
    t("write_busy", touch, "sleep", os.O_WRONLY)
    t("truncate_busy", os.truncate, "sleep", 0)
    t("rename_busy", os.rename, "sleep", "moved")
    t("unlink_busy", os.unlink, "moved")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    copy_program("plain", 0o644)
    t("not_executable", run, "./plain")
    copy_program("only", 0o111)
    t.by("execute_only", ANN, run, "./only", "0")
    copy_program("owner", 0o700)
    t.by("not_allowed", ANN, run, "./owner", "0")
    fd = os.open("only", os.O_WRONLY)
    t("open_for_writing", run, "./only", "0")
    os.close(fd)
    write("text", b"no program")
    os.chmod("text", 0o755)
    t("no_format", run, "./text")
    write("script", b"#!/bin/sh\nexit 7\n")
    os.chmod("script", 0o755)
    t("script", run, "./script")
    os.mkdir("d")
    t("dir", run, "./d")


@case
def watches(t):
    fd = call("inotify_init1", os.O_NONBLOCK)
    t("watch", lambda: call("inotify_add_watch", fd, ".", 0xfff) > 0)

    def events():
        found, data = [], b""
        try:
            data = os.read(fd, 65536)
        except BlockingIOError:
            pass
        at = 0
        while at < len(data):
            _, mask, cookie, length = struct.unpack_from("iIII", data, at)
            found.append(f"{mask & 0xfff:x}:{data[at + 16:at + 16 + length].rstrip(bytes(1)).decode()}{'*' if cookie else ''}")
            at += 16 + length
        return ";".join(found)

    for label, work in (("create", lambda: touch("f")), ("write", lambda: write("f", b"x", os.O_WRONLY)), ("read", lambda: read("f")),
                        ("chmod", lambda: os.chmod("f", 0o600)), ("rename", lambda: os.rename("f", "g")), ("link", lambda: os.link("g", "h")),
                        ("mkdir", lambda: os.mkdir("d")), ("truncate", lambda: os.truncate("g", 0)), ("xattr", lambda: os.setxattr("g", "user.a", b"")),
                        ("unlink", lambda: os.unlink("h")), ("rmdir", lambda: os.rmdir("d"))):
        work()
        t(label, events)


@case
def leases(t):
    signal.signal(signal.SIGIO, signal.SIG_IGN)
    write("f", b"x")
    fd = os.open("f", os.O_RDONLY)
    t("none", fcntl.fcntl, fd, fcntl.F_GETLEASE)
    t("read", fcntl.fcntl, fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    t("get", fcntl.fcntl, fd, fcntl.F_GETLEASE)
    t("broken", touch, "f", os.O_WRONLY | os.O_NONBLOCK)
    t("let_go", fcntl.fcntl, fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)


@case
def inode_flags(t):
    touch("f")
    fd = os.open("f", os.O_RDWR)
    t("get", lambda: bool(fcntl.ioctl(fd, 0x80086601, bytes(8))))


@case
def other_requests(t):
    touch("f")
    fd = os.open("f", os.O_RDWR)
    t("terminal", fcntl.ioctl, fd, 0x5401, bytes(64))
    t("waiting", lambda: struct.unpack("i", fcntl.ioctl(fd, 0x541b, bytes(4)))[0])
    t("poll", lambda: select.select([fd], [fd], [], 0) == ([fd], [fd], []))


@case
def epoll_of_files(t):
    touch("f")
    t("register", lambda: select.epoll().register(os.open("f", os.O_RDWR)))


@case
def directory_descriptors(t):
    os.makedirs("a/b")
    a = os.open("a", os.O_RDONLY)
    b = os.open("b", os.O_PATH, dir_fd=a)
    t("make", touch, "f", dir_fd=b)
    os.rename("a", "moved")
    t("after_rename", touch, "g", dir_fd=b)
    t("mkdir", os.mkdir, "sub", dir_fd=a)
    t("rename", os.rename, "f", "h", src_dir_fd=b, dst_dir_fd=a)
    t("link", os.link, "h", "i", src_dir_fd=a, dst_dir_fd=b)
    t("symlink", os.symlink, "h", "s", dir_fd=a)
    t("readlink", os.readlink, "s", dir_fd=a)
    t("chmod", os.chmod, "h", 0o600, dir_fd=a)
    t("chown", os.chown, "h", 3, 4, dir_fd=a)
    t("look", os.stat, "i", dir_fd=b)
    t("access", os.access, "h", os.R_OK, dir_fd=a)
    t("mkfifo", os.mkfifo, "p", dir_fd=a)
    t("unlink", os.unlink, "h", dir_fd=a)
    t("names", lambda: names("moved") + names("moved/b"))
    t("self", os.stat, ".", dir_fd=b)


@case
def same_file_after_everything(t):
    """No step of this may find a file that has gone stale."""
    os.makedirs("a/b/c")
    write("a/b/c/f", b"content")
    fd = os.open("a/b/c/f", os.O_RDONLY)
    c = os.open("a/b/c", os.O_RDONLY)
    os.chdir("a/b/c")
    os.rename("../../../a", "../../../z")
    t("cwd", read, "f")
    os.rename("f", "g")
    t("by_fd", read, f"/proc/self/fd/{fd}")
    os.rename("../../b", "../../../y")
    t("moved_up", read, "g")
    os.link("g", "h")
    os.unlink("g")
    t("by_other_name", os.pread, fd, 20, 0)
    os.rename("h", "../f")
    t("up", os.stat, "../f")
    t("fchmod", os.fchmod, fd, 0o600)
    t("list", os.listdir, c)
    write("new", b"new")
    os.rename("new", "../f")
    t("replaced", read, "../f")
    t("old", os.pread, fd, 20, 0)
    t("old_look", os.fstat, fd)
    t("old_reopened", read, f"/proc/self/fd/{fd}")


# A read-only view of a tree that somebody else made.

def make_tree():
    make("f", 0o644, data=b"content")
    make("open", 0o666, data=b"for all")
    make("program", 0o755, data=b"#!/bin/sh\nexit 5\n")
    make_dir("d", 0o777)
    make("d/in", 0o644)
    os.symlink("f", "s")
    os.mkfifo("p", 0o666)
    os.setxattr("f", "user.a", b"value")
    os.utime("f", ns=(5, 6))


@read_only_case
def read_only_reading(t):
    t("names", names)
    t("read", read, "f")
    t("look", os.lstat, "f")
    t("link", read, "s")
    t("xattr", os.getxattr, "f", "user.a")
    t("mtime", lambda: os.stat("f").st_mtime_ns)
    t("access", os.access, "f", os.R_OK)
    t("map", lambda: bytes(mmap.mmap(os.open("f", os.O_RDONLY), 0, mmap.MAP_SHARED, mmap.PROT_READ)[:4]))
    t("private", lambda: mmap.mmap(os.open("f", os.O_RDONLY), 0, mmap.MAP_PRIVATE, mmap.PROT_WRITE) and None)
    t("create_existing", touch, "f", os.O_RDONLY | os.O_CREAT)
    t("fsync", lambda: os.fsync(os.open("f", os.O_RDONLY)))
    t("flock", lambda: fcntl.flock(os.open("f", os.O_RDONLY), fcntl.LOCK_EX))
    t("lockf", lambda: fcntl.lockf(os.open("f", os.O_RDONLY), fcntl.LOCK_SH))
    fd = t.open("fifo", "p", os.O_RDWR)
    t("fifo_works", lambda: (os.write(fd, b"x"), os.read(fd, 1))[1])


@read_only_case
def read_only_changes(t):
    fd = os.open("f", os.O_RDONLY)
    for label, work in (
            ("wronly", lambda: touch("f", os.O_WRONLY)), ("rdwr", lambda: touch("f", os.O_RDWR)), ("append", lambda: touch("f", os.O_WRONLY | os.O_APPEND)),
            ("trunc", lambda: touch("f", os.O_RDONLY | os.O_TRUNC)), ("create", lambda: touch("new")),
            ("exclusive", lambda: touch("f", os.O_RDONLY | os.O_CREAT | os.O_EXCL)), ("create_rdonly", lambda: touch("new", os.O_RDONLY | os.O_CREAT)),
            ("nameless", lambda: touch(".", os.O_TMPFILE | os.O_RDWR)), ("access", lambda: os.access("f", os.W_OK)),
            ("mkdir", lambda: os.mkdir("new")), ("mkdir_existing", lambda: os.mkdir("d")), ("rmdir", lambda: os.rmdir("d")),
            ("rmdir_missing", lambda: os.rmdir("none")), ("unlink", lambda: os.unlink("f")), ("unlink_missing", lambda: os.unlink("none")),
            ("rename", lambda: os.rename("f", "g")), ("rename_missing", lambda: os.rename("none", "g")), ("link", lambda: os.link("f", "g")),
            ("symlink", lambda: os.symlink("f", "g")), ("symlink_existing", lambda: os.symlink("f", "s")), ("mkfifo", lambda: os.mkfifo("g")),
            ("mknod", lambda: os.mknod("g", stat.S_IFCHR, 0)), ("chmod", lambda: os.chmod("f", 0o600)), ("chown", lambda: os.chown("f", 1, 1)),
            ("lchown", lambda: os.lchown("s", 1, 1)), ("utime", lambda: os.utime("f")), ("truncate", lambda: os.truncate("f", 0)),
            ("setxattr", lambda: os.setxattr("f", "user.a", b"")), ("removexattr", lambda: os.removexattr("f", "user.a")),
            ("fchmod", lambda: os.fchmod(fd, 0o600)), ("fchown", lambda: os.fchown(fd, 1, 1)), ("futime", lambda: os.utime(fd)),
            ("acl", lambda: os.setxattr("f", ACCESS, FOR_ANN)), ("write", lambda: os.write(fd, b"x")), ("ftruncate", lambda: os.ftruncate(fd, 0)),
            ("exchange", lambda: rename2("f", "d", RENAME_EXCHANGE)), ("fallocate", lambda: call("fallocate", fd, 0, 0, 10)),
            ("bind", lambda: socket.socket(socket.AF_UNIX).bind("u")), ("shared_map", lambda: mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_WRITE) and None)):
        t(label, work)
    t.by("by_user", ANN, touch, "open", os.O_WRONLY)
    t.by("by_user_closed", ANN, touch, "f", os.O_WRONLY)
    t.by("make_by_user", ANN, touch, "d/new")
    t("names", names)
    t("content", read, "f")
