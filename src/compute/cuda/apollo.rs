//! The arithmetic of one update (see `cpu::apollo`), with the same random numbers and the same rounding to the bit. Whether
//! a tensor is touched at all is decided on the device, so that the host never waits in the middle of a step.

use super::factored::{Matrices, Matrix};
use super::{Buffer, Gpu, Part, Result, Weight, blocks, kernels, launch};
use crate::compute::cpu::weight::Kind;
use crate::compute::rng::Stream;

kernels!("apollo");

const BLOCK: usize = 256;
/// Rows whose columns' squares one block adds.
const SPAN: usize = 64;

/// A gradient in bf16 or, where `wide`, f32: `rows x columns`, tight. With `map` (i32, by row of the weight) row i of the
/// weight has row map[i] of it, or none where that is negative.
#[derive(Clone, Copy)]
pub struct Gradient {
    pub part: Part,
    pub wide: bool,
    pub rows: usize,
    pub columns: usize,
    pub map: Option<Part>,
}

impl Gradient {
    pub fn new(part: Part, wide: bool, rows: usize, columns: usize) -> Gradient {
        part.holds(rows * columns, if wide { 4 } else { 2 });
        Gradient { part, wide, rows, columns, map: None }
    }
}

/// What becomes of a tensor in this step: `verdict` (i32: 0 update, 1 zero gradient, 2 not finite or too large), and `halted`
/// (i32), set when any tensor's verdict is 2: no later kernel of the step then changes anything. `counter` (i32) is zero
/// whenever no kernel runs.
#[derive(Clone, Copy)]
pub struct Verdict {
    pub verdict: Part,
    pub halted: Part,
    pub counter: Part,
}

impl Verdict {
    fn parts(&self) -> (u64, u64) {
        (self.verdict.holds(1, 4), self.halted.holds(1, 4))
    }
}

/// Rows, and columns, that one block of the kernels that judge has.
const ROWS: usize = 32;
const COLUMNS: usize = 32;

/// Decides on a gradient while [`measure`] goes over its parts: every channel's sum of squares and their sum may be at most
/// `limit`.
pub struct Judge<'a> {
    verdict: &'a Verdict,
    limit: f32,
    /// Sums of blocks (f64), and how many there are of all parts together.
    sums: Buffer,
    total: usize,
}

impl<'a> Judge<'a> {
    /// Of a gradient of `channels` rows where it is `tall`, else columns.
    pub fn new(gpu: &Gpu, verdict: &'a Verdict, limit: f32, channels: usize, tall: bool) -> Result<Judge<'a>> {
        let total = channels.div_ceil(if tall { ROWS } else { COLUMNS });
        Ok(Judge { verdict, limit, sums: gpu.take(8 * total as u64)?, total })
    }

    fn words(&self) -> JudgeWords {
        let (verdict, halted) = self.verdict.parts();
        let counter = self.verdict.counter.holds(1, 4);
        let (sums, total) = (self.sums.part().holds(self.total, 8), self.total as i32);
        JudgeWords { sums, verdict, halted, counter, limit: self.limit, total }
    }
}

/// As `struct Judge` in the kernels.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct JudgeWords {
    sums: u64,
    verdict: u64,
    halted: u64,
    counter: u64,
    limit: f32,
    total: i32,
}

// SAFETY: plain numbers in C's layout, the same fields in the same order as the kernels' struct.
unsafe impl cudarc::driver::DeviceRepr for JudgeWords {}

/// As `struct Limits` in the kernels.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Limits {
    squares: u64,
    sums: u64,
    last: u64,
    factors: u64,
    gain: u64,
    counter: u64,
    growth: f32,
    rate: f32,
    by_channel: i32,
}

// SAFETY: as above.
unsafe impl cudarc::driver::DeviceRepr for Limits {}

/// How weights are rounded, as `cpu::apollo::Apply`.
pub struct Apply<'a> {
    pub stochastic: Option<&'a Stream>,
    pub keep: f32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct Words([u32; 5]);

// SAFETY: five words in C's layout, as `struct Stream` in the kernels.
unsafe impl cudarc::driver::DeviceRepr for Words {}

pub(super) fn words(stream: Option<&Stream>) -> Words {
    Words(stream.map_or([0; 5], |s| s.words()))
}

/// What multiplies a gradient: by row or by column of the whole matrix (f32), and in all `gain` (f32, one value).
#[derive(Clone, Copy)]
pub enum Factors {
    One,
    Rows(Part),
    Columns(Part),
}

/// The matrix that projects, in the forms that [`project`] takes.
pub struct Projection {
    rank: usize,
    /// Rank 1: f32.
    single: Option<Buffer>,
    /// Else bf16 twice: rounded, and what rounding lost.
    split: Option<Buffer>,
}

/// Fills a projection of a dimension of `small` to `rank`, in the stream's order (rank x small of a tall matrix, small x rank
/// of a wide one), variance 1/rank.
pub fn projection(gpu: &Gpu, stream: &Stream, small: usize, rank: usize, tall: bool) -> Result<Projection> {
    let (count, scale) = (rank * small, 1.0 / (rank as f32).sqrt());
    let (single, split) = match rank {
        1 => (Some(gpu.f32(count)?), None),
        _ => (None, Some(gpu.bf16(2 * count)?)),
    };
    let part = |b: &Option<Buffer>| b.as_ref().map_or(0, |b| b.part().address);
    // Tall: rows of the rounded matrix, then rows of the rest. Wide: both side by side in every row.
    let inner = if tall { count } else { rank };
    launch!(gpu, "projection", (blocks(count.div_ceil(4), BLOCK), 1, 1), (BLOCK as u32, 1, 1), 0;
        words(Some(stream)), count as i64, scale, part(&single), part(&split), inner as i64);
    Ok(Projection { rank, single, split })
}

/// `out (count, bf16)` = normals times `scale`: weights for tests.
pub fn normals(gpu: &Gpu, stream: &Stream, count: usize, scale: f32, out: Part) -> Result<()> {
    let split = gpu.bf16(2 * count)?;
    launch!(gpu, "projection", (blocks(count.div_ceil(4), BLOCK), 1, 1), (BLOCK as u32, 1, 1), 0;
        words(Some(stream)), count as i64, scale, 0u64, split.part().address, count as i64);
    gpu.copy(split.part().first(2 * count as u64), out)
}

/// The first pass over rows `first..` of a gradient of a matrix m x n, of which `g` is a part (all of it, for a wide matrix):
/// sums of squares by channel into `squares` (f32), which `judge` sees; the projected gradient into `projected` (f32, twice the
/// size for ranks above 1: in two summands).
#[allow(clippy::too_many_arguments)]
pub fn measure(
    gpu: &Gpu,
    g: &Gradient,
    tall: bool,
    first: usize,
    projection: Option<&Projection>,
    squares: Part,
    projected: Part,
    judge: &Judge,
) -> Result<()> {
    let (rows, n) = (g.rows, g.columns);
    let single = projection.and_then(|p| p.single.as_ref()).map(Buffer::part);
    let suffix = match (g.wide, n % 8) {
        (true, _) => "_f32",
        (false, 0) => "_wide",
        _ => "",
    };
    let width = if suffix == "_wide" { 8 } else { 1 };
    if tall {
        assert!(first.is_multiple_of(ROWS) && first / ROWS + rows.div_ceil(ROWS) <= judge.total);
        let r = if single.is_some() { projected.from(4 * first as u64).f32(rows) } else { 0 };
        launch!(gpu, &format!("square_rows{suffix}"), (blocks(rows, ROWS), 1, 1), (BLOCK as u32, 1, 1), 0;
            g.part.address, rows as i32, n as i32, single.map_or(0, |p| p.f32(n)), r,
            squares.from(4 * first as u64).f32(rows), first as i32, judge.words());
    } else {
        assert!(first == 0 && n.div_ceil(COLUMNS) == judge.total);
        let count = rows.div_ceil(SPAN);
        let planes = 1 + single.is_some() as usize;
        let partial = gpu.f32(planes * count * n)?;
        launch!(gpu, &format!("square_columns{suffix}"), (blocks(n, 128 * width), count as u32, 1), (128, 1, 1), 0;
            g.part.address, rows as i32, n as i32, SPAN as i32, single.map_or(0, |p| p.f32(rows)), partial.part().address);
        launch!(gpu, "sum_columns", (blocks(n, COLUMNS), 1, 1), (BLOCK as u32, 1, 1), 0;
            partial.part().address, count as i32, n as i32, squares.f32(n),
            if single.is_some() { projected.f32(n) } else { 0 }, judge.words());
    }
    let Some(p) = projection.filter(|p| p.single.is_none()) else { return Ok(()) };
    use super::matmul::{Operand, Output, matmul};
    // The products want bf16; a gradient in f32 is small.
    let narrow;
    let part = match g.wide {
        false => g.part,
        true => {
            narrow = gpu.bf16(rows * n)?;
            let g = Weight { address: g.part.address, kind: Kind::F32, rows, columns: n, stride: n, from_one: false };
            super::linear::narrow(gpu, &g, narrow.part())?;
            narrow.part()
        }
    };
    let split = p.split.as_ref().map_or(Part::NONE, Buffer::part);
    let width = 2 * p.rank;
    match tall {
        true => {
            let out = projected.from((4 * first * width) as u64);
            let split = Operand::new(split, n).t();
            matmul(gpu, Output::f32(out, width), rows, width, n, Operand::new(part, n), split)
        }
        false => {
            let split = Operand::new(split, width).t();
            matmul(gpu, Output::f32(projected, n), width, n, rows, split, Operand::new(part, n))
        }
    }
}

/// `to (rows x 2 n, bf16)` = the sum of the two halves of each row of `from (rows x 2 n, f32)`, as two summands side by side.
pub(super) fn split_sums(gpu: &Gpu, from: Part, rows: usize, n: usize, to: Part) -> Result<()> {
    launch!(gpu, "split_sums", (blocks(rows * n, BLOCK), 1, 1), (BLOCK as u32, 1, 1), 0;
        from.f32(2 * rows * n), rows as i32, n as i32, to.bf16(2 * rows * n));
    Ok(())
}

/// [`projection`] of `count` matrices, to a rank above 1.
pub(super) fn projections(gpu: &Gpu, all: &Matrices, count: usize, rank: usize) -> Result<()> {
    let most = all.0[..count].iter().map(|m| m.count as usize).max().unwrap_or(0);
    launch!(gpu, "projections", (blocks(most.div_ceil(4), BLOCK), count as u32, 1), (BLOCK as u32, 1, 1), 0;
        *all, 1.0 / (rank as f32).sqrt());
    Ok(())
}

/// Decides on `count` gradients by their projections in two summands: squares, and their sum, may be at most `limit`.
pub(super) fn judge_projections(
    gpu: &Gpu,
    all: &Matrices,
    count: usize,
    rank: usize,
    limit: f32,
    halted: Part,
    counter: Part,
) -> Result<()> {
    assert!(rank.is_multiple_of(4));
    let most = all.0[..count].iter().map(|m| 2 * rank * m.channels as usize).max().unwrap_or(0);
    let grid = blocks(most, 16 * BLOCK).clamp(1, 4 * gpu.device.multiprocessors);
    let sums = gpu.take(8 * grid as u64 * count as u64)?;
    launch!(gpu, "judge_projections", (grid, count as u32, 1), (BLOCK as u32, 1, 1), 0;
        *all, rank as i32, sums.part().address, limit, halted.holds(1, 4), counter.holds(1, 4));
    Ok(())
}

/// Moments of `count` matrices after one more projected gradient in two summands, and factors by channel.
pub(super) fn moments_all(
    gpu: &Gpu,
    all: &Matrices,
    count: usize,
    rank: usize,
    rates: &Rates,
    halted: Part,
) -> Result<()> {
    assert!(rank.is_multiple_of(4));
    let grid = |m: &Matrix| blocks(m.channels as usize, if m.tall == 1 { 64 } else { COLUMNS });
    let most = all.0[..count].iter().map(grid).max().unwrap_or(0);
    launch!(gpu, "moments_all", (most, count as u32, 1), (BLOCK as u32, 1, 1), 0;
        *all, rank as i32, rates.betas.0, rates.betas.1, rates.eps, halted.holds(1, 4));
    Ok(())
}

/// Numbers of the optimizer that a tensor's update takes.
#[derive(Debug, Clone, Copy)]
pub struct Rates {
    pub betas: (f32, f32),
    pub eps: f32,
    /// Learning rate with bias correction and scale.
    pub rate: f32,
    /// The limiter's, 0 for none.
    pub growth: f32,
}

/// Moments, factors and limiter after [`measure`]: `factors` (f32, channels) and `gain` (f32). `last` (f32) is the norm of the
/// update before, negative for none.
#[allow(clippy::too_many_arguments)]
pub fn factors(
    gpu: &Gpu,
    (channels, rank, tall, by_channel): (usize, usize, bool, bool),
    projected: Part,
    squares: Part,
    (m, v): (Part, Part),
    rates: &Rates,
    last: Part,
    (factors, gain): (Part, Part),
    verdict: &Verdict,
) -> Result<()> {
    let (name, per) = match tall {
        true if rank.is_multiple_of(4) => ("moments_tall_wide", 64),
        true => ("moments_tall", BLOCK / 32),
        false => ("moments_flat", COLUMNS),
    };
    let (halves, grid) = (rank > 1, blocks(channels, per));
    let sums = gpu.take(24 * grid as u64)?;
    let (vp, hp) = verdict.parts();
    let size = rank * channels;
    let limits = Limits {
        squares: squares.f32(channels),
        sums: sums.part().address,
        last: last.f32(1),
        factors: factors.f32(channels),
        gain: gain.f32(1),
        counter: verdict.counter.holds(1, 4),
        growth: rates.growth,
        rate: rates.rate,
        by_channel: by_channel as i32,
    };
    launch!(gpu, name, (grid, 1, 1), (BLOCK as u32, 1, 1), 0;
        projected.f32(if halves { 2 * size } else { size }), halves as i32, channels as i32, rank as i32,
        rates.betas.0, rates.betas.1, rates.eps, m.f32(size), v.f32(size), limits, vp, hp);
    Ok(())
}

/// The second pass: `w <- round((w - factor g gain) keep)` for the rows `first..` of the weight that `g` has (all, with a map).
#[allow(clippy::too_many_arguments)]
pub fn apply(
    gpu: &Gpu,
    w: &Weight,
    g: &Gradient,
    first: usize,
    factors: Factors,
    gain: Part,
    how: &Apply,
    verdict: &Verdict,
) -> Result<()> {
    let (rows, n) = (if g.map.is_some() { w.rows } else { g.rows }, w.columns);
    assert!(first + rows <= w.rows && n == g.columns);
    let (factors, by) = match factors {
        Factors::One => (0, 0),
        Factors::Rows(f) => (f.f32(w.rows), 1),
        Factors::Columns(f) => (f.f32(n), 2),
    };
    let map = g.map.map_or(0, |m| m.holds(w.rows, 4));
    let (vp, hp) = verdict.parts();
    let stochastic = how.stochastic.is_some() as i32;
    let aligned = w.kind == Kind::Bf16
        && n.is_multiple_of(8)
        && w.stride.is_multiple_of(8)
        && (w.address | factors).is_multiple_of(16);
    if aligned && rows * n / 8 < u32::MAX as usize {
        let name = if g.wide { "apply_wide_f32" } else { "apply_wide" };
        let grid = blocks(rows * n / 8, BLOCK).min(32 * gpu.device.multiprocessors);
        launch!(gpu, name, (grid, 1, 1), (BLOCK as u32, 1, 1), 0;
            w.address, w.stride as i64, g.part.address, rows as i32, n as i32, first as i64, map, factors, by,
            gain.f32(1), how.keep, stochastic, words(how.stochastic), vp, hp);
    } else {
        launch!(gpu, "apply", (blocks(rows * n, BLOCK), 1, 1), (BLOCK as u32, 1, 1), 0;
            w.address, w.number(), w.stride as i64, g.part.address, g.wide as i32, rows as i32, n as i32, first as i64,
            map, factors, by, gain.f32(1), how.keep, stochastic, words(how.stochastic), vp, hp);
    }
    Ok(())
}

/// Adam on the rows `first..` of the weight that `g` has, moments of the whole weight.
#[allow(clippy::too_many_arguments)]
pub fn adam(
    gpu: &Gpu,
    w: &Weight,
    g: &Gradient,
    first: usize,
    (m, v): (Part, Part),
    rates: &Rates,
    how: &Apply,
    verdict: &Verdict,
) -> Result<()> {
    let (rows, n) = (if g.map.is_some() { w.rows } else { g.rows }, w.columns);
    assert!(first + rows <= w.rows && n == g.columns);
    let size = w.rows * n;
    let (vp, hp) = verdict.parts();
    launch!(gpu, "adam", (blocks(rows * n, BLOCK), 1, 1), (BLOCK as u32, 1, 1), 0;
        w.address, w.number(), w.stride as i64, g.part.address, g.wide as i32, rows as i32, n as i32, first as i64,
        g.map.map_or(0, |m| m.holds(w.rows, 4)), m.f32(size), v.f32(size), rates.betas.0, rates.betas.1, rates.eps,
        rates.rate, how.keep, how.stochastic.is_some() as i32, words(how.stochastic), vp, hp);
    Ok(())
}

/// A weight that is a vector, on its way to an update by Adam: as `struct Vector` in the kernels.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Vector {
    w: u64,
    g: u64,
    m: u64,
    v: u64,
    verdict: u64,
    n: i32,
    kind: i32,
    rate: f32,
    stream: Words,
}

impl Vector {
    /// `g (f32)` is its gradient. Its random numbers are drawn where the rounding that [`adam_vectors`] is told is stochastic.
    pub fn new(w: &Weight, g: Part, (m, v): (Part, Part), rate: f32, stream: &Stream, verdict: Part) -> Vector {
        assert_eq!(w.rows, 1);
        let n = w.columns;
        let (g, m, v, verdict) = (g.f32(n), m.f32(n), v.f32(n), verdict.holds(1, 4));
        Vector { w: w.address, g, m, v, verdict, n: n as i32, kind: w.number(), rate, stream: words(Some(stream)) }
    }
}

/// The most vectors of one call of [`adam_vectors`].
pub const VECTORS: usize = 8;

/// As `struct Vectors` in the kernels.
#[repr(C)]
#[derive(Clone, Copy)]
struct Vectors([Vector; VECTORS]);

// SAFETY: plain numbers in C's layout, the same fields in the same order as the kernels' structs.
unsafe impl cudarc::driver::DeviceRepr for Vectors {}

/// Adam on vectors, each judged by itself, and held back where one before it is bad: its squares, and their sum, may be at most
/// `limit`. Of `rates`, the rate is each vector's own; `verdict` has what they share.
pub fn adam_vectors(
    gpu: &Gpu,
    vectors: &[Vector],
    rates: &Rates,
    (stochastic, keep): (bool, f32),
    limit: f32,
    verdict: &Verdict,
) -> Result<()> {
    let Some(&first) = vectors.first() else { return Ok(()) };
    let mut all = Vectors([first; VECTORS]);
    all.0[..vectors.len()].copy_from_slice(vectors);
    let (halted, counter) = (verdict.halted.holds(1, 4), verdict.counter.holds(1, 4));
    launch!(gpu, "adam_vectors", (vectors.len() as u32, 1, 1), (1024, 1, 1), 0;
        all, rates.betas.0, rates.betas.1, rates.eps, keep, stochastic as i32, limit, halted, counter);
    Ok(())
}

/// Row i of `to (rows x n, f32)` = row map[i] of `from`, or zeros.
pub fn spread(gpu: &Gpu, from: Part, map: Part, rows: usize, n: usize, to: Part) -> Result<()> {
    launch!(gpu, "spread", (blocks(rows * n, BLOCK), 1, 1), (BLOCK as u32, 1, 1), 0;
        from.address, map.holds(rows, 4), rows as i32, n as i32, to.f32(rows * n));
    Ok(())
}
