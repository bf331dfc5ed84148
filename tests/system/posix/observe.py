"""What cases are written with: doing something and telling what came of it, as another user or in a second process too."""

import ctypes
import errno
import fcntl
import mmap
import os
import resource
import select
import signal
import socket
import stat
import struct
import sys
import time

libc = ctypes.CDLL(None, use_errno=True)

CASES = []
READ_ONLY_CASES = []

# Users that own nothing: uid, gid, supplementary groups.
ANN = (1001, 2001, [2001, 3000])
BOB = (1002, 2002, [2002, 3000])
EVE = (1003, 2003, [2003])

# The clock of a file system ticks with the kernel's, at 100 Hz or faster.
TICK = 0.015
PAGE = 4096

RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = 1, 2, 4
KEEP_SIZE, PUNCH_HOLE, COLLAPSE_RANGE, ZERO_RANGE, INSERT_RANGE = 1, 2, 8, 16, 32
F_OFD_GETLK, F_OFD_SETLK, F_OFD_SETLKW = 36, 37, 38
AT_FDCWD, AT_EMPTY_PATH = -100, 0x1000
UTIME_NOW, UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2


def case(function):
    CASES.append(function)
    return function


def read_only_case(function):
    READ_ONLY_CASES.append(function)
    return function


def call(name, *args):
    """A function of the C library that os lacks."""
    args = [ctypes.c_long(arg) if isinstance(arg, int) else os.fsencode(arg) if isinstance(arg, str) else arg
            for arg in args]
    result = getattr(libc, name)(*args)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def shown(value):
    if value is None:
        return "ok"
    if isinstance(value, os.stat_result):
        kind = {stat.S_IFREG: "file", stat.S_IFDIR: "dir", stat.S_IFLNK: "link", stat.S_IFIFO: "fifo",
                stat.S_IFSOCK: "socket", stat.S_IFCHR: "chr", stat.S_IFBLK: "blk"}[stat.S_IFMT(value.st_mode)]
        size = value.st_size if kind in ("file", "link") else "-"
        return f"{kind}/{stat.S_IMODE(value.st_mode):04o}/{value.st_nlink}/{value.st_uid}:{value.st_gid}/{size}"
    if isinstance(value, (bytes, bytearray)):
        value = bytes(value)
        return repr(value) if len(value) <= 40 else f"{len(value)}bytes:{sum(value) % 9973}"
    return str(value).replace(" ", "")


def outcome(work, *args, **kwargs):
    try:
        value = work(*args, **kwargs)
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error.errno)), None
    return shown(value), value


class Steps:
    """What the steps of a case came to."""

    def __init__(self):
        self.parts = []

    def __call__(self, label, work, *args, **kwargs):
        text, value = outcome(work, *args, **kwargs)
        self.parts.append(f"{label}={text}")
        return value

    def open(self, label, path, flags=os.O_RDONLY, mode=0o666, **kwargs):
        """Opens a file; returns its descriptor, or None."""
        text, value = outcome(os.open, path, flags, mode, **kwargs)
        self.parts.append(f"{label}={'ok' if value is not None else text}")
        return value

    def by(self, label, user, work, *args, **kwargs):
        """Does it as another user, in a child."""
        self.parts.append(f"{label}={in_child(user, work, *args, **kwargs)}")

    def say(self, label, value):
        self.parts.append(f"{label}={shown(value)}")


def in_child(user, work, *args, **kwargs):
    """What comes out of `work` in a child, as a user if there is one."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        text = "raised"
        try:
            if user is not None:
                uid, gid, groups = user
                os.setgroups(groups)
                os.setresgid(gid, gid, gid)
                os.setresuid(uid, uid, uid)
            text, _ = outcome(work, *args, **kwargs)
        except BaseException as error:
            text = f"raised:{error!r}"
        finally:
            os.write(write_end, text.encode())
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        text = pipe.read().decode()
    _, status = os.waitpid(pid, 0)
    return text if os.WIFEXITED(status) else f"signal{os.WTERMSIG(status)}"


class Partner:
    """A second process that does one thing after the other, each when it is told to."""

    def __init__(self, *works):
        self.there, here = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            self.there.close()
            try:
                for work in works:
                    if not here.recv(1):
                        break
                    here.send(b"!")
                    text, _ = outcome(work)
                    here.send(text.encode())
                # It keeps what it has until it is to end.
                here.recv(1)
            finally:
                os._exit(0)
        here.close()

    def start(self):
        self.there.send(b"x")
        self.there.recv(1)

    def said(self, seconds=20.0):
        """What the present step came to, or None while it takes longer."""
        ready, _, _ = select.select([self.there], [], [], seconds)
        return self.there.recv(1000).decode() if ready else None

    def step(self):
        self.start()
        return self.said()

    def waits(self):
        """Whether it is asleep in the kernel."""
        for _ in range(200):
            with open(f"/proc/{self.pid}/stat") as file:
                if file.read().rsplit(")", 1)[1].split()[0] in "SD":
                    return self.said(0.05) is None
            time.sleep(0.01)
        return False

    def end(self):
        self.there.close()
        os.waitpid(self.pid, 0)


def link_through(old, new):
    """A name for what a symbolic link leads to, which os.link() does not make on Linux."""
    call("linkat", AT_FDCWD, old, AT_FDCWD, new, 0x400)


def rename2(old, new, flags):
    call("renameat2", AT_FDCWD, old, AT_FDCWD, new, flags)


def touch(path, flags=os.O_CREAT | os.O_WRONLY, mode=0o666, **kwargs):
    os.close(os.open(path, flags, mode, **kwargs))


def write(path, data, flags=os.O_CREAT | os.O_WRONLY | os.O_TRUNC, mode=0o666):
    fd = os.open(path, flags, mode)
    try:
        return os.write(fd, data)
    finally:
        os.close(fd)


def read(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.read(fd, 1 << 20)
    finally:
        os.close(fd)


def make(path, mode, uid=0, gid=0, data=b""):
    """A file with exactly this mode and owner."""
    write(path, data)
    os.chown(path, uid, gid)
    os.chmod(path, mode)


def make_dir(path, mode, uid=0, gid=0):
    os.mkdir(path)
    os.chown(path, uid, gid)
    os.chmod(path, mode)


def mode_of(path):
    return f"{stat.S_IMODE(os.lstat(path).st_mode):04o}"


def names(path="."):
    return sorted(os.listdir(path))


def moved(before, after):
    """Which times went on (+), stayed (=) or went back (-): of access, change of the content, change of the inode."""
    signs = []
    for field in ("st_atime_ns", "st_mtime_ns", "st_ctime_ns"):
        one, two = getattr(before, field), getattr(after, field)
        signs.append("+" if two > one else "=" if two == one else "-")
    return "".join(signs)


def what_moves(path, work, *args, **kwargs):
    before = os.lstat(path)
    time.sleep(TICK)
    work(*args, **kwargs)
    return moved(before, os.lstat(path))
