#!/usr/bin/env python3
"""Makes apollo.safetensors: weights after 100 steps of APOLLO, written from the equations, in float64 numpy.

usage: make_apollo.py      needs numpy and safetensors

Random projections come from the same counters as in src/compute/rng.rs, in a second implementation; `projection` holds some of them,
to be equal to the bit. Gradients follow from a hash; step 7's is zero throughout, and the size of others jumps.
"""
import pathlib

import numpy as np
from safetensors.numpy import save_file

STEPS, REFRESH = 100, 30
F = np.float32
CASES = {  # name: (shape, options)
    "tall": ((24, 10), dict(rank=4, lr=1e-2, weight_decay=0.1)),
    "wide": ((10, 24), dict(rank=4, lr=1e-2, scale=2.0)),
    "mini": ((16, 16), dict(rank=1, lr=1e-2, tensor_wise=True, scale=128**0.5)),
    "no_limit": ((12, 20), dict(rank=3, lr=1e-2, limit=None, betas=(0.8, 0.99))),
    "small": ((3, 20), dict(rank=4, lr=1e-2, weight_decay=0.1)),  # a dimension below the rank: Adam
}


def philox(c, k):
    c, k = [np.uint64(x) for x in c], [np.uint64(x) for x in k]
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(b >> np.uint64(32)) ^ c[1] ^ k[0], b & low, (a >> np.uint64(32)) ^ c[3] ^ k[1], a & low]
        k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    return [int(x) for x in c]


def ln(x):
    bits = int(x.view(np.uint32))
    shift = (bits - 0x3F3504F3) & 0xFF800000
    exponent = F((shift - (1 << 32) if shift >> 31 else shift) >> 23)
    m = np.uint32((bits - shift) & 0xFFFFFFFF).view(F)
    s = (m - F(1)) / (m + F(1))
    z = s * s
    two = F(2)
    series = two + z * (two / F(3) + z * (two / F(5) + z * (two / F(7) + z * (two / F(9)))))
    return exponent * F(np.log(2)) + s * series


NEAR = [2.8102264e-8, 3.4327394e-7, -3.5233877e-6, -4.3915065e-6, 0.00021858087, -0.001253725, -0.0041776816, 0.24664073, 1.5014094]
FAR = [-0.00020021426, 0.00010095056, 0.0013493432, -0.0036734284, 0.0057395077, -0.0076224613, 0.0094388705, 1.001674, 2.8329768]


def normal(word):
    u = (F(word >> 9) * F(2) + F(1)) * F(2.0**-23) - F(1)
    w = -ln((F(1) - u) * (F(1) + u))
    x, c = (w - F(2.5), NEAR) if w < 5 else (np.sqrt(w) - F(3), FAR)
    p = F(c[0])
    for a in c[1:]:
        p = p * x + F(a)
    return F(np.sqrt(2)) * p * u


def projection(name, refresh, count, rank):
    h = 0x811C9DC5
    for byte in name.encode():
        h = ((h ^ byte) * 0x01000193) % 2**32
    words = [w for block in range(-(-count // 4)) for w in philox([block, 1, h, refresh], [0, 0])]
    scale = F(1) / np.sqrt(F(rank))
    return np.array([normal(w) * scale for w in words[:count]], dtype=F)


def splitmix64(x):
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def hashed(start, shape, scale):
    bits = splitmix64(np.arange(start, start + np.prod(shape), dtype=np.uint64)) >> np.uint64(56)
    return ((2.0 * bits.astype(np.float64) - 255.0) * scale).reshape(shape)


def gradient(step, shape):
    return hashed(1_000_000 * (step + 1), shape, 0.0 if step == 7 else 2.0 ** (-12 + step * step % 7))


class Apollo:
    """The optimizer of one tensor."""

    def __init__(self, name, shape, lr, rank, scale=None, tensor_wise=False, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0,
                 limit=1.01, refresh=REFRESH):
        self.name, self.lr, self.rank, self.tensor_wise, self.betas = name, lr, rank, tensor_wise, betas
        self.eps, self.weight_decay, self.limit, self.refresh = eps, weight_decay, limit, refresh
        self.projected = len(shape) == 2 and min(shape) >= rank
        self.tall = shape[0] >= shape[-1]
        self.scale = (min(shape) / rank) ** 0.5 if scale is None else scale
        self.m = self.v = self.last = None
        self.t = 0

    def step(self, w, g):
        if not g.any():
            return w
        (b1, b2), small = self.betas, min(g.shape)
        r = g
        if self.projected:
            p = projection(self.name, self.t // self.refresh, self.rank * small, self.rank).astype(np.float64)
            r = g @ p.reshape(self.rank, small).T if self.tall else p.reshape(small, self.rank).T @ g
        if self.m is None:
            self.m, self.v = np.zeros_like(r), np.zeros_like(r)
        self.t += 1
        self.m = b1 * self.m + (1 - b1) * r
        self.v = b2 * self.v + (1 - b2) * r * r
        n = self.m / (np.sqrt(self.v) + self.eps)
        rate = self.lr * np.sqrt(1 - b2**self.t) / (1 - b1**self.t)
        if self.projected:
            axis = None if self.tensor_wise else 1 if self.tall else 0
            norm = lambda x: np.sqrt((x * x).sum(axis=axis, keepdims=True))
            update = g * (norm(n) / (norm(r) + 1e-8))
            length = np.linalg.norm(update)
            if self.limit:
                k = 1.0 if self.last is None else max(length / (self.last + 1e-8), self.limit) / self.limit
                update, self.last = update / k, length / k
            w = w - rate * self.scale * update
        else:
            w = w - rate * n
        return w - self.lr * self.weight_decay * w


def run(name, shape, **options):
    w, apollo = hashed(0, shape, 2.0**-9), Apollo(name, shape, **options)
    for step in range(STEPS):
        w = apollo.step(w, gradient(step, shape))
    return w


if __name__ == "__main__":
    out = {name: run(name, shape, **options).astype(np.float32) for name, (shape, options) in CASES.items()}
    out["projection"] = projection("tall", 2, 4096, 4)
    save_file(out, pathlib.Path(__file__).parent / "apollo.safetensors")
    for name, w in out.items():
        print(name, w.shape, float(np.abs(w).mean()))
