"""Opening files."""

import fcntl
import mmap
import os

from observe import *


@case
def open_exclusive(t):
    flags = os.O_CREAT | os.O_EXCL | os.O_RDWR
    t("new", touch, "f", flags, 0o640)
    t("again", touch, "f", flags)
    os.symlink("nothing", "dangling")
    t("dangling", touch, "dangling", flags)
    os.mkdir("d")
    t("dir", touch, "d", flags)
    t("look", os.lstat, "f")
    t("names", names)


@case
def open_create(t):
    os.symlink("target", "link")
    t("through_dangling", write, "link", b"x")
    t("target", os.lstat, "target")
    t("no_mode", touch, "zero", os.O_CREAT | os.O_WRONLY, 0)
    t("zero", os.lstat, "zero")
    t("sticky_mode", touch, "sticky", os.O_CREAT | os.O_WRONLY, 0o7777)
    t("sticky", os.lstat, "sticky")
    t("unwritable", write, "readonly", b"made", os.O_CREAT | os.O_WRONLY, 0o444)
    t("readonly", os.lstat, "readonly")
    t("in_nothing", touch, "none/f")
    t("in_file", touch, "target/f")
    t("slash", touch, "new/")
    t("dir", touch, ".")
    t("with_directory", touch, "x", os.O_CREAT | os.O_DIRECTORY | os.O_RDONLY)
    t("names", names)


@case
def open_truncate(t):
    for label, flags in (("wronly", os.O_WRONLY), ("rdwr", os.O_RDWR), ("creat", os.O_WRONLY | os.O_CREAT)):
        write("f", b"content")
        t(label, touch, "f", flags | os.O_TRUNC)
        t(label + "_look", os.lstat, "f")
    write("f", b"content")
    t("rdonly", touch, "f", os.O_RDONLY | os.O_TRUNC)
    t("rdonly_look", os.lstat, "f")
    make("closed", 0o444, data=b"content")
    t.by("not_allowed", ANN, touch, "closed", os.O_RDONLY | os.O_TRUNC)
    t("closed", os.lstat, "closed")
    write("f", b"content")
    t("moves", what_moves, "f", touch, "f", os.O_WRONLY | os.O_TRUNC)
    t("moves_empty", what_moves, "f", touch, "f", os.O_WRONLY | os.O_TRUNC)


@case
def open_append(t):
    write("f", b"one")
    fd = t.open("open", "f", os.O_WRONLY | os.O_APPEND)
    t("write", os.write, fd, b"two")
    os.lseek(fd, 0, os.SEEK_SET)
    t("after_seek", os.write, fd, b"three")
    t("position", os.lseek, fd, 0, os.SEEK_CUR)
    t("at", os.pwrite, fd, b"at", 0)
    t("read", read, "f")
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_APPEND)
    t("off", os.pwrite, fd, b"ONE", 0)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags)
    t("on", os.pwrite, fd, b"end", 0)
    t("result", read, "f")
    other = os.open("f", os.O_RDWR)
    os.ftruncate(other, 2)
    t("after_truncate", os.write, fd, b"tail")
    t("short", read, "f")


@case
def open_no_follow(t):
    write("f", b"x")
    os.symlink("f", "link")
    os.mkdir("d")
    os.symlink("d", "dlink")
    t("link", touch, "link", os.O_RDONLY | os.O_NOFOLLOW)
    t("link_create", touch, "link", os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW)
    t("dlink", touch, "dlink", os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
    t("slash", touch, "dlink/", os.O_RDONLY | os.O_NOFOLLOW)
    t("file", touch, "f", os.O_RDONLY | os.O_NOFOLLOW)
    fd = t.open("path", "link", os.O_PATH | os.O_NOFOLLOW)
    t("look", os.fstat, fd)
    t("readlink", os.readlink, "", dir_fd=fd)


@case
def open_directories(t):
    os.mkdir("d")
    write("f", b"x")
    t("file", touch, "f", os.O_RDONLY | os.O_DIRECTORY)
    t("writing", touch, "d", os.O_WRONLY)
    t("both", touch, "d", os.O_RDWR)
    t("create", touch, "d", os.O_RDONLY | os.O_CREAT)
    t("truncate", touch, "d", os.O_RDONLY | os.O_TRUNC)
    fd = t.open("open", "d", os.O_RDONLY)
    t("read", os.read, fd, 10)
    t("write", os.write, fd, b"x")
    t("look", os.fstat, fd)
    t("ftruncate", os.ftruncate, fd, 0)
    t("truncate_path", os.truncate, "d", 0)


@case
def open_nameless(t):
    os.umask(0o027)
    fd = t.open("open", ".", os.O_TMPFILE | os.O_RDWR, 0o666)
    t("look", os.fstat, fd)
    t("write", os.write, fd, b"nameless")
    t("read", os.pread, fd, 20, 0)
    t("names", names)
    t("size", os.fstat, fd)
    t("reopened", read, f"/proc/self/fd/{fd}")
    t("link", link_through, f"/proc/self/fd/{fd}", "named")
    t("named", os.lstat, "named")
    t("content", read, "named")
    t("same", os.path.samestat, os.fstat(fd), os.stat("named"))
    t("again", link_through, f"/proc/self/fd/{fd}", "second")
    t("two", os.fstat, fd)
    os.unlink("named")
    os.unlink("second")
    t("none", os.fstat, fd)
    t("gone", link_through, f"/proc/self/fd/{fd}", "third")
    fd = t.open("exclusive", ".", os.O_TMPFILE | os.O_WRONLY | os.O_EXCL, 0o600)
    t("exclusive_link", link_through, f"/proc/self/fd/{fd}", "never")
    t("rdonly", touch, ".", os.O_TMPFILE | os.O_RDONLY)
    write("f", b"")
    t("on_file", touch, "f", os.O_TMPFILE | os.O_RDWR)
    t("nowhere", touch, "none", os.O_TMPFILE | os.O_RDWR)
    make_dir("closed", 0o755)
    t.by("not_allowed", ANN, touch, "closed", os.O_TMPFILE | os.O_RDWR)


@case
def open_direct(t):
    buffer = mmap.mmap(-1, 4 * PAGE)
    buffer.write(b"abcd" * PAGE)
    fd = t.open("open", "f", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    t("write", os.pwritev, fd, [buffer], 0)
    t("look", os.fstat, fd)
    back = mmap.mmap(-1, 4 * PAGE)
    t("read", os.preadv, fd, [back], PAGE)
    t("same", bytes(back[:3 * PAGE]).__eq__, b"abcd" * (3 * PAGE // 4))
    t("beyond", os.preadv, fd, [back], 8 * PAGE)
    t("cached", read, "f")
    other = os.open("f", os.O_RDWR)
    t("write_cached", os.pwrite, other, b"CACHED", 100)
    os.preadv(fd, [back], 0)
    t("seen", bytes(back[98:108]).hex)
    buffer[:6] = b"direct"
    t("write_direct", os.pwritev, fd, [memoryview(buffer)[:PAGE]], 0)
    t("seen_cached", os.pread, other, 10, 0)


@case
def open_direct_unaligned(t):
    fd = t.open("open", "f", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    t("write", os.write, fd, b"seven..")


@case
def open_path_only(t):
    make("f", 0o644, data=b"x")
    make_dir("d", 0o755)
    write("d/in", b"y")
    fd = t.open("file", "f", os.O_PATH)
    t("look", os.fstat, fd)
    t("read", os.read, fd, 1)
    t("write", os.write, fd, b"x")
    t("fchmod", os.fchmod, fd, 0o600)
    t("fchown", os.fchown, fd, 1, 1)
    t("ftruncate", os.ftruncate, fd, 0)
    t("flock", fcntl.flock, fd, fcntl.LOCK_SH)
    t("reopened", read, f"/proc/self/fd/{fd}")
    t("chmod", os.chmod, f"/proc/self/fd/{fd}", 0o640)
    t("mode", mode_of, "f")
    here = t.open("dir", "d", os.O_PATH)
    t("relative", os.stat, "in", dir_fd=here)
    t("unlink", os.unlink, "in", dir_fd=here)
    t("list", os.listdir, here)
    secret = t.open("secret", "secret", os.O_PATH | os.O_CREAT)
    t("secret_made", os.path.exists, "secret")


@case
def open_by_mode(t):
    def tries(path):
        said = ""
        for letter, flags in (("r", os.O_RDONLY), ("w", os.O_WRONLY), ("b", os.O_RDWR)):
            said += letter if outcome(touch, path, flags)[0] == "ok" else "-"
        return said + ("x" if os.access(path, os.X_OK) else "-")

    for mode in (0o000, 0o400, 0o024, 0o602, 0o067, 0o111):
        make("f", mode, ANN[0], 3000)
        t.say(f"{mode:04o}", in_child(ANN, tries, "f") + in_child(BOB, tries, "f") + in_child(EVE, tries, "f") + tries("f"))
        os.unlink("f")
