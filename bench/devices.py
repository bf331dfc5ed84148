"""Measures disks, shares and the network of a guest against the machine that it runs on; prints a report as JSON.

    devices.py [--counted | --shares]

The same work is done on the host and in a guest, on the same files and between the same two network namespaces; a figure is what
the guest comes to divided by what the host does, both in one run, so it says something on a slow machine as well. Without an
argument disks and the network are measured, with --shares shares, whose archive of small files takes twenty minutes. With
--counted it is instructions for each operation, in the counted lab, those of the caller, the guest and the host together.

A guest's root has this machine's programs, so all have the same.
"""

import json
import mmap
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time

import peer

NAME = "bench-devices"
WORK = "/var/tmp/bench-devices"
ROOT = f"{WORK}/root"
DISK = f"{WORK}/disk.img"
SHARE = f"{WORK}/share"
# The root of machines that are measured, Hull's and others'; on a disk, since not each of them has shares.
DISK_ROOT = f"{WORK}/root.erofs"
HERE, THERE, OWN_ADDRESS, ADDRESS, PORT = "bench-here", "bench-there", "192.0.2.1/24", "192.0.2.2", 5300
# What leads a peer's packets to the other namespace.
TAP, BRIDGE = "bench-tap", "bench-bridge"
DISK_BYTES = 256 << 20
FILE_BYTES = 64 << 20
SECONDS = 3
OPERATIONS = 2000
CHANGES = 21

# Name, pattern, size of an access, depth of the queue.
DISK_JOBS = [(f"{name}{suffix}", pattern, size, depth) for depth, suffix in ((1, ""), (32, "_d32"))
             for name, pattern, size in (("randread_4k", "randread", "4k"), ("randwrite_4k", "randwrite", "4k"),
                                         ("seq_1m", "read", "1m"))]
SHARE_JOBS = [("randread_4k", "randread", "4k", 1), ("seq_1m", "read", "1m", 1)]


def run(*command, **options):
    """What a command says on standard output."""
    options = {"stdin": subprocess.DEVNULL, "timeout": peer.TIMEOUT_SECONDS, **options}
    ended = subprocess.run(command, capture_output=True, check=False, **options)
    if ended.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed ({ended.returncode}): {ended.stderr.decode()}{ended.stdout.decode()}")
    return ended.stdout.decode()


# The work, which a guest does as well: each is called by name with its arguments as text, and answers numbers by name.

def fio(path, jobs):
    """Bytes a second of each job; a job is a list of name, pattern, size and depth."""
    command = ["fio", "--output-format=json", f"--filename={path}", "--direct=1", "--ioengine=libaio", "--time_based",
               f"--runtime={SECONDS}", f"--size={FILE_BYTES}"]
    for name, pattern, size, depth in json.loads(jobs):
        command += [f"--name={name}", f"--rw={pattern}", f"--bs={size}", f"--iodepth={depth}", "--stonewall"]
    with tempfile.NamedTemporaryFile() as report:
        # Its notes go to standard output too.
        run(*command, f"--output={report.name}")
        report = json.load(report)
    return {job["jobname"]: job["read"]["bw_bytes"] + job["write"]["bw_bytes"] for job in report["jobs"]}


def small_files(directory, archive):
    """Seconds that it takes to unpack an archive, to look at each file of it, and to remove them."""
    target = f"{directory}/unpacked"
    os.mkdir(target)
    steps = {"untar": ["tar", "-x", "-f", archive, "-C", target], "stat": ["find", target, "-type", "f", "-size", "+100k"],
             "rm": ["rm", "-r", target]}
    times = {}
    for name, command in steps.items():
        start = time.monotonic()
        # The host, which knows how many files there are, sees to a limit.
        run(*command, timeout=None)
        times[name] = time.monotonic() - start
    return times


def tcp_streams(address):
    """Bits a second that arrive, from here and to here, by one connection and by eight."""
    rates = {}
    for streams in (1, 8):
        for direction, option in (("out", []), ("in", ["-R"])):
            report = json.loads(run("iperf3", "-c", address, "-J", "-t", str(SECONDS), "-P", str(streams), *option))
            rates[f"{direction}_{streams}"] = report["end"]["sum_received"]["bits_per_second"]
    return rates


def udp_packets(address):
    """Packets of 64 bytes a second that arrive."""
    report = json.loads(run("iperf3", "-c", address, "-J", "-t", str(SECONDS), "-u", "-b", "0", "-l", "64"))
    total = report["end"]["sum"]
    return {"pps": (total["packets"] - total["lost_packets"]) / total["seconds"]}


def round_trips(address, port):
    """Microseconds that a byte takes there and back by TCP."""
    with socket.create_connection((address, int(port))) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        start = time.monotonic()
        for _ in range(OPERATIONS):
            connection.sendall(b"x")
            connection.recv(1)
        return {"us": (time.monotonic() - start) / OPERATIONS * 1e6}


def counted(action):
    """The counted lab's clock goes one nanosecond an instruction."""
    for number in range(OPERATIONS // 10):
        action(number)
    start = time.monotonic_ns()
    for number in range(OPERATIONS):
        action(number)
    return (time.monotonic_ns() - start) // OPERATIONS


def disk_reads(path):
    buffer = mmap.mmap(-1, 4096)
    file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    return {"instructions": counted(lambda number: os.preadv(file, [buffer], number * 4096 % FILE_BYTES))}


def file_reads(path):
    def open_read_close(_):
        file = os.open(path, os.O_RDONLY)
        os.read(file, 4096)
        os.close(file)
    return {"instructions": counted(open_read_close)}


def packets(address, port):
    """Each is answered when it has arrived, so that none waits in a queue; a packet is half of that."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as connection:
        connection.connect((address, int(port)))

        def there_and_back(_):
            connection.send(b"x" * 64)
            connection.recv(64)
        return {"instructions": counted(there_and_back) // 2}


WORKS = {work.__name__: work for work in (fio, small_files, tcp_streams, udp_packets, round_trips, disk_reads, file_reads,
                                         packets)}


# Where it is done.

def on_host(work, *args, namespace=None):
    prefix = ["ip", "netns", "exec", namespace] if namespace else []
    return json.loads(run(*prefix, sys.executable, "-B", __file__, "work", work, *args))


def in_guest(work, *args):
    return json.loads(run("hull", "exec", NAME, sys.executable, "-B", "/bench/devices.py", "work", work, *args))


def echo(kind):
    """A process in the other namespace that sends back what it gets on `PORT`; of datagrams or of one connection after another."""
    program = {
        "tcp": f"import socket\nserver = socket.create_server(('{ADDRESS}', {PORT}))\nprint(flush=True)\n"
               "while True:\n    connection, _ = server.accept()\n"
               "    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)\n"
               "    while data := connection.recv(64):\n        connection.sendall(data)\n",
        "udp": "import socket\nserver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
               f"server.bind(('{ADDRESS}', {PORT}))\nprint(flush=True)\n"
               "while True:\n    data, sender = server.recvfrom(64)\n    server.sendto(data, sender)\n",
    }[kind]
    return listening("ip", "netns", "exec", THERE, sys.executable, "-I", "-c", program)


def listening(*command):
    """A process in the background that has said its first line, which is that it listens."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    if not process.stdout.readline():
        raise SystemExit(f"{' '.join(command)} ended at once")
    return process


def connect():
    """Two namespaces with a pair of Ethernet interfaces between them."""
    for namespace in (HERE, THERE):
        run("ip", "netns", "add", namespace)
        run("ip", "-n", namespace, "link", "set", "lo", "up")
    run("ip", "-n", HERE, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", THERE)
    for namespace, address in ((HERE, OWN_ADDRESS), (THERE, f"{ADDRESS}/24")):
        run("ip", "-n", namespace, "address", "add", address, "dev", "eth0")
        run("ip", "-n", namespace, "link", "set", "eth0", "up")


def prepare():
    shutil.rmtree(WORK, ignore_errors=True)
    for path in (ROOT, SHARE, f"{WORK}/archive"):
        os.makedirs(path)
    # Without what is mounted in it.
    run("mount", "--bind", "/", ROOT)
    block = os.urandom(1 << 20)
    for path, size in ((DISK, DISK_BYTES), (f"{SHARE}/file", FILE_BYTES)):
        with open(path, "wb") as file:
            for _ in range(size >> 20):
                file.write(block)
    connect()


def start_guest(root):
    run("hull", "run", "-d", "--name", NAME, "--memory", "512", "--net", f"netns:/run/netns/{HERE}", "--rootfs", root,
        "--disk", DISK, "-v", f"{SHARE}:/share", "-v", f"{os.path.dirname(__file__)}:/bench:ro", "--", "sleep", "1000000")


def ratios(host, guest, slower_is_less=True):
    return {name: round(guest[name] / host[name] if slower_is_less else host[name] / guest[name], 3) for name in host}


def bridge():
    """Takes the interface here, whose guest has gone, onto a bridge with a tap for a peer."""
    run("ip", "-n", HERE, "address", "flush", "dev", "eth0")
    run("ip", "-n", HERE, "link", "add", BRIDGE, "type", "bridge")
    run("ip", "-n", HERE, "tuntap", "add", TAP, "mode", "tap", "vnet_hdr")
    for interface in ("eth0", TAP):
        run("ip", "-n", HERE, "link", "set", interface, "master", BRIDGE, "up")
    run("ip", "-n", HERE, "link", "set", BRIDGE, "up")


def measure(add):
    """The network first: afterwards its namespace is the guest's."""
    server = listening("ip", "netns", "exec", THERE, "stdbuf", "-oL", "iperf3", "-s")
    repeater = echo("tcp")
    network = [("tcp_streams", ADDRESS), ("udp_packets", ADDRESS), ("round_trips", ADDRESS, str(PORT))]
    host = [on_host(*work, namespace=HERE) for work in network]
    peer.make_root(DISK_ROOT, ROOT)
    start_guest(DISK_ROOT)

    def add_network(suffix, found):
        streams, packets, round_trip = found
        if found is not host:
            for name, ratio in ratios(host[0], streams).items():
                add(f"net_tcp_stream_{name}_ratio{suffix}", ratio, "")
        add(f"net_tcp_rr{suffix}_us", round(round_trip["us"], 1), "us")
        add(f"net_udp{suffix}_pps", round(packets["pps"]), "1/s")

    add_network("", [in_guest(*work) for work in network])
    add_network("_host", host)

    jobs = json.dumps(DISK_JOBS)
    on_disk = on_host("fio", DISK, jobs)

    def add_disk(suffix, found):
        for name, ratio in ratios(on_disk, found).items():
            add(f"blk_{name}_ratio{suffix}", ratio, "")

    warm(DISK)
    add_disk("", in_guest("fio", "/dev/vda", jobs))
    run("hull", "rm", "-f", NAME)
    bridge()
    for kind in peer.PEERS:
        if kind.is_there():
            warm(DISK)
            *found, disk = kind(WORK, DISK_ROOT, __file__).run([*network, ("fio", "/dev/vdc", jobs)], DISK, (HERE, TAP, OWN_ADDRESS))
            add_network(f"_{kind.name}", found)
            add_disk(f"_{kind.name}", disk)
    server.kill()
    repeater.kill()


def measure_shares(add):
    # A file takes a tenth of a second where it is slowest.
    peer.TIMEOUT_SECONDS += peer.FILES // 10
    peer.make_root(DISK_ROOT, ROOT)
    files = f"{WORK}/files.tar"
    for number in range(peer.FILES):
        directory = f"{WORK}/archive/{number // 100}"
        os.makedirs(directory, exist_ok=True)
        with open(f"{directory}/{number}", "wb") as file:
            file.write(b"x" * 1024)
    run("tar", "-c", "-f", files, "-C", f"{WORK}/archive", ".")
    shutil.copy(files, f"{SHARE}/files.tar")
    jobs = json.dumps(SHARE_JOBS)

    def works(share):
        return ("fio", f"{share}/file", jobs), ("small_files", share, f"{share}/files.tar")

    host = [on_host(*work) for work in works(SHARE)]
    start_guest(DISK_ROOT)

    def add_share(prefix, found):
        for name, ratio in {**ratios(host[0], found[0]), **ratios(host[1], found[1], slower_is_less=False)}.items():
            add(f"{prefix}_{name}_ratio", ratio, "")

    warm(f"{SHARE}/file")
    add_share("fs", [in_guest(*work) for work in works("/share")])
    add("fs_inotify_ms", round(told_of_changes(), 1), "ms")
    run("hull", "rm", "-f", NAME)
    if peer.Virtiofsd.is_there():
        machine = peer.Virtiofsd(WORK, DISK_ROOT, __file__, SHARE)
        warm(f"{SHARE}/file")
        add_share("fs_virtiofsd", machine.run(works("/run/share")))


def told_of_changes():
    """Milliseconds from a file that the host makes in the share until the line has come that a program in the guest says when inotify has
    told it, for which it waits in read(2): the median. The line's way back through `hull exec` is in it, since the clocks are two."""
    program = ("import ctypes, os\nlibc = ctypes.CDLL(None)\ngroup = libc.inotify_init1(0)\n"
               "if libc.inotify_add_watch(group, b'/share', 0x100) < 0:\n    raise SystemExit('no inotify')\n"
               "print(flush=True)\nwhile os.read(group, 4096):\n    print(flush=True)\n")
    watcher = listening("hull", "exec", NAME, sys.executable, "-I", "-c", program)
    times = []
    for number in range(CHANGES):
        path = f"{SHARE}/change-{number}"
        start = time.monotonic()
        with open(path, "xb"):
            pass
        if not watcher.stdout.readline():
            raise SystemExit("the program that waits in inotify ended")
        times.append((time.monotonic() - start) * 1e3)
        os.remove(path)
    watcher.kill()
    return statistics.median(times)


def warm(path):
    """Has this machine's page cache hold a file, which fio on the host leaves it without: else who comes first reads it for all others."""
    with open(path, "rb") as file:
        while file.read(1 << 20):
            pass


def count(add):
    start_guest(ROOT)
    # What the page cache holds takes no time of the lab's host.
    for path in (DISK, f"{SHARE}/file"):
        warm(path)
    repeater = echo("udp")
    for name, work, *args in (("blk_4k", "disk_reads", "/dev/vda"), ("fs_open_read_close", "file_reads", "/share/file"),
                              ("net_packet", "packets", ADDRESS, str(PORT))):
        add(f"{name}_instructions", in_guest(work, *args)["instructions"], "")
    repeater.kill()
    run("hull", "rm", "-f", NAME)


def main():
    figures = {}

    def add(name, value, unit):
        figures[name] = {"value": value, "unit": unit}
        print(f"{name}: {value} {unit}", file=sys.stderr, flush=True)

    prepare()
    try:
        {"--counted": count, "--shares": measure_shares, "": measure}[sys.argv[1] if sys.argv[1:] else ""](add)
    finally:
        # What has been measured is kept where a later one fails.
        json.dump({"figures": figures}, sys.stdout, indent=2)


if __name__ == "__main__":
    if sys.argv[1:2] == ["work"]:
        print(json.dumps(WORKS[sys.argv[2]](*sys.argv[3:])))
    else:
        main()
