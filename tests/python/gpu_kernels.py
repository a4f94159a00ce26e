#!/usr/bin/env python3
"""Every kernel of training against PyTorch, on a GPU: random values, ragged and odd sizes, packed sequences, windows.

    python tests/python/gpu_kernels.py [--only PART,PART] [--time]      # needs torch with CUDA; the PTX is that of the repository

A reference is PyTorch's own operation (or its autograd) in float32 or float64 on the same bf16 inputs. Random numbers and
projections are compared to the bit with a Philox written here.
"""

import argparse
import ctypes
import math
from pathlib import Path

import numpy as np
import torch

KERNELS = Path(__file__).resolve().parents[2] / "src/compute/cuda/kernels"
cuda = ctypes.CDLL("libcuda.so.1")
torch.cuda.init()
torch.zeros(1, device="cuda")
torch.backends.cuda.matmul.allow_tf32 = False
P, I, L, F = ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong, ctypes.c_float
DEV = "cuda"
failures = []


def ok(code):
    if code:
        text = ctypes.c_char_p()
        cuda.cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(text.value.decode())


class Module:
    def __init__(self, name):
        self.name, self.handle, self.functions = name, None, {}

    def __call__(self, name, grid, block, *args, shared=0):
        if self.handle is None:
            # Of what is not asked for nothing is assembled.
            self.handle = P()
            ok(cuda.cuModuleLoadData(ctypes.byref(self.handle), (KERNELS / f"{self.name}.ptx").read_bytes() + b"\0"))
        if name not in self.functions:
            f = P()
            ok(cuda.cuModuleGetFunction(ctypes.byref(f), self.handle, name.encode()))
            self.functions[name] = f
        if shared > 48 << 10:
            ok(cuda.cuFuncSetAttribute(self.functions[name], 8, I(shared)))
        args = [P(a.data_ptr()) if isinstance(a, torch.Tensor) else P(0) if a is None else a for a in args]
        array = (P * len(args))(*[ctypes.cast(ctypes.pointer(a), P) for a in args])
        grid = tuple(grid) + (1,) * (3 - len(grid))
        stream = P(torch.cuda.current_stream().cuda_stream)
        ok(cuda.cuLaunchKernel(self.functions[name], *grid, block if isinstance(block, int) else block[0],
                               1 if isinstance(block, int) else block[1], 1, shared, stream, array, None))


def check(what, got, want, limit, least=1e-30):
    """Norm of the difference over that of what is wanted, which counts as `least` at the least."""
    got, want = got.detach().double(), want.detach().double()
    error = float((got - want).norm() / want.norm().clamp_min(least))
    bad = not error <= limit
    if bad:
        failures.append(what)
    check.worst[what.split(" ")[0]] = max(check.worst.get(what.split(" ")[0], 0), error if error == error else math.inf)
    if bad:
        print(f"FAIL {what}: {error:.2e}, limit {limit:.0e}")


check.worst = {}


def random(*shape, dtype=torch.bfloat16, scale=1.0):
    return (torch.randn(*shape, device=DEV) * scale).to(dtype)


def poison(*shape, dtype=torch.bfloat16):
    return torch.full(shape, float("nan"), device=DEV, dtype=dtype)


KIND = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


# ---- attention

class Attention(ctypes.Structure):
    _fields_ = [(n, P) for n in "q k v out log_sums dout delta dq dk dv tiles".split()] + \
        [(n, L) for n in "ldq ldk ldv ldo lddq lddk".split()] + \
        [(n, I) for n in "log_rows log_shift q_shift group d window".split()] + [("scale", F)]


attention, hopper = Module("attention"), None
if torch.cuda.get_device_capability() == (9, 0):
    hopper = Module("attention_hopper")


def head_map(x, heads, d, rows=64):
    """How Hopper's copy engine finds boxes of so many rows and 64 columns of a head in rows of heads x d."""
    room = (ctypes.c_uint64 * 32)()
    at = (ctypes.addressof(room) + 127) & ~127
    dims, strides = (ctypes.c_uint64 * 3)(d, heads, x.shape[0]), (ctypes.c_uint64 * 2)(2 * d, 2 * x.stride(0))
    box, steps = (ctypes.c_uint32 * 3)(64, 1, rows), (ctypes.c_uint32 * 3)(1, 1, 1)
    # bf16, three dimensions, as they lie, swizzle of 128 bytes, 256 bytes at a time into the second cache, zeros outside.
    ok(cuda.cuTensorMapEncodeTiled(P(at), I(9), I(3), P(x.data_ptr()), dims, strides, box, steps, I(0), I(3), I(3), I(0)))
    return bytes((ctypes.c_char * 128).from_address(at))


class Maps(ctypes.Structure):
    _fields_ = [("maps", ctypes.c_char * 512)]

    def __init__(self, *maps):
        super().__init__()
        ctypes.memmove(ctypes.addressof(self), b"".join(maps), 128 * len(maps))
apollo_hopper = Module("apollo_hopper") if hopper else None


def size_class(d):
    return "plain" if d % 8 else 64 if d <= 64 else 128 if d <= 128 else 256


def attention_bytes(which, d):
    """Shared memory, as src/compute/cuda/attention.rs asks for it, and the rows of a tile."""
    if d == "plain":
        return 0, 64
    if isinstance(d, str) and d.startswith("hopper"):
        d = int(d.split("_")[1])
        rows = 5 * 128 if which == "forward" else 2 * 128 + 8 * 64
        return rows * d * 2 + (8 * 4 * 80 if which == "kv" else 0) + 1024 + 256, 128
    if which == "forward":
        rows = 128 if d < 256 else 64
        return (rows + 4 * 64) * d * 2, rows
    if which == "q":
        return (2 * 64 + 4 * 64) * d * 2, 64
    rows = 64 if d < 256 else 32
    return (2 * 64 + 4 * rows) * d * 2 + 4 * rows * 4, 64


def tiles(spans, rows, which):
    """As src/compute/cuda/attention.rs lists them: those that take longest first."""
    out = []
    for first, end, prefix, length in spans:
        out += [[t, min(end, t + rows), prefix, length, first, end] for t in range(first, end, rows)]
    out.sort(key=lambda t: t[0] - t[5] if which == "kv" else t[4] - t[3] - t[1])
    return torch.tensor(out, dtype=torch.int32, device=DEV), len(out)


def attention_reference(q, k, v, spans, window, scale):
    """q (T, heads, d), k and v (T, kv, d) in float32; differentiable."""
    group = q.shape[1] // k.shape[1]
    out = torch.zeros_like(q)
    for first, end, prefix, length in spans:
        rows = list(range(prefix, prefix + length)) + list(range(first, end))
        rows = torch.tensor(rows, device=DEV)
        kk, vv = k[rows].repeat_interleave(group, 1), v[rows].repeat_interleave(group, 1)
        s = torch.einsum("qhd,khd->hqk", q[first:end], kk) * scale
        position = torch.arange(length, length + end - first, device=DEV)[:, None]
        key = torch.arange(len(rows), device=DEV)[None]
        see = (key <= position) & ((key > position - window) if window else True)
        p = torch.softmax(s.masked_fill(~see, -math.inf), -1)
        o = torch.einsum("hqk,khd->qhd", p, vv)
        out = torch.cat([out[:first], o, out[end:]])
    return out


def attention_case(spans, heads, kv, d, window=0, frozen=0, timed=False, kind=None):
    total = max(s[1] for s in spans)
    trained = total - frozen
    extra = 8 if d % 8 == 0 else 3
    width_q, width_kv = heads * d + extra, 2 * kv * d + extra - extra % 8 if d % 8 == 0 else 2 * kv * d + extra
    q = random(total, width_q)
    kvs = random(total, width_kv)
    k, v = kvs[:, : kv * d], kvs[:, kv * d : 2 * kv * d]
    out = poison(total, heads * d)
    logs = poison(heads, trained, dtype=torch.float32)
    dout = random(trained, heads * d)
    delta = poison(heads, trained, dtype=torch.float32)
    dq, dk, dv = (poison(trained, heads * d) for _ in range(3))
    scale = d ** -0.5
    kind = kind or size_class(d)
    own_way = str(kind).startswith("hopper")
    what = f"attention d={d} {kind} heads={heads}/{kv} window={window} spans={spans}"

    def launch(which, spans, grid_z=1, split=False, **fields):
        shared, rows = attention_bytes(which, kind)
        rows = 64 if split else rows
        t, count = tiles(spans, rows, which)
        a = Attention(tiles=t.data_ptr(), ldq=width_q, ldk=width_kv, ldv=width_kv, ldo=heads * d, lddq=heads * d,
                      lddk=heads * d, log_rows=trained, log_shift=frozen, group=heads // kv, d=d, window=window,
                      scale=scale, **{n: x.data_ptr() if isinstance(x, torch.Tensor) else x for n, x in fields.items()})
        name = ("forward" if which == "forward" else f"backward_{which}") + ("_split" if split else "")
        if own_way:
            name = f"{kind.replace('_', f'_{name}_')}"
            x = fields["q"]
            maps = Maps(head_map(x, heads, d), head_map(k, kv, d), head_map(v, kv, d), head_map(fields.get("dout", x), heads, d))
            blocks = min(heads * count, torch.cuda.get_device_properties(0).multi_processor_count)
            run = lambda: hopper(name, (blocks,), 384, a, maps, I(heads), I(count), shared=shared)
        else:
            name = f"attention_{name}_{kind}"
            run = lambda: attention(name, (heads, count, grid_z), 128, a, shared=shared)
        run()
        if not timed:
            return t
        torch.cuda.synchronize()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(10):
            run()
        end.record()
        torch.cuda.synchronize()
        pairs = sum((e - f) * l + (e - f) * (e - f + 1) // 2 for f, e, _, l in spans)
        if which == "kv":
            pairs = sum((e - f) * (e - f + 1) // 2 for f, e, _, l in spans)
        flops = {"forward": 4, "q": 6, "kv": 8}[which] * pairs * d * heads
        ms = start.elapsed_time(end) / 10
        print(f"time {kind} {name} d={d} {[(e - f, l) for f, e, _, l in spans]}: {ms:.3f} ms, {flops / ms / 1e9:.0f} TFLOP/s")
        return t

    keep = [launch("forward", spans, q=q, k=k, v=v, out=out, log_sums=logs, q_shift=0)]
    own = [s for s in spans if s[0] >= frozen]
    of_delta = (((trained * heads + 3) // 4,), 128, dout, out[frozen:], L(heads * d), I(trained), I(heads), I(d), delta)
    attention("attention_delta", *of_delta)
    if timed and own_way:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(10):
            attention("attention_delta", *of_delta)
        end.record()
        torch.cuda.synchronize()
        print(f"time attention_delta: {start.elapsed_time(end) / 10:.3f} ms")
    back = dict(q=q[frozen:], k=k, v=v, log_sums=logs, dout=dout, delta=delta, q_shift=frozen)
    keep.append(launch("q", own, dq=dq, **back))
    keep.append(launch("kv", own, grid_z=2 if kind == 256 else 1, dk=dk, dv=dv, **back))
    if own_way:
        dq_split = poison(trained, heads * d)
        keep.append(launch("q", own, split=True, dq=dq_split, **back))
    if own_way and not timed:
        # The same bits again, and for rows that train alone.
        out2, logs2 = poison(total, heads * d), poison(heads, trained, dtype=torch.float32)
        keep.append(launch("forward", own, q=q[frozen:], k=k, v=v, out=out2[frozen:], log_sums=logs2, q_shift=frozen))
        dq2, dk2, dv2 = (poison(trained, heads * d) for _ in range(3))
        keep.append(launch("q", own, dq=dq2, **back))
        keep.append(launch("kv", own, dk=dk2, dv=dv2, **back))
        for name, x, y in (("out", out[frozen:], out2[frozen:]), ("logs", logs, logs2), ("dq", dq, dq2), ("dk", dk, dk2), ("dv", dv, dv2)):
            if not torch.equal(x, y):
                failures.append(f"{what} {name} again")
    torch.cuda.synchronize()
    if timed:
        return
    qf = q[:, : heads * d].float().reshape(total, heads, d).requires_grad_()
    kf = k.float().reshape(total, kv, d).requires_grad_()
    vf = v.float().reshape(total, kv, d).requires_grad_()
    want = attention_reference(qf, kf, vf, spans, window, scale)
    check(what + " out", out, want.reshape(total, -1), 6e-3)
    up = torch.cat([torch.zeros(frozen, heads, d, device=DEV), dout.float().reshape(trained, heads, d)])
    want.backward(up)
    group = heads // kv
    gathered = lambda x: x.float().reshape(trained, kv, group, d).sum(2)
    # A row that sees itself alone has no gradient: what is left of dP - delta is measured by dP.
    least = 1e-2 * float(dout.float().norm())
    check(what + " dq", dq, qf.grad[frozen:].reshape(trained, -1), 1.5e-2, least)
    if own_way:
        check(what + " dq split", dq_split, qf.grad[frozen:].reshape(trained, -1), 1.5e-2, least)
    check(what + " dk", gathered(dk), kf.grad[frozen:], 1.5e-2, least)
    check(what + " dv", gathered(dv), vf.grad[frozen:], 1.5e-2)


def attentions():
    packed = [(0, 70, 0, 0), (70, 75, 0, 0), (75, 240, 0, 70), (240, 241, 70, 5), (241, 400, 70, 5), (400, 463, 0, 0)]
    for d in (64, 128, 256, 96, 8, 80, 6, 20):
        for window in (0, 3, 100):
            attention_case(packed, 4, 2, d, window, frozen=75)
    for d in (64, 128, 256):
        attention_case([(0, 1, 0, 0)], 2, 1, d)
        attention_case([(0, 64, 0, 0)], 2, 2, d)
        attention_case([(0, 129, 0, 0)], 8, 1, d)
        attention_case([(0, 300, 0, 0), (300, 777, 0, 300)], 6, 2, d, frozen=300)
        attention_case(packed, 4, 2, d, 17, frozen=75, kind="plain")
    for d in (64, 128, 96, 8, 80) if hopper else ():
        kind = "hopper_64" if d <= 64 else "hopper_128"
        for window in (0, 3, 100):
            attention_case(packed, 4, 2, d, window, frozen=75, kind=kind)
        attention_case([(0, 1, 0, 0)], 2, 1, d, kind=kind)
        attention_case([(0, 64, 0, 0)], 2, 2, d, kind=kind)
        attention_case([(0, 129, 0, 0)], 8, 1, d, kind=kind)
        attention_case([(0, 700, 0, 0), (700, 1577, 0, 700)], 6, 2, d, frozen=700, kind=kind)


# ---- attention of heads of 129 to 256 on Hopper

hopper_256 = Module("attention_hopper_256") if hopper else None


def attention_256_case(spans, heads, kv, d, window=0, frozen=0, timed=False):
    """`attention_hopper_256.cu`."""
    total, group, scale = max(s[1] for s in spans), heads // kv, d ** -0.5
    trained, width_q, width_kv = total - frozen, heads * d + 8, 2 * kv * d + 8
    q, kvs, dout = random(total, width_q), random(total, width_kv), random(trained, heads * d)
    k, v = kvs[:, : kv * d], kvs[:, kv * d : 2 * kv * d]
    out, logs = poison(total, heads * d), poison(heads, trained, dtype=torch.float32)
    delta = poison(heads, trained, dtype=torch.float32)
    dq, dq_pair, dk, dv = (poison(trained, heads * d) for _ in range(4))
    what = f"attention256 d={d} heads={heads}/{kv} window={window} spans={spans}"

    def launch(name, spans, **fields):
        of_keys = "kv" in name
        t, count = tiles(spans, 128, "kv" if of_keys else "q")
        a = Attention(tiles=t.data_ptr(), ldq=width_q, ldk=width_kv, ldv=width_kv, ldo=heads * d, lddq=heads * d,
                      lddk=heads * d, log_rows=trained, log_shift=frozen, group=group, d=d, window=window, scale=scale,
                      **{n: x.data_ptr() if isinstance(x, torch.Tensor) else x for n, x in fields.items()})
        # Rows of 512 bytes, numbers and barriers, and what aligns; rows of the maps' boxes.
        if name == "forward_256":
            rows, rest, maps = 128 + 4 * 80, 5 * 16, [(fields["q"], heads, 128), (k, kv, 80), (v, kv, 80)]
        elif of_keys:
            rows, rest = 2 * 64 + 6 * 48, 64 * 48 * 4 + 6 * 48 * 4 + 7 * 16
            maps = [(fields["q"], heads, 48), (k, kv, 64), (v, kv, 64), (dout, heads, 48)]
        else:
            rows, rest, maps = 2 * 128 + 3 * 64, 3 * 16, []
        maps = [Maps(*(head_map(x, of, d, box) for x, of, box in maps))] if maps else []
        grid = heads, 2 * count if of_keys else count, 2 if "pair" in name else 1
        run = lambda: hopper_256(f"hopper_{name}", grid, 384, a, *maps, shared=rows * 512 + rest + 1024)
        run()
        if not timed:
            return t
        torch.cuda.synchronize()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(10):
            run()
        end.record()
        torch.cuda.synchronize()
        pairs = sum((e - f) * (0 if of_keys else l) + (e - f) * (e - f + 1) // 2 for f, e, _, l in spans)
        ms = start.elapsed_time(end) / 10
        flops = (4 if name == "forward_256" else 8 if of_keys else 6) * pairs * d * heads
        print(f"time {name} d={d} {[(e - f, l) for f, e, _, l in spans]}: {ms:.3f} ms, {flops / ms / 1e9:.0f} TFLOP/s")
        return t

    keep = [launch("forward_256", spans, q=q, k=k, v=v, out=out, log_sums=logs, q_shift=0)]
    attention("attention_delta", ((trained * heads + 3) // 4,), 128, dout, out[frozen:], L(heads * d), I(trained), I(heads),
              I(d), delta)
    own = [s for s in spans if s[0] >= frozen]
    back = dict(q=q[frozen:], k=k, v=v, log_sums=logs, dout=dout, delta=delta, q_shift=frozen)
    keep.append(launch("backward_q_256", own, dq=dq, **back))
    keep.append(launch("backward_q_256_pair", own, dq=dq_pair, **back))
    keep.append(launch("backward_kv_256", own, dk=dk, dv=dv, **back))
    torch.cuda.synchronize()
    if timed:
        return
    # The rows that train alone, whose bits are the same.
    again, logs_again = poison(trained, heads * d), poison(heads, trained, dtype=torch.float32)
    keep.append(launch("forward_256", own, q=q[frozen:], k=k, v=v, out=again, log_sums=logs_again, q_shift=frozen))
    check(what + " again", again, out[frozen:], 0)
    check(what + " log_sums again", logs_again, logs, 0)
    qf = q[:, : heads * d].float().reshape(total, heads, d).requires_grad_()
    kf = k.float().reshape(total, kv, d).requires_grad_()
    vf = v.float().reshape(total, kv, d).requires_grad_()
    want = attention_reference(qf, kf, vf, spans, window, scale)
    check(what + " out", out, want.reshape(total, -1), 6e-3)
    want.backward(torch.cat([torch.zeros(frozen, heads, d, device=DEV), dout.float().reshape(trained, heads, d)]))
    gathered = lambda x: x.float().reshape(trained, kv, group, d).sum(2)
    # A row that sees itself alone has no gradient: what is left of dP - delta is measured by dP.
    least = 1e-2 * float(dout.float().norm())
    for name, x in (("dq", dq), ("dq pair", dq_pair)):
        check(f"{what} {name}", x, qf.grad[frozen:].reshape(trained, -1), 1.5e-2, least)
    check(what + " dk", gathered(dk), kf.grad[frozen:], 1.5e-2, least)
    check(what + " dv", gathered(dv), vf.grad[frozen:], 1.5e-2)


def attentions_256():
    if not hopper:
        return
    packed = [(0, 70, 0, 0), (70, 75, 0, 0), (75, 240, 0, 70), (240, 241, 70, 5), (241, 400, 70, 5), (400, 463, 0, 0)]
    for d in (256, 136, 200):
        for window in (0, 3, 100):
            attention_256_case(packed, 4, 2, d, window, frozen=75)
    attention_256_case([(0, 1, 0, 0)], 2, 1, 256)
    attention_256_case([(0, 64, 0, 0)], 2, 2, 256)
    attention_256_case([(0, 129, 0, 0)], 8, 1, 256)
    attention_256_case([(0, 700, 0, 0), (700, 1577, 0, 700)], 6, 2, 256, frozen=700)


# ---- norms, rope, swiglu, loss

norm, rope, swiglu, loss, embedding, linear, apollo = map(
    Module, ["rms_norm", "rope", "swiglu", "cross_entropy", "embedding", "linear", "apollo"])
peaks = Module("peaks")


def norm_kernel(h):
    """As src/compute/cuda/rms_norm.rs chooses."""
    held = lambda each: (f"_{each}", -(-h // (8 * each * 32)) * 32)
    return ("", 256) if h % 8 or h > 16384 else held(2) if h <= 8192 else held(4)


def norms():
    # Norms that are kept as their distance from 1, every other one.
    for i, (t, h, kind) in enumerate([(5, 16, torch.bfloat16), (37, 4096, torch.bfloat16), (300, 5120, torch.float32), (9, 77, torch.float16),
                       (3, 20, torch.float32), (700, 8, torch.bfloat16), (2, 12296, torch.float16), (2, 16392, torch.bfloat16)]):
        distance, (wide, block) = i % 2, norm_kernel(h)
        x, w, first = random(t, h, dtype=torch.float32), random(h, dtype=kind), t // 3
        y, rstd, kept = poison(t, h), poison(t - first, dtype=torch.float32), poison(t - first, h)
        norm("rms_norm_forward" + wide, (t,), block, x, None, w, I(KIND[kind] + 4 * distance), F(1e-5), I(h), y, rstd, kept, I(first))
        want = torch.nn.functional.rms_norm(x, (h,), w.float() + distance, 1e-5)
        check(f"rms_norm forward {t}x{h} {kind}", y, want, 3e-3)
        check("rms_norm kept", kept, x[first:], 3e-3)
        check("rms_norm rstd", rstd, (x[first:].double().pow(2).mean(1) + 1e-5).rsqrt(), 1e-5)
        again = poison(t - first, h)
        norm("rms_norm_again" + wide, (t - first,), block, kept, rstd, w, I(KIND[kind] + 4 * distance), I(h), again)
        check("rms_norm again", again, want[first:], 6e-3)
        n = t - first
        dy, dx, index = random(n, h), random(t, h, dtype=torch.float32), torch.randperm(t, device=DEV)[:n].int()
        before, copy = dx.clone(), poison(t, h)
        blocks = min(n, 40)
        partial, dw = poison(blocks, h, dtype=torch.float32), poison(h, dtype=torch.float32)
        norm("rms_norm_backward" + wide, (blocks,), block, dy, kept, rstd, w, I(KIND[kind] + 4 * distance), I(n), I(h), index, dx, copy, partial,
             shared=0 if wide else -(-h // 256) * 256 * 4)
        norm("sum_partial", ((h + 31) // 32,), 1024, partial, I(blocks), I(h), dw)
        xf, wf = kept.float().requires_grad_(), w.float().requires_grad_()
        torch.nn.functional.rms_norm(xf, (h,), wf + distance, 1e-5).backward(dy.float())
        want = before.clone()
        want[index.long()] += xf.grad
        check(f"rms_norm dx {t}x{h}", dx, want, 1e-3)
        check("rms_norm copy", copy[index.long()], want[index.long()], 3e-3)
        # The way back has the rstd of the rows before they were rounded; autograd that of the rounded ones.
        check(f"rms_norm dw {t}x{h} {kind}", dw, (dy.double() * kept.double() * rstd[:, None].double()).sum(0), 1e-5)
        check(f"rms_norm dw as autograd {t}x{h} {kind}", dw, wf.grad, 4e-3)
        gathered = poison(n, h)
        norm("rms_norm_forward" + wide, (n,), block, x, index, w, I(KIND[kind] + 4 * distance), F(1e-5), I(h), gathered, None, None, I(0))
        check("rms_norm gathered", gathered, torch.nn.functional.rms_norm(x[index.long()], (h,), w.float() + distance, 1e-5), 3e-3)


def turned(x, cos, sin):
    n = cos.shape[-1]
    a, b, rest = x[..., :n], x[..., n : 2 * n], x[..., 2 * n :]
    c, s = cos[:, None], sin[:, None]
    return torch.cat([a * c - b * s, b * c + a * s, rest], -1)


def ropes():
    # `turn` pairs of every head turn; with a gate, q's heads have one behind them and norms are kept as their distance from 1.
    for t, heads, kv, d, normed, turn, gated in [
            (50, 4, 2, 6, False, 3, 0), (300, 32, 8, 128, True, 64, 0), (41, 6, 3, 64, True, 32, 0), (70, 4, 4, 256, False, 128, 0),
            (35, 6, 2, 128, True, 8, 0), (21, 40, 1, 64, False, 32, 1), (33, 4, 2, 80, True, 40, 0), (20, 4, 1, 4, True, 2, 0), (100, 24, 4, 256, True, 32, 1), (30, 4, 2, 16, True, 2, 1)]:
        first, eps, all_ = t // 3, 1e-6, heads + 2 * kv
        # A row a block, or a head a warp.
        by_row = d in (64, 128, 256) and turn % 8 == 0
        n, wide_, block = t - first, f"_{d}" if by_row else "" if d % 4 or turn % 2 else "_wide", 128 if by_row else 256
        blocks_of = lambda rows, heads: (rows if by_row else (rows * heads + 7) // 8,)
        wide = random(t, (all_ + gated * heads) * d)
        at = [h * (1 + gated) if h < heads else h + gated * heads for h in range(all_)]
        columns = torch.cat([torch.arange(h * d, (h + 1) * d) for h in at]).to(DEV)
        x = wide[:, columns].contiguous()
        angle = torch.rand(t, turn, device=DEV) * 6
        cos, sin = angle.cos() * 1.1, angle.sin() * 1.1
        qn, kn = (random(d), random(d, dtype=torch.float32)) if normed else (None, None)
        q, kvs, before, kept = poison(t, heads * d), poison(t, 2 * kv * d), poison(n, (heads + kv) * d), poison(n, heads * d)
        rope("rope_forward" + wide_, blocks_of(t, all_), block, wide, L(wide.shape[1]), I(gated), I(t), I(heads), I(kv), I(d), I(turn), cos, sin,
             qn, I(4 * gated), kn, I(2 + 4 * gated), F(eps), q, kvs, before if normed else None, kept, I(first))
        xf = x.float().reshape(t, all_, d)
        qf, kf, vf = [y.clone().requires_grad_() for y in xf.split([heads, kv, kv], 1)]
        wq, wk = (qn.float().requires_grad_(), kn.clone().requires_grad_()) if normed else (None, None)
        rms = lambda x, w: torch.nn.functional.rms_norm(x, (d,), w + gated, eps) if normed else x
        yq, yk = turned(rms(qf, wq), cos, sin), turned(rms(kf, wk), cos, sin)
        what = f"rope {t} {heads}/{kv}x{d} {normed} {turn} {gated}"
        check(what + " q", q, yq.reshape(t, -1), 4e-3)
        check(what + " k", kvs[:, : kv * d], yk.reshape(t, -1), 4e-3)
        check(what + " v", kvs[:, kv * d :], vf.reshape(t, -1), 0)
        check(what + " kept", kept, q[first:], 0)
        if normed:
            check(what + " before", before, x[first:, : (heads + kv) * d], 0)
            again = poison(n, heads * d)
            rope("rope_again" + wide_, blocks_of(n, heads), block, before, I(n), I(heads), I(kv), I(d), I(turn), cos[first:], sin[first:],
                 qn, I(4 * gated), F(eps), again)
            check(what + " again", again, kept, 0)
        dq, dk, dv = (random(n, heads * d) for _ in range(3))
        out, blocks = poison(n, wide.shape[1]), 5
        partial = poison(2 * blocks, d, dtype=torch.float32)
        rope("rope_backward" + wide_, (blocks, 1 if by_row else 3), block, dq, dk, dv, I(n), I(heads), I(kv), I(d), I(turn), cos[first:], sin[first:], qn,
             I(4 * gated), kn, I(2 + 4 * gated), F(eps), before if normed else None, out, I(gated), partial)
        beside = torch.ones(wide.shape[1], dtype=torch.bool, device=DEV)
        beside[columns] = False
        if not torch.isnan(out[:, beside]).all():
            failures.append(what + " wrote into gates")
        out = out[:, columns]
        g = heads // kv
        pad = lambda y: torch.cat([torch.zeros(first, *y.shape[1:], device=DEV), y])
        group = lambda y: y.float().reshape(n, kv, g, d).sum(2)
        torch.autograd.backward([yq, yk], [pad(dq.float().reshape(n, heads, d)), pad(group(dk))])
        want = torch.cat([qf.grad, kf.grad, pad(group(dv))], 1)[first:]
        check(what + " backward", out, want.reshape(n, -1), 5e-3)
        if normed:
            check(what + " dwq", partial[:blocks].sum(0), wq.grad, 2e-3)
            check(what + " dwk", partial[blocks:].sum(0), wk.grad, 2e-3)


def others():
    for t, n in [(7, 20), (100, 12288), (33, 1001), (64, 8)]:
        wide = "_wide" if n % 8 == 0 else ""
        per = 256 * (8 if wide else 1)
        both, out, d = random(t, 2 * n), poison(t, n), random(t, n)
        blocks = (-(-t * n // per),)
        swiglu("swiglu_forward" + wide, blocks, 256, both, L(t), I(n), out)
        f = both.float().requires_grad_()
        y = torch.nn.functional.silu(f[:, :n]) * f[:, n:]
        check(f"swiglu {t}x{n}", out, y, 4e-3)
        y.backward(d.float())
        swiglu("swiglu_backward" + wide, blocks, 256, d, both, L(t), I(n), both)
        check("swiglu act", d, y, 4e-3)
        check("swiglu gradient", both, f.grad, 4e-3)
    for t, n, ld in [(5, 32, 40), (77, 1001, 1001), (30, 151936, 151936)]:
        logits, losses, d = random(t, ld, dtype=torch.float32, scale=3), poison(t, dtype=torch.float32), poison(t, n)
        target = torch.randint(0, n, (t,), device=DEV)
        f = logits[:, :n].clone().requires_grad_()
        want = torch.nn.functional.cross_entropy(f, target, reduction="none")
        (want * 0.3).sum().backward()
        name = "cross_entropy" if n % 4 or ld % 4 else "cross_entropy_wide"
        loss(name, (t,), 1024, logits, L(ld), I(n), target.int(), F(0.3), losses, d)
        check(f"cross_entropy {t}x{n}", losses, want, 1e-5)
        check("cross_entropy gradient", d, f.grad, 4e-3)
        for bad in (math.nan, math.inf):
            spoilt = logits.clone()
            spoilt[t // 2, n // 2] = bad
            loss(name, (t,), 1024, spoilt, L(ld), I(n), target.int(), F(0.3), losses, None)
            if torch.isfinite(losses).sum() != t - 1:
                failures.append(f"cross_entropy {bad}")
    v, h, t = 50, 24, 33
    table, ids = random(v, h + 5, dtype=torch.float16), torch.randint(0, v, (t,), device=DEV).int()
    x = poison(t, h, dtype=torch.float32)
    embedding("embedding_forward", (t,), 128, table, I(1), L(h + 5), ids, I(h), x)
    check("embedding forward", x, table[ids.long(), :h], 0)
    unique, inverse, counts = torch.unique(ids, return_inverse=True, return_counts=True)
    rows = torch.sort(inverse, stable=True).indices.int()
    starts = torch.cat([torch.zeros(1, device=DEV), counts.cumsum(0)]).int()
    dx, sums = random(t, h, dtype=torch.float32), poison(len(unique), h, dtype=torch.float32)
    embedding("embedding_backward", (len(unique),), 128, dx, starts, rows, I(h), sums)
    want = torch.zeros(v, h, device=DEV).index_add_(0, ids.long(), dx)
    check("embedding backward", sums, want[unique.long()], 1e-6)
    g = random(20, h)
    before = g.float()
    embedding("embedding_add", (len(unique),), 128, sums, unique.int(), I(10), I(20), I(h), g)
    check("embedding add", g, before + want[10:30], 3e-3)
    for m, n, k in [(5, 7, 3), (130, 70, 200), (64, 64, 64)]:
        for ta in (0, 1):
            for tb in (0, 1):
                a, b = random(*((k, m) if ta else (m, k))), random(*((n, k) if tb else (k, n)))
                want = (a.float().T if ta else a.float()) @ (b.float().T if tb else b.float())
                strides = [L(1 if ta else k), L(m if ta else 1), L(1 if tb else n), L(k if tb else 1)]
                for dtype in (torch.float32, torch.bfloat16):
                    c = random(m, n + 3, dtype=dtype)
                    start = c.float().clone()  # float() of f32 is the same memory
                    linear("matmul_plain", (-(-n // 16), -(-m // 16)), (16, 16), a, *strides[:2], b, *strides[2:], c, L(n + 3),
                           I(dtype == torch.float32), I(m), I(n), I(k), I(1))
                    check("matmul", c[:, :n], start[:, :n] + want, 4e-3 if dtype == torch.bfloat16 else 1e-5)
                    check("matmul beside", c[:, n:], start[:, n:], 0)
    x, partial = random(100, 77), poison(7, 70, dtype=torch.float32)
    linear("column_sums", (1, 7), 128, x, L(77), I(100), I(70), partial)
    check("column_sums", partial.sum(0), x[:, :70].float().sum(0), 1e-5)
    y, b = random(9, 30), random(25, dtype=torch.float32)
    want = y.float()
    want[:, :25] += b
    linear("add_bias", (1, 4), 128, y, I(0), L(30), I(9), I(25), b, I(2))
    check("add_bias", y, want, 3e-3)
    w, out = random(11, 30, dtype=torch.float16), poison(11, 25)
    linear("narrow", (1, 4), 128, w, I(1), L(30), I(11), I(25), out)
    check("narrow", out, w[:, :25], 4e-3)
    many_peaks()


class Array(ctypes.Structure):
    _fields_ = [("x", P), ("count", L), ("kind", I), ("to", I)]


class Arrays(ctypes.Structure):
    _fields_ = [("of", Array * 16), ("out", P)]


def many_peaks():
    """Arrays of every kind and size, at every offset; NaN is above all; what was there counts."""
    kinds = list(KIND)
    whole = [random(70000, dtype=kinds[i % 3], scale=10.0 ** (i % 5)) for i in range(16)]
    sizes = [1, 7, 8, 9, 63, 70000 - 16, 12345, 2, 3, 15, 16, 17, 31, 50001, 64, 5]
    parts = [w[i % 11 :][: n] for i, (w, n) in enumerate(zip(whole, sizes))]
    out = torch.zeros(9, device=DEV)
    out[3], out[8] = 1e30, 7
    wanted = out.clone()
    arrays = Arrays(out=P(out.data_ptr()))
    for i, x in enumerate(parts):
        to = i % 8
        # A largest value at either end too.
        if i % 3 == 1:
            x[0 if i % 2 else -1] = -1000.0 if x.dtype == torch.float16 else -1e20
        arrays.of[i] = Array(P(x.data_ptr()), L(x.numel()), I(KIND[x.dtype]), I(to))
        wanted[to] = torch.maximum(wanted[to], x.float().abs().max())
    peaks("peaks", (40, 16), 256, arrays)
    check("peaks", out, wanted, 0)
    for where in (0, 20001, 50000):
        x = random(50001)
        x[where] = math.nan
        out.zero_()
        arrays.of[0] = Array(P(x.data_ptr()), L(x.numel()), I(0), I(0))
        peaks("peaks", (40, 1), 256, arrays)
        check("peaks NaN", out[:1].isnan().float(), torch.ones(1, device=DEV), 0)


# ---- linear attention

class Conv(ctypes.Structure):
    _fields_ = [("x", P), ("taps", P), ("w", P), ("ld", L)] + [(n, I) for n in "kind kernel rows k_heads v_heads k_dim v_dim pad".split()]


class Delta(ctypes.Structure):
    _fields_ = [(n, P) for n in "x lengths sums beta by_k by_q rest inverse scores contexts out news states dout solved dstates dq dk dv dg dbeta sequences "
                "chunks".split()] + [(n, I) for n in "rows heads k_heads stages".split()]


class Gates(ctypes.Structure):
    _fields_ = [(n, P) for n in "a b a_log dt_bias".split()] + [("ld", L), ("log_kind", I), ("bias_kind", I)]


conv, delta, gated, gate = map(Module, ["causal_conv", "delta_rule", "gated_norm", "output_gate"])
hopper_delta = Module("delta_rule_hopper") if torch.cuda.get_device_capability() == (9, 0) else None
# Two contexts, the second shorter than the convolution reaches; continuations of both; one alone.
SPANS = [(0, 70, 0, 0), (70, 72, 0, 0), (72, 240, 0, 70), (240, 241, 70, 2), (241, 400, 70, 2), (400, 463, 0, 0), (463, 591, 0, 70)]
FROZEN = 72


def fields(struct, **values):
    return struct(**{n: x.data_ptr() if isinstance(x, torch.Tensor) else x for n, x in values.items()})


def ints(values):
    return torch.tensor(values, dtype=torch.int32, device=DEV)


def padded(x, heads, d):
    return torch.nn.functional.pad(x.reshape(x.shape[0], heads, d), (0, 128 - d)).reshape(x.shape[0], heads * 128)


def tight(x, heads, d):
    return x.reshape(x.shape[0], heads, 128)[:, :, :d]


def convolutions():
    for k_heads, v_heads, k_dim, v_dim, kernel, kind in [(2, 4, 6, 5, 4, torch.float32), (2, 6, 128, 128, 4, torch.bfloat16),
                                                         (1, 1, 64, 96, 3, torch.float16), (3, 3, 20, 128, 1, torch.bfloat16)]:
        rows, trained, channels = 591, 591 - FROZEN, 2 * k_heads * k_dim + v_heads * v_dim
        ld = channels + 16
        x, w = random(rows, ld), random(channels, 1, kernel, dtype=kind)
        x[:, channels:] = math.nan
        taps = []
        for first, end, prefix, length in SPANS:
            sequence = list(range(prefix, prefix + length)) + list(range(first, end))
            for at in range(length, len(sequence)):
                taps += [sequence[at - back] if at >= back else -1 for back in (3, 2, 1, 0)]
        taps = ints(taps)
        of = dict(w=w, ld=ld, kind=KIND[kind], kernel=kernel, k_heads=k_heads, v_heads=v_heads, k_dim=k_dim, v_dim=v_dim)
        heads = 2 * k_heads + v_heads
        y, lengths = poison(rows, heads * 128), poison(2 * k_heads, rows, dtype=torch.float32)
        wide = "" if k_dim % 8 or v_dim % 8 else "_wide"
        conv("conv_forward" + wide, (-(-rows // 12), -(-heads // 8)), 128, fields(Conv, x=x, taps=taps, rows=rows, **of), y, lengths, I(12))
        xf, wf = x[:, :channels].double().requires_grad_(), w.double().requires_grad_()
        silu, parts = torch.nn.functional.silu, []
        for first, end, prefix, length in SPANS:
            sequence = torch.cat([xf[prefix : prefix + length].detach(), xf[first:end]])
            z = torch.nn.functional.conv1d(torch.nn.functional.pad(sequence.T[None], (kernel - 1, 0)), wf, groups=channels)[0].T[length:]
            parts.append(silu(z))
        z = torch.cat(parts)
        q, k, v = z.split([k_heads * k_dim, k_heads * k_dim, v_heads * v_dim], 1)
        unit = lambda x: (lambda h: h * (h.pow(2).sum(-1, keepdim=True) + 1e-6).rsqrt())(x.reshape(rows, k_heads, k_dim))
        whole = (q.reshape(rows, k_heads, k_dim), k.reshape(rows, k_heads, k_dim), v.reshape(rows, v_heads, v_dim))
        q, k, v = unit(q) * k_dim ** -0.5, unit(k), whole[2]
        want = torch.cat([padded(a.reshape(rows, -1), h, d) for a, h, d in zip(whole, (k_heads, k_heads, v_heads), (k_dim, k_dim, v_dim))], 1)
        what = f"conv {k_heads}x{k_dim} {v_heads}x{v_dim} {kernel} {kind}"
        check(what + " forward", y, want, 4e-3)
        # Of what is there, rounded.
        unit_of = [tight(y[:, i * k_heads * 128 : (i + 1) * k_heads * 128].double(), k_heads, k_dim) for i in (0, 1)]
        by = [k_dim ** (-0.5 * (1 - i)) * (h.pow(2).sum(-1) + 1e-6).rsqrt() for i, h in enumerate(unit_of)]
        check(what + " lengths", lengths, torch.cat([b.T for b in by]), 1e-5)
        dq, dk, dv = (random(trained, v_heads * 128) for _ in range(3))
        dx, stripe = poison(trained, ld + 8), 40
        partial = poison(-(-trained // stripe), channels * kernel, dtype=torch.float32)
        own = fields(Conv, x=x, taps=taps[4 * FROZEN :], rows=trained, **of)
        conv("conv_backward" + wide, (-(-trained // stripe), -(-heads // 4)), 64, own, dq, dk, dv, dx, L(ld + 8), I(stripe), partial)
        group = v_heads // k_heads
        summed = lambda g: tight(g.double(), v_heads, k_dim).reshape(trained, k_heads, group, k_dim).sum(2)
        torch.autograd.backward([q[FROZEN:], k[FROZEN:], v[FROZEN:]], [*(summed(d) / b[FROZEN:, :, None] for d, b in zip((dq, dk), by)), tight(dv.double(), v_heads, v_dim)])
        check(what + " dx", dx[:, :channels], xf.grad[FROZEN:], 6e-3)
        check(what + " dw", partial.sum(0), wf.grad.reshape(-1), 4e-3)


def delta_reference(q, k, v, g, beta, state):
    """A token at a time; q and k (T, heads, k_dim), v (T, heads, v_dim), g and beta (T, heads), state (heads, k_dim, v_dim)."""
    out = []
    for t in range(q.shape[0]):
        state = state * g[t].exp()[:, None, None]
        d = beta[t][:, None] * (v[t] - torch.einsum("hkv,hk->hv", state, k[t]))
        state = state + k[t][:, :, None] * d[:, None]
        out.append(torch.einsum("hkv,hk->hv", state, q[t]))
    return torch.stack(out), state


def delta_tables(spans, shift):
    """Sequences, how many of them are contexts, chunks."""
    contexts = [s[:2] for s in spans if s[1] <= FROZEN]
    sequences, chunks = [], []
    for first, end, prefix, length in spans:
        begins = contexts.index((prefix, prefix + length)) if length else -1
        ends = contexts.index((first, end)) if (first, end) in contexts else -1
        if shift and end <= FROZEN:
            continue
        sequences += [first - shift, end - shift, len(chunks) // 2, begins, ends]
        for t in range(first, end, 64):
            chunks += [t - shift, min(end, t + 64) - shift]
    return ints(sequences), 0 if shift else len(contexts), ints(chunks)


def stage_bytes(stages):
    return 3 * (9 * 64 * 64 * 2 + 1024) + 1024 if stages == "hopper" else stages * (2 * 64 * 128 * 2 + 5 * 64 * 64 * 2 + 1024)


def backward_bytes(stages):
    return 2 * 64 * 128 * 2 + stages * (3 * 64 * 64 * 2 + 2 * 128 * 64 * 2) + 4 * (31 * 64 + 16)


class Rule:
    """The kernels of the delta rule on one set of rows, as src/compute/cuda/delta_rule.rs calls them."""

    def __init__(self, x, lengths, a, b, a_log, dt_bias, spans, shift, contexts, stages):
        # "hopper": by that module from chunk to chunk, and two stages elsewhere.
        (self.rows, self.heads), self.stages, stages = a.shape, stages, 2 if stages == "hopper" else stages
        self.backward_stages = stages
        self.k_heads = (x.shape[1] // 128 - self.heads) // 2
        self.sequences, self.first, self.chunks = delta_tables(spans, shift)
        self.count, n = self.chunks.numel() // 2, self.rows * self.heads
        f32 = torch.float32
        self.fields = dict(x=x, lengths=lengths, **{name: poison(n, dtype=f32) for name in "sums beta by_k by_q rest".split()}, inverse=poison(self.count * self.heads, 2, 64, 64),
                           scores=poison(self.count * self.heads, 2, 64, 64), contexts=contexts, chunks=self.chunks, rows=self.rows,
                           heads=self.heads, k_heads=self.k_heads, stages=stages)
        self.gates = fields(Gates, a=a, b=b, a_log=a_log, dt_bias=dt_bias, ld=a.stride(0), log_kind=KIND[a_log.dtype],
                            bias_kind=KIND[dt_bias.dtype])
        self.keep = (a, b, a_log, dt_bias, lengths)
        self.prepare()

    def go(self, name, *args, **more):
        if self.stages == "hopper":
            hopper_delta("hopper_" + name, *args, **more)
        else:
            delta(name, *args, **more)

    def prepare(self):
        delta("delta_chunks", (self.count, self.heads), 128, fields(Delta, **self.fields), self.gates, shared=4 * (2 * 64 * 68 + 4 * 64 + 2))

    def forward(self, **outputs):
        # Contexts first.
        total = self.sequences.numel() // 5
        for first, end in ((0, self.first), (self.first, total)):
            if end > first:
                self.go("delta_forward" if "out" in outputs else "delta_news", (2, self.heads, end - first), 256,
                        fields(Delta, sequences=self.sequences[5 * first :], **self.fields, **outputs),
                        shared=stage_bytes(self.stages))

    def backward(self, only=None, **more):
        a = fields(Delta, sequences=self.sequences, **self.fields, **more)
        if only != "delta_backward":
            self.go("delta_states", (2, self.heads, self.sequences.numel() // 5), 256, a, shared=stage_bytes(self.stages))
        if only != "delta_states":
            delta("delta_backward", (self.count, self.heads), 512, a, shared=backward_bytes(self.backward_stages))


def deltas(cases=((1, 3, 128, 128), (2, 4, 6, 5), (2, 2, 64, 100))):
    for k_heads, heads, k_dim, v_dim in cases:
        for alike, stages in ((0.0, 2), (1.5, 1)) + ((0.0, "hopper"), (1.5, "hopper")) * (hopper_delta is not None):
            rows, trained, group = SPANS[-1][1], SPANS[-1][1] - FROZEN, heads // k_heads
            # Keys that resemble each other make a strong A.
            unit = lambda x: torch.nn.functional.normalize(x.float() + alike * torch.randn(1, x.shape[1], k_dim, device=DEV), dim=-1)
            # They come as they are, of any length, with what their length makes of them.
            long = lambda: (unit(random(rows, k_heads, k_dim)) * (0.1 + 3 * torch.rand(rows, k_heads, 1, device=DEV))).bfloat16()
            q, k, v = long(), long(), random(rows, heads, v_dim)
            by_q, by_k = (s / x.float().norm(dim=-1) for x, s in ((q, k_dim ** -0.5), (k, 1.0)))
            lengths = torch.cat([by_q.T, by_k.T]).contiguous()
            x = torch.cat([padded(q, k_heads, k_dim), padded(k, k_heads, k_dim), padded(v, heads, v_dim)], 1)
            both = random(rows, 2 * heads + 3, scale=2)
            a, b = both[:, :heads], both[:, heads : 2 * heads]
            a_log, dt_bias = torch.linspace(-5, 1, heads, device=DEV), random(heads)
            n_contexts = sum(s[1] <= FROZEN for s in SPANS)
            contexts, out = poison(n_contexts, heads, 128, 128, dtype=torch.float32), poison(rows, heads * 128)
            rule = Rule(x, lengths, a, b, a_log, dt_bias, SPANS, 0, contexts, stages)
            rule.forward(out=out)
            what = f"delta {k_heads}/{heads} {k_dim}x{v_dim} {alike} {stages}"
            logits = [y.double().requires_grad_() for y in (a, b)]
            small = [y.double().requires_grad_() for y in (a_log, dt_bias)]
            g = -small[0].exp() * torch.nn.functional.softplus(logits[0] + small[1])
            beta = logits[1].sigmoid()
            repeat = lambda y: y.double().repeat_interleave(group, 1)
            qf, kf, vf = (y.detach().requires_grad_() for y in (repeat(q) * repeat(by_q[:, :, None]), repeat(k) * repeat(by_k[:, :, None]), v.double()))
            states, wants = [], []
            for first, end, prefix, length in SPANS:
                start = torch.zeros(heads, k_dim, v_dim, device=DEV, dtype=torch.float64)
                if length:
                    start = states[[s[:2] for s in SPANS].index((prefix, prefix + length))].detach()
                o, state = delta_reference(*(y[first:end] for y in (qf, kf, vf, g, beta)), start)
                states.append(state)
                wants.append(o)
            want = torch.cat(wants)
            check(what + " out", tight(out, heads, v_dim), want, 2.5e-3)
            check(what + " contexts", contexts[:, :, :k_dim, :v_dim], torch.stack(states[:n_contexts]), 1e-4)
            own = Rule(x[FROZEN:], lengths[:, FROZEN:].contiguous(), a[FROZEN:], b[FROZEN:], a_log, dt_bias, SPANS, FROZEN, contexts, stages)
            news = poison(trained, heads * 128)
            kept = poison(own.count * heads, 128, 128)
            own.forward(news=news, states=kept)
            dout = random(trained, heads, v_dim)
            f32 = torch.float32
            solved, dstates = poison(trained, heads * 128), poison(own.count * heads, 128, 128)
            dq, dk = poison(trained, heads * 128), poison(trained, heads * 128)
            dg, dbeta = poison(heads, trained, dtype=f32), poison(heads, trained, dtype=f32)
            own.backward(news=news, states=kept, dout=padded(dout, heads, v_dim), solved=solved, dstates=dstates, dq=dq, dk=dk,
                         dv=solved, dg=dg, dbeta=dbeta)
            leaves = [qf, kf, vf, g, beta]
            grads = torch.autograd.grad(want[FROZEN:], leaves, dout.double(), retain_graph=True)
            by = [repeat(y[:, :, None]) for y in (by_q, by_k)] + [torch.ones(rows, 1, 1, device=DEV)]
            for name, got, wanted, factor, d in zip(("dq", "dk", "dv"), (dq, dk, solved), grads, by, (k_dim, k_dim, v_dim)):
                check(f"{what} {name}", tight(got, heads, d), (wanted * factor)[FROZEN:], 1.5e-2)
            check(what + " dg", dg.T, grads[3][FROZEN:], 2e-2)
            check(what + " dbeta", dbeta.T, grads[4][FROZEN:], 1.5e-2)
            da, stripes = poison(trained, 2 * heads + 5), -(-trained // 256)
            partial = poison(stripes, 2 * heads, dtype=f32)
            delta("delta_gates_backward", (stripes, heads), 256, own.gates, dg, dbeta, I(trained), I(heads), da[:, heads:], da,
                  L(da.shape[1]), partial)
            torch.autograd.backward([g[FROZEN:], beta[FROZEN:]], [dg.T.double(), dbeta.T.double()])
            check("gates da", da[:, heads : 2 * heads], logits[0].grad[FROZEN:], 4e-3)
            check("gates db", da[:, :heads], logits[1].grad[FROZEN:], 4e-3)
            check("gates small", partial.sum(0), torch.cat([small[0].grad, small[1].grad]), 1e-5)


def gates():
    for t, heads, d, kind in [(51, 5, 5, torch.float32), (301, 6, 128, torch.bfloat16), (33, 3, 64, torch.float16)]:
        x, z, dy, w = random(t, heads, d), random(t, heads * d + 8, scale=2), random(t, heads * d), random(d, dtype=kind)
        wide, blocks = I(d % 8 == 0), 7
        y, xp = poison(t, heads * d), padded(x, heads, d)
        gated("gated_norm_forward", (-(-t * heads // 16),), 256, xp, z, L(z.shape[1]), w, I(KIND[kind]), F(1e-5), I(t), I(heads), I(d),
              wide, y)
        xf, zf, wf = x.double().requires_grad_(), z[:, : heads * d].double().requires_grad_(), w.double().requires_grad_()
        rms = xf * (xf.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * wf
        want = (rms * torch.nn.functional.silu(zf.reshape(t, heads, d))).reshape(t, -1)
        want.backward(dy.double())
        check("gated_norm forward", y, want, 4e-3)
        dz, partial = poison(t, heads * d + 16), poison(blocks, 128, dtype=torch.float32)
        gated("gated_norm_backward", (blocks,), 256, dy, xp, z, L(z.shape[1]), w, I(KIND[kind]), F(1e-5), I(t), I(heads), I(d), wide, dz,
              L(dz.shape[1]), partial)
        check("gated_norm again", dy, want, 4e-3)
        check("gated_norm dx", tight(xp, heads, d), xf.grad, 4e-3)
        check("gated_norm dz", dz[:, : heads * d], zf.grad, 4e-3)
        check("gated_norm dw", partial.sum(0)[:d], wf.grad, 1e-4)
    for t, heads, d in [(30, 4, 16), (77, 6, 256), (5, 3, 2)]:
        both, x, first = random(t, heads * 2 * d + 8), random(t, heads * d), t // 3
        wide = "" if d % 8 else "_wide"
        y, kept = poison(t, heads * d), poison(t - first, heads * d)
        blocks = (-(-t * heads * d // (2048 if wide else 512)),)
        gate("output_gate_forward" + wide, blocks, 256, both, L(both.shape[1]), x, I(t), I(heads), I(d), y, kept, I(first))
        xf = x.double().requires_grad_()
        bf = both.double().requires_grad_()
        g = bf[:, : heads * 2 * d].reshape(t, heads, 2 * d)[:, :, d:].reshape(t, -1)
        want, dy = xf * g.sigmoid(), random(t - first, heads * d)
        want[first:].backward(dy.double())
        check("gate forward", y, want, 4e-3)
        check("gate kept", kept, g[first:], 0)
        out = poison(t - first, both.shape[1])
        gate("output_gate_backward" + wide, blocks, 256, dy, x[first:], kept, I(t - first), I(heads), I(d), out, L(out.shape[1]))
        check("gate again", kept, want[first:], 4e-3)
        check("gate dx", dy, xf.grad[first:], 4e-3)
        part = lambda y: y[:, : heads * 2 * d].reshape(-1, heads, 2 * d)
        check("gate gradient", part(out)[:, :, d:], part(bf.grad[first:])[:, :, d:], 4e-3)
        if not torch.isnan(part(out)[:, :, :d]).all():
            failures.append("gate beside")


# ---- the optimizer

def philox(counter, key):
    c, k = [np.asarray(x, dtype=np.uint64) for x in counter], [np.uint64(x) for x in key]
    m = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(b >> np.uint64(32)) ^ c[1] ^ k[0], b & m, (a >> np.uint64(32)) ^ c[3] ^ k[1], a & m]
        k = [(k[0] + np.uint64(0x9E3779B9)) & m, (k[1] + np.uint64(0xBB67AE85)) & m]
    return np.stack(c, -1)


class Stream(ctypes.Structure):
    _fields_ = [(n, ctypes.c_uint32) for n in "key0 key1 tensor purpose when".split()]


class Judge(ctypes.Structure):
    _fields_ = [(n, P) for n in "sums verdict halted counter".split()] + [("limit", F), ("total", I)]


class Limits(ctypes.Structure):
    _fields_ = [(n, P) for n in "squares sums last factors gain counter".split()] + \
        [("growth", F), ("rate", F), ("by_channel", I)]


class Vector(ctypes.Structure):
    _fields_ = [(n, P) for n in "w g m v verdict".split()] + [("n", I), ("kind", I), ("rate", F), ("s", Stream)]


class Vectors(ctypes.Structure):
    _fields_ = [("of", Vector * 8)]


def struct(of, /, **fields):
    return of(**{n: x.data_ptr() if isinstance(x, torch.Tensor) else x for n, x in fields.items()})


STREAM = Stream(5, 6, 7, 2, 9)


def random16(count):
    words = philox([np.arange((count + 7) // 8), 2, 7, 9], (5, 6)).reshape(-1)
    return np.stack([words & 0xFFFF, words >> 16], -1).reshape(-1)[:count].astype(np.uint32)


def stochastic(x, bits):
    return ((x.view(np.uint32) + bits) >> 16).astype(np.uint16)


def optimizer():
    f32 = torch.float32
    # Normals: the words' quantiles by torch in f64; to the bit against the CPU's goldens in tests/gpu_train.rs.
    count = 10001
    p, split = poison(count, dtype=f32), poison(2 * count)
    apollo("projection", ((count + 1023) // 1024,), 256, STREAM, L(count), F(0.25), p, split, L(count))
    words = philox([np.arange((count + 3) // 4), 2, 7, 9], (5, 6)).reshape(-1)[:count]
    u = ((words >> np.uint64(9)).astype(np.float64) * 2 + 1) / 8388608 - 1
    want = torch.special.ndtri(torch.tensor((u + 1) / 2, device=DEV)) * 0.25
    check("projection", p, want, 1e-5)
    check("projection halves", split[:count].float() + split[count:].float(), p, 2e-5)
    rows = poison(2 * 9996)
    apollo("projection", ((9996 + 1023) // 1024,), 256, STREAM, L(9996), F(0.25), None, rows, L(4))
    check("projection rows", rows.reshape(-1, 2, 4).float().sum(1).reshape(-1), p[:9996], 2e-5)
    verdict, halted = torch.zeros(1, device=DEV, dtype=torch.int32), torch.zeros(1, device=DEV, dtype=torch.int32)
    for m, n in [(24, 10), (10, 24), (129, 77), (4096, 1024), (1024, 4096), (16, 4104)]:
        for dtype in (torch.bfloat16, f32):
            g, pn, pm = random(m, n, dtype=dtype), random(n, dtype=f32), random(m, dtype=f32)
            name = "_f32" if dtype == f32 else "_wide" if n % 8 == 0 else ""
            wide = 8 if name == "_wide" else 1
            s, r = poison(m, dtype=f32), poison(m, dtype=f32)
            counter = torch.zeros(1, device=DEV, dtype=torch.int32)
            sums = poison(max(m, n), dtype=torch.float64)
            at = m // 64 * 32  # in two parts, as a large matrix comes
            judge = struct(Judge, sums=sums, verdict=verdict, halted=halted, counter=counter, limit=1e30, total=-(-m // 32))
            for first, rows in ((0, at), (at, m - at)):
                if rows:
                    verdict.fill_(7 if m > at else 0)
                    apollo("square_rows" + name, (-(-rows // 32),), 256, g[first:], I(rows), I(n), pn, r[first:], s[first:], I(first),
                           judge)
            if verdict.item() or halted.item() or counter.item():
                failures.append("square_rows verdict")
            check("square_rows", s, g.float().pow(2).sum(1), 1e-5)
            check("square_rows dot", r, g.double() @ pn.double(), 1e-4)
            span = 20
            count = -(-m // span)
            partial = poison(2 * count, n, dtype=f32)
            apollo("square_columns" + name, (-(-n // (128 * wide)), count), 128, g, I(m), I(n), I(span), pm, partial)
            by_column, dot = poison(n, dtype=f32), poison(n, dtype=f32)
            judge = struct(Judge, sums=sums, verdict=verdict, halted=halted, counter=counter, limit=1e30, total=-(-n // 32))
            verdict.fill_(7)
            apollo("sum_columns", (-(-n // 32),), 256, partial, I(count), I(n), by_column, dot, judge)
            check("square_columns", by_column, g.float().pow(2).sum(0), 1e-5)
            check("square_columns dot", dot, g.double().T @ pm.double(), 1e-4)
            if verdict.item() or halted.item() or counter.item():
                failures.append("sum_columns verdict")
            tall, channels = m >= n, max(m, n)
            squares = s if tall else by_column
            for kind in (torch.bfloat16, torch.float16, f32):
                for by in (0, 1, 2):
                    w, f = random(m + 3, n + (8 if n % 8 == 0 else 3), dtype=kind, scale=0.02), random(channels, dtype=f32)
                    f = random([1, m, n][by], dtype=f32)
                    gain, old = torch.tensor([1e-3], device=DEV), w.clone()
                    flat = [I(m - 2), I(n), L(2), None, f, I(by), gain, F(0.999), I(1), STREAM, verdict, halted]
                    if kind == torch.bfloat16 and n % 8 == 0:
                        apollo("apply_wide" + ("_f32" if dtype == f32 else ""), (64,), 256, w, L(w.stride(0)), g, *flat)
                    else:
                        apollo("apply", (-(-(m - 2) * n // 256),), 256, w, I(KIND[kind]), L(w.stride(0)), g, I(dtype == f32), *flat)
                    factor = [torch.ones(1, 1, device=DEV), f[2:m, None] if by == 1 else None, f[None] if by == 2 else None][by]
                    x = (old[2:m, :n].float() - (factor * gain) * g[: m - 2].float()) * torch.tensor(0.999, device=DEV)
                    got = w[2:m, :n]
                    if kind == torch.bfloat16:
                        bits = random16(m * n)[2 * n :].reshape(m - 2, n)
                        want = stochastic(x.cpu().numpy(), bits).view(np.int16)
                        same = (got.cpu().view(torch.int16).numpy() == want).mean()
                        if same != 1:
                            failures.append("apply bits")
                            print(f"FAIL apply {m}x{n} by {by}: {same:.6f} of the bits are the same")
                    else:
                        check(f"apply {kind}", got, x, 1e-3)
                    beside = torch.ones_like(w, dtype=torch.bool)
                    beside[2:m, :n] = False
                    check("apply beside", w[beside], old[beside], 0)
            for rank in (1, 3, 64):
                for halves in (0, 1):
                    shape = (channels, (1 + halves) * rank) if tall else ((1 + halves) * rank, channels)
                    r = random(*shape, dtype=f32)
                    full = r if not halves else (r[:, :rank] + r[:, rank:] if tall else r[:rank] + r[rank:])
                    mm, vv = random(*full.shape, dtype=f32), random(*full.shape, dtype=f32).abs()
                    wm, wv = 0.9 * mm + 0.1 * full, 0.99 * vv + 0.01 * full * full
                    raw = full.double().pow(2).sum(1 if tall else 0)
                    normed = (wm / (wv.sqrt() + 1e-8)).double().pow(2).sum(1 if tall else 0)
                    m0, v0, sums = mm.clone(), vv.clone(), poison(3 * channels, dtype=torch.float64)
                    for by in (0, 1):
                        for before in (-1.0, 0.5):
                            mm, vv = m0.clone(), v0.clone()
                            last, fs, gain = torch.tensor([before], device=DEV), poison(channels, dtype=f32), poison(1, dtype=f32)
                            limits = struct(Limits, squares=squares, sums=sums, last=last, factors=fs, gain=gain, counter=counter,
                                            growth=1.01, rate=0.25, by_channel=by)
                            name, per = ("moments_tall", 8) if tall else ("moments_flat", 32)
                            apollo(name, (-(-channels // per),), 256, r, I(halves), I(channels), I(rank), F(0.9), F(0.99), F(1e-8),
                                   mm, vv, limits, verdict, halted)
                            check("moments m", mm, wm, 1e-6)
                            check("moments v", vv, wv, 1e-6)
                            f = normed.sqrt() / (raw.sqrt() + 1e-8) if by else \
                                (normed.sum().sqrt() / (raw.sum().sqrt() + 1e-8)).expand(channels)
                            length = (f * f * squares.double()).sum().sqrt()
                            shrink = 1 if before < 0 else max(float(length) / (before + 1e-8), 1.01) / 1.01
                            check("factors", fs, f, 1e-5)
                            check("factors gain", gain, torch.tensor([0.25 / shrink], device=DEV), 1e-5)
                            check("factors last", last, length[None] / shrink, 1e-5)
                            if counter.item():
                                failures.append("moments counter")
            # A gradient of zeros, and one that is not finite, touch nothing.
            for bad, code in ((0.0, 1), (math.nan, 2), (math.inf, 2), (1e38, 2)):
                w = random(m, n)
                old, one, two = w.clone(), torch.zeros(1, device=DEV, dtype=torch.int32), torch.zeros(1, device=DEV, dtype=torch.int32)
                spoilt, out = torch.zeros(m, n, device=DEV), poison(max(m, n), dtype=f32)
                spoilt[m // 2, n // 2] = bad
                if tall:
                    judge = struct(Judge, sums=sums, verdict=one, halted=two, counter=counter, limit=1e30, total=-(-m // 32))
                    apollo("square_rows_f32", (-(-m // 32),), 256, spoilt, I(m), I(n), None, None, out, I(0), judge)
                else:
                    judge = struct(Judge, sums=sums, verdict=one, halted=two, counter=counter, limit=1e30, total=-(-n // 32))
                    apollo("sum_columns", (-(-n // 32),), 256, spoilt.square(), I(m), I(n), out, None, judge)
                apollo("apply", (-(-m * n // 256),), 256, w, I(0), L(n), g, I(dtype == f32), I(m), I(n), L(0), None, None, I(0),
                       torch.ones(1, device=DEV), F(0.9), I(1), STREAM, one, two)
                if int(one) != code or int(two) != (code == 2) or not torch.equal(w, old):
                    failures.append(f"judge {bad}")
            for rank in (4, 64, 100) if tall else ():
                r = random(m, 2 * rank, dtype=f32)
                full = r[:, :rank] + r[:, rank:]
                mm, vv = random(m, rank, dtype=f32), random(m, rank, dtype=f32).abs()
                wm, wv = 0.9 * mm + 0.1 * full, 0.99 * vv + 0.01 * full * full
                f = (wm / (wv.sqrt() + 1e-8)).double().pow(2).sum(1).sqrt() / (full.double().pow(2).sum(1).sqrt() + 1e-8)
                last, fs, gain = torch.tensor([0.5], device=DEV), poison(m, dtype=f32), poison(1, dtype=f32)
                limits = struct(Limits, squares=squares, sums=poison(m, dtype=torch.float64), last=last, factors=fs, gain=gain,
                                counter=counter, growth=1.01, rate=0.25, by_channel=1)
                apollo("moments_tall_wide", (-(-m // 64),), 256, r, I(1), I(m), I(rank), F(0.9), F(0.99), F(1e-8), mm, vv, limits,
                       verdict, halted)
                check("moments wide m", mm, wm, 1e-6)
                check("moments wide v", vv, wv, 1e-6)
                check("factors wide", fs, f, 1e-5)
                length = (f * f * squares.double()).sum().sqrt()
                shrink = max(float(length) / (0.5 + 1e-8), 1.01) / 1.01
                check("factors wide gain", gain, torch.tensor([0.25 / shrink], device=DEV), 1e-5)
                check("factors wide last", last, length[None] / shrink, 1e-5)
                if counter.item():
                    failures.append("moments wide counter")
    m, n = 40, 24
    g, w = random(7, n, dtype=f32), random(m, n, dtype=f32)
    rows = torch.full((m,), -1, device=DEV, dtype=torch.int32)
    rows[torch.randperm(m, device=DEV)[:7]] = torch.arange(7, device=DEV, dtype=torch.int32)
    full = torch.where(rows[:, None] >= 0, g[rows.clamp_min(0).long()], 0)
    out = poison(m, n, dtype=f32)
    apollo("spread", (-(-m * n // 256),), 256, g, rows, I(m), I(n), out)
    check("spread", out, full, 0)
    mm, vv, old = torch.zeros(m, n, device=DEV), torch.zeros(m, n, device=DEV), w.clone()
    zero = torch.zeros(1, device=DEV, dtype=torch.int32)
    apollo("adam", (-(-m * n // 256),), 256, w, I(2), L(n), g, I(1), I(m), I(n), L(0), rows, mm, vv, F(0.9), F(0.999), F(1e-8),
           F(1e-2), F(0.99), I(1), STREAM, zero, zero)
    a, b = 0.1 * full, 0.001 * full * full
    check("adam", w, (old - 1e-2 * a / (b.sqrt() + 1e-8)) * 0.99, 1e-6)
    # Vectors, one of which may be what holds those behind it back.
    counter = torch.zeros(1, device=DEV, dtype=torch.int32)
    sizes = (5, 128, 4096, 5000, 1, 33)
    for spoilt in range(-1, 6):
        for scale, want in ((0.0, 1), (math.nan, 2), (math.inf, 2), (1e38, 2)):
            verdicts, halted = torch.full((6,), 7, device=DEV, dtype=torch.int32), torch.zeros(1, device=DEV, dtype=torch.int32)
            of, vectors = [], Vectors()
            for k, n in enumerate(sizes):
                g, w = random(n, dtype=f32), random(n, dtype=[torch.bfloat16, f32][k % 2])
                if k == spoilt:
                    g *= scale
                of.append((g, w, w.clone(), torch.zeros(n, device=DEV), torch.zeros(n, device=DEV)))
                vectors.of[k] = struct(Vector, w=w, g=g, m=of[k][3], v=of[k][4], verdict=verdicts[k:], n=n, kind=KIND[w.dtype],
                                       rate=1e-2 * (k + 1), s=STREAM)
            apollo("adam_vectors", (6,), 1024, vectors, F(0.9), F(0.999), F(1e-8), F(0.99), I(0), F(1e30), halted, counter)
            expected = [want if k == spoilt else 0 for k in range(6)]
            if verdicts.tolist() != expected or halted.item() != (spoilt >= 0 and want == 2) or counter.item():
                failures.append(f"adam_vectors verdict {spoilt} {scale}: {verdicts.tolist()}, {halted.item()}")
            for k, (g, w, old, mm, vv) in enumerate(of):
                if spoilt >= 0 and (k == spoilt or (k > spoilt and want == 2)):
                    check("adam_vectors leaves", w, old, 0)
                    check("adam_vectors leaves m", mm, torch.zeros_like(mm), 0)
                    continue
                a, b = 0.1 * g, 0.001 * g * g
                check("adam_vectors", w, (old.float() - 1e-2 * (k + 1) * a / (b.sqrt() + 1e-8)) * 0.99, 4e-3)
                check("adam_vectors m", mm, a, 1e-6)


# ---- the update from a gradient's factors

class Update(ctypes.Structure):
    _fields_ = [(n, I) for n in "m n tokens".split()] + \
        [("factors", P), ("by", I), ("gain", P), ("keep", F), ("stochastic", I), ("s", Stream), ("verdict", P), ("halted", P)]


class Map(ctypes.Structure):
    _fields_ = [("words", ctypes.c_uint64 * 16)]


class Matrix(ctypes.Structure):
    _fields_ = [(n, P) for n in "split r m v factors verdict".split()] + [(n, I) for n in "count inner channels tall".split()] + \
        [("numbers", Stream)]


class Matrices(ctypes.Structure):
    _fields_ = [("of", Matrix * 8)]


class Norm(ctypes.Structure):
    _fields_ = [(n, P) for n in "gram factors last gain verdict".split()] + [("channels", I), ("rate", F)]


class Norms(ctypes.Structure):
    _fields_ = [("side", Map * 8), ("of", Norm * 8), ("first", I * 9)]


def tile_map(x, high):
    """A bf16 matrix in tiles of `high` rows and 64 columns, 128 bytes swizzled, for the copy engine."""
    raw = (ctypes.c_uint8 * 192)()
    at = ctypes.addressof(raw)
    at += -at % 64
    sizes, strides = (ctypes.c_uint64 * 2)(x.shape[1], x.shape[0]), (ctypes.c_uint64 * 1)(2 * x.stride(0))
    tile, steps = (ctypes.c_uint32 * 2)(64, high), (ctypes.c_uint32 * 2)(1, 1)
    # bf16, two dimensions; no interleave, 128-byte swizzle, L2 promotion to 128 bytes, zeros outside
    ok(cuda.cuTensorMapEncodeTiled(P(at), I(9), ctypes.c_uint32(2), P(x.data_ptr()), sizes, strides, tile, steps, I(0), I(3), I(2), I(0)))
    return Map.from_buffer_copy(ctypes.string_at(at, 128))


MULTIPROCESSORS = torch.cuda.get_device_properties(0).multi_processor_count


def launch_update(dy, x, w, factors, by, gain, keep, random_bits, stream, verdict, halted):
    m, n, t = w.shape[0], w.shape[1], dy.shape[0]
    a = struct(Update, m=m, n=n, tokens=t, factors=factors, by=by, gain=gain, keep=keep, stochastic=random_bits, s=stream,
               verdict=verdict, halted=halted)
    apollo_hopper("update_product", (min(-(-m // 128) * -(-n // 256), MULTIPROCESSORS),), 384, tile_map(dy, 32), tile_map(x, 32),
                  tile_map(w, 64), a, shared=6 * 24576 + 65536 + 2048 + 1024)


def launch_norms(sides, grams, tokens, factors, lasts, gains, sums, counters, verdicts, halted, growth=1.01, rate=0.25):
    low = -(-tokens // 128)
    pairs = low * (low + 1) // 2
    chunks = [-(-c.shape[1] // 64) for c in sides]
    each = min(32, max(8, -(-sum(chunks) * pairs // (4 * MULTIPROCESSORS))))
    norms, at = Norms(), 0
    for i in range(8):
        norms.first[i] = at
        if i >= len(sides):
            continue
        norms.side[i] = tile_map(sides[i], 128)
        norms.of[i] = struct(Norm, gram=grams[i], factors=factors[i], last=lasts[i:], gain=gains[i:], verdict=verdicts[i:],
                             channels=sides[i].shape[1], rate=rate * (i + 1))
        at += -(-chunks[i] // each)
    norms.first[8] = at
    apollo_hopper("gram_norms", (pairs, at), 256, norms, I(grams[0].stride(0)), I(tokens), F(growth), sums, halted, counters,
                  shared=3 * (32768 + 256) + 1024)


def factored():
    if not hopper:
        return
    f32 = torch.float32
    verdict, halted, counter = (torch.zeros(1, device=DEV, dtype=torch.int32) for _ in range(3))
    sums = poison(4096, dtype=torch.float64)
    # Halves of a row, and a judge of what is projected.
    x, y = random(37, 24, dtype=f32), poison(37, 24)
    apollo("split_sums", (-(-37 * 12 // 256),), 256, x, I(37), I(12), y)
    check("split_sums", y[:, :12].float() + y[:, 12:].float(), x[:, :12] + x[:, 12:], 2e-5)
    # Several matrices at once: their projections' numbers, judges and moments. One that is bad holds all of them back.
    counters = torch.zeros(8, device=DEV, dtype=torch.int32)
    shapes = [(1000, 72, 1), (520, 96, 0), (64, 64, 1), (4096, 100, 0), (777, 300, 1)]  # channels, the other side, tall
    for rank in (4, 64):
        for spoilt, value, code in ((-1, 0, 0), (0, math.nan, 2), (4, math.inf, 2), (2, 1e38, 2), (3, 0.0, 1)):
            all_, of = Matrices(), []
            verdicts, two = torch.full((5,), 7, device=DEV, dtype=torch.int32), torch.zeros(1, device=DEV, dtype=torch.int32)
            for i, (channels, other, tall) in enumerate(shapes):
                shape = (channels, 2 * rank) if tall else (2 * rank, channels)
                r = random(*shape, dtype=f32)
                if i == spoilt:
                    r = r * 0
                    r.view(-1)[r.numel() // 2] = value
                full = r[:, :rank] + r[:, rank:] if tall else r[:rank] + r[rank:]
                mm, vv = random(*full.shape, dtype=f32), random(*full.shape, dtype=f32).abs()
                split, fs = poison(2 * rank * other), poison(channels, dtype=f32)
                numbers = Stream(5, 6, 7 + i, 2, 9)
                of.append((r, full, mm, vv, mm.clone(), vv.clone(), split, fs, numbers))
                all_.of[i] = struct(Matrix, split=split, r=r, m=mm, v=vv, factors=fs, verdict=verdicts[i:], count=rank * other,
                                    inner=rank * other if tall else rank, channels=channels, tall=tall, numbers=numbers)
            apollo("projections", (-(-rank * 300 // 1024), 5), 256, all_, F(0.25))
            apollo("judge_projections", (7, 5), 256, all_, I(rank), sums, F(1e30), two, counters)
            apollo("moments_all", (-(-4096 // 32), 5), 256, all_, I(rank), F(0.9), F(0.99), F(1e-8), two)
            wanted = [1 if code == 2 else 0] * 5
            if spoilt >= 0:
                wanted[spoilt] = code
            if verdicts.tolist() != wanted or two.item() != (code == 2) or counters.any():
                failures.append(f"judge_projections {spoilt} {value}: {verdicts.tolist()} {two.item()}")
            for i, ((r, full, mm, vv, m0, v0, split, fs, numbers), (channels, other, tall)) in enumerate(zip(of, shapes)):
                one = poison(2 * rank * other)
                apollo("projection", (-(-rank * other // 1024),), 256, numbers, L(rank * other), F(0.25), None, one,
                       L(rank * other if tall else rank))
                check("projections", split, one, 0)
                if wanted[i]:
                    check("moments_all leaves", mm, m0, 0)
                    check("moments_all leaves v", vv, v0, 0)
                    continue
                wm, wv = 0.9 * m0 + 0.1 * full, 0.99 * v0 + 0.01 * full * full
                along = 1 if tall else 0
                f = (wm / (wv.sqrt() + 1e-8)).double().pow(2).sum(along).sqrt() / (full.double().pow(2).sum(along).sqrt() + 1e-8)
                check("moments_all m", mm, wm, 1e-6)
                check("moments_all v", vv, wv, 1e-6)
                check("moments_all factors", fs, f, 1e-5)
    sizes = [(128, 128, 64), (256, 128, 200), (1000, 512, 473), (512, 1000, 473), (48, 136, 3), (1001, 264, 1), (2048, 1024, 256),
             (4096, 1536, 1023)]
    for m, n, t in sizes:
        dy, x = random(t, (m + 31) // 8 * 8)[:, 8 : 8 + m], random(t, (n + 31) // 8 * 8)[:, 16 : 16 + n]
        want_g = dy.double().T @ x.double()
        # The norm, from either side, of a scaled gradient; and of one that is held back.
        sides, others = (dy, x, dy), (x, dy, x)
        factors = [random(c.shape[1], dtype=f32).abs() + 0.5 for c in sides]
        grams = [poison(t, -(-t // 8) * 8, dtype=f32) for _ in sides]
        for gram, other in zip(grams, others):
            gram[:, :t] = other.float() @ other.float().T
        verdicts = torch.tensor([0, 0, 1], device=DEV, dtype=torch.int32)
        for before in (-1.0, 0.5):
            lasts, gains = torch.full((3,), before, device=DEV), poison(3, dtype=f32)
            launch_norms(sides, grams, t, factors, lasts, gains, sums, counters, verdicts, halted)
            for i in range(2):
                length = (want_g * (factors[i].double()[:, None] if i == 0 else factors[i].double()[None])).norm()
                shrink = 1 if before < 0 else max(float(length) / (before + 1e-8), 1.01) / 1.01
                check("norm last", lasts[i : i + 1], length[None] / shrink, 1e-4 if t > 3 else 1e-3)
                check("norm gain", gains[i : i + 1], torch.tensor([0.25 * (i + 1) / shrink], device=DEV), 1e-4 if t > 3 else 1e-3)
            if counters.any() or lasts[2] != before or not torch.isnan(gains[2]):
                failures.append("norm beside")
    for m, n, t in sizes:
        dy, x = random(t, (m + 31) // 8 * 8)[:, 8 : 8 + m], random(t, (n + 31) // 8 * 8)[:, 16 : 16 + n]
        g = (dy.double().T @ x.double()).float()
        for by in (1, 2):
            f = random([m, n][by - 1], dtype=f32)
            factor = f[:, None] if by == 1 else f[None]
            for bits in (0, 1):
                w, gain = random(m + 1, n + 8, scale=0.02), torch.tensor([1e-3], device=DEV)
                old = w.clone()
                launch_update(dy, x, w[:m, :n], f, by, gain, 0.999, bits, STREAM, verdict, halted)
                z = (old[:m, :n].float() - (factor * gain) * g) * torch.tensor(0.999, device=DEV)
                got = w[:m, :n]
                check(f"update {m} {n} {t} {by}", got, z, 5e-3)
                if bits:
                    want = stochastic(z.cpu().numpy(), random16(m * n).reshape(m, n)).view(np.int16)
                    differ = float((got.cpu().view(torch.int16).numpy() != want).mean())
                    check.worst["update_bits"] = max(check.worst.get("update_bits", 0), differ)
                    if not differ < 2e-3:
                        failures.append("update bits")
                        print(f"FAIL update {m} {n} {t} by {by}: {differ:.2e} of the bits differ")
                check("update beside", w[m:], old[m:], 0)
                check("update beside", w[:m, n:], old[:m, n:], 0)
        for held in (verdict, halted):
            held.fill_(1)
            launch_update(dy, x, w[:m, :n], f, 2, gain, 0.999, 1, STREAM, verdict, halted)
            check("update held", w[:m, :n], got, 0)
            held.fill_(0)
    torch.cuda.synchronize()


def replayed(f, repeat=5, each=5):
    """Milliseconds, the median of some: replayed, so that the host takes no part in it."""
    f()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(each):
            f()
    graph.replay()
    times = []
    for _ in range(repeat):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        graph.replay()
        b.record()
        torch.cuda.synchronize()
        times.append(a.elapsed_time(b) / each)
    return sorted(times)[len(times) // 2]


def time_factored():
    f32 = torch.float32
    # A layer's norms.
    for t, shapes in ((1023, (17408, 17408, 10240, 6144, 6144, 17408)), (256, (17408, 17408, 10240, 6144, 6144, 17408)),
                      (1024, (4096, 4096, 12288, 12288, 12288))):
        sides, fs = [random(t, c) for c in shapes], [random(c, dtype=f32) for c in shapes]
        k = len(shapes)
        grams = [torch.zeros(t, -(-t // 8) * 8, device=DEV) for _ in shapes]
        lasts, gains = torch.full((k,), -1.0, device=DEV), torch.ones(k, device=DEV)
        sums, counters, none = poison(1 << 16, dtype=torch.float64), torch.zeros(8, device=DEV, dtype=torch.int32), torch.zeros(8, device=DEV, dtype=torch.int32)
        us = 1e3 * replayed(lambda: launch_norms(sides, grams, t, fs, lasts, gains, sums, counters, none, none))
        print(f"time norms of a layer, {t} tokens, {shapes}: {us:.0f} us, {t * t * sum(shapes) / us / 1e6:.0f} TFLOP/s of half")
    zero, counter, one = torch.zeros(1, device=DEV, dtype=torch.int32), torch.zeros(1, device=DEV, dtype=torch.int32), torch.ones(1, device=DEV)
    sums, keep = poison(1 << 16, dtype=torch.float64), []
    for m, n, t in [(17408, 5120, 1023), (5120, 17408, 1023), (12288, 4096, 1024), (17408, 5120, 256), (4096, 4096, 256), (5120, 6144, 1023)]:
        dy, x, w, g = random(t, m), random(t, n), random(m, n, scale=0.02), random(m, n)
        c, s, by = (dy, x, 1) if m >= n else (x, dy, 2)
        f, channels = random(max(m, n), dtype=f32).abs(), max(m, n)
        for bits in (1, 0):
            ms = replayed(lambda: launch_update(dy, x, w, f, by, one, 0.999, bits, STREAM, zero, zero))
            print(f"time update_product {m} {n} {t} random {bits}: {ms * 1e3:.0f} us, {2 * m * n * t / ms / 1e9:.0f} TFLOP/s, {4 * m * n / ms / 1e9:.2f} TB/s")
        gram = torch.zeros(t, -(-t // 8) * 8, device=DEV)
        last, gain = -one, one.clone()
        ms = replayed(lambda: launch_norms([c], [gram], t, [f], last, gain, sums, counter, zero, zero))
        p, halves, r = random(128, s.shape[1]), random(t, 128), random(channels, 128, dtype=f32)
        first, second, dw, self_ = (replayed(k) for k in (lambda: s @ p.T, lambda: (c.T @ halves), lambda: torch.mm(dy.T, x), lambda: s @ s.T))
        mm, vv = random(channels, 64, dtype=f32), random(channels, 64, dtype=f32).abs()
        limits = struct(Limits, squares=f, sums=sums, last=last, factors=f.clone(), gain=gain, counter=counter, growth=1.01, rate=1.0, by_channel=1)
        args = (r, I(1), I(channels), I(64), F(0.9), F(0.99), F(1e-8), mm, vv, limits, zero, zero)
        old, tall, flat = (replayed(lambda: apollo(k, (-(-channels // per),), 256, *args))
                           for k, per in (("moments_tall", 8), ("moments_tall_wide", 64), ("moments_flat", 32)))
        all_ = Matrices()
        for i in range(4):
            split = poison(128 * min(m, n))
            keep.append(split)
            all_.of[i] = struct(Matrix, split=split, r=r, m=mm, v=vv, factors=f.clone(), verdict=zero, count=64 * min(m, n), inner=64 * min(m, n),
                                channels=channels, tall=int(m >= n), numbers=STREAM)
        judging = replayed(lambda: apollo("judge_projections", (528, 1), 256, all_, I(64), sums, F(1e30), zero, counter))
        moving, moving4 = (replayed(lambda: apollo("moments_all", (-(-channels // 32), k), 256, all_, I(64), F(0.9), F(0.99), F(1e-8), zero)) for k in (1, 4))
        numbers4 = replayed(lambda: apollo("projections", (-(-64 * min(m, n) // 1024), 4), 256, all_, F(0.125)))
        judge = struct(Judge, sums=sums, verdict=zero, halted=zero, counter=counter, limit=1e30, total=-(-m // 32))
        out = poison(channels, dtype=f32)
        rows = replayed(lambda: apollo("square_rows_wide", (-(-m // 32),), 256, g, I(m), I(n), None, None, out, I(0), judge))
        partial = poison(-(-m // 64), n, dtype=f32)
        columns = replayed(lambda: apollo("square_columns_wide", (-(-n // 1024), -(-m // 64)), 128, g, I(m), I(n), I(64), None, partial))
        flat_apply = [w, L(n), g, I(m), I(n), L(0), None, f, I(by), one, F(0.999), I(1), STREAM, zero, zero]
        applying = replayed(lambda: apollo("apply_wide", (32 * MULTIPROCESSORS,), 256, *flat_apply))
        numbers = replayed(lambda: apollo("projection", (-(-64 * min(m, n) // 1024),), 256, STREAM, L(64 * min(m, n)), F(0.125), None, p, L(64 * min(m, n))))
        print(f"time {m} {n} {t} us: gram_norms {ms * 1e3:.0f} ({t * t * channels / ms / 1e9:.0f} TFLOP/s of half), S P {first * 1e3:.0f}, C Z {second * 1e3:.0f}, "
              f"S S^T {self_ * 1e3:.0f}, dW {dw * 1e3:.0f}, moments tall {old * 1e3:.0f} wide {tall * 1e3:.0f} flat {flat * 1e3:.0f}, judge {judging * 1e3:.0f}, "
              f"rows {rows * 1e3:.0f}, columns {columns * 1e3:.0f}, apply {applying * 1e3:.0f}, projection {numbers * 1e3:.0f} of four {numbers4 * 1e3:.0f}, moments_all {moving * 1e3:.0f} of four {moving4 * 1e3:.0f}; matrix {2 * m * n / 4.1e6:.0f}")


# ---- how long those take that read and write much

def timed(what, size, run, times=20):
    """`size` bytes have to be read and written; inputs of several calls do not fit the cache together."""
    for _ in range(3):
        run()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(times):
        run()
    end.record()
    torch.cuda.synchronize()
    us = start.elapsed_time(end) / times * 1000
    print(f"time {what}: {us:.1f} us" + (f", {size / us / 1e6:.2f} TB/s" if size else ""))


def linear_attention_times(rows):
    """Qwen3.5-27B's shapes: 16 heads of k, 48 of v."""
    k_heads, heads, ld = 16, 48, 16480
    all_, channels, f32 = 2 * k_heads + heads, 10240, torch.float32
    x, w = random(rows, ld), random(channels, 1, 4)
    taps = ints([t - back if t >= back else -1 for t in range(rows) for back in (3, 2, 1, 0)])
    y, lengths = poison(rows, all_ * 128), poison(2 * k_heads, rows, dtype=f32)
    c = fields(Conv, x=x, taps=taps, rows=rows, w=w, ld=ld, kind=0, kernel=4, k_heads=k_heads, v_heads=heads, k_dim=128, v_dim=128)
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count

    def stripe(group):
        groups = -(-all_ // group)
        rows_each = -(-rows // max(1, 4 * multiprocessors // groups))
        return min(64, max(16, -(-rows_each // 4) * 4)), groups

    each, groups = stripe(8)
    timed(f"conv_forward {rows}", 4 * rows * channels,
          lambda: conv("conv_forward_wide", (-(-rows // each), groups), 128, c, y, lengths, I(each)))
    a, b = random(rows, heads), random(rows, heads)
    out, news = poison(rows, heads * 128), poison(rows, heads * 128)
    dout, solved = random(rows, heads * 128), poison(rows, heads * 128)
    dq, dk, dg, dbeta = poison(rows, heads * 128), poison(rows, heads * 128), poison(heads, rows, dtype=f32), poison(heads, rows, dtype=f32)
    a_log, dt_bias, contexts = torch.linspace(-5, 1, heads, device=DEV), random(heads), poison(1, heads, 128, 128, dtype=f32)
    for stages in (2,) + ("hopper",) * (hopper_delta is not None):
        rule = Rule(y, lengths, a, b, a_log, dt_bias, [(0, rows, 0, 0)], 0, contexts, stages)
        kept, dstates = poison(rule.count * heads, 128, 128), poison(rule.count * heads, 128, 128)
        more = dict(news=news, states=kept, dout=dout, solved=solved, dstates=dstates, dq=dq, dk=dk, dv=solved, dg=dg, dbeta=dbeta)
        timed(f"delta_chunks {rows}", 0, rule.prepare)
        timed(f"delta_forward {rows} {stages}", 0, lambda: rule.forward(out=out))
        timed(f"delta_news {rows} {stages}", 0, lambda: rule.forward(news=news, states=kept))
        timed(f"delta_states {rows} {stages}", 0, lambda: rule.backward(only="delta_states", **more))
        timed(f"delta_backward {rows}", 0, lambda: rule.backward(only="delta_backward", **more))
    each, groups = stripe(4)
    partial, dx = poison(-(-rows // each), channels * 4, dtype=f32), poison(rows, ld)
    timed(f"conv_backward {rows}", 2 * rows * (2 * channels + 3 * heads * 128),
          lambda: conv("conv_backward_wide", (-(-rows // each), groups), 64, c, dq, dk, dout, dx, L(ld), I(each), partial))
    z, dz, wn = x[:, channels:], dx[:, channels:], random(128)
    timed(f"gated_norm_forward {rows}", 6 * rows * heads * 128,
          lambda: gated("gated_norm_forward", (rows * heads // 16,), 256, out, z, L(ld), wn, I(0), F(1e-6), I(rows), I(heads), I(128), I(1), y))
    blocks = 3 * multiprocessors
    sums = poison(blocks, 128, dtype=f32)
    timed(f"gated_norm_backward {rows}", 12 * rows * heads * 128,
          lambda: gated("gated_norm_backward", (blocks,), 256, dout, out, z, L(ld), wn, I(0), F(1e-6), I(rows), I(heads), I(128), I(1), dz, L(ld), sums))


def stream_times(rows, h, heads, kv, d, turn, gated_):
    f32, eps = torch.float32, F(1e-6)
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    x, w, y, kept, rstd = random(rows, h, dtype=f32), random(h), poison(rows, h), random(rows, h), poison(rows, dtype=f32)
    wide, block = norm_kernel(h)
    timed(f"rms_norm_forward {rows}x{h}", 8 * rows * h,
          lambda: norm("rms_norm_forward" + wide, (rows,), block, x, None, w, I(0), eps, I(h), y, rstd, kept, I(0)))
    blocks = min(rows, 2 * multiprocessors)
    partial = poison(blocks, h, dtype=f32)
    timed(f"rms_norm_backward {rows}x{h}", 14 * rows * h,
          lambda: norm("rms_norm_backward" + wide, (blocks,), block, y, kept, rstd, w, I(0), I(rows), I(h), None, x, y, partial))
    width = ((1 + gated_) * heads + 2 * kv) * d
    qkv, q, kvs, before = random(rows, width), poison(rows, heads * d), poison(rows, 2 * kv * d), poison(rows, (heads + kv) * d)
    cos, sin, wn = torch.rand(rows, turn, device=DEV), torch.rand(rows, turn, device=DEV), random(d)
    timed(f"rope_forward {rows} {heads}/{kv}x{d}", 2 * rows * d * (3 * heads + 5 * kv),
          lambda: rope(f"rope_forward_{d}", (rows,), 128, qkv, L(width), I(gated_), I(rows), I(heads), I(kv), I(d), I(turn), cos, sin, wn, I(0), wn,
                       I(0), eps, q, kvs, before, None, I(0)))
    timed(f"rope_again {rows}", 2 * rows * d * 2 * heads,
          lambda: rope(f"rope_again_{d}", (rows,), 128, before, I(rows), I(heads), I(kv), I(d), I(turn), cos, sin, wn, I(0), eps, q))
    dq, dk, dv = (random(rows, heads * d) for _ in range(3))
    blocks = min(rows, 3 * multiprocessors)
    partial = poison(2 * blocks, d, dtype=f32)
    timed(f"rope_backward {rows}", 2 * rows * d * (5 * heads + 3 * kv),
          lambda: rope(f"rope_backward_{d}", (blocks,), 128, dq, dk, dv, I(rows), I(heads), I(kv), I(d), I(turn), cos, sin, wn, I(0), wn, I(0), eps,
                       before, qkv, I(gated_), partial))


def other_times():
    rows, n = 441, 151936
    logits, losses, d, target = random(rows, n, dtype=torch.float32), poison(rows, dtype=torch.float32), poison(rows, n), torch.zeros(rows, device=DEV).int()
    timed(f"cross_entropy {rows}x{n}", 10 * rows * n,
          lambda: loss("cross_entropy_wide", (rows,), 1024, logits, L(n), I(n), target, F(0.3), losses, d))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--time-streams", action="store_true", help="only what reads and writes much, and linear attention")
    parser.add_argument("--only", type=lambda names: names.split(","))
    args = parser.parse_args()
    torch.manual_seed(0)
    for part in (attentions, attentions_256, norms, ropes, convolutions, deltas, gates, others, optimizer, factored):
        if args.only and part.__name__ not in args.only:
            continue
        try:
            part()
            torch.cuda.synchronize()
        except RuntimeError as e:
            failures.append(part.__name__)
            print(f"FAIL {part.__name__}: {e}")
            break
    print(" ".join(f"{name} {error:.1e}" for name, error in check.worst.items()))
    if args.time and (not args.only or "factored" in args.only) and hopper and not failures:
        time_factored()
    if args.time_streams:
        for rows in (1023, 4351):
            linear_attention_times(rows)
            stream_times(rows, 5120, 24, 4, 256, 32, 1)
        for rows in (1024, 4095):
            stream_times(rows, 4096, 32, 8, 128, 64, 0)
        other_times()
    def wanted(part):
        return args.time and (not args.only or part in args.only)

    if wanted("attentions"):
        for d, heads, kv in ((128, 32, 8), (64, 32, 8)):
            attention_case([(0, 4096, 0, 0)], heads, kv, d, timed=True)
            attention_case([(0, 1024, 0, 0), (1024, 2048, 0, 1024)], heads, kv, d, frozen=1024, timed=True)
            if hopper:
                attention_case([(0, 4096, 0, 0)], heads, kv, d, timed=True, kind=f"hopper_{d}")
                attention_case([(0, 1024, 0, 0), (1024, 2048, 0, 1024)], heads, kv, d, frozen=1024, timed=True, kind=f"hopper_{d}")
                attention_case([(0, 2048, 0, 0), (2048, 2304, 0, 2048)], heads, kv, d, frozen=2048, timed=True, kind=f"hopper_{d}")
    if wanted("attentions_256") and hopper:
        # Of Qwen3.5-27B's heads: the spans of 0 + 1024, 4096 + 256 and 32768 + 1024.
        for own, context in ((1024, 0), (4096, 0), (256, 4096), (1024, 32768)):
            spans = [(0, context, 0, 0), (context, context + own, 0, context)] if context else [(0, own, 0, 0)]
            if context <= 4096:
                attention_case(spans, 24, 4, 256, frozen=context, timed=True)
            attention_256_case(spans, 24, 4, 256, frozen=context, timed=True)
    print("all agree" if not failures else f"{len(failures)} FAILED: {sorted(set(failures))[:20]}")
    raise SystemExit(bool(failures))
