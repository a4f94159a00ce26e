"""Where the plugin hangs in vLLM (0.32 and 0.33): around `Worker.load_model`, for as long as it runs.

vLLM calls `register` in each of its processes, long before it is known whether that process will hold weights. So nothing is
imported here but the standard library; the worker's module is patched when, and if, vLLM imports it.
"""

import contextlib
import functools
import importlib.abc
import logging
import multiprocessing
import os
import sys
import time
import weakref

# A child of vLLM's logger, so that what is said here comes out where vLLM's own lines do.
logger = logging.getLogger("vllm.weightfs")

# Seconds that killed workers have to be gone.
WORKERS_END = 3

WORKER = "vllm.v1.worker.gpu_worker"


def register():
    """Called by vLLM. WEIGHTFS_VLLM=0 switches the plugin off."""
    try:
        if os.environ.get("WEIGHTFS_VLLM", "1") == "0":
            return
        after_import(WORKER, wrap_worker)
        sweep_at_exit()
    except Exception:
        logger.exception("weightfs: the plugin could not be set up; vLLM goes on without it")


@functools.cache
def sweep_at_exit():
    """vLLM kills its workers when it ends, before they can tidy up; its server ends last, in good order. Where a program has made the
    engine (`vllm.LLM`), a finalizer of vLLM's ends it at exit. Finalizers run newest first, and before handlers of atexit that are
    older than the first of them: so this is one too, made before there is an engine."""
    weakref.finalize(sweep, sweep)


def sweep():
    """Removes the manifests of workers that have ended. The server has just killed its own: they are waited for."""
    with contextlib.suppress(Exception):
        from .export import manifest

        deadline = time.monotonic() + WORKERS_END
        while any(os.getpid() in about.get("parents", ()) for about in manifest.sweep(manifest.manifest_directory())):
            if multiprocessing.parent_process() is not None or time.monotonic() > deadline:
                break
            time.sleep(0.02)


def after_import(name, action):
    """Calls `action(module)` once the module has been imported; now, if it has been already."""
    if name in sys.modules:
        action(sys.modules[name])
    elif not any(isinstance(f, AfterImport) and f.name == name for f in sys.meta_path):
        sys.meta_path.insert(0, AfterImport(name, action))


class AfterImport(importlib.abc.MetaPathFinder):
    """Finds nothing itself: lets the others find, and runs `action` after the module."""

    def __init__(self, name, action):
        self.name, self.action = name, action

    def find_spec(self, fullname, path, target=None):
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        for finder in sys.meta_path:
            spec = finder.find_spec(fullname, path, target) if hasattr(finder, "find_spec") else None
            if spec is not None and spec.loader is not None:
                spec.loader = Loader(spec.loader, self.action)
                return spec
        return None


class Loader(importlib.abc.Loader):
    def __init__(self, loader, action):
        self.loader, self.action = loader, action

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        self.loader.exec_module(module)
        try:
            self.action(module)
        except Exception:
            logger.exception("weightfs: vLLM's worker could not be patched; its weights will not be shared")


def wrap_worker(module):
    worker_class = module.Worker
    original = worker_class.load_model
    if getattr(original, "_weightfs", False):
        return

    def load_model(self, *args, **kwargs):
        session, hooks = None, contextlib.ExitStack()
        try:
            from .session import Session

            session = Session(self)
            # Here, where it is caught: this vLLM may lack what the hooks replace.
            hooks.enter_context(session.hooks())
        except Exception as e:
            logger.exception("weightfs: the weights of this engine will not be shared")
            if session is not None:
                session.refused = f"the plugin does not fit this vLLM ({type(e).__name__}: {e}): serve with 0.32 or 0.33"
        with hooks:
            result = original(self, *args, **kwargs)
        if session is not None:
            try:
                session.publish()
            except Exception as e:
                session.failed(e)
        return result

    load_model._weightfs = True
    worker_class.load_model = load_model
