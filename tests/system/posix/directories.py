"""Names, and directories as streams."""

import ctypes
import os
import socket
import stat
import struct
import time

from observe import *


# Names.

@case
def names_of_all_bytes(t):
    every = bytes(b for b in range(1, 256) if b != ord("/"))
    t("every_byte", write, every, b"every")
    t("read", read, every)
    t("listed", lambda: every in os.listdir(b"."))
    for label, name in (("space", b" "), ("newline", b"\n"), ("dots", b"..."), ("hidden", b"..x"), ("bad_utf8", b"\xff\xfe"),
                        ("longest", b"n" * 255), ("utf8", "ä€𝄞".encode() * 20)):
        t(label, touch, name)
        t(label + "_look", os.lstat, name)
    t("count", lambda: len(os.listdir(b".")))
    t("case", lambda: (touch(b"Case"), touch(b"case"), sum(name.lower() == b"case" for name in os.listdir(b".")))[2])
    t("link", os.link, every, b"l" * 255)
    t("rename", os.rename, b"n" * 255, b"m" * 255)
    t("mkdir", os.mkdir, b"d" * 255)
    t("inside", touch, b"d" * 255 + b"/" + b"f" * 255)
    t("unlink", os.unlink, every)


@case
def names_too_long(t):
    long = "n" * 256
    touch("f")
    os.mkdir("d")
    for label, work in (("create", lambda: touch(long)), ("open", lambda: touch(long, os.O_RDONLY)), ("stat", lambda: os.lstat(long)),
                        ("mkdir", lambda: os.mkdir(long)), ("rmdir", lambda: os.rmdir(long)), ("unlink", lambda: os.unlink(long)),
                        ("link", lambda: os.link("f", long)), ("symlink", lambda: os.symlink("f", long)),
                        ("rename", lambda: os.rename("f", long)), ("rename_from", lambda: os.rename(long, "g")),
                        ("mknod", lambda: os.mkfifo(long)), ("under", lambda: touch(long + "/f")), ("in_dir", lambda: touch("d/" + long)),
                        ("longer", lambda: touch("n" * 2000)), ("path", lambda: os.lstat("./" * 2046 + "f")),
                        ("path_too_long", lambda: os.lstat("./" * 2048 + "f")), ("truncate", lambda: os.truncate(long, 0)),
                        ("chmod", lambda: os.chmod(long, 0)), ("xattr", lambda: os.getxattr(long, "user.a"))):
        t(label, work)
    t("names", names)


@case
def paths_that_lead_nowhere(t):
    write("f", b"x")
    os.mkdir("d")
    for label, work in (("under_file", lambda: os.stat("f/x")), ("file_slash", lambda: os.stat("f/")), ("file_dot", lambda: os.stat("f/.")),
                        ("file_up", lambda: os.stat("f/..")), ("missing", lambda: os.stat("none/x")), ("empty", lambda: os.stat("")),
                        ("chdir_file", lambda: os.chdir("f")), ("list_file", lambda: os.listdir("f")), ("list_missing", lambda: os.listdir("none")),
                        ("open_under", lambda: touch("f/x")), ("at_file", lambda: os.stat("x", dir_fd=os.open("f", os.O_RDONLY))),
                        ("dir_slashes", lambda: os.stat("d//./")), ("rmdir_slash", lambda: os.rmdir("d/")),
                        ("symlink_under", lambda: os.symlink("x", "f/s")), ("link_under", lambda: os.link("f", "f/x")),
                        ("mkfifo_under", lambda: os.mkfifo("none/p")), ("rename_under", lambda: os.rename("f/x", "y")),
                        ("access", lambda: os.access("f/x", os.F_OK)), ("exec", lambda: os.execv("none", ["none"]))):
        t(label, work)


@case
def deep_trees(t):
    here = os.open(".", os.O_RDONLY)
    for i in range(21):
        os.mkdir("d" * 200)
        os.chdir("d" * 200)
    t("make", write, "bottom", b"deep")
    t("read", read, "bottom")
    t("cwd", lambda: len(os.getcwd()) > 4200)
    t("up", lambda: os.listdir("../.."))
    os.fchdir(here)
    os.rename("d" * 200, "e")
    t("after_rename", lambda: os.listdir("e"))
    os.chdir("e")
    for i in range(20):
        os.chdir("d" * 200)
    t("found", read, "bottom")
    os.unlink("bottom")
    for i in range(20):
        os.chdir("..")
        os.rmdir("d" * 200)
    os.fchdir(here)
    t("removed", os.rmdir, "e")
    t("left", names)


# Directories as streams.

class Stream:
    """A directory read by the kernel's own call, a few entries at a time."""

    def __init__(self, path):
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        self.buffer = ctypes.create_string_buffer(600)
        self.seek(0)

    def seek(self, position):
        """To a position that `tell` returned."""
        self.entries, self.position = [], os.lseek(self.fd, position, os.SEEK_SET)

    def tell(self):
        return self.position

    def next(self):
        """Inode number, type and name of the next entry, or None."""
        if not self.entries:
            length, at = call("getdents64", self.fd, self.buffer, len(self.buffer)), 0
            while at < length:
                number, following, size, kind = struct.unpack_from("QqHB", self.buffer, at)
                self.entries.append((following, number, kind, self.buffer.raw[at + 19:at + size].split(b"\0")[0].decode()))
                at += size
        if not self.entries:
            return None
        self.position, *entry = self.entries.pop(0)
        return entry

    def names(self, count=1 << 30):
        found = []
        while len(found) < count and (entry := self.next()):
            found.append(entry[2])
        return found

    def close(self):
        os.close(self.fd)


@case
def directory_entries(t):
    touch("f")
    os.mkdir("d")
    os.symlink("f", "s")
    os.mkfifo("p")
    os.link("f", "g")
    os.mknod("c", stat.S_IFCHR, 0)
    server = socket.socket(socket.AF_UNIX)
    server.bind("u")
    stream = Stream(".")
    kinds, numbers = {}, {}
    while entry := stream.next():
        numbers[entry[2]], kinds[entry[2]] = entry[:2]
    stream.close()
    t.say("types", sorted(kinds.items()))
    t.say("numbers", all(os.lstat(name).st_ino == ino for name, ino in numbers.items() if name not in (".", "..")))
    t.say("own", numbers["."] == os.stat(".").st_ino)
    t.say("parent", numbers[".."] == os.stat("..").st_ino)
    t.say("linked", numbers["f"] == numbers["g"])
    t("scan", lambda: sorted((entry.name, entry.is_dir(), entry.is_symlink()) for entry in os.scandir(".")))
    before = os.lstat("f").st_ino
    os.rename("f", "h")
    t.say("number_stays", os.lstat("h").st_ino == before)


@case
def directories_that_change_while_read(t):
    pad = "x" * 100
    for i in range(60):
        touch(f"{i:03}{pad}")
    stream = Stream(".")
    first = stream.names(13)
    position = stream.tell()
    following = stream.names(5)
    seen = {name[:3] for name in first + following}
    unseen = [i for i in range(60) if f"{i:03}" not in seen]
    removed = {f"{i:03}" for i in unseen[::2]} | set(sorted(name for name in seen if name.isdigit())[:3])
    for name in removed:
        os.unlink(name + pad)
    for i in range(20):
        touch(f"n{i:02}{pad}")
    rest = stream.names()
    every = [name[:3] for name in first + following + rest]
    kept = [f"{i:03}" for i in range(60) if f"{i:03}" not in removed]
    t.say("kept_seen_once", all(every.count(name) == 1 for name in kept))
    t.say("nothing_twice", len(set(every)) == len(every))
    stream.seek(position)
    t.say("seek_goes_on", [name for name in stream.names() if name[:3] in kept] == [name for name in following + rest if name[:3] in kept])
    stream.seek(0)
    again = stream.names()
    t.say("rewound", sorted(again) == sorted([".", ".."] + os.listdir(".")))
    t.say("count", len(again))
    touch("late")
    t.say("at_end", stream.names() in ([], ["late"]))
    stream.seek(0)
    t.say("late", "late" in stream.names())
    os.unlink("late")
    stream.seek(0)
    t.say("no_longer", "late" in stream.names())
    stream.close()
    for name in os.listdir("."):
        os.unlink(name)
    t("emptied", names)


@case
def directories_removed_while_read(t):
    os.mkdir("d")
    for i in range(40):
        touch(f"d/{i:03}" + "x" * 100)
    stream = Stream("d")
    while entries_read := stream.names(7):
        for name in entries_read:
            if name not in (".", ".."):
                os.unlink(f"d/{name}")
    t("left", names, "d")
    t("rmdir", os.rmdir, "d")
    stream.seek(0)
    t("dead", lambda: stream.names())
    stream.close()
