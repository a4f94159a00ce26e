"""The engines' side without an engine: tensors laid out as vLLM lays them out, on the CPU or a CUDA device, traced, proved and
published; another process opens the memory by nothing but the manifest and compares bytes. Needs torch and numpy, no vLLM and no
weightfs binary.

usage: export_check.py cpu|cuda [GIGABYTES]      GIGABYTES: also times the proof of a model of that size (files in /dev/shm)
"""
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path[:0] = [HERE, os.path.join(ROOT, "engines", "vllm"), os.path.join(ROOT, "engines", "torch")]


def check(what, holds):
    print(("ok    " if holds else "WRONG ") + what, flush=True)
    check.failed += not holds


check.failed = 0

HIDDEN, HEADS, KV, DIM, INNER, VOCAB, EXPERTS = 512, 8, 2, 64, 1024, 1000, 4


def make_checkpoint(directory, torch, layers=2, hidden=HIDDEN, inner=INNER):
    """Shapes as Qwen3's and its relatives', written with plain Python: header, then bytes."""
    import struct

    bf16, f32 = torch.bfloat16, torch.float32
    shapes = {"model.embed_tokens.weight": ((VOCAB, hidden), bf16), "lm_head.weight": ((VOCAB, hidden), bf16),
              "model.norm.weight": ((hidden,), bf16)}
    for i in range(layers):
        p = f"model.layers.{i}."
        shapes |= {p + "self_attn.q_proj.weight": ((HEADS * DIM, hidden), bf16), p + "self_attn.k_proj.weight": ((KV * DIM, hidden), bf16),
                   p + "self_attn.v_proj.weight": ((KV * DIM, hidden), bf16), p + "self_attn.o_proj.weight": ((hidden, HEADS * DIM), bf16),
                   p + "mlp.gate_proj.weight": ((inner, hidden), bf16), p + "mlp.up_proj.weight": ((inner, hidden), bf16),
                   p + "mlp.down_proj.weight": ((hidden, inner), bf16), p + "A_log": ((HEADS,), bf16), p + "scalar": ((), f32),
                   p + "conv1d.weight": ((3 * DIM, 1, 4), bf16), p + "experts.gate_up_proj": ((EXPERTS, hidden, 2 * DIM), bf16)}
        shapes |= {p + f"experts.{e}.down_proj.weight": ((hidden, DIM), bf16) for e in range(EXPERTS)}
    names = {bf16: "BF16", f32: "F32"}
    generator = torch.Generator().manual_seed(0)
    # Large models take theirs from one pool: making billions of random numbers would take longer than all else.
    pool = torch.randn((1 << 26) + 4096, generator=generator).to(bf16) if layers > 2 else None

    def values(i, shape, dtype):
        count = torch.Size(shape).numel()
        if pool is None or count > 1 << 26:
            return torch.randn(shape, generator=generator).to(dtype)
        return pool[i % 4096 :][:count].view(shape).to(dtype)

    tensors = {n: values(i, s, d) for i, (n, (s, d)) in enumerate(shapes.items())}
    header, at = {}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    text = json.dumps(header).encode()
    with open(os.path.join(directory, "model.safetensors"), "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            f.write(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))
    with open(os.path.join(directory, "config.json"), "w") as f:
        f.write("{}")
    return tensors


def vllm_layout(torch, device, layers, hidden=HIDDEN, inner=INNER):
    """Empty parameters as vLLM has them, and how its loaders copy a checkpoint tensor in."""
    new = lambda *shape, dtype=torch.bfloat16: torch.nn.Parameter(torch.zeros(shape, dtype=dtype, device=device), False)
    model = torch.nn.Module()
    padded = -(-VOCAB // 64) * 64
    model.embed, model.head, model.norm = new(padded, hidden), new(padded, hidden), new(hidden)
    places = {"model.embed_tokens.weight": lambda t: model.embed.data[:VOCAB].copy_(t),
              "lm_head.weight": lambda t: model.head.data[:VOCAB].copy_(t), "model.norm.weight": lambda t: model.norm.data.copy_(t)}
    model.layers = torch.nn.ModuleList()
    for i in range(layers):
        layer, p = torch.nn.Module(), f"model.layers.{i}."
        model.layers.append(layer)
        layer.qkv, layer.o = new((HEADS + 2 * KV) * DIM, hidden), new(hidden, HEADS * DIM)
        layer.gate_up, layer.down = new(2 * inner, hidden), new(hidden, inner)
        layer.A_log, layer.scalar, layer.conv = new(HEADS, dtype=torch.float32), new(dtype=torch.float32), new(3 * DIM, 1, 4)
        layer.w13, layer.w2 = new(EXPERTS, 2 * DIM, hidden), new(EXPERTS, hidden, DIM)
        rows = {"q": (0, HEADS * DIM), "k": (HEADS * DIM, KV * DIM), "v": ((HEADS + KV) * DIM, KV * DIM)}
        for name, (start, count) in rows.items():
            places[p + f"self_attn.{name}_proj.weight"] = lambda t, l=layer, s=start, c=count: l.qkv.data.narrow(0, s, c).copy_(t)
        places |= {
            p + "self_attn.o_proj.weight": lambda t, l=layer: l.o.data.copy_(t),
            p + "mlp.gate_proj.weight": lambda t, l=layer: l.gate_up.data[:inner].copy_(t),
            # As some loaders do: to the device first, then into place.
            p + "mlp.up_proj.weight": lambda t, l=layer: l.gate_up.data[inner:].copy_(t.to(device)),
            p + "mlp.down_proj.weight": lambda t, l=layer: l.down.data.copy_(t),
            p + "A_log": lambda t, l=layer: l.A_log.data.copy_(t), p + "scalar": lambda t, l=layer: l.scalar.data.copy_(t),
            p + "conv1d.weight": lambda t, l=layer: l.conv.data.copy_(t),
            # Head by head, transposed, as gpt-oss's experts are.
            p + "experts.gate_up_proj": lambda t, l=layer: [l.w13.data[e].copy_(t[e].t().contiguous()) for e in range(EXPERTS)],
        }
        for e in range(EXPERTS):
            places[p + f"experts.{e}.down_proj.weight"] = lambda t, l=layer, e=e: l.w2.data[e].copy_(t)
    return model, places


def load_traced(torch, model, places, checkpoint, device, spoil=None):
    """Loads as vLLM does, under the plugin's tracer; `spoil(model)` plays post-processing. Returns what is published."""
    import mmap

    from weightfs_vllm.assembly import Load, assemble, homes
    from weightfs_vllm.export.memory import HostArena, Memories
    from weightfs_vllm.session import loadable
    from weightfs_vllm.tracer import DerivedTracer, LoadTracer

    if device.type == "cpu":
        arena = HostArena("check")
        arena.move(loadable(model))
        model.arena = arena
    tracer = LoadTracer()

    def weights():
        for name, disk in checkpoint.items():
            with open(disk.file, "rb") as f:
                mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
            dtype = {"BF16": torch.bfloat16, "F32": torch.float32}[disk.dtype]
            yield name, torch.frombuffer(mapped, dtype=dtype, count=disk.nbytes // dtype.itemsize, offset=disk.start).view(disk.shape)

    with tracer, torch.no_grad():
        for name, tensor in tracer.watch(weights()):
            places[name](tensor)
    load = Load(model, tracer, homes(model))
    with DerivedTracer(tracer.weights()) as derived, torch.no_grad():
        if spoil:
            spoil(model)
    load.derived = derived.survivors()
    began = time.monotonic()
    found = assemble([load], checkpoint, Memories(), device, 1)
    return found, time.monotonic() - began


def publish_found(found, directory, path):
    from weightfs_export import manifest

    manifest.write(path, {"weightfs": 1, "engine": manifest.engine("check", "1"), "model": directory, "memories": found.memories,
                          "tensors": found.tensors, "opaque": found.opaque})


# -- the other process --

def read_memories(manifest):
    """Bytes of every memory, by the manifest alone. Also returns a function that writes into one."""
    import numpy as np

    out, writers = [], []
    cuda = None
    for memory in manifest["memories"]:
        if memory["kind"] == "file":
            mapped = np.memmap(memory["path"], np.uint8, "r+", shape=(memory["bytes"],))
            out.append(np.array(mapped))
            writers.append(lambda at, data, m=mapped: m.__setitem__(slice(at, at + len(data)), data))
            continue
        if cuda is None:
            cuda = ctypes.CDLL("libcuda.so.1")
            call = lambda name, *a: (_ for _ in ()).throw(SystemExit(f"{name}: {code}")) if (code := getattr(cuda, name)(*a)) else None
            call("cuInit", 0)
            device, context = ctypes.c_int(), ctypes.c_void_p()
            call("cuDeviceGet", ctypes.byref(device), 0)
            call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
            call("cuCtxSetCurrent", context)
        handle = (ctypes.c_char * 64).from_buffer_copy(bytes.fromhex(memory["handle"]))
        pointer = ctypes.c_uint64()

        class Handle(ctypes.Structure):
            _fields_ = [("reserved", ctypes.c_char * 64)]

        by_value = Handle.from_buffer_copy(handle)
        cuda.cuIpcOpenMemHandle_v2.argtypes = [ctypes.POINTER(ctypes.c_uint64), Handle, ctypes.c_uint]
        call("cuIpcOpenMemHandle_v2", ctypes.byref(pointer), by_value, 1)
        host = np.empty(memory["bytes"], np.uint8)
        cuda.cuMemcpyDtoH_v2.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_size_t]
        cuda.cuMemcpyHtoD_v2.argtypes = [ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t]
        call("cuMemcpyDtoH_v2", host.ctypes.data, pointer.value, memory["bytes"])
        out.append(host)
        writers.append(lambda at, data, p=pointer.value: call("cuMemcpyHtoD_v2", p + at, data.ctypes.data, len(data)))
    return out, writers


def other(path, model_dir, flip):
    """Compares every tensor of the manifest with the file, through the manifest; then flips the lowest bit of `flip`'s first
    element, so that the engine can see that it is its own memory."""
    import numpy as np
    from weightfs_export.checkpoint import read_checkpoint

    manifest = json.load(open(path))
    memories, writers = read_memories(manifest)
    checkpoint = read_checkpoint(model_dir)
    size = {"BF16": 2, "F32": 4}
    wrong = []
    for name, tensor in manifest["tensors"].items():
        disk = checkpoint[name]
        raw = np.fromfile(disk.file, np.uint8, disk.nbytes, offset=disk.start).view(f"<u{size[disk.dtype]}").reshape(disk.shape)
        seen = np.zeros(disk.shape, bool)
        for s in tensor["segments"]:
            n = size[s["dtype"]]
            flat = memories[s["memory"]][s["offset"]:]
            live = np.lib.stride_tricks.as_strided(flat[: len(flat) // n * n].view(f"<u{n}"), s["shape"], [x * n for x in s["strides"]])
            box = tuple(slice(a, a + k) for a, k in zip(s["at"], s["shape"]))
            want = raw[box].astype("<u4") << 16 if (disk.dtype, s["dtype"]) == ("BF16", "F32") else raw[box]
            if not np.array_equal(live, want):
                wrong.append(name)
            seen[box] = True
        if not seen.all():
            wrong.append(name + " (holes)")
    segment = manifest["tensors"][flip]["segments"][0]
    first = memories[segment["memory"]][segment["offset"]: segment["offset"] + 1].copy()
    writers[segment["memory"]](segment["offset"], first ^ 1)
    print(json.dumps({"tensors": len(manifest["tensors"]), "wrong": wrong}))


def in_other_process(path, model_dir, flip):
    command = [sys.executable, os.path.abspath(__file__), "other", path, model_dir, flip]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if result.returncode:
        return {"tensors": 0, "wrong": [result.stderr.strip().splitlines()[-1] if result.stderr else "died"]}
    return json.loads(result.stdout)


def main(kind, gigabytes):
    import torch

    from weightfs_export import Unexportable, publish
    from weightfs_export.checkpoint import read_checkpoint

    device = torch.device(kind, 0) if kind == "cuda" else torch.device("cpu")
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["WEIGHTFS_MANIFEST_DIR"] = f"{scratch}/manifests"
        model_dir = f"{scratch}/model"
        os.mkdir(model_dir)
        originals = make_checkpoint(model_dir, torch)
        checkpoint = read_checkpoint(model_dir)

        # 1. The plugin's way.
        model, places = vllm_layout(torch, device, 2)
        found, seconds = load_traced(torch, model, places, checkpoint, device)
        kinds = sorted({m["kind"] for m in found.memories})
        check(f"{kind}: {len(found.tensors)} of {len(checkpoint)} tensors traced and proved, {len(found.memories)} memories {kinds}, "
              f"opaque {dict(list(found.opaque.items())[:2])}", set(found.tensors) == set(checkpoint))
        path = f"{scratch}/traced.json"
        publish_found(found, model_dir, path)
        flip = "model.layers.1.mlp.up_proj.weight"
        seen = in_other_process(path, model_dir, flip)
        check(f"{kind}: another process finds the checkpoint's bytes in {seen['tensors']} tensors, wrong: {seen['wrong'][:3]}",
              seen["tensors"] == len(checkpoint) and not seen["wrong"])
        live = model.layers[1].gate_up[INNER:].cpu()
        differ = (live.view(torch.int16) != originals[flip].view(torch.int16)).sum().item()
        check(f"{kind}: what it writes is in the engine's own tensor ({differ} element differs)", differ == 1)

        # 2. Post-processing that repacks, replaces and copies is found out.
        model, places = vllm_layout(torch, device, 2)

        def spoil(m):
            a, b = m.layers
            a.gate_up.data.copy_(torch.cat([a.gate_up.data[INNER:], a.gate_up.data[:INNER]]))  # halves swapped, in place
            b.w2 = torch.nn.Parameter(b.w2.data.transpose(1, 2).contiguous(), False)  # another form
            b.o = torch.nn.Parameter(b.o.data.clone(), False)  # the same form and values elsewhere
            a.absorbed = a.qkv.data.float()  # a copy that does not change with it

        found, _ = load_traced(torch, model, places, checkpoint, device, spoil)
        expected = {f"model.layers.0.mlp.{n}_proj.weight" for n in ("gate", "up")} | {f"model.layers.0.self_attn.{n}_proj.weight" for n in "qkv"}
        expected |= {f"model.layers.1.experts.{e}.down_proj.weight" for e in range(EXPERTS)} | {"model.layers.1.self_attn.o_proj.weight"}
        check(f"{kind}: {len(expected)} tensors that post-processing spoilt are opaque, the rest is live",
              set(found.opaque) == expected and set(found.tensors) == set(checkpoint) - expected)
        del model, found

        # 3. Any module.
        module = torch.nn.Module()
        for name, tensor in originals.items():
            *parents, last = name.split(".")
            at = module
            for parent in parents:
                if not hasattr(at, parent):
                    at.add_module(parent, torch.nn.Module())
                at = getattr(at, parent)
            at.register_parameter(last, torch.nn.Parameter(tensor.to(device), False))
        module.lm_head.weight = module.model.embed_tokens.weight  # tied
        norm = module.model.norm
        norm.weight = torch.nn.Parameter(torch.zeros(2 * HIDDEN, dtype=torch.bfloat16, device=device)[::2].copy_(norm.weight), False)
        before = {n: p.detach().clone() for n, p in module.named_parameters(remove_duplicate=False)}
        with publish(module, model_dir) as publication:
            after = dict(module.named_parameters(remove_duplicate=False))
            check(f"{kind}: publish shares {len(publication.tensors)} tensors, mode {os.stat(publication.path).st_mode & 0o777:o}, values kept",
                  set(publication.tensors) == set(checkpoint) and os.stat(publication.path).st_mode & 0o777 == 0o600
                  and all(torch.equal(after[n], v) for n, v in before.items()))
            manifest = json.load(open(publication.path))["tensors"]
            check(f"{kind}: tied tensors name one place", manifest["lm_head.weight"]["segments"] == manifest["model.embed_tokens.weight"]["segments"])
            check(f"{kind}: strides are kept", manifest["model.norm.weight"]["segments"][0]["strides"] == [2])
            with publication.step(), torch.no_grad():
                module.lm_head.weight.copy_(originals["lm_head.weight"])
            seen = in_other_process(publication.path, model_dir, "model.norm.weight")
            check(f"{kind}: another process finds them, but the embedding, which is the head now: {seen['wrong']}",
                  seen["wrong"] == ["model.embed_tokens.weight"])
        check(f"{kind}: the manifest is gone", not os.listdir(f"{scratch}/manifests"))
        module.to("meta")
        try:
            publish(module, model_dir)
            check(f"{kind}: a model without memory is refused", False)
        except Unexportable as e:
            check(f"{kind}: a model without memory is refused: {e}", "meta" in str(e))

        # 4. Allocators whose memory cannot be shared.
        if kind == "cuda":
            for setting in ("expandable_segments:True", "backend:cudaMallocAsync"):
                code = ("import sys; sys.path[:0]=%r\nimport torch, weightfs_export as w\nm=torch.nn.Module()\n"
                        "m.A=torch.nn.Parameter(torch.zeros(%d,dtype=torch.bfloat16,device='cuda'),False)\n"
                        "try: w.publish(m,%r,names={'A':'model.norm.weight'})\nexcept w.Unexportable as e: print(e)"
                        % (sys.path[:3], HIDDEN, model_dir))
                environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": setting, "PYTORCH_ALLOC_CONF": setting}
                said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
                text = (said.stdout or said.stderr).strip().splitlines()
                check(f"cuda: {setting}: {text[-1][:300] if text else 'nothing said'}", "expandable_segments" in said.stdout)

    # 5. How long the proof takes.
    if gigabytes:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as scratch:
            hidden, inner = 4096, 12288
            layers = max(1, round(gigabytes * 1e9 / (2 * (3 * hidden * inner + hidden * (2 * HEADS + 2 * KV) * DIM + EXPERTS * hidden * 3 * DIM))))
            make_checkpoint(scratch, torch, layers, hidden, inner)
            checkpoint = read_checkpoint(scratch)
            size = sum(t.nbytes for t in checkpoint.values()) / 1e9
            model, places = vllm_layout(torch, device, layers, hidden, inner)
            began = time.monotonic()
            for name, disk in checkpoint.items():
                dtype = {"BF16": torch.bfloat16, "F32": torch.float32}[disk.dtype]
                raw = torch.from_file(disk.file, False, os.path.getsize(disk.file), dtype=torch.uint8)
                places[name](raw[disk.start: disk.start + disk.nbytes].clone().view(dtype).view(disk.shape))
            if kind == "cuda":
                torch.cuda.synchronize()
            plain = time.monotonic() - began
            model, places = vllm_layout(torch, device, layers, hidden, inner)
            if kind == "cuda":
                torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_allocated()
            began = time.monotonic()
            found, seconds = load_traced(torch, model, places, checkpoint, device)
            traced = time.monotonic() - began - seconds
            more = f", {(torch.cuda.max_memory_allocated() - held) / 1e6:.0f} MB of device memory beyond the weights" if kind == "cuda" else ""
            print(f"      {kind}: {size:.1f} GB: loaded in {plain:.2f} s, traced in {traced:.2f} s, proved in {seconds:.2f} s "
                  f"({size / seconds:.1f} GB/s){more}")
            check(f"{kind}: all of it is live", set(found.tensors) == set(checkpoint))
    sys.exit(1 if check.failed else 0)


if __name__ == "__main__":
    if sys.argv[1] == "other":
        other(*sys.argv[2:])
    else:
        main(sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 0)
