"""Access control lists and extended attributes."""

import ctypes
import os
import stat
import struct

from observe import *


# Access control lists: version 2, then tag, permissions and id of each entry.

def acl(*entries):
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER, NOBODY = 1, 2, 4, 8, 16, 32, 0xffffffff
ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"


def entries(value):
    return ",".join(f"{tag}:{rights}:{'' if who == NOBODY else who}"
                    for tag, rights, who in struct.iter_unpack("<HHI", value[4:]))


def acl_of(path, which=ACCESS):
    return entries(os.getxattr(path, which))


FOR_ANN = acl((USER_OBJ, 6, NOBODY), (USER, 6, ANN[0]), (GROUP_OBJ, 0, NOBODY), (MASK, 6, NOBODY), (OTHER, 0, NOBODY))
FOR_GROUP = acl((USER_OBJ, 6, NOBODY), (GROUP_OBJ, 0, NOBODY), (GROUP, 4, 3000), (MASK, 7, NOBODY), (OTHER, 0, NOBODY))


@case
def acl_access(t):
    make("f", 0o600, data=b"secret")
    t.by("before", ANN, read, "f")
    t("none", acl_of, "f")
    t("set", os.setxattr, "f", ACCESS, FOR_ANN)
    t("look", os.lstat, "f")
    t("get", acl_of, "f")
    t("list", os.listxattr, "f")
    t.by("ann", ANN, read, "f")
    t.by("ann_writes", ANN, write, "f", b"annwrote", os.O_WRONLY)
    t.by("bob", BOB, read, "f")
    t("chmod", os.chmod, "f", 0o640)
    t("masked", acl_of, "f")
    t.by("ann_masked", ANN, write, "f", b"x", os.O_WRONLY)
    t.by("ann_reads", ANN, read, "f")
    t("group", os.setxattr, "f", ACCESS, FOR_GROUP)
    t.by("ann_by_group", ANN, read, "f")
    t.by("bob_by_group", BOB, read, "f")
    t.by("eve", EVE, read, "f")
    t("plain", os.setxattr, "f", ACCESS, acl((USER_OBJ, 6, NOBODY), (GROUP_OBJ, 4, NOBODY), (OTHER, 4, NOBODY)))
    t("plain_look", mode_of, "f")
    t("plain_get", acl_of, "f")
    os.setxattr("f", ACCESS, FOR_ANN)
    t("remove", os.removexattr, "f", ACCESS)
    t("removed_look", mode_of, "f")
    t("removed_get", acl_of, "f")
    t("remove_again", os.removexattr, "f", ACCESS)
    t("moves", what_moves, "f", os.setxattr, "f", ACCESS, FOR_ANN)


@case
def acl_errors(t):
    make("f", 0o644, ANN[0], ANN[1])
    make_dir("d", 0o755)
    os.symlink("f", "s")
    t("no_owner_entry", os.setxattr, "f", ACCESS, acl((OTHER, 4, NOBODY)))
    t("no_mask", os.setxattr, "f", ACCESS, acl((USER_OBJ, 6, NOBODY), (USER, 6, 1), (GROUP_OBJ, 0, NOBODY), (OTHER, 0, NOBODY)))
    t("version", os.setxattr, "f", ACCESS, b"\x03\0\0\0" + FOR_ANN[4:])
    t("cut", os.setxattr, "f", ACCESS, FOR_ANN[:-1])
    t("short", os.setxattr, "f", ACCESS, b"\x02")
    t("empty", os.setxattr, "f", ACCESS, b"")
    t("default_on_file", os.setxattr, "f", DEFAULT, FOR_ANN)
    t("default_of_file", os.getxattr, "f", DEFAULT)
    t.by("by_other", BOB, os.setxattr, "f", ACCESS, FOR_ANN)
    t.by("by_owner", ANN, os.setxattr, "f", ACCESS, FOR_ANN)
    t("on_link", os.setxattr, "s", ACCESS, FOR_ANN, follow_symlinks=False)
    t("of_link", os.getxattr, "s", ACCESS, follow_symlinks=False)
    t("look", os.lstat, "f")
    t("create_flag", os.setxattr, "f", ACCESS, FOR_ANN, os.XATTR_CREATE)


@case
def acl_inheritance(t):
    make_dir("d", 0o755)
    default = acl((USER_OBJ, 7, NOBODY), (USER, 7, ANN[0]), (GROUP_OBJ, 5, NOBODY), (MASK, 7, NOBODY), (OTHER, 1, NOBODY))
    t("set", os.setxattr, "d", DEFAULT, default)
    t("look", os.lstat, "d")
    t("list", os.listxattr, "d")
    os.umask(0o077)
    touch("d/f", mode=0o666)
    touch("d/narrow", mode=0o640)
    os.mkdir("d/sub", 0o777)
    os.mkfifo("d/p", 0o666)
    os.mknod("d/n", stat.S_IFREG | 0o666)
    os.symlink("f", "d/s")
    fd = os.open("d", os.O_TMPFILE | os.O_RDWR, 0o666)
    t("nameless", os.fstat, fd)
    for name in names("d"):
        t(name, os.lstat, f"d/{name}")
        t(name + "_acl", acl_of, f"d/{name}")
    t("sub_default", acl_of, "d/sub", DEFAULT)
    os.mkdir("d/sub/deeper", 0o700)
    t("deeper", os.lstat, "d/sub/deeper")
    t("deeper_acl", acl_of, "d/sub/deeper")
    os.chmod("d", 0o777)
    t.by("ann_makes", ANN, touch, "d/of_ann", mode=0o666)
    t("of_ann", os.lstat, "d/of_ann")
    t("remove", os.removexattr, "d", DEFAULT)
    t("removed", acl_of, "d", DEFAULT)
    touch("d/after", mode=0o666)
    t("after", os.lstat, "d/after")
    t("after_acl", acl_of, "d/after")


@case
def acl_and_set_group_id(t):
    for label, group in (("member", 3000), ("no_member", 4000)):
        make("f", 0o755, ANN[0], group)
        os.chmod("f", 0o2755)
        t.by(label, ANN, os.setxattr, "f", ACCESS, FOR_ANN)
        t(label + "_look", mode_of, "f")
        os.chmod("f", 0o2755)
        t(label + "_root", os.setxattr, "f", ACCESS, FOR_ANN)
        t(label + "_root_look", mode_of, "f")
        os.unlink("f")


# Extended attributes.

def get_into(path, name, room):
    return call("getxattr", path, name, ctypes.create_string_buffer(room or 1), room)


def list_into(path, room):
    return call("listxattr", path, ctypes.create_string_buffer(room or 1), room)


@case
def user_attributes(t):
    make("f", 0o644, ANN[0], ANN[1])
    t("list_none", os.listxattr, "f")
    t("get_none", os.getxattr, "f", "user.a")
    t("replace_none", os.setxattr, "f", "user.a", b"1", os.XATTR_REPLACE)
    t("create", os.setxattr, "f", "user.a", b"1", os.XATTR_CREATE)
    t("create_again", os.setxattr, "f", "user.a", b"2", os.XATTR_CREATE)
    t("replace", os.setxattr, "f", "user.a", b"three", os.XATTR_REPLACE)
    t("get", os.getxattr, "f", "user.a")
    t("both_flags", os.setxattr, "f", "user.a", b"", os.XATTR_CREATE | os.XATTR_REPLACE)
    t("bad_flag", os.setxattr, "f", "user.a", b"", 4)
    t("room_exact", get_into, "f", "user.a", 5)
    t("room_small", get_into, "f", "user.a", 4)
    t("room_none", get_into, "f", "user.a", 0)
    t("list_small", list_into, "f", 3)
    t("list_ask", list_into, "f", 0)
    t("empty", os.setxattr, "f", "user.empty", b"")
    t("get_empty", os.getxattr, "f", "user.empty")
    t("binary", os.setxattr, "f", "user.b", bytes(range(256)))
    t("get_binary", os.getxattr, "f", "user.b")
    t("list", lambda: sorted(os.listxattr("f")))
    t("no_name", os.setxattr, "f", "user.", b"1")
    t("nothing", os.setxattr, "f", "", b"1")
    t("no_namespace", os.setxattr, "f", "colour", b"1")
    t("other_namespace", os.setxattr, "f", "strange.colour", b"1")
    t("long_name", os.setxattr, "f", "user." + "n" * 250, b"1")
    t("get_long_name", os.getxattr, "f", "user." + "n" * 250)
    t("too_long_name", os.setxattr, "f", "user." + "n" * 251, b"1")
    t("remove", os.removexattr, "f", "user.a")
    t("remove_again", os.removexattr, "f", "user.a")
    t.by("by_owner", ANN, os.setxattr, "f", "user.o", b"1")
    t.by("by_other", BOB, os.setxattr, "f", "user.o", b"2")
    t.by("read_by_other", BOB, os.getxattr, "f", "user.o")
    os.chmod("f", 0o600)
    t.by("read_closed", BOB, os.getxattr, "f", "user.o")
    t.by("list_closed", BOB, lambda: len(os.listxattr("f")))
    fd = os.open("f", os.O_RDONLY)
    t("by_fd", os.setxattr, fd, "user.fd", b"fd")
    t("get_by_fd", os.getxattr, fd, "user.fd")
    t("moves", what_moves, "f", os.setxattr, "f", "user.a", b"again")
    t("missing", os.getxattr, "none", "user.a")
    os.link("f", "g")
    t("by_other_name", os.getxattr, "g", "user.fd")


@case
def user_attribute_sizes(t):
    touch("f")
    for size in (100, 3000, 5000, 65536, 65537):
        t(str(size), os.setxattr, "f", "user.a", b"v" * size)
        t(f"{size}_get", get_into, "f", "user.a", 70000)
    os.setxattr("f", "user.a", b"v" * 100)
    t("two", os.setxattr, "f", "user.b", b"w" * 3500)
    t("kept", os.getxattr, "f", "user.a")


@case
def user_attributes_of_special_files(t):
    os.mkdir("d")
    touch("f")
    os.symlink("f", "s")
    os.mkfifo("p")
    make_dir("sticky", 0o1777)
    t("dir", os.setxattr, "d", "user.a", b"1")
    t("dir_get", os.getxattr, "d", "user.a")
    t("link", os.setxattr, "s", "user.a", b"1", follow_symlinks=False)
    t("link_get", os.getxattr, "s", "user.a", follow_symlinks=False)
    t("link_list", os.listxattr, "s", follow_symlinks=False)
    t("through_link", os.setxattr, "s", "user.a", b"1")
    t("fifo", os.setxattr, "p", "user.a", b"1")
    t("fifo_get", os.getxattr, "p", "user.a")
    t.by("sticky", ANN, os.setxattr, "sticky", "user.a", b"1")


@case
def trusted_attributes(t):
    touch("f")
    t("set", os.setxattr, "f", "trusted.a", b"1")
    t("get", os.getxattr, "f", "trusted.a")
    t.by("by_user", ANN, os.getxattr, "f", "trusted.a")
    t.by("set_by_user", ANN, os.setxattr, "f", "trusted.a", b"2")
    os.setxattr("f", "user.b", b"")
    t("list", lambda: sorted(os.listxattr("f")))
    t.by("list_by_user", ANN, os.listxattr, "f")
    for label, room in (("length", 0), ("exact", 7), ("less", 6)):
        t.by(label + "_by_user", ANN, call, "listxattr", "f", ctypes.create_string_buffer(room) if room else None, room)
    t("there", os.setxattr, "f", "trusted.a", b"2", os.XATTR_CREATE)
    t("replace", os.setxattr, "f", "trusted.a", bytes(range(256)) * 4, os.XATTR_REPLACE)
    t("long", os.getxattr, "f", "trusted.a")
    t("no_room", lambda: call("getxattr", "f", "trusted.a", ctypes.create_string_buffer(10), 10))
    t("length", lambda: call("getxattr", "f", "trusted.a", None, 0))
    t("not_there", os.getxattr, "f", "trusted.c")
    t("replace_none", os.setxattr, "f", "trusted.c", b"1", os.XATTR_REPLACE)
    t("too_long", os.setxattr, "f", "trusted.c", b"x" * 65537)
    t("no_name", os.setxattr, "f", "trusted.", b"1")
    t("remove", os.removexattr, "f", "trusted.a")
    t("removed", os.removexattr, "f", "trusted.a")
    os.symlink("f", "s")
    os.mkdir("d")
    os.mkfifo("p")
    for name in ("s", "d", "p"):
        t("set_" + name, os.setxattr, name, "trusted.a", b"1", follow_symlinks=False)
        t("get_" + name, os.getxattr, name, "trusted.a", follow_symlinks=False)
        t("list_" + name, os.listxattr, name, follow_symlinks=False)
    t("system", os.setxattr, "f", "system.a", b"1")
    t("system_get", os.getxattr, "f", "system.a")


# CAP_NET_BIND_SERVICE, permitted and effective, in the form of revision 2.
CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)


@case
def security_attributes(t):
    make("f", 0o755, ANN[0], ANN[1], data=b"x")
    t("set", os.setxattr, "f", "security.capability", CAPABILITY)
    t("get", os.getxattr, "f", "security.capability")
    t("list", os.listxattr, "f")
    t.by("by_owner", ANN, os.setxattr, "f", "security.capability", CAPABILITY)
    t("damaged", os.setxattr, "f", "security.capability", b"\xff" * 20)
    t("write", write, "f", b"y", os.O_WRONLY)
    t("after_write", os.getxattr, "f", "security.capability")
    os.setxattr("f", "security.capability", CAPABILITY)
    os.chmod("f", 0o711)
    t("after_chmod", os.getxattr, "f", "security.capability")
    os.chown("f", 9, 9)
    t("after_chown", os.getxattr, "f", "security.capability")
    os.setxattr("f", "security.capability", CAPABILITY)
    os.truncate("f", 0)
    t("after_truncate", os.getxattr, "f", "security.capability")
    t("other", os.setxattr, "f", "security.hull", b"1")
    t("other_get", os.getxattr, "f", "security.hull")
    t("other_remove", os.removexattr, "f", "security.hull")
    t.by("other_by_owner", ANN, os.setxattr, "f", "security.hull", b"1")
