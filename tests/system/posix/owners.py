"""Owners, modes, and who may do what."""

import mmap
import os
import socket
import stat

from observe import *


@case
def directories_by_mode(t):
    def tries():
        said = []
        for work in (lambda: os.listdir("d"), lambda: os.stat("d/f"), lambda: touch("d/new"), lambda: os.unlink("d/new"),
                     lambda: os.mkdir("d/sub"), lambda: os.rmdir("d/sub"),
                     lambda: os.rename("d/f", "d/g"), lambda: os.rename("d/g", "d/f"), lambda: os.chdir("d")):
            text, _ = outcome(work)
            said.append(text if text.isupper() else "ok")
        return ",".join(said)

    for mode in (0o700, 0o070, 0o050, 0o014, 0o021, 0o003):
        make_dir("d", mode, BOB[0], 3000)
        write("d/f", b"")
        t.by(f"{mode:04o}ann", ANN, tries)
        t.by(f"{mode:04o}eve", EVE, tries)
        for name in os.listdir("d"):
            os.remove(f"d/{name}")
        os.rmdir("d")


@case
def sticky_directories(t):
    make_dir("d", 0o1777, BOB[0], BOB[1])
    for name in ("ann", "ann2", "ann3", "eve"):
        make(f"d/{name}", 0o666, (ANN if name.startswith("ann") else EVE)[0], 0)
    make_dir("d/sub", 0o777, ANN[0], ANN[1])
    t.by("unlink_others", EVE, os.unlink, "d/ann")
    t.by("rename_others", EVE, os.rename, "d/ann", "d/x")
    t.by("rename_over_others", EVE, os.rename, "d/eve", "d/ann")
    t.by("rmdir_others", EVE, os.rmdir, "d/sub")
    t.by("exchange_others", EVE, call, "renameat2", AT_FDCWD, "d/eve", AT_FDCWD, "d/ann", RENAME_EXCHANGE)
    t.by("own", ANN, os.unlink, "d/ann")
    t.by("of_the_directory", BOB, os.unlink, "d/ann2")
    t("root", os.unlink, "d/ann3")
    t.by("rename_own", EVE, os.rename, "d/eve", "d/mine")
    t("names", names, "d")


@case
def set_id_bits(t):
    def after(label, mode, user, work, owner=(0, 0)):
        make("f", 0o777, *owner, data=b"0123456789")
        os.chmod("f", mode)
        if user is None:
            text, _ = outcome(work)
        else:
            text = in_child(user, work)
        t.say(label, f"{text}:{mode_of('f')}")
        os.unlink("f")

    def at_end(work):
        def run():
            fd = os.open("f", os.O_RDWR)
            work(fd)
            os.close(fd)
        return run

    def copy(fd):
        os.copy_file_range(fd, fd, 4, 0, 5)

    changes = (("write", lambda fd: os.write(fd, b"x")), ("pwrite", lambda fd: os.pwrite(fd, b"x", 3)),
               ("ftruncate", lambda fd: os.ftruncate(fd, 4)),
               ("fallocate", lambda fd: os.posix_fallocate(fd, 0, 100)),
               ("punch", lambda fd: call("fallocate", fd, PUNCH_HOLE | KEEP_SIZE, 0, 5)),
               ("copy", copy))
    for label, change in changes:
        after(f"{label}_6777_ann", 0o6777, ANN, at_end(change))
        after(f"{label}_2767_ann", 0o2767, ANN, at_end(change))
        after(f"{label}_2767_root", 0o2767, None, at_end(change))
    after("nothing_written", 0o6777, ANN, at_end(lambda fd: os.write(fd, b"")))
    after("truncate", 0o6777, ANN, lambda: os.truncate("f", 3))
    after("trunc_flag", 0o6777, ANN, lambda: touch("f", os.O_WRONLY | os.O_TRUNC))
    after("create_trunc", 0o6777, ANN, lambda: touch("f", os.O_WRONLY | os.O_TRUNC | os.O_CREAT))
    after("read", 0o6777, ANN, lambda: read("f"))
    after("chown_root", 0o6777, None, lambda: os.chown("f", 5, 5))
    after("chown_root_to_same", 0o6777, None, lambda: os.chown("f", 0, 0))
    after("chown_nothing", 0o6777, None, lambda: os.chown("f", -1, -1))
    after("chown_root_no_group_x", 0o6767, None, lambda: os.chown("f", 5, 5))
    after("chown_owner", 0o6777, ANN, lambda: os.chown("f", -1, 3000), owner=(ANN[0], ANN[1]))
    after("chown_owner_no_group_x", 0o6767, ANN, lambda: os.chown("f", -1, 3000), owner=(ANN[0], ANN[1]))
    after("chmod_member", 0o0777, ANN, lambda: os.chmod("f", 0o6755), owner=(ANN[0], 3000))
    after("chmod_no_member", 0o0777, ANN, lambda: os.chmod("f", 0o6755), owner=(ANN[0], 4000))


@case
def set_id_bits_that_root_keeps(t):
    def store(fd):
        view = mmap.mmap(fd, 10)
        view[0:1] = b"M"
        view.flush()

    for label, change in (("write", lambda fd: os.write(fd, b"x")), ("ftruncate", lambda fd: os.ftruncate(fd, 4)),
                          ("fallocate", lambda fd: os.posix_fallocate(fd, 0, 100)), ("map", store)):
        make("f", 0o6777, data=b"0123456789")
        fd = os.open("f", os.O_RDWR)
        change(fd)
        t(label, mode_of, "f")
    os.chmod("f", 0o6777)
    touch("f", os.O_WRONLY | os.O_TRUNC)
    t("trunc_flag", mode_of, "f")


@case
def set_id_chown_no_member(t):
    """The owner of a file with set-group-ID, but no right to execute, of a group that he is not in."""
    make("f", 0o644, ANN[0], 4000)
    os.chmod("f", 0o2644)
    t.by("chown", ANN, os.chown, "f", -1, 3000)
    t("mode", mode_of, "f")


@case
def set_group_id_directories(t):
    make_dir("d", 0o2777, 0, 4000)

    def made():
        os.umask(0)
        touch("d/f", mode=0o666)
        touch("d/g", mode=0o2775)
        os.mkdir("d/sub", 0o755)
        os.mkdir("d/bits", 0o2755)
        os.mkfifo("d/p", 0o600)
        os.symlink("f", "d/s")
        os.mknod("d/n", 0o2775 | stat.S_IFREG)
        os.close(os.open("d", os.O_TMPFILE | os.O_RDWR, 0o2775))

    t.by("by_ann", ANN, made)
    for name in names("d"):
        t(name, os.lstat, f"d/{name}")
    os.chmod("d", 0o0777)
    t.by("chmod_no_member", ANN, os.mkdir, "d/plain")
    t("plain", os.lstat, "d/plain")
    make_dir("own", 0o777, ANN[0], 4000)
    t.by("set_on_own", ANN, os.chmod, "own", 0o2777)
    t("own", mode_of, "own")
    os.chown("d/sub", 5, 5)
    t("chown_keeps", os.lstat, "d/sub")


@case
def file_creation_masks(t):
    for mask in (0o000, 0o022, 0o077, 0o137, 0o777):
        os.umask(mask)
        touch("f", mode=0o7777)
        os.mkdir("d", 0o7777)
        os.mkfifo("p", 0o7777)
        os.mknod("n", stat.S_IFREG | 0o7777)
        os.symlink("f", "s")
        server = socket.socket(socket.AF_UNIX)
        server.bind("u")
        server.close()
        t.say(f"{mask:03o}", ",".join(mode_of(name) for name in "fdpnsu"))
        for name in "fpnsu":
            os.unlink(name)
        os.rmdir("d")


@case
def changes_of_owner(t):
    def give(path, uid, gid):
        os.chown(path, uid, gid, follow_symlinks=False)

    make("f", 0o644, ANN[0], ANN[1])
    os.symlink("f", "s")
    t.by("to_own_group", ANN, give, "f", -1, 3000)
    t("look", os.lstat, "f")
    t.by("to_strange_group", ANN, give, "f", -1, 4000)
    t.by("give_away", ANN, give, "f", BOB[0], -1)
    t.by("to_oneself", ANN, give, "f", ANN[0], ANN[1])
    t.by("by_other", BOB, give, "f", -1, 3000)
    t.by("nothing_by_other", BOB, give, "f", -1, -1)
    t("link", give, "s", 7, 8)
    t("link_look", os.lstat, "s")
    t("target_look", os.lstat, "f")
    t("high", give, "f", 4294967294, 4294967293)
    t("high_look", os.lstat, "f")
    t("through_link", os.chown, "s", 65534, 65533)
    t("through_look", os.lstat, "f")
    fd = os.open("f", os.O_RDONLY)
    t("by_fd", os.fchown, fd, 11, 12)
    t("by_fd_look", os.fstat, fd)
    t("moves", what_moves, "f", os.chown, "f", 13, 14)
    t("missing", give, "none", 0, 0)


@case
def changes_of_mode(t):
    make("f", 0o644, ANN[0], ANN[1])
    os.symlink("f", "s")
    make_dir("d", 0o755, ANN[0], ANN[1])
    t.by("own", ANN, os.chmod, "f", 0o4711)
    t("own_look", os.lstat, "f")
    t.by("other", BOB, os.chmod, "f", 0o777)
    t.by("sticky_file", ANN, os.chmod, "f", 0o1644)
    t("sticky_look", mode_of, "f")
    t.by("sticky_dir", ANN, os.chmod, "d", 0o1755)
    t("all", os.chmod, "f", 0o7777)
    t("all_look", mode_of, "f")
    t("through_link", os.chmod, "s", 0o600)
    t("through_look", mode_of, "f")
    t("link_itself", call, "fchmodat", AT_FDCWD, "s", 0o600, 0x100)
    t("link_look", mode_of, "s")
    t("moves", what_moves, "f", os.chmod, "f", 0o640)
    t("missing", os.chmod, "none", 0o644)
    fd = os.open("f", os.O_WRONLY)
    os.chmod("f", 0)
    t("open_stays", os.write, fd, b"x")
    t("by_fd", os.fchmod, fd, 0o604)
    t("by_fd_look", os.fstat, fd)
