"""Measures pods of containerd, in Hull and in runc, where containerd runs; prints a report as JSON, of what it came to.

Each timing is the median of several runs after one that warms the page cache.
"""

import json
import os
import statistics
import subprocess
import sys
import time

RUNS = 5
PODS = 10
IMAGE = "hull.test/busybox:latest"
RUNTIMES = {"runc": "io.containerd.runc.v2", "hull": "io.containerd.hull.v2"}
# A call that takes this long hangs.
TIMEOUT_SECONDS = 60
# What a guest has freed goes back to the host within two seconds.
SETTLE_SECONDS = 10


def ctr(*args):
    command = ["ctr", *args]
    try:
        ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT_SECONDS,
                               check=False)
    except subprocess.TimeoutExpired:
        raise SystemExit(f"{' '.join(command)} hangs") from None
    if ended.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed: {ended.stderr.decode()}")


def milliseconds(action):
    """The median time that `action` takes; it is given the number of the run."""
    action(0)
    times = []
    for number in range(1, RUNS + 1):
        start = time.monotonic_ns()
        action(number)
        times.append((time.monotonic_ns() - start) / 1e6)
    return round(statistics.median(times), 1)


def start(runtime, name):
    ctr("run", "-d", "--runtime", RUNTIMES[runtime], IMAGE, name, "sleep", "1000000")


def remove(name):
    ctr("task", "rm", "-f", name)
    ctr("container", "rm", name)


def processes():
    """The command line and the parent of every process."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline") as cmdline, open(f"/proc/{pid}/stat") as stat:
                parent = stat.read().rsplit(")", 1)[1].split()[1]
                found[pid] = (cmdline.read().split("\0"), parent)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def pss_kib(pid):
    with open(f"/proc/{pid}/smaps_rollup") as rollup:
        return next(int(line.split()[1]) for line in rollup if line.startswith("Pss:"))


def pod_pss_kib(name):
    """The share of memory of a pod's shim, and of all that the shim has started."""
    known = processes()
    shims = [pid for pid, (words, _) in known.items() if "shim" in words[0] and "-pod" in words and name in words]
    if len(shims) != 1:
        raise SystemExit(f"{name} has {len(shims)} shims")
    children = [pid for pid, (_, parent) in known.items() if parent == shims[0]]
    if not children:
        raise SystemExit(f"{name} has no virtual machine")
    shim = pss_kib(shims[0])
    return shim, shim + sum(pss_kib(pid) for pid in children)


def main():
    figures = {}

    def add(name, value, unit):
        figures[name] = {"value": value, "unit": unit}
        print(f"{name}: {value} {unit}", file=sys.stderr)

    try:
        measure(add)
    finally:
        json.dump({"figures": figures}, sys.stdout, indent=2)


def measure(add):
    for runtime, handler in RUNTIMES.items():
        add(f"ctr_run_{runtime}_ms", milliseconds(
            lambda number: ctr("run", "--rm", "--runtime", handler, IMAGE, f"run-{runtime}-{number}", "true")), "ms")
    for runtime in RUNTIMES:
        start(runtime, "bench")
        add(f"ctr_exec_{runtime}_ms", milliseconds(
            lambda number: ctr("task", "exec", "--exec-id", f"exec-{number}", "bench", "true")), "ms")
        remove("bench")
    start("hull", "bench-0")
    time.sleep(SETTLE_SECONDS)
    add("shim_pss_kib", pod_pss_kib("bench-0")[0], "KiB")
    for number in range(1, PODS):
        start("hull", f"bench-{number}")
    time.sleep(SETTLE_SECONDS)
    add("pod_pss_kib", round(statistics.mean(pod_pss_kib(f"bench-{number}")[1] for number in range(PODS))), "KiB")
    for number in range(PODS):
        remove(f"bench-{number}")


if __name__ == "__main__":
    main()
