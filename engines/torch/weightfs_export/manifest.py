"""The manifest file: written whole or not at all, readable by its owner only, gone when the process ends. No torch here.

Format: docs/manifest.md of weightfs.
"""

import atexit
import json
import multiprocessing.util
import os
import tempfile


def manifest_directory():
    """Where engines put manifests and `weightfs mount --weights vllm` looks for them."""
    named = os.environ.get("WEIGHTFS_MANIFEST_DIR")
    if named:
        return named
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return os.path.join(runtime, "weightfs") if runtime else "/run/weightfs"


def process_start(pid):
    """Field 22 of /proc/PID/stat: clock ticks from boot to the process's start. None: no such process."""
    try:
        with open(f"/proc/{pid}/stat") as f:
            fields = f.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def parents(pid):
    """The processes above `pid`, nearest first, up to init."""
    above = []
    while pid > 1:
        try:
            with open(f"/proc/{pid}/stat") as f:
                pid = int(f.read().rpartition(")")[2].split()[1])
        except OSError:
            break
        above.append(pid)
    return above


def engine(name, version, rank=0, world_size=1, **more):
    """The `engine` part of a manifest that this process writes."""
    pid = os.getpid()
    return {"name": name, "version": version, "pid": pid, "start_time": process_start(pid), "rank": rank,
            "world_size": world_size, "parents": parents(pid), **more}  # fmt: skip


def default_instance(world_size):
    """What the ranks of one engine have in common, and no others: the job's name and port under torchrun, else the process that started
    them. None for one that is alone: it is known by its pid."""
    if world_size == 1:
        return None
    job, port = os.environ.get("TORCHELASTIC_RUN_ID"), os.environ.get("MASTER_PORT")
    # Without --rdzv-id every job of torchrun has the same name, so the port is needed too.
    return f"torchrun {job} {port}" if job and port else f"parent {os.getppid()}"


def write(path, manifest):
    """Writes and renames. The directory is made if it is missing, for its owner only."""
    directory = os.path.dirname(path)
    os.makedirs(directory, mode=0o700, exist_ok=True)
    # mkstemp makes the file with mode 0600.
    fd, draft = tempfile.mkstemp(prefix=f".{os.path.basename(path)}.", dir=directory)
    try:
        with os.fdopen(fd, "w") as f:
            json.dump(manifest, f, separators=(",", ":"))
        os.rename(draft, path)
    except BaseException:
        os.unlink(draft)
        raise


def remove_at_exit(path):
    """Removes the file when this process ends, unless somebody else's is there by then. Returns a function that does it
    now. What a SIGKILL leaves behind is known to be dead by its pid and start time, and swept by the next engine."""
    owner, inode = os.getpid(), os.stat(path).st_ino

    def remove():
        try:
            # A forked child runs the same exit handlers, and the file is not its own.
            if os.getpid() == owner and os.stat(path).st_ino == inode:
                os.unlink(path)
        except OSError:
            pass

    # Processes of multiprocessing end through their own finalizers; atexit handlers never run in forked ones.
    finalizer = multiprocessing.util.Finalize(None, remove, exitpriority=10)
    atexit.register(remove)

    def now():
        atexit.unregister(remove)
        if finalizer.still_active():
            finalizer()

    return now


def sweep(directory):
    """Removes manifests of ours whose process has ended. Returns the `engine` parts of those that go on."""
    alive = []
    try:
        entries = list(os.scandir(directory))
    except OSError:
        return alive
    for entry in entries:
        try:
            if not entry.name.endswith(".json") or entry.stat(follow_symlinks=False).st_uid != os.geteuid():
                continue
            with open(entry.path) as f:
                about = json.load(f)["engine"]
            if process_start(about["pid"]) != about["start_time"]:
                os.unlink(entry.path)
            else:
                alive.append(about)
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return alive
