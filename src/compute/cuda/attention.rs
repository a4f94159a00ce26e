//! Causal attention over packed sequences (see `cpu::attention`), rows side by side instead of heads apart. The kernels
//! for head dimensions in multiples of 8 use the tensor cores, in Hopper's own way where the device is one; others go to plain
//! ones.

use super::rope::{Heads, LARGEST_HEAD};
use super::tensor_map::Heads as HeadRows;
use super::{Buffer, Gpu, Part, Result, blocks, kernels, launch};
use crate::compute::cpu::attention::Span;
use cudarc::driver::DeviceRepr;

kernels!("attention");

const BLOCK: u32 = 128;
/// Keys of a tile, and queries in the backward pass.
const TILE: usize = 64;

/// Arguments of every kernel but `attention_delta`, as `struct Attention` in the kernels.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct Arguments {
    q: u64,
    k: u64,
    v: u64,
    out: u64,
    log_sums: u64,
    dout: u64,
    delta: u64,
    dq: u64,
    dk: u64,
    dv: u64,
    tiles: u64,
    ldq: i64,
    ldk: i64,
    ldv: i64,
    ldo: i64,
    lddq: i64,
    lddk: i64,
    log_rows: i32,
    log_shift: i32,
    q_shift: i32,
    group: i32,
    d: i32,
    window: i32,
    scale: f32,
}

// SAFETY: plain numbers in C's layout, the same fields in the same order as the kernels' struct.
unsafe impl DeviceRepr for Arguments {}

/// Which kernels a head dimension gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    Plain,
    Tensor(usize),
    Hopper(usize),
    /// Of 129 to 256.
    Hopper256,
}

/// Rows that a block of Hopper's has, and shared memory to align its tiles.
const HOPPER: usize = 128;
const ALIGN: usize = 1024;

/// q, k, v and dout as the copy engine sees them, of so many query heads, rows of queries and rows of keys. Where there is no
/// dout, q stands for it.
fn matrices(a: &Arguments, (heads, q_rows, kv_rows): (usize, usize, usize)) -> [HeadRows; 4] {
    let head_dim = a.d as usize;
    let of = |address, heads, rows, stride| HeadRows { address, rows, heads, head_dim, stride: stride as usize };
    let kv_heads = heads / a.group as usize;
    let q = of(a.q, heads, q_rows, a.ldq);
    let dout = if a.dout == 0 { q } else { of(a.dout, heads, q_rows, a.ldo) };
    [q, of(a.k, kv_heads, kv_rows, a.ldk), of(a.v, kv_heads, kv_rows, a.ldv), dout]
}

/// The kernels of `attention_hopper_256.cu`.
mod hopper_256 {
    use super::super::tensor_map::Maps;
    use super::{ALIGN, Arguments, Gpu, HOPPER, Result, launch};
    use std::cmp::Reverse;
    use std::collections::BinaryHeap;

    static KERNELS: crate::memory::cuda::Ptx = crate::memory::cuda::Ptx {
        name: "compute/attention_hopper_256",
        // For 9.0 alone, which `Class::of` sees to.
        baseline: (90, include_str!("kernels/attention_hopper_256.ptx")),
        exact: &[],
    };

    const ROW: usize = 2 * 256;
    /// Keys of a tile of the forward pass, and of the backward pass for queries.
    const KEYS: (usize, usize) = (80, 64);
    /// Keys of a block of the backward pass for them, and queries of a tile, of which there are three.
    const OWN: usize = 64;
    const QUERIES: usize = 48;
    /// Two barriers for every tile that is copied.
    const BARRIERS: usize = 16;

    pub const FORWARD: usize = (HOPPER + 4 * KEYS.0) * ROW + 5 * BARRIERS + ALIGN;
    pub const BACKWARD_Q: usize = (2 * HOPPER + 3 * KEYS.1) * ROW + 3 * BARRIERS + ALIGN;
    pub const BACKWARD_KV: usize =
        (2 * OWN + 6 * QUERIES) * ROW + OWN * QUERIES * 4 + 6 * QUERIES * 4 + 7 * BARRIERS + ALIGN;

    const THREADS: (u32, u32, u32) = (384, 1, 1);

    /// In two `parts`, blocks of queries have half of the keys each; those of keys have half of a tile.
    pub fn launch(
        gpu: &Gpu,
        of: &str,
        tiles: usize,
        (shared, parts): (u32, u32),
        a: Arguments,
        sizes: (usize, usize, usize),
    ) -> Result<()> {
        let (heads, tiles) = (sizes.0 as u32, tiles as u32);
        match of {
            "forward" => {
                let maps = maps(gpu, &a, sizes, (HOPPER, KEYS.0))?;
                launch!(gpu, "hopper_forward_256", (heads, tiles, 1), THREADS, shared; a, maps);
            }
            "backward_q" => {
                let name = if parts == 2 { "hopper_backward_q_256_pair" } else { "hopper_backward_q_256" };
                launch!(gpu, name, (heads, tiles, parts), THREADS, shared; a);
            }
            _ => {
                let maps = maps(gpu, &a, sizes, (QUERIES, OWN))?;
                // Halves of a tile one after the other, so that the longest still begin first.
                launch!(gpu, "hopper_backward_kv_256", (heads, tiles * parts, 1), THREADS, shared; a, maps);
            }
        }
        Ok(())
    }

    /// Of q, k, v and dout, with the rows of a tile of queries and of keys.
    fn maps(
        gpu: &Gpu,
        a: &Arguments,
        sizes: (usize, usize, usize),
        (queries, keys): (usize, usize),
    ) -> Result<Maps<4>> {
        let [q, k, v, dout] = super::matrices(a, sizes);
        Maps::of_rows(gpu, [(q, queries), (k, keys), (v, keys), (dout, queries)])
    }

    /// Whether tiles of queries are done sooner where two blocks have half of a tile's keys each: where blocks are few, or
    /// fill the device a second time by half. `seen` begins with the most.
    pub fn pays_to_halve(seen: &[usize], heads: usize, multiprocessors: usize) -> bool {
        // What a block takes besides, in keys: as measured on an H200.
        const BESIDES: usize = 384;
        // Where tiles are many, nothing is idle for long.
        if seen.len() * heads >= 4 * multiprocessors {
            return false;
        }
        // When the last is done, each going to the multiprocessor that is free first.
        let end = |parts: usize| {
            let mut free: BinaryHeap<Reverse<usize>> = (0..multiprocessors).map(|_| Reverse(0)).collect();
            for keys in seen.iter().flat_map(|&keys| std::iter::repeat_n(keys / parts + BESIDES, heads * parts)) {
                let Reverse(at) = free.pop().expect("a device has multiprocessors");
                free.push(Reverse(at + keys));
            }
            free.into_iter().map(|Reverse(at)| at).max()
        };
        end(2) < end(1)
    }

    #[cfg(test)]
    mod tests {
        use super::pays_to_halve;

        /// What was faster on an H200, of 132 multiprocessors, for 24 heads.
        #[test]
        fn halves_as_measured() {
            let halves = |own: usize, context: usize| {
                let seen: Vec<usize> = (1..=own.div_ceil(128)).rev().map(|t| context + own.min(128 * t)).collect();
                pays_to_halve(&seen, 24, 132)
            };
            assert!(!halves(1024, 0) && !halves(4096, 0));
            assert!(halves(256, 4096) && halves(1024, 32768));
        }
    }
}

/// The kernels of `attention_hopper.cu`.
mod hopper {
    use super::super::tensor_map::Maps;
    use super::{Arguments, Gpu, Result, launch};

    static KERNELS: crate::memory::cuda::Ptx = crate::memory::cuda::Ptx {
        name: "compute/attention_hopper",
        // For 9.0 alone, which `Class::of` sees to.
        baseline: (90, include_str!("kernels/attention_hopper.ptx")),
        exact: &[],
    };

    /// Shared memory of barriers and what lies behind them.
    pub const BARRIERS: usize = 256;
    /// Of what the backward pass for keys has of a tile of queries: a number each, in four parts apart.
    pub const NUMBERS: usize = 4 * 80;

    /// Over `tiles` tiles of every head, as many blocks as the device has multiprocessors: each does many.
    pub fn launch(
        gpu: &Gpu,
        name: &str,
        tiles: usize,
        shared: u32,
        a: Arguments,
        sizes: (usize, usize, usize),
    ) -> Result<()> {
        let maps = Maps::new(gpu, super::matrices(&a, sizes))?;
        let heads = sizes.0;
        let blocks = (heads * tiles).min(gpu.device.multiprocessors as usize) as u32;
        launch!(gpu, name, (blocks, 1, 1), (384, 1, 1), shared; a, maps, heads as i32, tiles as i32);
        Ok(())
    }
}

impl Class {
    fn of(gpu: &Gpu, head_dim: usize) -> Class {
        assert!(head_dim <= LARGEST_HEAD);
        let hopper = gpu.device.capability == (9, 0) && !gpu.is_portable();
        match head_dim {
            d if d % 8 != 0 => Class::Plain,
            d if d <= 128 => {
                let d = if d <= 64 { 64 } else { 128 };
                if hopper { Class::Hopper(d) } else { Class::Tensor(d) }
            }
            _ if hopper => Class::Hopper256,
            _ => Class::Tensor(256),
        }
    }

    /// Runs a kernel over `tiles` tiles of every head. Heads come first: blocks of one tile run side by side, share keys, and
    /// the longest tiles of all heads begin first.
    fn launch(
        self,
        gpu: &Gpu,
        of: &str,
        tiles: usize,
        (shared, parts): (usize, u32),
        arguments: Arguments,
        (heads, q_rows, kv_rows): (usize, usize, usize),
    ) -> Result<()> {
        let (grid, shared) = ((heads as u32, tiles as u32, parts), shared as u32);
        let name = match self {
            Class::Hopper(d) => {
                let name = format!("hopper_{of}_{d}");
                return hopper::launch(gpu, &name, tiles, shared, arguments, (heads, q_rows, kv_rows));
            }
            Class::Hopper256 => {
                let sizes = (heads, q_rows, kv_rows);
                return hopper_256::launch(gpu, of, tiles, (shared, parts), arguments, sizes);
            }
            Class::Plain => format!("attention_{of}_plain"),
            Class::Tensor(d) => format!("attention_{of}_{d}"),
        };
        launch!(gpu, &name, grid, (BLOCK, 1, 1), shared; arguments);
        Ok(())
    }

    /// Queries of a tile in the forward pass, and shared memory.
    fn forward(self) -> (usize, usize) {
        match self {
            Class::Plain => (TILE, 0),
            Class::Tensor(d) => {
                let rows = if d < 256 { 128 } else { 64 };
                (rows, (rows + 4 * TILE) * 2 * d)
            }
            Class::Hopper(d) => (HOPPER, 5 * HOPPER * 2 * d + hopper::BARRIERS + ALIGN),
            Class::Hopper256 => (HOPPER, hopper_256::FORWARD),
        }
    }

    /// Rows of a tile in the backward pass.
    fn backward(self) -> usize {
        if matches!(self, Class::Hopper(_) | Class::Hopper256) { HOPPER } else { TILE }
    }

    /// Shared memory, and in how many parts the keys are done, of which tiles of `heads` heads have `seen` to see, the most
    /// first.
    fn backward_q(self, gpu: &Gpu, seen: &[usize], heads: usize) -> (usize, u32) {
        match self {
            Class::Plain => (0, 1),
            Class::Tensor(d) => (6 * TILE * 2 * d, 1),
            Class::Hopper(d) => ((2 * HOPPER + 8 * TILE) * 2 * d + hopper::BARRIERS + ALIGN, 1),
            Class::Hopper256 => {
                let halved = hopper_256::pays_to_halve(seen, heads, gpu.device.multiprocessors as usize);
                (hopper_256::BACKWARD_Q, if halved { 2 } else { 1 })
            }
        }
    }

    /// Shared memory, and in how many parts the columns, or the keys of a tile, are done.
    fn backward_kv(self) -> (usize, u32) {
        match self {
            Class::Plain => (0, 1),
            Class::Tensor(d) => {
                let rows = if d < 256 { 64 } else { 32 };
                ((2 * TILE + 4 * rows) * 2 * d + 4 * rows * 4, if d < 256 { 1 } else { 2 })
            }
            Class::Hopper(d) => ((2 * HOPPER + 8 * TILE) * 2 * d + 8 * hopper::NUMBERS + hopper::BARRIERS + ALIGN, 1),
            Class::Hopper256 => (hopper_256::BACKWARD_KV, 2),
        }
    }
}

/// Tiles of the spans of a batch, on the device.
pub struct Tiles {
    class: Class,
    forward: (Buffer, usize),
    /// Tiles of queries, and of keys.
    backward_q: (Buffer, usize),
    /// The queries in smaller tiles, each of which all of a block works on: for when tiles are few.
    backward_q_split: Option<(Buffer, usize)>,
    backward_kv: (Buffer, usize),
    /// Keys that each tile of queries in the backward pass sees where there is no window, the most first.
    seen: Vec<usize>,
    /// Those of rows that train, for a forward pass over them alone.
    again: (Buffer, usize),
    rows: usize,
    frozen: usize,
}

/// Tiles of `rows` rows as the kernels have them, the longest first: queries that see the most keys, or keys that the most
/// queries see. Late blocks of a grid should be short ones.
fn tiles(spans: &[Span], rows: usize, of_keys: bool) -> Vec<[i32; 6]> {
    let mut all: Vec<[usize; 6]> = Vec::new();
    for s in spans {
        let tile = |first: usize| {
            [first, s.rows.end.min(first + rows), s.prefix.start, s.prefix.len(), s.rows.start, s.rows.end]
        };
        all.extend(s.rows.clone().step_by(rows).map(tile));
    }
    all.sort_by_key(|t| std::cmp::Reverse(if of_keys { t[5] - t[0] } else { t[3] + t[1] - t[4] }));
    all.into_iter().map(|tile| tile.map(|x| x as i32)).collect()
}

impl Tiles {
    /// Of `spans` over `rows` rows, of which the first `frozen` do not train.
    pub fn new(gpu: &Gpu, spans: &[Span], rows: usize, frozen: usize, head_dim: usize) -> Result<Tiles> {
        for s in spans {
            assert!(s.rows.end <= rows && s.prefix.end <= s.rows.start.max(s.prefix.start));
        }
        let own: Vec<Span> = spans.iter().filter(|s| s.rows.start >= frozen).cloned().collect();
        let upload = |tiles: Vec<[i32; 6]>| Ok::<_, super::GpuError>((gpu.upload(tiles.as_flattened())?, tiles.len()));
        let class = Class::of(gpu, head_dim);
        let per = class.forward().0;
        let of_queries = tiles(&own, class.backward(), false);
        Ok(Tiles {
            class,
            forward: upload(tiles(spans, per, false))?,
            backward_q_split: match class {
                Class::Hopper(_) => Some(upload(tiles(&own, HOPPER / 2, false))?),
                _ => None,
            },
            seen: of_queries.iter().map(|t| (t[3] + t[1] - t[4]) as usize).collect(),
            backward_q: upload(of_queries)?,
            backward_kv: upload(tiles(&own, class.backward(), true))?,
            again: upload(tiles(&own, per, false))?,
            rows,
            frozen,
        })
    }
}

/// Sizes of one call.
#[derive(Clone, Copy)]
pub struct Shape<'a> {
    pub heads: &'a Heads,
    pub tiles: &'a Tiles,
    pub window: Option<usize>,
}

impl Shape<'_> {
    fn arguments(&self, q: Part, q_rows: usize, kv: Part, log_sums: Part) -> Arguments {
        let (h, t) = (self.heads, self.tiles);
        let trained = t.rows - t.frozen;
        let kv_width = 2 * h.kv();
        Arguments {
            q: q.bf16(q_rows * h.q()),
            k: kv.bf16(t.rows * kv_width),
            v: kv.from(2 * h.kv() as u64).address,
            log_sums: log_sums.f32(trained * h.heads),
            ldq: h.q() as i64,
            ldk: kv_width as i64,
            ldv: kv_width as i64,
            ldo: h.q() as i64,
            lddq: h.q() as i64,
            lddk: h.q() as i64,
            log_rows: trained as i32,
            log_shift: t.frozen as i32,
            group: (h.heads / h.kv_heads) as i32,
            d: h.head_dim as i32,
            window: self.window.unwrap_or(0) as i32,
            scale: 1.0 / (h.head_dim as f32).sqrt(),
            ..Arguments::default()
        }
    }
}

/// `out (rows x qD)` of `q (rows x qD)` and `kv (rows x 2 kvD)`; `log_sums (heads, trained rows, f32)`. With `trained`, of the
/// rows that train alone: q and out are those.
pub fn forward(gpu: &Gpu, shape: &Shape, q: Part, kv: Part, out: Part, log_sums: Part, trained: bool) -> Result<()> {
    let t = shape.tiles;
    let first = if trained { t.frozen } else { 0 };
    let rows = t.rows - first;
    let (list, count) = if trained { &t.again } else { &t.forward };
    let arguments = Arguments {
        out: out.bf16(rows * shape.heads.q()),
        tiles: list.part().holds(6 * count, 4),
        q_shift: first as i32,
        ..shape.arguments(q, rows, kv, log_sums)
    };
    t.class.launch(gpu, "forward", *count, (t.class.forward().1, 1), arguments, (shape.heads.heads, rows, t.rows))
}

/// Gradients of the rows that train: `dq`, and `dk` and `dv` by query head, each trained rows x qD. `q`, `out` and `dout` are
/// of those rows, `kv` of all.
pub fn backward(
    gpu: &Gpu,
    shape: &Shape,
    (q, kv, out, log_sums): (Part, Part, Part, Part),
    dout: Part,
    [dq, dk, dv]: [Part; 3],
) -> Result<()> {
    let (t, h) = (shape.tiles, shape.heads);
    let rows = t.rows - t.frozen;
    let size = rows * h.q();
    let delta = gpu.f32(rows * h.heads)?;
    launch!(gpu, "attention_delta", (blocks(rows * h.heads, 8), 1, 1), (256, 1, 1), 0;
        dout.bf16(size), out.bf16(size), h.q() as i64, rows as i32, h.heads as i32, h.head_dim as i32,
        delta.part().address);
    let fits = |tiles: usize| tiles * h.heads <= gpu.device.multiprocessors as usize;
    let split = t.backward_q_split.as_ref().filter(|(_, count)| fits(*count));
    let (of_q, (q_list, q_count)) = split.map_or(("backward_q", &t.backward_q), |few| ("backward_q_split", few));
    let (kv_list, kv_count) = &t.backward_kv;
    let arguments = Arguments {
        dout: dout.bf16(size),
        delta: delta.part().address,
        dq: dq.bf16(size),
        dk: dk.bf16(size),
        dv: dv.bf16(size),
        tiles: q_list.part().holds(6 * q_count, 4),
        q_shift: t.frozen as i32,
        ..shape.arguments(q, rows, kv, log_sums)
    };
    let sizes = (h.heads, rows, t.rows);
    let most = shape.window.map_or(usize::MAX, |w| w + t.class.backward());
    let seen: Vec<usize> = t.seen.iter().map(|&keys| keys.min(most)).collect();
    t.class.launch(gpu, of_q, *q_count, t.class.backward_q(gpu, &seen, h.heads), arguments, sizes)?;
    let arguments = Arguments { tiles: kv_list.part().holds(6 * kv_count, 4), ..arguments };
    t.class.launch(gpu, "backward_kv", *kv_count, t.class.backward_kv(), arguments, sizes)
}
