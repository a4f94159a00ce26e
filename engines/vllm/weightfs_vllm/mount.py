"""The weightfs mount of a model, as one who uses its files: `ctl`, `status.json`. No torch, no vLLM here."""

import errno
import json
import multiprocessing
import os
import re
import tempfile

from .export import manifest


class NoMount(Exception):
    """No mount of this model is there; the message says what to do."""


class Refused(Exception):
    """weightfs did not do it. `errno` tells the kind, the message is weightfs's own sentence."""

    def __init__(self, code, message):
        super().__init__(message)
        self.errno = code


class Mount:
    def __init__(self, point):
        self.point = point

    def status(self):
        try:
            with open(os.path.join(self.point, "status.json")) as f:
                return json.load(f)
        except (OSError, ValueError) as e:
            raise NoMount(f"the mount at {self.point} does not answer ({e}): weightfs umount it, and mount again") from e

    def tell(self, command):
        """One write is one command; returns when it is done or accepted."""
        try:
            fd = os.open(os.path.join(self.point, "ctl"), os.O_WRONLY)
        except OSError as e:
            raise Refused(e.errno, f"ctl cannot be opened: {e.strerror}; only the mount's owner may write it") from e
        try:
            os.write(fd, command.encode())
        except OSError as e:
            last = self.status().get("last_command") or {}
            ours = last.get("command", "").split(" ")[0] == command.split(" ")[0]
            raise Refused(e.errno, last["says"] if ours and last.get("says") else os.strerror(e.errno)) from e
        finally:
            os.close(fd)

    def train(self, job):
        """Queues a job (a dict) and returns its entry in `status.json`."""
        # Through a file: longer jobs than one write may be, and a name by which the job is known again.
        with tempfile.NamedTemporaryFile("w", prefix="weightfs-job-", suffix=".json") as f:
            json.dump(job, f)
            f.flush()
            self.tell(f"train {f.name}")
            return next((j for j in reversed(self.status()["jobs"]) if f.name in j.get("source", "")), {})

    def commit(self, message=""):
        message = " ".join(message.split())
        self.tell(f"commit {message}".strip())
        return self.status()


def find(model):
    """The mount in which this server's weights can be trained: WEIGHTFS_MOUNT, or the one of the model directory `model` that has
    `ctl` and shows memory of this server's own processes. Others of the directory show other weights (weightfs's own copy, another
    engine's): a job there would be done and change nothing here."""
    named = os.environ.get("WEIGHTFS_MOUNT")
    if named:
        return Mount(named)
    others = []
    for point in mount_points():
        mount = Mount(point)
        try:
            status = mount.status()
            if os.path.realpath(status["model"]) != os.path.realpath(model):
                continue
            source = status["source"]
            if not any(is_ours(pid) for pid in source["pids"]):
                pids = ", ".join(str(pid) for pid in source["pids"])
                others.append(f"{point} shows {source['engine']} weights{pids and f' of pid {pids}'}, not this server's")
            elif not os.path.exists(os.path.join(point, "ctl")):
                others.append(f"{point} is read-only")
            else:
                return mount
        except (NoMount, KeyError):
            continue
    what = f"{model} is mounted, but {'; '.join(others)}" if others else f"{model} is not mounted"
    raise NoMount(f"{what}: weightfs mount {model} MOUNT_POINT --weights vllm (or set WEIGHTFS_MOUNT)")


def is_ours(pid):
    """Is it a process of the vLLM server that this process belongs to? Several processes for HTTP are children of one, which is the
    parent of the engine too."""
    server = os.getpid() if multiprocessing.parent_process() is None else os.getppid()
    return server == pid or server in manifest.parents(pid)


def mount_points():
    with open("/proc/self/mountinfo") as f:
        for line in f:
            fields = line.split(" ")
            kind, source = fields[fields.index("-") + 1 :][:2]
            if kind.startswith("fuse") and source == "weightfs":
                # Spaces and the like are octal escapes (proc(5)).
                yield re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), fields[4])


# Errno of ctl -> HTTP status.
HTTP = {
    errno.EINVAL: 400, errno.ENOENT: 404, errno.EBUSY: 409, errno.E2BIG: 413, errno.EFBIG: 413, errno.EOPNOTSUPP: 422,
    errno.EROFS: 403, errno.EACCES: 403, errno.EPERM: 403, errno.ESTALE: 503, errno.ENOMEM: 507, errno.ENOSPC: 507,
}  # fmt: skip
