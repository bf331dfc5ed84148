"""The lab's PID 1: runs the one command that lab/run sends, and carries its streams.

Four virtio-serial ports lead to the host. `control` carries one JSON object a line in both
directions; `stdin`, `stdout` and `stderr` carry plain bytes. A port has no end of file, so whoever
ends a stream says on `control` how many bytes it had.

    waiting --start--> running --child exits, streams drained--> done (the host kills the lab)

Ports are only ever written non-blocking: the kernel's blocking write spins until the host has taken
the data, which starves a lab of one CPU.
"""

import ctypes
import errno
import fcntl
import json
import os
import selectors
import signal
import struct
import subprocess
import sys
import termios
import time

CONTROL, STDIN, STDOUT, STDERR = (f"/dev/vport0p{number}" for number in (1, 2, 3, 4))
PORT_WAIT_SECONDS = 20
CHUNK_BYTES = 64 * 1024
STAGE_DISK = "/dev/vdb"
STAGE = "/run/lab/stage"


class Pump:
    """Moves bytes from one non-blocking descriptor to another, holding at most one chunk.

    It ends at its source's end, when its target's reader has gone, or at a length set by end_at();
    then it closes a target that is its own.
    """

    def __init__(self, selector, source, target, owns_target=False):
        self.selector, self.source, self.target, self.owns_target = selector, source, target, owns_target
        self.held = b""
        self.moved = 0
        self.length = None
        self.open = True
        self.watched = None
        self.watch(source, selectors.EVENT_READ)

    def step(self):
        """Moves what can be moved now; leaves the selector watching whatever is in the way."""
        while self.open:
            if self.moved == self.length:
                return self.close()
            try:
                if not self.held:
                    self.held = self.read()
                    if not self.held:
                        return self.close()
            except BlockingIOError:
                return self.watch(self.source, selectors.EVENT_READ)
            try:
                written = os.write(self.target, self.held)
            except BlockingIOError:
                return self.watch(self.target, selectors.EVENT_WRITE)
            except BrokenPipeError:
                return self.close()
            self.held = self.held[written:]
            self.moved += written

    def read(self):
        wanted = CHUNK_BYTES if self.length is None else min(CHUNK_BYTES, self.length - self.moved)
        try:
            return os.read(self.source, wanted)
        except OSError as error:
            if error.errno == errno.EIO:  # The end of a terminal.
                return b""
            raise

    def watch(self, fd, event):
        if self.watched == fd:
            return
        if self.watched is not None:
            self.selector.unregister(self.watched)
        if fd is not None:
            self.selector.register(fd, event, self.step)
        self.watched = fd

    def close(self):
        self.open = False
        self.watch(None, 0)
        if self.owns_target:
            os.close(self.target)

    def end_at(self, length):
        self.length = length
        self.step()

    def end_at_what_is_there(self):
        """Ends a pipe at what it holds now: a process in the background may keep it open for ever."""
        if self.open:
            waiting = struct.unpack("i", fcntl.ioctl(self.source, termios.FIONREAD, bytes(4)))[0]
            self.end_at(self.moved + len(self.held) + waiting)


class Control:
    """The control port: one JSON object a line."""

    def __init__(self):
        self.fd = open_port(CONTROL)
        self.received = b""

    def send(self, message):
        data = json.dumps(message).encode() + b"\n"
        while data:
            try:
                data = data[os.write(self.fd, data):]
            except BlockingIOError:
                wait_for(self.fd, selectors.EVENT_WRITE)

    def messages(self):
        """What has arrived by now."""
        try:
            self.received += os.read(self.fd, CHUNK_BYTES)
        except BlockingIOError:
            pass
        *lines, self.received = self.received.split(b"\n")
        return [json.loads(line) for line in lines]

    def first_message(self):
        while True:
            wait_for(self.fd, selectors.EVENT_READ)
            messages = self.messages()
            if messages:
                assert len(messages) == 1, "the host speaks again only when the command has started"
                return messages[0]


def wait_for(fd, event):
    with selectors.DefaultSelector() as selector:
        selector.register(fd, event)
        selector.select()


def open_port(path):
    """Opens a port; the kernel makes them one after the other, some time after the driver's loading."""
    deadline = time.monotonic() + PORT_WAIT_SECONDS
    while not os.path.exists(path):
        if time.monotonic() > deadline:
            sys.exit(f"lab: {path} did not appear")
        time.sleep(0.02)
    return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)


def mount(*arguments):
    subprocess.run(["mount", *arguments], check=True)


def mount_shares(shares):
    # Parents before children, so that a share inside the repository stays visible.
    for share in sorted(shares, key=lambda share: share["path"]):
        os.makedirs(share["path"], exist_ok=True)
        # `loose` caches names too, which suits what does not change while the lab runs.
        cache = "ro,cache=loose" if share["read_only"] else "rw,cache=mmap"
        mount("-t", "9p", "-o", f"trans=virtio,version=9p2000.L,msize=512000,access=client,{cache}",
              share["tag"], share["path"])


def install_stage(read_ahead):
    """Puts what `make install` staged where it belongs: all of it is on the second disk."""
    # The kernel looked for partitions when another image may have been there.
    subprocess.run(["blockdev", "--flushbufs", STAGE_DISK], check=True)
    os.makedirs(STAGE, exist_ok=True)
    mount("-t", "erofs", "-o", "ro", STAGE_DISK, STAGE)
    for name in sorted(os.listdir(STAGE)):
        if name != "usr":
            subprocess.run(["cp", "-a", f"{STAGE}/{name}", "/"], check=True)
    if os.path.isdir(f"{STAGE}/usr/local"):
        for directory in ("upper", "work"):
            os.makedirs(f"/var/lib/lab/{directory}", exist_ok=True)
        # An overlay costs no copy, and its files are mapped from the disk's own page cache.
        mount("-t", "overlay", "-o",
              f"lowerdir={STAGE}/usr/local:/usr/local,upperdir=/var/lib/lab/upper,workdir=/var/lib/lab/work",
              "overlay", "/usr/local")
    if read_ahead:
        subprocess.run(["find", "/usr/local/", "-type", "f", "-exec", "cat", "{}", "+"], check=True,
                       stdout=subprocess.DEVNULL)


def spawn(start, streams, terminal):
    """Starts the command with the given standard streams."""
    pid = os.fork()
    if pid:
        return pid
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        if terminal is not None:
            os.login_tty(terminal)
        else:
            os.setsid()
            for target, source in enumerate(streams):
                os.dup2(source, target)
        try:
            os.chdir(start["cwd"])
        except OSError:
            os.chdir("/root")
        os.execvpe(start["argv"][0], start["argv"], start["env"])
    except OSError as error:
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        os.write(2, f"lab: {start['argv'][0]}: {error.strerror}\n".encode(errors="surrogateescape"))
        os._exit(127 if missing else 126)
    finally:
        os._exit(126)


def set_window_size(terminal, size):
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))


def reap(command):
    """Reaps whatever has ended; the command's exit status if it is among them."""
    status = None
    while True:
        try:
            pid, wait_status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return status
        if pid == 0:
            return status
        if pid == command:
            status = os.waitstatus_to_exitcode(wait_status)
            if status < 0:
                status = 128 - status


def flush(shares):
    """Brings what was written through a mapping to the host, whose files outlive the lab."""
    libc = ctypes.CDLL(None)
    for share in shares:
        if not share["read_only"]:
            fd = os.open(share["path"], os.O_RDONLY)
            libc.syncfs(fd)
            os.close(fd)


def run(control, ports, start):
    selector = selectors.DefaultSelector()
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_write)

    if start["terminal"]:
        terminal, command_side = os.openpty()
        set_window_size(terminal, start["terminal"])
        child = spawn(start, None, command_side)
        # The kernel tells the end of a terminal only to who does not hold its other side.
        os.close(command_side)
        os.set_blocking(terminal, False)
        stdin = Pump(selector, ports[0], os.dup(terminal))
        outputs = [Pump(selector, terminal, ports[1])]
    else:
        terminal = None
        pipes = [os.pipe() for _ in range(3)]
        child = spawn(start, (pipes[0][0], pipes[1][1], pipes[2][1]), None)
        for command_side in (pipes[0][0], pipes[1][1], pipes[2][1]):
            os.close(command_side)
        for our_side in (pipes[0][1], pipes[1][0], pipes[2][0]):
            os.set_blocking(our_side, False)
        stdin = Pump(selector, ports[0], pipes[0][1], owns_target=True)
        outputs = [Pump(selector, pipes[1][0], ports[1]), Pump(selector, pipes[2][0], ports[2])]
    control.send({"started": True})

    def on_control():
        for message in control.messages():
            if "stdin_ends_at" in message:
                stdin.end_at(message["stdin_ends_at"])
            if "window" in message and terminal is not None:
                set_window_size(terminal, message["window"])

    selector.register(control.fd, selectors.EVENT_READ, on_control)
    selector.register(wake_read, selectors.EVENT_READ, lambda: os.read(wake_read, 4096))
    status = None
    while status is None or any(pump.open for pump in outputs):
        for key, _ in selector.select():
            key.data()
        ended = reap(child)
        if ended is not None:
            status = ended
            # A terminal needs no help: it ends with its session's leader, which the command is.
            if terminal is None:
                for pump in outputs:
                    pump.end_at_what_is_there()
    flush(start["shares"])
    control.send({"exit": status, "lengths": [pump.moved for pump in outputs]})


def main():
    control = Control()
    ports = [open_port(path) for path in (STDIN, STDOUT, STDERR)]
    control.send({"ready": True})
    start = control.first_message()
    try:
        if start["time"] is not None:
            time.clock_settime(time.CLOCK_REALTIME, start["time"])
        mount_shares(start["shares"])
        if start["stage"]:
            install_stage(start["read_ahead"])
    except (OSError, subprocess.CalledProcessError) as error:
        control.send({"failed": str(error)})
    else:
        run(control, ports, start)
    while True:
        signal.pause()


main()
