"""The real binary, killed at every write, fsync, rename, … of a commit, and with each of them failing.

usage: crash_strace.py [--stride N]     (N: play every Nth only; default 1, all)
Needs strace. Runs in the temporary directory, with the engine's weights in /dev/shm.
"""

import argparse
import collections
import os
import random
import re
import tempfile

from crash_model import Engine, check, shards, weightfs

# Everything that changes a file or makes one durable; openat makes files, flock and futimens (utimensat) belong to the protocol.
CALLS = ["pwrite64", "write", "fsync", "fdatasync", "rename", "mkdir", "unlink", "rmdir", "utimensat", "ftruncate", "openat", "flock"]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--stride", type=int, default=1)
    stride = parser.parse_args().stride
    with tempfile.TemporaryDirectory() as work, tempfile.TemporaryDirectory(dir="/dev/shm") as shared:
        engine = Engine(os.path.join(work, "model"), shared)
        model, trace, dice = engine.directory, os.path.join(work, "trace"), random.Random(3)
        options = ("--keep", "3")
        engine.change()
        engine.commit(*options)
        engine.change()
        engine.commit(*options, prefix=["strace", "-f", "-o", trace, "-e", "trace=" + ",".join(CALLS)])
        # A thread has counters of its own in strace; what writes is nearly always the first.
        counts = collections.Counter()
        by_thread = collections.Counter()
        for line in open(trace):
            found = re.match(r"(\d+) +(\w+)\(", line)
            if found:
                by_thread[found.groups()] += 1
        for (_, call), count in by_thread.items():
            counts[call] = max(counts[call], count)
        print("operations of one commit:", dict(counts))
        newest, states = 2, {2: shards(model)}
        points = collections.Counter()
        index = 0
        for kind in ["signal=KILL", "error=EIO", "error=ENOSPC"]:
            for call, count in counts.items():
                # Failing to open a library or flock is not a failing disk.
                if kind != "signal=KILL" and call in ("openat", "flock", "write"):
                    continue
                for n in range(1, count + 1):
                    index += 1
                    if index % stride:
                        continue
                    what = f"{kind} at {call} {n}"
                    engine.change()
                    inject = ["strace", "-f", "-o", "/dev/null", "-e", f"inject={call}:{kind}:when={n}"]
                    done = engine.commit(*options, prefix=inject, check=False)
                    allowed = {newest + 1: engine.expected()}
                    if done.returncode != 0:
                        allowed[newest] = states[newest]
                    if kind == "signal=KILL" and dice.random() < 0.5:
                        # Recovery is killed as well.
                        again = dice.choice(["pwrite64", "fsync", "rename"])
                        kill = ["strace", "-f", "-o", "/dev/null", "-e", f"inject={again}:signal=KILL:when={dice.randrange(1, 4)}"]
                        weightfs("recover", model, prefix=kill, check=False)
                        points["recovery killed"] += 1
                    now = check(model, allowed, what)
                    points[f"{kind}, {'commit k' if now == newest else 'commit k + 1'}"] += 1
                    states, newest = {now: allowed[now]}, now
                    # And on it goes.
                    engine.change()
                    engine.commit(*options)
                    newest += 1
                    states = {newest: engine.expected()}
                    if shards(model) != states[newest]:
                        raise SystemExit(f"{what}: the commit after it is not on the disk")
        print(f"{sum(points.values())} crash points:", dict(points))


main()
