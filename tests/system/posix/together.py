"""Two processes at once: races and locks."""

import errno
import fcntl
import os
import signal
import struct
import time

from observe import *


def both(one, other):
    """Runs two works side by side; what they came to."""
    partner = Partner(one)
    partner.start()
    mine, _ = outcome(other)
    theirs = partner.said()
    partner.end()
    return theirs, mine


@case
def appending_at_once(t):
    touch("f")

    def append(letter):
        fd = os.open("f", os.O_WRONLY | os.O_APPEND)
        for i in range(40):
            os.write(fd, (letter * 60 + f"{i:03}\n").encode())
        os.close(fd)

    t.say("both", both(lambda: append("a"), lambda: append("b")))
    lines = read("f").decode().split("\n")
    t.say("lines", len(lines) - 1)
    t.say("whole", all(len(line) == 63 and len(set(line[:60])) == 1 for line in lines[:-1]))
    t.say("all", len(set(lines[:-1])))
    for letter in "ab":
        t.say("in_order_" + letter, [line[60:] for line in lines if line.startswith(letter)] == [f"{i:03}" for i in range(40)])


@case
def creating_at_once(t):
    def create(make_one):
        won = 0
        for i in range(12):
            try:
                make_one(i)
                won += 1
            except FileExistsError:
                pass
        return won

    write("source", b"")
    for label, make_one in (("open", lambda i: touch(f"o{i}", os.O_CREAT | os.O_EXCL | os.O_WRONLY)),
                            ("mkdir", lambda i: os.mkdir(f"d{i}")), ("link", lambda i: os.link("source", f"l{i}")),
                            ("symlink", lambda i: os.symlink("x", f"s{i}")),
                            ("noreplace", lambda i: (touch(f"n{i}.{os.getpid()}"),
                                                     rename2(f"n{i}.{os.getpid()}", f"n{i}", RENAME_NOREPLACE)))):
        theirs, mine = both(lambda: create(make_one), lambda: create(make_one))
        t.say(label, int(theirs) + int(mine) if theirs and theirs.isdigit() and mine.isdigit() else (theirs, mine))
    t("count", os.lstat, "source")


@case
def replacing_while_reading(t):
    write("f", b"0" * 1000)

    def replace():
        for i in range(40):
            write("new", b"%d" % (i % 10) * 1000)
            os.rename("new", "f")

    def look():
        for _ in range(60):
            content = read("f")
            if len(content) != 1000 or len(set(content)) != 1:
                return "torn"
        return "whole"

    t.say("both", both(replace, look))


@case
def posix_locks(t):
    def lock(fd, kind, start=0, length=0, command=fcntl.F_SETLK):
        fcntl.fcntl(fd, command, struct.pack("hhqqi4x", kind, os.SEEK_SET, start, length, 0))

    def test(fd, kind, start=0, length=0):
        found = fcntl.fcntl(fd, fcntl.F_GETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, start, length, 0))
        kind, _, start, length, pid = struct.unpack("hhqqi4x", found)
        if kind == fcntl.F_UNLCK:
            return "free"
        return f"{kind}:{start}:{length}:{'partner' if pid == partner.pid else pid}"

    write("f", b"0123456789")
    fd = os.open("f", os.O_RDWR)
    partner = Partner(
        lambda: lock(os.open("f", os.O_RDWR), fcntl.F_WRLCK, 2, 4),
        lambda: lock(os.open("f", os.O_RDWR), fcntl.F_UNLCK, 3, 1),
        lambda: lock(os.open("f", os.O_RDWR), fcntl.F_RDLCK, 8, 0),
    )
    t.say("partner", partner.step())
    t("test", test, fd, fcntl.F_RDLCK)
    t("conflict", lock, fd, fcntl.F_WRLCK)
    t("read_conflict", lock, fd, fcntl.F_RDLCK, 5, 1)
    t("beside", lock, fd, fcntl.F_WRLCK, 6, 2)
    t.say("split", partner.step())
    t("in_the_gap", lock, fd, fcntl.F_WRLCK, 3, 1)
    t("first_half", test, fd, fcntl.F_WRLCK, 0, 3)
    t("second_half", test, fd, fcntl.F_WRLCK, 4, 10)
    t.say("shared", partner.step())
    t("both_read", lock, fd, fcntl.F_RDLCK, 8, 5)
    t("no_write", lock, fd, fcntl.F_WRLCK, 8, 5)
    t("tail", test, fd, fcntl.F_WRLCK, 1 << 40, 1)
    t("upgrade", lock, fd, fcntl.F_WRLCK, 3, 1)
    t("own", test, fd, fcntl.F_WRLCK, 3, 1)
    partner.end()
    t("after_end", lock, fd, fcntl.F_WRLCK)
    t.by("not_inherited", None, lock, fd, fcntl.F_WRLCK)
    partner = Partner(lambda: lock(fd, fcntl.F_WRLCK, 0, 0, fcntl.F_SETLKW))
    partner.start()
    t("waits", partner.waits)
    t("unlock", lock, fd, fcntl.F_UNLCK)
    t("woken", partner.said)
    t("taken", lock, fd, fcntl.F_WRLCK)
    partner.end()
    t("retaken", lock, fd, fcntl.F_WRLCK)
    touch("f", os.O_RDONLY)
    t.by("lost_by_close", None, lock, fd, fcntl.F_WRLCK)
    t("rdonly_write", lambda: lock(os.open("f", os.O_RDONLY), fcntl.F_WRLCK))
    t("wronly_read", lambda: lock(os.open("f", os.O_WRONLY), fcntl.F_RDLCK))
    t("negative", lock, fd, fcntl.F_WRLCK, 5, -10)
    t("backwards", lock, fd, fcntl.F_WRLCK, 5, -3)
    t("dir", lambda: lock(os.open(".", os.O_RDONLY), fcntl.F_RDLCK))


@case
def posix_locks_that_would_wait_for_each_other(t):
    write("f", b"0123456789")
    fd = os.open("f", os.O_RDWR)
    partner = Partner(lambda: fcntl.lockf(fd, fcntl.LOCK_EX, 1, 1), lambda: fcntl.lockf(fd, fcntl.LOCK_EX, 1, 0))
    t("mine", fcntl.lockf, fd, fcntl.LOCK_EX, 1, 0)
    t.say("theirs", partner.step())
    partner.start()
    t("waits", partner.waits)
    t("deadlock", fcntl.lockf, fd, fcntl.LOCK_EX, 1, 1)
    t("unlock", fcntl.lockf, fd, fcntl.LOCK_UN, 1, 0)
    t("woken", partner.said)
    partner.end()


@case
def waits_for_locks_that_are_interrupted(t):
    def alarmed(work):
        def handler(*_):
            raise InterruptedError(errno.EINTR, "")
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        work()

    write("f", b"x")
    mine = os.open("f", os.O_RDWR)
    fcntl.lockf(mine, fcntl.LOCK_EX)
    fcntl.flock(mine, fcntl.LOCK_EX)
    t.by("posix", None, lambda: alarmed(lambda: fcntl.lockf(mine, fcntl.LOCK_EX)))
    t.by("flock", None, lambda: alarmed(lambda: fcntl.flock(os.open("f", os.O_RDWR), fcntl.LOCK_EX)))

    pid = os.fork()
    if pid == 0:
        try:
            fcntl.flock(os.open("f", os.O_RDWR), fcntl.LOCK_EX)
        finally:
            os._exit(0)
    time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    t("killed", lambda: os.WTERMSIG(os.waitpid(pid, 0)[1]))


@case
def locks_of_open_files(t):
    def lock(fd, kind, start=0, length=0, command=F_OFD_SETLK):
        fcntl.fcntl(fd, command, struct.pack("hhqqi4x", kind, os.SEEK_SET, start, length, 0))

    def test(fd, kind):
        found = struct.unpack("hhqqi4x", fcntl.fcntl(fd, F_OFD_GETLK, struct.pack("hhqqi4x", kind, 0, 0, 0, 0)))
        return "free" if found[0] == fcntl.F_UNLCK else found

    write("f", b"0123456789")
    one, two = os.open("f", os.O_RDWR), os.open("f", os.O_RDWR)
    t("one", lock, one, fcntl.F_WRLCK, 0, 5)
    t("two", lock, two, fcntl.F_WRLCK, 4, 5)
    t("test", test, two, fcntl.F_WRLCK)
    t("own", test, one, fcntl.F_WRLCK)
    t("beside", lock, two, fcntl.F_WRLCK, 5, 5)
    t("posix", fcntl.lockf, one, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0)
    t.by("inherited", None, lock, one, fcntl.F_WRLCK, 0, 3)
    copy = os.dup(one)
    os.close(one)
    t("dup_keeps", lock, two, fcntl.F_WRLCK, 0, 5)
    # Not by the partner's own copy of the descriptor.
    partner = Partner(lambda: (os.close(copy), lock(two, fcntl.F_WRLCK, 0, 5, F_OFD_SETLKW))[1])
    partner.start()
    t("waits", partner.waits)
    os.close(copy)
    t("woken_by_close", partner.said)
    partner.end()
    touch("f", os.O_RDONLY)
    three = os.open("f", os.O_RDWR)
    t("close_of_another_keeps", lock, three, fcntl.F_WRLCK, 0, 5)
    t("pid", lambda: fcntl.fcntl(three, F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 5)) and None)
    t("unlock", lock, two, fcntl.F_UNLCK)
    t("free", lock, three, fcntl.F_WRLCK)


@case
def whole_file_locks(t):
    write("f", b"x")
    one, two = os.open("f", os.O_RDONLY), os.open("f", os.O_RDWR)
    nb = fcntl.LOCK_NB
    t("shared", fcntl.flock, one, fcntl.LOCK_SH | nb)
    t("shared_too", fcntl.flock, two, fcntl.LOCK_SH | nb)
    t("exclusive", fcntl.flock, two, fcntl.LOCK_EX | nb)
    t("unlock", fcntl.flock, one, fcntl.LOCK_UN)
    t("upgrade", fcntl.flock, two, fcntl.LOCK_EX | nb)
    t("shut_out", fcntl.flock, one, fcntl.LOCK_SH | nb)
    t("posix_apart", lambda: fcntl.lockf(two, fcntl.LOCK_EX | nb))
    t.by("inherited", None, fcntl.flock, two, fcntl.LOCK_EX | nb)
    partner = Partner(lambda: (os.close(two), fcntl.flock(one, fcntl.LOCK_EX))[1], lambda: fcntl.flock(one, fcntl.LOCK_UN))
    partner.start()
    t("waits", partner.waits)
    t("downgrade", fcntl.flock, two, fcntl.LOCK_SH)
    t("still_waits", partner.waits)
    copy = os.dup(two)
    os.close(two)
    t("waits_for_dup", partner.waits)
    os.close(copy)
    t("woken", partner.said)
    three = os.open("f", os.O_RDWR)
    t("taken", fcntl.flock, three, fcntl.LOCK_SH | nb)
    t.say("let_go", partner.step())
    t("free", fcntl.flock, three, fcntl.LOCK_EX | nb)
    partner.end()
    t("dir", lambda: fcntl.flock(os.open(".", os.O_RDONLY), fcntl.LOCK_EX | nb))
    t("bad", fcntl.flock, three, 0)
    os.unlink("f")
    t("unlinked", fcntl.flock, three, fcntl.LOCK_SH | nb)
