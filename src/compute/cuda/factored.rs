//! The update of a matrix from the factors of its gradient: `dW (m x n) = dy^T x` over the tokens of a step. What the optimizer
//! asks of dW (its projection, the norm of what is applied) comes of dy and x; dW itself is made tile by tile on its way into the
//! weights (`kernels/apollo_hopper.cu`). Saves four passes over dW, for products whose cost grows with the square of the
//! tokens: worth it where these are few beside the matrix's sides.

use super::apollo::{Rates, Words, words};
use super::matmul::{Operand, Output, matmul};
use super::{Buffer, Gpu, GpuError, Part, Result, Weight, launch};
use crate::compute::cpu::weight::Kind;
use crate::compute::rng::Stream;
use crate::memory::cuda::CudaError;
use cudarc::driver::{DeviceRepr, sys};

static KERNELS: crate::memory::cuda::Ptx = crate::memory::cuda::Ptx {
    name: "compute/apollo_hopper",
    // For 9.0 alone, which `fits` sees to.
    baseline: (90, include_str!("kernels/apollo_hopper.ptx")),
    exact: &[],
};

const THREADS: u32 = 256;
/// Rows and columns of a tile of products of tokens, and rows of an update's.
const TILE: usize = 128;
/// Columns of an update's tile.
const WIDTH: usize = 256;
/// Tokens of a stage of an update, and its warp groups: two that multiply, one that has things brought.
const DEEP: usize = 32;
const GROUPS: u32 = 3;
/// Columns of a tile that lie side by side in shared memory.
const PANEL: usize = 64;
/// Shared memory of the norms: three stages of two tiles of 64 by 128 and of factors, and what aligns them.
const SHARED: u32 = 3 * (32768 + 256) + 1024;
/// Of an update: six stages, the tile of the weights, its columns' factors for either group, and what aligns them.
const SHARED_UPDATE: u32 = (6 * DEEP * (TILE + WIDTH) * 2 + TILE * WIDTH * 2) as u32 + 2 * 1024 + 1024;

/// `dW (rows x columns) = dy^T x`: dy (tokens x rows) and x (tokens x columns) in bf16, their rows `*_stride` elements apart.
#[derive(Debug, Clone, Copy)]
pub struct Product {
    pub dy: Part,
    pub dy_stride: usize,
    pub x: Part,
    pub x_stride: usize,
    pub tokens: usize,
    pub rows: usize,
    pub columns: usize,
}

/// One factor: rows of tokens, `width` channels of `stride`.
#[derive(Debug, Clone, Copy)]
struct Side {
    part: Part,
    stride: usize,
    width: usize,
}

impl Product {
    /// Rows `first..first + rows` of dW, as bf16 or f32.
    pub fn fill(&self, gpu: &Gpu, first: usize, rows: usize, out: Output) -> Result<()> {
        let dy = Operand::new(self.dy.from(2 * first as u64), self.dy_stride).t();
        matmul(gpu, out, rows, self.columns, self.tokens, dy, Operand::new(self.x, self.x_stride))
    }

    pub fn tall(&self) -> bool {
        self.rows >= self.columns
    }

    /// The factor whose columns are the channels, and the other.
    fn sides(&self) -> (Side, Side) {
        let dy = Side { part: self.dy, stride: self.dy_stride, width: self.rows };
        let x = Side { part: self.x, stride: self.x_stride, width: self.columns };
        if self.tall() { (dy, x) } else { (x, dy) }
    }
}

impl Side {
    /// Can the copy engine read it?
    fn fits(&self) -> bool {
        self.part.address.is_multiple_of(16) && self.stride.is_multiple_of(8) && self.width <= i32::MAX as usize
    }

    fn map(&self, gpu: &Gpu, tokens: usize, rows: usize) -> Result<Map> {
        self.part.bf16((tokens - 1) * self.stride + self.width);
        Map::new(gpu, self.part.address, (tokens, self.width, self.stride), rows)
    }
}

/// Can `w`, whose gradient is `g`, be updated like this, with projections to `rank`?
pub fn fits(gpu: &Gpu, w: &Weight, g: &Product, rank: usize) -> bool {
    let (channels, other) = g.sides();
    gpu.device.capability == (9, 0)
        && !gpu.is_portable()
        && w.kind == Kind::Bf16
        && w.address.is_multiple_of(16)
        && w.stride.is_multiple_of(8)
        && w.columns.is_multiple_of(8)
        && rank.is_multiple_of(8)
        && rank > 1
        && g.tokens > 0
        && channels.fits()
        && other.fits()
}

/// Tokens up to this part of a matrix's smaller side may be few enough: see [`pays`].
pub const FEW: usize = 4;

/// Is a matrix cheaper updated like this than with its gradient in memory? By what either way took on an H200 (Qwen3-8B's and
/// Qwen3.5-27B's matrices, 256 and 1024 tokens, rank 64), in microseconds. In memory: the library's product at 720 TFLOP/s;
/// gradient and weights in and the weights out at 4.05 TB/s; the gradient's squares at 3.4; its product with the projection at
/// 425 TFLOP/s. Without: 6.9 and 0.0106 a token for each tile of every multiprocessor; the norm and the products of every two
/// tokens' rows at 290 and 300 TFLOP/s; one factor's product with the projected other at 2.5 TB/s. Short kernels take 20
/// more where every matrix has its own.
pub fn pays(gpu: &Gpu, tokens: usize, rows: usize, columns: usize) -> bool {
    if FEW * tokens > rows.min(columns) {
        return false;
    }
    let (t, size, channels, other) =
        (tokens as f64, (rows * columns) as f64, rows.max(columns) as f64, rows.min(columns) as f64);
    let dense = 2.0 * t * size / 720e6 + size * (6.0 / 4.05e6 + 2.0 / 3.4e6 + 256.0 / 425e6) + 20.0;
    let waves = (rows.div_ceil(TILE) * columns.div_ceil(WIDTH)).div_ceil(gpu.device.multiprocessors as usize);
    let factored = waves as f64 * (6.9 + 0.0106 * t)
        + t * t * (channels / 290e6 + other / 300e6)
        + channels * (2.0 * t + 512.0) / 2.5e6;
    factored < dense
}

/// A matrix in tiles for the copy engine, as the driver describes it.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Map([u64; 16]);

// SAFETY: plain words in C's layout and alignment, as `struct Map` in the kernels.
unsafe impl DeviceRepr for Map {}

impl Map {
    /// `rows x columns` of bf16, rows `stride` apart, in tiles of `high` rows and a panel's columns.
    fn new(gpu: &Gpu, address: u64, (rows, columns, stride): (usize, usize, usize), high: usize) -> Result<Map> {
        gpu.device.bind()?;
        let mut map = std::mem::MaybeUninit::<sys::CUtensorMap>::zeroed();
        const _: () = assert!(size_of::<sys::CUtensorMap>() == size_of::<Map>());
        let (sizes, strides) = ([columns as u64, rows as u64], [2 * stride as u64]);
        let (tile, steps) = ([PANEL as u32, high as u32], [1u32; 2]);
        // SAFETY: the arrays have as many values as the two dimensions ask for, and the map is written in whole where the
        // driver says so. It reads nothing of the matrix.
        let map = unsafe {
            let code = sys::cuTensorMapEncodeTiled(
                map.as_mut_ptr(),
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                2,
                address as *mut _,
                sizes.as_ptr(),
                strides.as_ptr(),
                tile.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            );
            code.result().map_err(|e| GpuError::from(CudaError::new("describe a matrix to the copy engine", e)))?;
            map.assume_init()
        };
        // SAFETY: both are 128 bytes of plain words.
        Ok(unsafe { std::mem::transmute_copy(&map) })
    }
}

/// A matrix on its way to an update.
pub struct Task {
    pub weight: Weight,
    pub gradient: Product,
    /// Numbers of the matrix that projects: see [`super::apollo::projection`].
    pub numbers: Stream,
    /// m and v (f32, rank by channel).
    pub moments: (Part, Part),
    /// Learning rate with bias correction and scale.
    pub rate: f32,
    /// The norm of the update before (f32), negative for none.
    pub last: Part,
    pub verdict: Part,
    /// Of its rounding, where that is stochastic.
    pub rounding: Option<Stream>,
}

/// What tasks share. Of `rates`, the rate is each task's own; `halted` as in [`Verdict`](super::apollo::Verdict); `counters`
/// (i32, [`COUNTERS`]) are zero whenever no kernel runs.
pub struct Shared<'a> {
    pub rank: usize,
    pub rates: &'a Rates,
    /// `1 - lr * weight_decay`.
    pub keep: f32,
    /// The most that squares of a projected gradient may come to.
    pub limit: f32,
    pub halted: Part,
    pub counters: Part,
}

/// The most tasks of one call of [`update`].
pub const TASKS: usize = 8;
pub const COUNTERS: usize = TASKS;

/// As `struct Matrix` in apollo.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct Matrix {
    pub split: u64,
    pub projected: u64,
    pub m: u64,
    pub v: u64,
    pub factors: u64,
    pub verdict: u64,
    pub count: i32,
    pub inner: i32,
    pub channels: i32,
    pub tall: i32,
    pub numbers: Words,
}

/// As `struct Matrices` in apollo.cu.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Matrices(pub [Matrix; TASKS]);

// SAFETY: plain numbers in C's layout, the same fields in the same order as the kernels' structs.
unsafe impl DeviceRepr for Matrices {}

/// As `struct Norm` in the kernels.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Norm {
    gram: u64,
    factors: u64,
    last: u64,
    gain: u64,
    verdict: u64,
    channels: i32,
    rate: f32,
}

/// As `struct Norms` in the kernels.
#[repr(C)]
#[derive(Clone, Copy)]
struct Norms {
    side: [Map; TASKS],
    of: [Norm; TASKS],
    /// Parts of the channels of the tasks before.
    first: [i32; TASKS + 1],
}

// SAFETY: as above.
unsafe impl DeviceRepr for Norms {}

/// Tasks one behind the other that are tall and have the same input: one product projects for all of them.
fn runs(tasks: &[Task]) -> Vec<std::ops::Range<usize>> {
    let mut runs: Vec<std::ops::Range<usize>> = Vec::new();
    for (i, task) in tasks.iter().enumerate() {
        match runs.last_mut() {
            Some(run)
                if task.gradient.tall() && tasks[run.start].gradient.tall() && {
                    let (a, b) = (&task.gradient, &tasks[run.start].gradient);
                    (a.x, a.x_stride, a.columns) == (b.x, b.x_stride, b.columns)
                } =>
            {
                run.end = i + 1
            }
            _ => runs.push(i..i + 1),
        }
    }
    runs
}

/// Updates matrices whose gradients are products over the same tokens. One whose projection is not finite or too large sets
/// `halted`, and none of them changes.
///
/// With `P` in two summands, `P dW^T = (P x^T) dy` for a tall matrix, whose first product is rounded to two bf16 again; then
/// moments and factors by channel, the norm of the scaled gradient, and the gain, each for all of them at once.
pub fn update(gpu: &Gpu, tasks: &[Task], shared: &Shared) -> Result<()> {
    let Some(first) = tasks.first() else { return Ok(()) };
    let (rank, tokens) = (shared.rank, first.gradient.tokens);
    assert!(tasks.len() <= TASKS && tasks.iter().all(|t| t.gradient.tokens == tokens));
    let width = 2 * rank;
    // By task, where it begins.
    let begins = |size: &dyn Fn(&Product) -> usize| {
        let mut at = 0;
        let place = |t: &Task| {
            let begin = at;
            at += size(&t.gradient);
            begin
        };
        let places: Vec<usize> = tasks.iter().map(place).collect();
        (places, at)
    };
    let channels = |g: &Product| g.sides().0.width;
    let (numbers_at, count) = begins(&|g| width * g.sides().1.width);
    let (projected_at, values) = begins(&|g| width * channels(g));
    let (factors_at, factor_count) = begins(&|g| channels(g).next_multiple_of(4));
    let (numbers, projected) = (gpu.bf16(count)?, gpu.f32(values)?);
    let (factors, gains) = (gpu.f32(factor_count)?, gpu.f32(tasks.len())?);
    let matrix = |(i, t): (usize, &Task)| {
        let (of, other) = t.gradient.sides();
        let size = rank * of.width;
        Matrix {
            split: numbers.from(2 * numbers_at[i] as u64).bf16(width * other.width),
            projected: projected.from(4 * projected_at[i] as u64).f32(2 * size),
            m: t.moments.0.f32(size),
            v: t.moments.1.f32(size),
            factors: factors.from(4 * factors_at[i] as u64).f32(of.width),
            verdict: t.verdict.holds(1, 4),
            count: (rank * other.width) as i32,
            // As `projection`: rows of the rounded matrix and then of the rest, or both side by side in every row.
            inner: if t.gradient.tall() { rank * other.width } else { rank } as i32,
            channels: of.width as i32,
            tall: t.gradient.tall() as i32,
            numbers: words(Some(&t.numbers)),
        }
    };
    let mut matrices = Matrices([matrix((0, first)); TASKS]);
    tasks.iter().enumerate().for_each(|(i, t)| matrices.0[i] = matrix((i, t)));
    let halted = shared.halted.holds(1, 4);
    let counters = shared.counters.holds(COUNTERS, 4);

    super::apollo::projections(gpu, &matrices, tasks.len(), rank)?;
    let (sums, halves) = (gpu.f32(tasks.len() * tokens * width)?, gpu.bf16(tasks.len() * tokens * width)?);
    let runs = runs(tasks);
    for run in &runs {
        let (_, other) = tasks[run.start].gradient.sides();
        let p = numbers.from(2 * numbers_at[run.start] as u64);
        let all = run.len() * width;
        let p =
            if tasks[run.start].gradient.tall() { Operand::new(p, other.width).t() } else { Operand::new(p, width) };
        let out = Output::f32(sums.from((4 * run.start * tokens * width) as u64), all);
        matmul(gpu, out, tokens, all, other.width, Operand::new(other.part, other.stride), p)?;
    }
    super::apollo::split_sums(gpu, sums.part(), tasks.len() * tokens, rank, halves.part())?;
    for run in &runs {
        for i in run.clone() {
            let g = &tasks[i].gradient;
            let (of, _) = g.sides();
            let at = 2 * (run.start * tokens + (i - run.start)) * width;
            let halves = Operand::new(halves.from(at as u64), run.len() * width);
            let (to, side) = (projected.from(4 * projected_at[i] as u64), Operand::new(of.part, of.stride));
            match g.tall() {
                true => matmul(gpu, Output::f32(to, width), of.width, width, tokens, side.t(), halves)?,
                false => matmul(gpu, Output::f32(to, of.width), width, of.width, tokens, halves.t(), side)?,
            }
        }
    }
    let (limit, counter) = (shared.limit, shared.counters);
    super::apollo::judge_projections(gpu, &matrices, tasks.len(), rank, limit, shared.halted, counter)?;
    super::apollo::moments_all(gpu, &matrices, tasks.len(), rank, shared.rates, shared.halted)?;
    drop((numbers, projected, sums, halves));

    let mut norms = Norms {
        side: [Map([0; 16]); TASKS],
        of: [Norm { gram: 0, factors: 0, last: 0, gain: 0, verdict: 0, channels: 0, rate: 0.0 }; TASKS],
        first: [0; TASKS + 1],
    };
    let mut grams = Vec::new();
    for run in &runs {
        let gram = gram(gpu, &tasks[run.start].gradient)?;
        for i in run.clone() {
            let (t, (side, _)) = (&tasks[i], tasks[i].gradient.sides());
            norms.side[i] = side.map(gpu, tokens, TILE)?;
            norms.of[i] = Norm {
                gram: gram.part().f32(tokens * padded(tokens)),
                factors: matrices.0[i].factors,
                last: t.last.f32(1),
                gain: gains.from(4 * i as u64).f32(1),
                verdict: matrices.0[i].verdict,
                channels: side.width as i32,
                rate: t.rate,
            };
        }
        grams.push(gram);
    }
    let low = tokens.div_ceil(TILE);
    let pairs = low * (low + 1) / 2;
    let panels = |t: &Task| channels(&t.gradient).div_ceil(PANEL);
    // Parts of as many panels for all: some four blocks a multiprocessor, each with enough to do and none with too much.
    let all: usize = tasks.iter().map(panels).sum();
    let each = (all * pairs).div_ceil(4 * gpu.device.multiprocessors as usize).clamp(8, 32);
    for i in 0..TASKS {
        norms.first[i + 1] = norms.first[i] + tasks.get(i).map_or(0, |t| panels(t).div_ceil(each)) as i32;
    }
    let parts = norms.first[TASKS] as u32;
    let sums = gpu.take(8 * pairs as u64 * parts as u64)?;
    launch!(gpu, "gram_norms", (pairs as u32, parts, 1), (THREADS, 1, 1), SHARED;
        norms, padded(tokens) as i32, tokens as i32, shared.rates.growth, sums.part().address, halted, counters);
    drop((grams, sums));
    for (i, task) in tasks.iter().enumerate() {
        apply(gpu, task, matrices.0[i].factors, gains.from(4 * i as u64), shared)?;
    }
    Ok(())
}

/// Products of every two tokens' rows of the factor that does not have the channels.
fn gram(gpu: &Gpu, g: &Product) -> Result<Buffer> {
    let ((_, side), t) = (g.sides(), g.tokens);
    let out = gpu.f32(t * padded(t))?;
    let of = Operand::new(side.part, side.stride);
    matmul(gpu, Output::f32(out.part(), padded(t)), t, t, side.width, of, of.t())?;
    Ok(out)
}

fn padded(tokens: usize) -> usize {
    tokens.next_multiple_of(8)
}

/// As `struct Update` in the kernels.
#[repr(C)]
#[derive(Clone, Copy)]
struct Update {
    m: i32,
    n: i32,
    tokens: i32,
    factors: u64,
    by: i32,
    gain: u64,
    keep: f32,
    stochastic: i32,
    stream: Words,
    verdict: u64,
    halted: u64,
}

// SAFETY: plain numbers in C's layout, the same fields in the same order as the kernels' struct.
unsafe impl DeviceRepr for Update {}

/// `w <- round((w - factor dW gain) keep)`, as [`super::apollo::apply`].
fn apply(gpu: &Gpu, task: &Task, factors: u64, gain: Part, shared: &Shared) -> Result<()> {
    let (w, g) = (&task.weight, &task.gradient);
    assert_eq!((w.rows, w.columns), (g.rows, g.columns));
    let side = |part, stride, width| Side { part, stride, width }.map(gpu, g.tokens, DEEP);
    let (dy, x) = (side(g.dy, g.dy_stride, g.rows)?, side(g.x, g.x_stride, g.columns)?);
    let weights = Map::new(gpu, w.address, (w.rows, w.columns, w.stride), TILE / 2)?;
    let update = Update {
        m: w.rows as i32,
        n: w.columns as i32,
        tokens: g.tokens as i32,
        factors,
        by: if g.tall() { 1 } else { 2 },
        gain: gain.f32(1),
        keep: shared.keep,
        stochastic: task.rounding.is_some() as i32,
        stream: words(task.rounding.as_ref()),
        verdict: task.verdict.holds(1, 4),
        halted: shared.halted.holds(1, 4),
    };
    let tiles = u32::try_from(w.rows.div_ceil(TILE) * w.columns.div_ceil(WIDTH)).expect("a grid fits 32 bits");
    // A block goes from tile to tile, one block a multiprocessor.
    let blocks = tiles.min(gpu.device.multiprocessors);
    launch!(gpu, "update_product", (blocks, 1, 1), (128 * GROUPS, 1, 1), SHARED_UPDATE; dy, x, weights, update);
    Ok(())
}
