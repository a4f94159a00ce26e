//! The update of a matrix from the factors of its gradient: `dW (m x n) = dy^T x` over the tokens of a step. What the optimizer
//! asks of dW (its projection, the norm of what is applied) comes of dy and x; dW itself is made tile by tile on its way into the
//! weights (`kernels/apollo_hopper.cu`). Saves four passes over dW, for products whose cost grows with the square of the
//! tokens: worth it where these are few beside the matrix's sides.

use super::apollo::{Apply, Factors, Projection, Rates, Verdict, Words, words};
use super::matmul::{Operand, Output, matmul};
use super::{Buffer, Gpu, GpuError, Part, Result, Weight, launch};
use crate::compute::cpu::weight::Kind;
use crate::memory::cuda::CudaError;
use cudarc::driver::{DeviceRepr, sys};

static KERNELS: crate::memory::cuda::Ptx = crate::memory::cuda::Ptx {
    name: "compute/apollo_hopper",
    // For 9.0 alone, which `fits` sees to.
    baseline: (90, include_str!("kernels/apollo_hopper.ptx")),
    exact: &[],
};

const THREADS: u32 = 256;
/// Rows and columns of a block's tile.
const TILE: usize = 128;
/// Columns of a tile that lie side by side in shared memory.
const PANEL: usize = 64;
/// Shared memory: three stages of two tiles of 64 by 128, and what aligns them.
const SHARED: u32 = 3 * 32768 + 1024;

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

/// The projected gradient in two summands (f32, see [`super::apollo::measure`]), by which `verdict` is made: its squares, and
/// their sum, may be at most `limit`. With `P` in two summands, `P dW^T = (P x^T) dy`, whose first product is rounded to two
/// bf16 again.
pub fn project(
    gpu: &Gpu,
    g: &Product,
    projection: &Projection,
    projected: Part,
    limit: f32,
    verdict: &Verdict,
) -> Result<()> {
    let (channels, other) = g.sides();
    let (rank, width, tokens, tall) = (projection.rank, 2 * projection.rank, g.tokens, g.tall());
    let split = projection.split.as_ref().map_or(Part::NONE, Buffer::part);
    let (sums, halves) = (gpu.f32(tokens * width)?, gpu.bf16(tokens * width)?);
    let p = if tall { Operand::new(split, other.width).t() } else { Operand::new(split, width) };
    let from = Operand::new(other.part, other.stride);
    matmul(gpu, Output::f32(sums.part(), width), tokens, width, other.width, from, p)?;
    super::apollo::split_sums(gpu, sums.part(), tokens, rank, halves.part())?;
    let (of, halves) = (Operand::new(channels.part, channels.stride), Operand::new(halves.part(), width));
    match tall {
        true => matmul(gpu, Output::f32(projected, width), channels.width, width, tokens, of.t(), halves)?,
        false => matmul(gpu, Output::f32(projected, channels.width), width, channels.width, tokens, halves.t(), of)?,
    }
    super::apollo::judge_projection(gpu, projected, width * channels.width, limit, verdict)
}

/// Products of every two tokens' rows of the factor that does not have the channels, for [`norm`]: that of x serves every
/// tall matrix with that input.
pub fn gram(gpu: &Gpu, g: &Product) -> Result<Buffer> {
    let ((_, side), t) = (g.sides(), g.tokens);
    let out = gpu.f32(t * padded(t))?;
    let of = Operand::new(side.part, side.stride);
    matmul(gpu, Output::f32(out.part(), padded(t)), t, t, side.width, of, of.t())?;
    Ok(out)
}

fn padded(tokens: usize) -> usize {
    tokens.next_multiple_of(8)
}

/// As `struct Norm` in the kernels.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Norm {
    sums: u64,
    last: u64,
    gain: u64,
    counter: u64,
    growth: f32,
    rate: f32,
}

// SAFETY: plain numbers in C's layout, the same fields in the same order as the kernels' struct.
unsafe impl DeviceRepr for Norm {}

/// `gain` (f32) from the norm of the gradient times `factors` (f32, by channel) and that of the update before, `last`.
#[allow(clippy::too_many_arguments)]
pub fn norm(
    gpu: &Gpu,
    g: &Product,
    gram: Part,
    factors: Part,
    rates: &Rates,
    last: Part,
    gain: Part,
    verdict: &Verdict,
) -> Result<()> {
    let ((side, _), t) = (g.sides(), g.tokens);
    let (low, chunks) = (t.div_ceil(TILE), side.width.div_ceil(PANEL));
    let pairs = low * (low + 1) / 2;
    let parts = (2 * gpu.device.multiprocessors as usize / pairs).clamp(1, chunks.div_ceil(4));
    let sums = gpu.take(8 * (pairs * parts) as u64)?;
    let (vp, hp) = verdict.parts();
    let norm = Norm {
        sums: sums.part().address,
        last: last.f32(1),
        gain: gain.f32(1),
        counter: verdict.counter.holds(1, 4),
        growth: rates.growth,
        rate: rates.rate,
    };
    launch!(gpu, "gram_norm", (pairs as u32, parts as u32, 1), (THREADS, 1, 1), SHARED;
        side.map(gpu, t, TILE)?, gram.f32(t * padded(t)), padded(t) as i32, t as i32, side.width as i32,
        factors.f32(side.width), norm, vp, hp);
    Ok(())
}

/// As `struct Update` in the kernels.
#[repr(C)]
#[derive(Clone, Copy)]
struct Update {
    m: i32,
    n: i32,
    tokens: i32,
    late: i32,
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
pub fn update(
    gpu: &Gpu,
    w: &Weight,
    g: &Product,
    factors: Factors,
    gain: Part,
    how: &Apply,
    verdict: &Verdict,
) -> Result<()> {
    assert_eq!((w.rows, w.columns), (g.rows, g.columns));
    let (factors, by) = match factors {
        Factors::One => (0, 0),
        Factors::Rows(f) => (f.f32(w.rows), 1),
        Factors::Columns(f) => (f.f32(w.columns), 2),
    };
    assert!(by > 0, "a matrix that is projected to more than one has a factor by channel");
    let side = |part, stride, width| Side { part, stride, width }.map(gpu, g.tokens, PANEL);
    let (dy, x) = (side(g.dy, g.dy_stride, g.rows)?, side(g.x, g.x_stride, g.columns)?);
    let weights = Map::new(gpu, w.address, (w.rows, w.columns, w.stride), TILE)?;
    let (verdict, halted) = verdict.parts();
    let a = Update {
        m: w.rows as i32,
        n: w.columns as i32,
        tokens: g.tokens as i32,
        late: gpu.device.multiprocessors as i32,
        factors,
        by,
        gain: gain.f32(1),
        keep: how.keep,
        stochastic: how.stochastic.is_some() as i32,
        stream: words(how.stochastic),
        verdict,
        halted,
    };
    let tiles = w.rows.div_ceil(TILE) * w.columns.div_ceil(TILE);
    launch!(gpu, "update_product", (u32::try_from(tiles).expect("a grid fits 32 bits"), 1, 1), (THREADS, 1, 1), SHARED;
        dy, x, weights, a);
    Ok(())
}
