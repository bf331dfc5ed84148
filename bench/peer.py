"""Other VMMs with the same kernel and the same programs: what Hull is compared with.

QEMU is in the lab. Firecracker (1.13 or later, for its `--enable-pci`: the kernel has no virtio-mmio) and Cloud Hypervisor (51 or later, for its
`image_type`: what it takes for raw by itself cannot be written to at its beginning) are taken where FIRECRACKER or CLOUD_HYPERVISOR says where they are. Each has two disks of its own before those that are measured: a
root, and a script that is its machine's first program. The script says on the console what the work found.
"""

import json
import os
import shutil
import subprocess
import threading

KERNEL = "/usr/local/share/hull/vmlinux"
QEMU, VIRTIOFSD = "qemu-system-x86_64", "/usr/libexec/virtiofsd"
MEMORY_MIB = 512
MAC = "02:00:00:00:01:01"
# Small files of the archive that shares are measured with.
FILES = int(os.environ.get("HULL_BENCH_FILES") or "100000")
# What hangs is an error, not a figure.
TIMEOUT_SECONDS = 900
SECTOR_BYTES = 512
# Before a line on the console that is an answer: a JSON list of an exit status and what was said.
MARK = "bench-answer: "
END = "END-OF-FILE"
# Of the lab's root, what the work does without.
LEFT_OUT = ["boot", "lab", "lost+found", "srv", "usr/lib/modules", "usr/lib/x86_64-linux-gnu/dri", "usr/local", "usr/share/qemu", "usr/src",
            "var"]

SCRIPT = """export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp
mkdir /run/share
mount -t virtiofs share /run/share 2>/run/said
ip link set lo up
if [ -e /sys/class/net/eth0 ]; then
    ip address add {address} dev eth0
    ip link set eth0 up
fi
{programs}
cat >/run/works.py <<'{end}'
import json, subprocess, sys
for work in json.loads(sys.argv[1]):
    ended = subprocess.run([sys.executable, "-B", "/run/{program}", "work", *work], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT, text=True)
    print("\\n{mark}" + json.dumps([ended.returncode, ended.stdout]), flush=True)
{end}
exec python3 -B /run/works.py {works}
"""


class Peer:
    """A VMM that runs pieces of work, each time in a machine that is new."""

    # What the names of its figures end with.
    name: str

    def __init__(self, directory, root, program):
        """Keeps its files in `directory`; `root` is a disk by `make_root`, `program` the one that knows the work."""
        self.directory, self.root, self.program = directory, root, program

    @staticmethod
    def is_there():
        raise NotImplementedError

    def command(self, cmdline, disks, tap):
        """The VMM's command line: `disks` are pairs of a path and whether it is read-only, `tap` an interface's name."""
        raise NotImplementedError

    def run(self, works, disk=None, network=None):
        """The answers to `works`, each a list of a name and arguments, with `disk` as /dev/vdc and `network`, the namespace and the name of
        a tap and the address to take there."""
        namespace, tap, address = network or (None, None, "")
        programs = []
        for path in (self.program, __file__):
            with open(path) as file:
                programs.append(f"cat >/run/{os.path.basename(path)} <<'{END}'\n{file.read()}\n{END}")
        quoted = "'" + json.dumps(works).replace("'", "'\\''") + "'"
        script = SCRIPT.format(address=address, programs="\n".join(programs), program=os.path.basename(self.program),
                               mark=MARK, end=END, works=quoted).encode()
        path = f"{self.directory}/script"
        with open(path, "wb") as file:
            # A shell reads a disk to its end, and of a part of a sector nothing.
            file.write(script.ljust(-(-len(script) // SECTOR_BYTES) * SECTOR_BYTES, b"\n"))
        disks = [(self.root, True), (path, True)] + ([(disk, False)] if disk else [])
        # The first program's end is a panic, and that the machine's.
        cmdline = "console=ttyS0 quiet panic=-1 reboot=k root=/dev/vda rootfstype=erofs ro init=/bin/sh -- /dev/vdb"
        prefix = ["ip", "netns", "exec", namespace] if namespace else []
        machine = subprocess.Popen([*prefix, *self.command(cmdline, disks, tap)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, text=True, errors="replace")
        answers, said = [], []
        watchdog = threading.Timer(TIMEOUT_SECONDS, machine.kill)
        watchdog.start()
        try:
            for line in machine.stdout:
                said.append(line)
                if line.startswith(MARK):
                    status, output = json.loads(line[len(MARK):])
                    if status != 0:
                        raise SystemExit(f"{works[len(answers)]} in {self.name} failed ({status}): {output}")
                    answers.append(json.loads(output))
                if len(answers) == len(works):
                    return answers
        finally:
            watchdog.cancel()
            machine.kill()
            machine.wait()
        raise SystemExit(f"{self.name}'s guest gave {len(answers)} answers of {len(works)}; it said:\n{''.join(said)[-2000:]}")


class Qemu(Peer):
    name = "qemu"

    @staticmethod
    def is_there():
        return bool(shutil.which(QEMU))

    def command(self, cmdline, disks, tap):
        command = [QEMU, "-M", "q35,accel=kvm", "-cpu", "host", "-m", str(MEMORY_MIB), "-nodefaults", "-display", "none",
                   "-no-reboot", "-serial", "stdio", "-kernel", KERNEL, "-append", cmdline]
        for index, (path, read_only) in enumerate(disks):
            command += ["-drive", f"if=none,id=disk{index},file={path},format=raw,readonly={'on' if read_only else 'off'}",
                        "-device", f"virtio-blk-pci,drive=disk{index}"]
        if tap:
            command += ["-netdev", f"tap,id=net,ifname={tap},script=no,downscript=no", "-device", f"virtio-net-pci,netdev=net,mac={MAC}"]
        return command


class Virtiofsd(Qemu):
    """QEMU with a share by virtiofsd, at /run/share."""

    name = "virtiofsd"

    def __init__(self, directory, root, program, share):
        super().__init__(directory, root, program)
        self.share = share

    @staticmethod
    def is_there():
        return Qemu.is_there() and os.path.exists(VIRTIOFSD)

    def command(self, cmdline, disks, tap):
        return super().command(cmdline, disks, tap) + [
            "-object", f"memory-backend-memfd,id=memory,size={MEMORY_MIB}M,share=on", "-numa", "node,memdev=memory",
            "-chardev", f"socket,id=share,path={self.directory}/share.sock", "-device", "vhost-user-fs-pci,chardev=share,tag=share"]

    def run(self, works, disk=None, network=None):
        daemon = subprocess.Popen([VIRTIOFSD, "--socket-path", f"{self.directory}/share.sock", "--shared-dir", self.share,
                                   "--sandbox", "chroot"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            # It says that it waits for a connection when its socket is there.
            if not any(b"Waiting for vhost-user" in line for line in daemon.stderr):
                raise SystemExit("virtiofsd ended at once")
            return super().run(works, disk, network)
        finally:
            daemon.kill()
            daemon.wait()


class Firecracker(Peer):
    name = "firecracker"

    @staticmethod
    def is_there():
        return bool(os.environ.get("FIRECRACKER"))

    def command(self, cmdline, disks, tap):
        config = {
            "boot-source": {"kernel_image_path": KERNEL, "boot_args": cmdline},
            "drives": [{"drive_id": f"disk{index}", "path_on_host": path, "is_root_device": False, "is_read_only": read_only}
                       for index, (path, read_only) in enumerate(disks)],
            "machine-config": {"vcpu_count": 1, "mem_size_mib": MEMORY_MIB},
            "network-interfaces": [{"iface_id": "net", "host_dev_name": tap, "guest_mac": MAC}] if tap else [],
        }
        path = f"{self.directory}/firecracker.json"
        with open(path, "w") as file:
            json.dump(config, file)
        return [os.environ["FIRECRACKER"], "--no-api", "--enable-pci", "--config-file", path]


class CloudHypervisor(Peer):
    name = "cloud_hypervisor"

    @staticmethod
    def is_there():
        return bool(os.environ.get("CLOUD_HYPERVISOR"))

    def command(self, cmdline, disks, tap):
        described = [f"path={path},image_type=raw,readonly={'on' if read_only else 'off'}" for path, read_only in disks]
        network = ["--net", f"tap={tap},mac={MAC}"] if tap else []
        return [os.environ["CLOUD_HYPERVISOR"], "--kernel", KERNEL, "--cmdline", cmdline, "--cpus", "boot=1",
                "--memory", f"size={MEMORY_MIB}M", "--disk", *described, *network, "--serial", "tty", "--console", "off"]


# Those that devices and networks are compared with.
PEERS = [Qemu, Firecracker, CloudHypervisor]


def make_root(path, tree):
    """A disk with the programs of `tree`."""
    left_out = [f"--exclude-path={part}" for part in LEFT_OUT]
    subprocess.run(["mkfs.erofs", "--quiet", *left_out, path, tree], check=True, stdin=subprocess.DEVNULL,
                   stdout=subprocess.DEVNULL, timeout=TIMEOUT_SECONDS)
