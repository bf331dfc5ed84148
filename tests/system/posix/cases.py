"""What a program can observe of a file system, case by case.

    cases.py [tree:DIR] [DIR...] [ro:DIR...]

Each case runs in a fresh directory of its own in DIR and prints one line: its name, and for each step of it what came
out, by name of the error where there was one. Two file systems that behave alike print the same lines, so nothing that
is only true of one run is printed: no inode numbers, no times of day, no order of a directory.

`tree:DIR` makes the tree in DIR that the cases for `ro:DIR` look at, a read-only view of it.

CASE=PART[,PART...] runs the cases with such names only. ADMINISTRATOR=1 keeps the capabilities to make device nodes and to set attributes
for administrators.
"""

import ctypes
import os
import resource
import signal
import struct
import sys

from observe import CASES, READ_ONLY_CASES, Steps, call, libc
import opening, owners, attributes, naming, content, together, special, directories, other


def drop_capabilities():
    """Leaves what a container has unless it is given more, so that the machine's own root is no more than that either."""
    more = (21, 27) if os.environ.get("ADMINISTRATOR") else ()
    kept = sum(1 << number for number in (0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 31, *more))
    header = struct.pack("<Ii", 0x20080522, 0)
    now = ctypes.create_string_buffer(24)
    call("capget", header, now)
    sets = struct.unpack("<6I", now.raw)
    low = [value & kept for value in sets[:3]]
    for number in range(64):
        if not kept >> number & 1 and libc.prctl(23, ctypes.c_long(number), 0, 0, 0) == 1:
            libc.prctl(24, ctypes.c_long(number), 0, 0, 0)
    call("capset", header, struct.pack("<6I", *low, 0, 0, 0))


def run(cases, directory, fresh):
    os.chdir(directory)
    home = os.getcwd()
    for function in cases:
        os.chdir(home)
        os.umask(0o022)
        if fresh:
            os.mkdir(function.__name__)
            os.chmod(function.__name__, 0o755)
            os.chdir(function.__name__)
        steps = Steps()
        signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(RuntimeError("it takes too long")))
        signal.alarm(60)
        try:
            function(steps)
        except Exception as error:
            steps.parts.append(f"raised:{error!r}".replace(" ", "_"))
        signal.alarm(0)
        os.closerange(3, 512)
        print(function.__name__, *steps.parts, flush=True)


def main():
    drop_capabilities()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    parts = os.environ.get("CASE", "").split(",")

    def chosen(cases):
        return [case for case in cases if any(part in case.__name__ for part in parts)]

    for argument in sys.argv[1:]:
        kind, _, directory = argument.rpartition(":")
        print("#", os.path.basename(directory), flush=True)
        if kind == "tree":
            os.chdir(directory)
            other.make_tree()
        elif kind == "ro":
            run(chosen(READ_ONLY_CASES), directory, False)
        else:
            run(chosen(CASES), directory, True)


main()
