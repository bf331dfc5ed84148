"""The host's half of the lab: starts QEMU, gives the agent in it the command, carries the streams.

    host.py REPOSITORY IMAGES [OPTION...] -- COMMAND [ARG...]

A lab whose shape is a usual one starts from a saved state: the machine as it was when its agent had
just become ready. The state is made on first use, under a name that is a digest of all it depends
on. QEMU and this process share nothing but sockets made here, and QEMU dies with this process.
"""

import argparse
import collections
import ctypes
import fcntl
import hashlib
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import tty

COULD_NOT_RUN = 125
PORTS = ("control", "stdin", "stdout", "stderr")
# A saved state has the devices that it was saved with, so every lab has as many share slots.
SHARE_SLOTS = 8
# The size of the second disk is part of a saved state too.
STAGE_DISK_BYTES = 2 << 30
CHUNK_BYTES = 256 * 1024
CONSOLE_LINES_KEPT = 200
CONSOLE_LINES_SHOWN = 30
# A cold start takes under 12 s; a busy machine or one that builds beside us takes longer.
START_TIMEOUT_SECONDS = 180
MAKE_VARIABLES = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES")
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None)


class LabError(Exception):
    """The lab could not run the command, or not to its end."""


class Shape:
    """What a lab's machine is like; labs of one shape can share a saved state."""

    def __init__(self, counted, cpus, memory_mib):
        self.counted = counted
        self.cpus = cpus or (1 if counted else 2)
        self.memory_mib = memory_mib or (3072 if counted else 6144)
        if counted and self.cpus != 1:
            raise LabError("a counted lab has one CPU: the instructions of several have no common order")
        # Those for which a state is saved: the defaults, and the lab of the tests, several of which run side by side.
        self.is_usual = cpus in (None, 1) and not memory_mib

    def arguments(self):
        if self.counted:
            # The clock is the count, so its start is fixed too. While the CPU is idle it goes as the host's does: one that
            # leapt to the next timer would leap on and on while the CPU waits for a disk.
            mode = ["-accel", "tcg", "-icount", "shift=0,sleep=on", "-rtc", "base=2026-01-01,clock=vm"]
        else:
            mode = ["-accel", "tcg,thread=multi", "-rtc", "base=utc,clock=host"]
        # With five-level paging on, Debian's kernel crashes.
        model = "max,la57=off"
        if not self.counted:
            # Where the processor says that it repeats bytes fast, kernels and libraries copy and clear memory by single bytes, which
            # QEMU does one at a time.
            model += ",erms=off,fsrm=off,fzrm=off,fsrs=off,fsrc=off"
        return mode + ["-smp", str(self.cpus), "-m", str(self.memory_mib), "-cpu", model]


class Console:
    """The last lines of what the lab's console and QEMU itself said."""

    def __init__(self, stream, shown):
        self.lines = collections.deque(maxlen=CONSOLE_LINES_KEPT)
        self.thread = threading.Thread(target=self._read, args=(stream, shown), daemon=True)
        self.thread.start()

    def _read(self, stream, shown):
        for line in stream:
            text = line.decode(errors="replace").rstrip()
            self.lines.append(text)
            if shown:
                print(f"console: {text}", file=sys.stderr, flush=True)

    def tail(self):
        self.thread.join(timeout=1)
        return "".join(f"  | {line}\n" for line in list(self.lines)[-CONSOLE_LINES_SHOWN:])


class Machine:
    """One QEMU process, and the sockets to it."""

    def __init__(self, images, shape, disk, shares, stage_fd, show_console=False, incoming=False):
        self.sockets, theirs = {}, {}
        for name in (*PORTS, "qmp"):
            self.sockets[name], theirs[name] = socket.socketpair()
        arguments = [f"{images}/qemu/qemu-system-x86_64", *base_arguments(images, shape), *disk,
                     *stage_arguments(stage_fd)]
        for slot in range(SHARE_SLOTS):
            arguments += share_arguments(slot, shares[slot] if slot < len(shares) else None, images)
        for name, end in theirs.items():
            arguments += ["-chardev", f"socket,id={name},fd={end.fileno()}"]
        if incoming:
            arguments += ["-incoming", "defer"]
        inherited = [end.fileno() for end in theirs.values()] + [stage_fd]
        parent = os.getpid()

        def die_with_parent():
            LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)

        # A session of its own: a terminal's Ctrl-C is for us to act on.
        self.process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, pass_fds=inherited,
                                        start_new_session=True, preexec_fn=die_with_parent)
        for end in theirs.values():
            end.close()
        self.console = Console(self.process.stdout, show_console)
        self.control_lines = self.sockets["control"].makefile("rb")
        self.qmp_lines = self.sockets["qmp"].makefile("rb")

    def kill(self):
        self.process.kill()
        self.process.wait()

    def send(self, message):
        try:
            self.sockets["control"].sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            pass  # The next receive() tells why.

    def receive(self, timeout=None):
        """The agent's next message."""
        self.sockets["control"].settimeout(timeout)
        try:
            line = self.control_lines.readline()
        except TimeoutError:
            raise self.failure(f"the lab did not come up within {timeout} s") from None
        except OSError:
            line = b""
        if not line:
            raise self.failure(f"the lab's machine ended ({self.end_of_process()})")
        message = json.loads(line)
        if "failed" in message:
            raise self.failure(f"the lab could not be set up: {message['failed']}")
        return message

    def end_of_process(self):
        try:
            return f"QEMU's exit status was {self.process.wait(timeout=5)}"
        except subprocess.TimeoutExpired:
            return "QEMU closed its sockets"

    def failure(self, what):
        self.process.kill()
        return LabError(f"{what}; its console's last lines:\n{self.console.tail()}")

    def qmp(self, command, **arguments):
        self.sockets["qmp"].sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        for line in self.qmp_lines:
            reply = json.loads(line)
            if "return" in reply:
                return reply["return"]
            if "error" in reply:
                raise self.failure(f"QEMU refused {command}: {reply['error']['desc']}")
        raise self.failure(f"{self.end_of_process()} at {command}")

    def migrate(self, command, path):
        """Saves to or restores from a file, and waits for the end of it."""
        self.qmp("qmp_capabilities")
        self.qmp("migrate-set-capabilities", capabilities=[{"capability": "mapped-ram", "state": True}])
        self.qmp(command, uri=f"file:{path}")
        while True:
            status = self.qmp("query-migrate").get("status")
            if status == "completed":
                return
            if status in ("failed", "cancelled"):
                raise self.failure(f"QEMU's {command} failed")
            time.sleep(0.01)


def base_arguments(images, shape):
    arguments = ["-M", "q35", *shape.arguments(), "-nodefaults", "-no-user-config", "-display", "none",
                 # QEMU is not where it was installed, so it has to be told where its firmware is.
                 "-L", f"{images}/qemu/firmware",
                 "-no-reboot", "-kernel", f"{images}/kernel", "-initrd", f"{images}/initrd",
                 # tsc=reliable: no watchdog that moves the clock to a slow timer when this machine is busy.
                 # oops=panic: a lab that is damaged ends.
                 "-append", "console=ttyS0 quiet rcupdate.rcu_expedited=1 panic=-1 oops=panic mitigations=off nokaslr tsc=reliable no_timer_check "
                            "cgroup_no_v1=all random.trust_cpu=on",
                 "-chardev", "file,id=console,path=/dev/stdout", "-serial", "chardev:console",
                 "-mon", "chardev=qmp,mode=control", "-device", "virtio-serial-pci,id=ports"]
    for number, name in enumerate(PORTS, start=1):
        arguments += ["-device", f"virtserialport,bus=ports.0,nr={number},chardev={name},name={name}"]
    return arguments


def disk_arguments(image, image_format, throw_away=True):
    snapshot = "on" if throw_away else "off"
    return ["-drive", f"if=none,id=root,file={image},format={image_format},snapshot={snapshot},cache=unsafe",
            "-device", "virtio-blk-pci,drive=root"]


def stage_arguments(stage_fd):
    return ["-drive", f"if=none,id=stage,file=/dev/fd/{stage_fd},format=raw,readonly=on",
            "-device", "virtio-blk-pci,drive=stage"]


def share_arguments(slot, share, images):
    path, read_only = (share["path"], share["read_only"]) if share else (f"{images}/empty", True)
    escaped = path.replace(",", ",,")
    return ["-fsdev", f"local,id=share{slot},path={escaped},security_model=none,multidevs=remap,"
                      f"readonly={'on' if read_only else 'off'}",
            "-device", f"virtio-9p-pci,fsdev=share{slot},mount_tag=share{slot}"]


def make_stage(repo):
    """A disk image with what `make install` installs, open and already without a name; None if that is nothing."""
    image = tempfile.TemporaryFile()
    with tempfile.TemporaryDirectory() as tree:
        if os.path.exists(f"{repo}/Makefile"):
            # A make that called us would have this one use its job slots.
            environment = {name: value for name, value in os.environ.items() if name not in MAKE_VARIABLES}
            made = subprocess.run(["make", "-s", "-C", repo, "install", f"DESTDIR={tree}", "PREFIX=/usr/local"],
                                  env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                  stderr=subprocess.PIPE)
            if made.returncode:
                reason = made.stderr.decode(errors="replace").strip().splitlines()[:1]
                print("lab/run: nothing of this checkout is installed in the lab:", *reason, file=sys.stderr)
                shutil.rmtree(tree)
                os.mkdir(tree)
        is_filled = bool(os.listdir(tree))
        if is_filled:
            subprocess.run(["mkfs.erofs", "--quiet", f"/proc/self/fd/{image.fileno()}", tree], check=True,
                           stdout=subprocess.DEVNULL, pass_fds=[image.fileno()])
    image.truncate(STAGE_DISK_BYTES)
    return image, is_filled


def saved_state(images, shape):
    """The directory of this shape's saved state, made if it is not there yet."""
    version = subprocess.run([f"{images}/qemu/qemu-system-x86_64", "--version"], check=True, capture_output=True).stdout
    with open(__file__, "rb") as source:
        key = hashlib.sha256(version + source.read() + repr(shape.arguments()).encode()).hexdigest()[:16]
    state = f"{images}/state-{key}"
    if os.path.isdir(state):
        os.utime(state)  # lab/build removes what has long been unused.
        return state
    with open(f"{images}/state.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.path.isdir(state):
            return state
        new = f"{state}.new"
        shutil.rmtree(new, ignore_errors=True)
        os.mkdir(new)
        subprocess.run([f"{images}/qemu/qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw",
                        "-b", f"{images}/root.img", f"{new}/disk.qcow2"], check=True)
        with tempfile.TemporaryFile() as stage:
            stage.truncate(STAGE_DISK_BYTES)
            machine = Machine(images, shape, disk_arguments(f"{new}/disk.qcow2", "qcow2", throw_away=False), [],
                              stage.fileno())
            try:
                machine.receive(START_TIMEOUT_SECONDS)
                machine.migrate("migrate", f"{new}/machine")
                machine.qmp("quit")
                machine.process.wait()
            finally:
                machine.kill()
        os.rename(new, state)
    return state


class Streams:
    """Threads that carry the command's standard streams, and how much each carried."""

    def __init__(self, machine, on_broken_pipe):
        self.machine = machine
        self.on_broken_pipe = on_broken_pipe
        self.lengths = {}
        self.received = {1: 0, 2: 0}
        self.changed = threading.Condition()
        for name, fd in (("stdout", 1), ("stderr", 2)):
            threading.Thread(target=self._output, args=(machine.sockets[name], fd), daemon=True).start()

    def start_input(self):
        threading.Thread(target=self._input, daemon=True).start()

    def _input(self):
        length = 0
        while chunk := os.read(0, CHUNK_BYTES):
            self.machine.sockets["stdin"].sendall(chunk)
            length += len(chunk)
        self.machine.send({"stdin_ends_at": length})

    def _output(self, source, fd):
        while chunk := source.recv(CHUNK_BYTES):
            try:
                written = 0
                while written < len(chunk):
                    written += os.write(fd, chunk[written:])
            except BrokenPipeError:
                self.on_broken_pipe()
                return
            with self.changed:
                self.received[fd] += len(chunk)
                self.changed.notify()

    def wait_for(self, lengths):
        """Until all output has been passed on."""
        with self.changed:
            for fd, length in enumerate(lengths, start=1):
                self.changed.wait_for(lambda: self.received[fd] >= length)


def window_size():
    rows, columns, _, _ = struct.unpack("HHHH", fcntl.ioctl(0, termios.TIOCGWINSZ, bytes(8)))
    return [rows, columns]


def command_environment():
    environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root",
                   "USER": "root", "LANG": "C.UTF-8", "HULL_IN_LAB": "1"}
    if "TERM" in os.environ:
        environment["TERM"] = os.environ["TERM"]
    return environment


def run_command(machine, shape, options, shares, has_stage):
    """Has the agent run the command, and returns its exit status."""
    is_terminal = options.interactive and os.isatty(0)
    main_thread = threading.main_thread().ident
    streams = Streams(machine, on_broken_pipe=lambda: signal.pthread_kill(main_thread, signal.SIGPIPE))
    if is_terminal:
        signal.signal(signal.SIGWINCH, lambda *_: machine.send({"window": window_size()}))
    machine.send({"argv": options.command, "env": command_environment(), "cwd": os.getcwd(),
                  "terminal": window_size() if is_terminal else None,
                  "time": None if shape.counted else time.time(), "shares": shares,
                  # While a counted lab waits for a disk, its clock goes on as the host's does.
                  "stage": has_stage, "read_ahead": shape.counted})
    machine.receive(START_TIMEOUT_SECONDS)
    if options.interactive:
        streams.start_input()
    else:
        machine.send({"stdin_ends_at": 0})
    ended = machine.receive()
    streams.wait_for(ended["lengths"])
    return ended["exit"]


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise LabError(message)


def parse_arguments(arguments):
    parser = Parser(prog="lab/run", allow_abbrev=False, description="Runs one command in the lab. See docs/lab.md.",
                    usage="lab/run [OPTION...] -- COMMAND [ARG...]")
    parser.add_argument("--counted", action="store_true", help="the lab's clock counts instructions; one CPU")
    parser.add_argument("--cpus", type=int, metavar="N", help="2 unless told")
    parser.add_argument("--memory", type=int, metavar="MIB", help="6144 unless told, 3072 counted")
    parser.add_argument("--share", action="append", default=[], metavar="DIR",
                        help="make DIR visible at the same path, writable; may be repeated")
    parser.add_argument("-i", dest="interactive", action="store_true",
                        help="pass standard input on, as a terminal if it is one")
    parser.add_argument("--containerd", nargs="?", const="1.7", choices=("1.7", "2"), metavar="VERSION",
                        help="have containerd run (1.7, or 2), with Hull as a runtime and the built images imported")
    parser.add_argument("--images", default="busybox,debian", metavar="NAMES",
                        help="which of the built images containerd is to have; an import takes seconds")
    parser.add_argument("--cold", action="store_true", help="boot, even where a saved state would do")
    parser.add_argument("--console", action="store_true", help="show the lab's console on standard error")
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:split])
    options.command = arguments[split + 1:]
    if not options.command:
        raise LabError("no command; usage: lab/run [OPTION...] -- COMMAND [ARG...]")
    return options


def share_list(repo, directories):
    paths = {os.path.abspath(directory) for directory in directories}
    for path in paths:
        if not os.path.isdir(path):
            raise LabError(f"--share {path}: not a directory")
    if len(paths) > SHARE_SLOTS - 1:
        raise LabError(f"at most {SHARE_SLOTS - 1} directories can be shared")
    shares = [{"path": path, "read_only": False} for path in sorted(paths)]
    if not any(os.path.commonpath([path, repo]) == path for path in paths):
        shares.append({"path": repo, "read_only": True})
    return [{"tag": f"share{slot}", **share} for slot, share in enumerate(shares)]


def main(repo, images, *arguments):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    machine = terminal_settings = None
    try:
        options = parse_arguments(list(arguments))
        shape = Shape(options.counted, options.cpus, options.memory)
        images = os.path.realpath(images)
        shares = share_list(repo, options.share)
        if options.containerd:
            options.command = [f"{repo}/lab/with-containerd", repo, options.containerd, options.images, *options.command]
        stage, has_stage = make_stage(repo)
        warm = shape.is_usual and not options.cold
        if warm:
            state = saved_state(images, shape)
            disk = disk_arguments(f"{state}/disk.qcow2", "qcow2")
        else:
            disk = disk_arguments(f"{images}/root.img", "raw")
        machine = Machine(images, shape, disk, shares, stage.fileno(), options.console, incoming=warm)
        if warm:
            machine.migrate("migrate-incoming", f"{state}/machine")
            machine.qmp("cont")
        else:
            machine.receive(START_TIMEOUT_SECONDS)
        if options.interactive and os.isatty(0):
            terminal_settings = termios.tcgetattr(0)
            tty.setraw(0)
        return run_command(machine, shape, options, shares, has_stage)
    except (LabError, subprocess.CalledProcessError, OSError) as error:
        print(f"lab/run: {error}", file=sys.stderr)
        return COULD_NOT_RUN
    finally:
        if terminal_settings is not None:
            termios.tcsetattr(0, termios.TCSADRAIN, terminal_settings)
        if machine is not None:
            machine.kill()


# Daemon threads may be blocked in a read or write that interpreter shutdown would wait for.
try:
    exit_status = main(*sys.argv[1:])
except SystemExit as end:
    exit_status = end.code if isinstance(end.code, int) else COULD_NOT_RUN
sys.stderr.flush()
os._exit(exit_status)
