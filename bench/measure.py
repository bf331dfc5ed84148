"""Measures hull where it is installed, and runc beside it; prints a report as JSON.

    measure.py IMAGES

Each timing is the median of several runs after one that warms the page cache and the image store.
"""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

RUNS = 5
SIZE = ["--cpus", "1", "--memory", "128", "--net", "none"]


def milliseconds(action):
    """The median time that `action` takes."""
    action()
    times = []
    for _ in range(RUNS):
        start = time.monotonic_ns()
        end = action()
        times.append(((end or time.monotonic_ns()) - start) / 1e6)
    return round(statistics.median(times), 1)


def check(*command):
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def agent_answers(image):
    """Runs a container with debug messages on; returns the time at which the agent had answered."""
    command = ["hull", "--debug", "run", "--rm", *SIZE, image, "true"]
    run = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    answered = None
    for line in run.stderr:
        if b"the agent answers" in line:
            answered = answered or time.monotonic_ns()
    if run.wait() != 0 or answered is None:
        raise SystemExit("hull run failed, or its debug messages do not tell when the agent answers")
    return answered


def resident_kib(pid, memory_mib):
    """Resident memory of a VMM: that of the guest, and all other. Guest memory is one range of addresses, in which parts of
    the kernel's file may be mapped too, and the guest's image, which all guests share."""
    mappings, image = [], 0
    with open(f"/proc/{pid}/smaps") as smaps:
        for line in smaps:
            bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
            if bounds:
                mappings.append([int(bounds[1], 16), int(bounds[2], 16), 0])
                is_image = line.endswith("/guest.img\n")
            elif line.startswith("Rss:"):
                mappings[-1][2] = int(line.split()[1])
                image += mappings[-1][2] if is_image else 0
    size = memory_mib << 20
    found = []
    # Adjoining mappings that come to the guest's size. The C library reserves ranges of such sizes too, of which little is
    # resident.
    for index, (start, _, _) in enumerate(mappings):
        end, resident = start, 0
        for lower, upper, rss in mappings[index:]:
            if lower != end or end - start >= size:
                break
            end, resident = upper, resident + rss
        if end - start == size:
            found.append(resident)
    if not found:
        raise SystemExit(f"no range of {memory_mib} MiB among the mappings of the VMM")
    guest = max(found) + image
    return guest, sum(rss for _, _, rss in mappings) - guest


def runc_bundle(directory):
    """A bundle whose root is the one that hull unpacked."""
    layers = "/var/lib/hull/layers"
    root = [entry for entry in os.listdir(layers) if not entry.startswith(".")]
    if len(root) != 1:
        raise SystemExit("more than one layer in the store")
    check("runc", "spec", "--bundle", directory)
    path = f"{directory}/config.json"
    with open(path) as file:
        spec = json.load(file)
    spec["process"]["terminal"] = False
    spec["process"]["args"] = ["true"]
    spec["root"] = {"path": f"{layers}/{root[0]}", "readonly": True}
    with open(path, "w") as file:
        json.dump(spec, file)


def main():
    # A share's answers take as long as the lab's host likes.
    image = "/dev/shm/busybox"
    shutil.copytree(f"{sys.argv[1]}/busybox", image)
    figures = {}

    def add(name, value, unit):
        figures[name] = {"value": value, "unit": unit}
        print(f"{name}: {value} {unit}", file=sys.stderr)

    add("cold_agent_ready_ms", milliseconds(lambda: agent_answers(image)), "ms")
    add("cold_run_ms", milliseconds(lambda: check("hull", "run", "--rm", *SIZE, image, "true")), "ms")

    started = subprocess.run(["hull", "run", "-d", "--name", "bench", *SIZE, image, "sleep", "100000"], check=True,
                             capture_output=True, stdin=subprocess.DEVNULL)
    container = started.stdout.decode().strip()
    add("exec_ms", milliseconds(lambda: check("hull", "exec", container, "true")), "ms")
    check("hull", "rm", "-f", "bench")

    started = subprocess.run(["hull", "run", "-d", "--name", "bench", *SIZE, image, "sleep", "100000"], check=True,
                             capture_output=True, stdin=subprocess.DEVNULL)
    container = started.stdout.decode().strip()
    record = json.loads(subprocess.run(["hull", "inspect", container], check=True, capture_output=True).stdout)[0]
    guest, other = resident_kib(record["vmm_pid"], 128)
    add("vmm_overhead_kib", other, "KiB")
    add("guest_resident_kib", guest, "KiB")
    check("hull", "rm", "-f", "bench")

    with tempfile.TemporaryDirectory(dir="/var/tmp") as bundle:
        runc_bundle(bundle)
        add("runc_run_ms", milliseconds(lambda: check("runc", "run", "--bundle", bundle, "bench")), "ms")
    json.dump({"figures": figures}, sys.stdout, indent=2)


if __name__ == "__main__":
    main()
