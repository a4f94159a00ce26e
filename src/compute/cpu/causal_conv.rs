//! Depthwise causal convolution with SiLU, a few taps a channel (Qwen3.5's `conv1d`), over packed sequences: what stands
//! before a span's first row are the last rows of its prefix, and before those nothing. Layout of rows: T x C. Weights: C x K,
//! the last tap on the row itself, as PyTorch keeps them.

use super::attention::Span;
use super::math::{exp, vectorized};
use rayon::prelude::*;

/// No row: nothing stands there.
const NONE: usize = usize::MAX;
/// Channels that one task sums the weights' gradient of.
const CHANNELS: usize = 64;

/// For every row of every span the K rows under its taps, the row itself last; NONE elsewhere.
fn taps(spans: &[Span], rows: usize, kernel: usize) -> Vec<usize> {
    let mut taps = vec![NONE; rows * kernel];
    for span in spans {
        for t in span.rows.clone() {
            for back in 0..kernel {
                let own = t - span.rows.start;
                taps[t * kernel + kernel - 1 - back] = match back.checked_sub(own) {
                    None | Some(0) => t - back,
                    Some(before) if before <= span.prefix.len() => span.prefix.end - before,
                    Some(_) => NONE,
                };
            }
        }
    }
    taps
}

/// K x C.
fn transposed(w: &[f32], kernel: usize) -> Vec<f32> {
    let channels = w.len() / kernel;
    (0..kernel).flat_map(|j| (0..channels).map(move |c| w[c * kernel + j])).collect()
}

vectorized! {
    fn multiply_add(out: &mut [f32], w: &[f32], x: &[f32]) {
        for ((o, &w), &x) in out.iter_mut().zip(w).zip(x) {
            *o += w * x;
        }
    }
}

vectorized! {
    fn silu(x: &mut [f32]) {
        for x in x {
            *x /= 1.0 + exp(-*x);
        }
    }
}

vectorized! {
    /// `dy *= silu'(z)`.
    fn silu_backward(dy: &mut [f32], z: &[f32]) {
        for (dy, &z) in dy.iter_mut().zip(z) {
            let sigmoid = 1.0 / (1.0 + exp(-z));
            *dy *= sigmoid * (1.0 + z * (1.0 - sigmoid));
        }
    }
}

/// The convolution of one row, before the activation.
fn convolve(x: &[f32], w: &[f32], taps: &[usize], z: &mut [f32]) {
    let channels = z.len();
    z.fill(0.0);
    for (w, &row) in w.chunks_exact(channels).zip(taps) {
        if row != NONE {
            multiply_add(z, w, &x[row * channels..(row + 1) * channels]);
        }
    }
}

/// `y (T x C)` for every row of every span; other rows are left as they were.
pub fn forward(x: &[f32], w: &[f32], kernel: usize, spans: &[Span], y: &mut [f32]) {
    let channels = w.len() / kernel;
    assert_eq!(x.len(), y.len());
    let (w, taps) = (transposed(w, kernel), taps(spans, x.len() / channels, kernel));
    y.par_chunks_mut(channels).zip(taps.par_chunks(kernel)).filter(|(_, taps)| taps[kernel - 1] != NONE).for_each(
        |(y, taps)| {
            convolve(x, &w, taps, y);
            silu(y);
        },
    );
}

/// Gradients of rows `first..` of `x`, in which all spans lie; their prefixes lie before them and get none. `dy` (rows
/// `first..`) is used up, `dx` (rows `first..`) is written, `dw += ...`.
#[allow(clippy::too_many_arguments)]
pub fn backward(
    dy: &mut [f32],
    x: &[f32],
    w: &[f32],
    kernel: usize,
    spans: &[Span],
    first: usize,
    dx: &mut [f32],
    dw: &mut [f32],
) {
    let channels = w.len() / kernel;
    let rows = x.len() / channels;
    assert_eq!((dy.len(), dx.len(), dw.len()), ((rows - first) * channels, dy.len(), w.len()));
    let (w, taps) = (transposed(w, kernel), taps(spans, rows, kernel));
    let mut ends = vec![first; rows];
    for span in spans {
        debug_assert!(span.rows.start >= first && span.prefix.end <= first, "a prefix is never trained");
        ends[span.rows.clone()].fill(span.rows.end);
    }
    dy.par_chunks_mut(channels).zip(taps.par_chunks(kernel).skip(first)).for_each_init(
        || vec![0.0; channels],
        |z, (dy, taps)| {
            convolve(x, &w, taps, z);
            silu_backward(dy, z);
        },
    );
    let dz = &*dy;
    let row = |t: usize| &dz[(t - first) * channels..(t - first + 1) * channels];
    dx.par_chunks_mut(channels).zip(&ends[first..]).enumerate().for_each(|(i, (dx, &end))| {
        dx.fill(0.0);
        for (back, w) in (0..kernel).zip(w.chunks_exact(channels).rev()) {
            if first + i + back < end {
                multiply_add(dx, w, row(first + i + back));
            }
        }
    });
    dw.par_chunks_mut(CHANNELS * kernel).enumerate().for_each(|(task, dw)| {
        let from = task * CHANNELS;
        for t in first..rows {
            for (j, &tap) in taps[t * kernel..(t + 1) * kernel].iter().enumerate().filter(|(_, tap)| **tap != NONE) {
                let (dz, x) = (&row(t)[from..], &x[tap * channels + from..]);
                for ((dw, dz), x) in dw.iter_mut().skip(j).step_by(kernel).zip(dz).zip(x) {
                    *dw += dz * x;
                }
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::super::testing::{check_gradient, random, weigh};
    use super::*;

    const K: usize = 4;
    const C: usize = 3;

    /// Contexts of 2 rows (shorter than the taps reach) and of 5, a continuation of each, and a sequence alone.
    fn spans() -> (Vec<Span>, usize, usize) {
        let span = |rows, prefix| Span { rows, prefix };
        (vec![span(0..2, 0..0), span(2..7, 0..0), span(7..9, 0..2), span(9..15, 2..7), span(15..18, 0..0)], 7, 18)
    }

    /// Every sequence by itself, in f64.
    fn plain(x: &[f32], w: &[f32], spans: &[Span]) -> Vec<f64> {
        let mut y = vec![0.0; x.len()];
        for span in spans {
            let sequence: Vec<usize> = span.prefix.clone().chain(span.rows.clone()).collect();
            for at in span.prefix.len()..sequence.len() {
                for c in 0..C {
                    let tap = |j: usize| match (at + j + 1).checked_sub(K) {
                        Some(i) => x[sequence[i] * C + c] as f64 * w[c * K + j] as f64,
                        None => 0.0,
                    };
                    let z: f64 = (0..K).map(tap).sum();
                    y[sequence[at] * C + c] = z / (1.0 + (-z).exp());
                }
            }
        }
        y
    }

    #[test]
    fn packed_rows_equal_every_sequence_by_itself() {
        let (spans, _, rows) = spans();
        let (x, w) = (random(rows * C, 1), random(C * K, 2));
        let mut y = vec![0.0; rows * C];
        forward(&x, &w, K, &spans, &mut y);
        assert!(y.iter().zip(plain(&x, &w, &spans)).all(|(&y, want)| (y as f64 - want).abs() < 1e-6));
    }

    #[test]
    fn gradients_agree_with_finite_differences_and_a_prefix_gets_none() {
        let (spans, first, rows) = spans();
        let (x, w, mut up) = (random(rows * C, 1), random(C * K, 2), random(rows * C, 3));
        up[..first * C].fill(0.0);
        let trained: Vec<Span> = spans.iter().filter(|s| s.rows.start >= first).cloned().collect();
        let mut dy = up[first * C..].to_vec();
        let (mut dx, mut dw) = (vec![9.0; dy.len()], vec![0.0; C * K]);
        backward(&mut dy, &x, &w, K, &trained, first, &mut dx, &mut dw);
        let loss = |x: &[f32], w: &[f32]| {
            let y: Vec<f32> = plain(x, w, &spans).into_iter().map(|y| y as f32).collect();
            weigh(&y, &up)
        };
        check_gradient("w", &w, &dw, |w| loss(&x, w));
        check_gradient("x", &x[first * C..], &dx, |part| loss(&[&x[..first * C], part].concat(), &w));
    }
}
