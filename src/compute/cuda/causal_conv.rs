//! What stands before the delta rule (see `cpu::causal_conv`): a depthwise causal convolution with SiLU over rows `[q | k | v]`,
//! and the lengths of q and k. What comes out has heads padded to [`HEAD`] columns.

use super::delta_rule::HEAD;
use super::{Buffer, Gpu, Part, Result, Weight, kernels, launch};
use crate::compute::cpu::attention::Span;
use crate::compute::cpu::delta_rule::Shape;
use cudarc::driver::DeviceRepr;

kernels!("causal_conv");

/// Most taps that a kernel may have.
pub const TAPS: usize = 4;
/// Heads of a block of the forward and of the backward kernel, half a warp each.
const FORWARD: usize = 8;
const BACKWARD: usize = 4;
/// Fewest and most rows that half a warp goes down.
const STRIPE: std::ops::RangeInclusive<usize> = 16..=64;

/// As `struct Conv` in the kernels.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Arguments {
    x: u64,
    taps: u64,
    w: u64,
    ld: i64,
    kind: i32,
    kernel: i32,
    rows: i32,
    k_heads: i32,
    v_heads: i32,
    k_dim: i32,
    v_dim: i32,
    pad: i32,
}

// SAFETY: plain numbers in C's layout, the same fields in the same order as the kernels' struct.
unsafe impl DeviceRepr for Arguments {}

/// Rows under the taps of each row of a batch (i32, four a row, the row itself last, -1 for none).
pub struct Taps {
    list: Buffer,
    rows: usize,
}

/// Of every span's rows, counted from `first` on, which is where the list begins.
fn taps(spans: &[Span], first: usize, rows: usize) -> Vec<i32> {
    let mut taps = vec![-1; rows * TAPS];
    for span in spans {
        for t in span.rows.clone() {
            let own = t - span.rows.start;
            for back in 0..TAPS {
                let from = match back.checked_sub(own) {
                    None | Some(0) => Some(t - back),
                    Some(before) if before <= span.prefix.len() => Some(span.prefix.end - before),
                    Some(_) => None,
                };
                if let Some(from) = from {
                    taps[(t - first) * TAPS + TAPS - 1 - back] = from as i32;
                }
            }
        }
    }
    taps
}

impl Taps {
    /// Of `rows` rows from `first` on, which the spans cover.
    pub fn new(gpu: &Gpu, spans: &[Span], first: usize, rows: usize) -> Result<Taps> {
        Ok(Taps { list: gpu.upload(&taps(spans, first, rows))?, rows })
    }
}

/// One call: rows `[q | k | v]` in `x`, `stride` elements apart, of which `taps` names some; the taps' weights (channels x
/// kernel).
#[derive(Clone, Copy)]
pub struct Input<'a> {
    pub x: Part,
    pub stride: usize,
    /// Rows that `x` has, those that only stand before others included.
    pub rows: usize,
    pub taps: &'a Taps,
    pub w: Weight,
    pub shape: &'a Shape,
}

impl Input<'_> {
    fn arguments(&self) -> Arguments {
        let s = self.shape;
        assert!(self.w.rows == s.channels() && self.w.columns <= TAPS && self.w.stride == self.w.columns);
        assert!(s.k_dim <= HEAD && s.v_dim <= HEAD && self.stride >= s.channels());
        Arguments {
            x: self.x.bf16(if self.rows == 0 { 0 } else { (self.rows - 1) * self.stride + s.channels() }),
            taps: self.taps.list.part().holds(self.taps.rows * TAPS, 4),
            w: self.w.address,
            ld: self.stride as i64,
            kind: self.w.number(),
            kernel: self.w.columns as i32,
            rows: self.taps.rows as i32,
            k_heads: s.k_heads as i32,
            v_heads: s.v_heads as i32,
            k_dim: s.k_dim as i32,
            v_dim: s.v_dim as i32,
            pad: 0,
        }
    }

    /// Eight channels in one access?
    fn name(&self, of: &str) -> String {
        let s = self.shape;
        let wide =
            [s.k_dim, s.v_dim, self.stride].iter().all(|n| n.is_multiple_of(8)) && self.x.address.is_multiple_of(16);
        if wide { format!("{of}_wide") } else { of.to_string() }
    }

    /// Rows of a block of `heads` heads, and the grid: one wave of four blocks a multiprocessor, where that leaves no block with too
    /// many or too few.
    fn stripes(&self, gpu: &Gpu, heads: usize) -> (usize, (u32, u32, u32)) {
        let (rows, groups) = (self.taps.rows, (2 * self.shape.k_heads + self.shape.v_heads).div_ceil(heads));
        let wave = (4 * gpu.device.multiprocessors as usize / groups).max(1);
        let stripe = rows.div_ceil(wave).next_multiple_of(4).clamp(*STRIPE.start(), *STRIPE.end());
        (stripe, (rows.div_ceil(stripe).max(1) as u32, groups as u32, 1))
    }
}

/// The most rows of partial sums that [`backward`] has of `rows` rows.
pub fn stripes(rows: usize) -> usize {
    rows.div_ceil(*STRIPE.start()).max(1)
}

/// What [`forward`] makes.
pub struct Convolved {
    /// Rows x (2 k_heads + v_heads) HEAD: q, k and v.
    pub x: Buffer,
    /// (2 k_heads, rows), f32: what q and k are to be multiplied with, 1 by their length; of q divided by the root of k_dim too.
    pub lengths: Buffer,
}

/// Of the rows of the taps.
pub fn forward(gpu: &Gpu, input: &Input) -> Result<Convolved> {
    let rows = input.taps.rows;
    let heads = 2 * input.shape.k_heads + input.shape.v_heads;
    let (x, lengths) = (gpu.bf16(rows * heads * HEAD)?, gpu.f32(rows * 2 * input.shape.k_heads)?);
    let (stripe, grid) = input.stripes(gpu, FORWARD);
    launch!(gpu, &input.name("conv_forward"), grid, (16 * FORWARD as u32, 1, 1), 0;
        input.arguments(), x.part().address, lengths.part().address, stripe as i32);
    Ok(Convolved { x, lengths })
}

/// From the gradients of q and k by value head, as [`delta_rule`](super::delta_rule) gives them, and of v (each rows x v_heads
/// HEAD): `dx`, rows `stride` apart, and `dw (channels x kernel, f32)`. Rows that only stand before others are constants.
pub fn backward(
    gpu: &Gpu,
    input: &Input,
    [dq, dk, dv]: [Part; 3],
    (dx, stride): (Part, usize),
    dw: Part,
) -> Result<()> {
    let (s, rows) = (input.shape, input.taps.rows);
    let [dq, dk, dv] = [dq, dk, dv].map(|x| x.bf16(rows * s.v_heads * HEAD));
    let (stripe, grid) = input.stripes(gpu, BACKWARD);
    let (stripes, n) = (grid.0 as usize, s.channels() * input.w.columns);
    let partial = gpu.f32(stripes * n)?;
    dx.bf16(if rows == 0 { 0 } else { (rows - 1) * stride + s.channels() });
    let wide = stride.is_multiple_of(8) && dx.address.is_multiple_of(16);
    let name = if wide { input.name("conv_backward") } else { "conv_backward".to_string() };
    launch!(gpu, &name, grid, (16 * BACKWARD as u32, 1, 1), 0;
        input.arguments(), dq, dk, dv, dx.address, stride as i64, stripe as i32, partial.part().address);
    super::rms_norm::sum_partial(gpu, partial.part(), stripes, n, dw)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn taps_reach_into_the_prefix_and_stop_before_it() {
        let span = |rows, prefix| Span { rows, prefix };
        let spans = [span(0..2, 0..0), span(2..4, 0..2)];
        assert_eq!(taps(&spans, 0, 4), [-1, -1, -1, 0, -1, -1, 0, 1, -1, 0, 1, 2, 0, 1, 2, 3]);
        assert_eq!(taps(&spans[1..], 2, 2), [-1, 0, 1, 2, 0, 1, 2, 3]);
    }
}
