"""The same kernel in QEMU, with a share by virtiofsd: what Hull's shares are compared with."""

import json
import os
import shutil
import subprocess
import tempfile

KERNEL = "/usr/local/share/hull/vmlinux"
QEMU, VIRTIOFSD = "qemu-system-x86_64", "/usr/libexec/virtiofsd"
MEMORY_MIB = 512
TIMEOUT_SECONDS = 900

# The machine's first program: it does one piece of work and leaves the answer, or what it said instead, on the root.
INIT = """#!/bin/sh
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /run
mount -t virtiofs share /share
{command} >{answer}.new 2>&1
echo $? >>{answer}.new
mv {answer}.new {answer}
sync
python3 -c 'import ctypes; ctypes.CDLL(None).reboot(0x1234567)'
"""


def is_there():
    return bool(shutil.which(QEMU) and os.path.exists(VIRTIOFSD))


class Peer:
    """A machine for each piece of work, with the same root, the same share and the same program in it."""

    def __init__(self, root, share, program):
        self.root, self.share, self.program = root, share, program

    def __enter__(self):
        self.directory = tempfile.TemporaryDirectory(dir="/var/tmp")
        os.makedirs("/share", exist_ok=True)
        shutil.copytree(self.program, f"{self.directory.name}/program")
        return self

    def __exit__(self, *_):
        self.directory.cleanup()

    def run(self, work, *args):
        work_path = self.directory.name
        answer = f"{work_path}/answer"
        words = ["/usr/bin/python3", "-B", f"{work_path}/program/devices.py", "work", work, *args]
        command = " ".join("'" + word.replace("'", "'\\''") + "'" for word in words)
        with open(f"{work_path}/init", "w") as file:
            file.write(INIT.format(command=command, answer=answer))
        os.chmod(f"{work_path}/init", 0o755)
        daemons = [self.daemon(tag, path) for tag, path in (("root", self.root), ("share", self.share))]
        machine = [QEMU, "-M", "q35,accel=kvm", "-cpu", "host", "-m", str(MEMORY_MIB), "-nodefaults", "-display", "none",
                   "-no-reboot", "-serial", "stdio", "-kernel", KERNEL,
                   "-append", f"console=ttyS0 panic=-1 rootfstype=virtiofs root=root rw init={work_path}/init",
                   "-object", f"memory-backend-memfd,id=memory,size={MEMORY_MIB}M,share=on", "-numa", "node,memdev=memory"]
        for tag in ("root", "share"):
            machine += ["-chardev", f"socket,id={tag},path={work_path}/{tag}.sock",
                        "-device", f"vhost-user-fs-pci,chardev={tag},tag={tag}"]
        try:
            ended = subprocess.run(machine, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   timeout=TIMEOUT_SECONDS, check=False)
        finally:
            for daemon in daemons:
                daemon.kill()
                daemon.wait()
        if not os.path.exists(answer):
            raise SystemExit(f"QEMU's guest gave no answer; it said:\n{ended.stdout.decode(errors='replace')[-2000:]}")
        with open(answer) as file:
            *said, status = file.read().splitlines()
        os.remove(answer)
        if status != "0":
            raise SystemExit(f"{work} in QEMU's guest failed ({status}): {said}")
        return json.loads("".join(said))

    def daemon(self, tag, path):
        socket = f"{self.directory.name}/{tag}.sock"
        daemon = subprocess.Popen([VIRTIOFSD, "--socket-path", socket, "--shared-dir", path, "--sandbox", "chroot"],
                                  stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        # It says that it waits for a connection when its socket is there.
        for line in daemon.stderr:
            if b"Waiting for vhost-user" in line:
                return daemon
        raise SystemExit("virtiofsd ended at once")
