//! Rotary position embedding (Su et al., arXiv 2104.09864), the half-split layout of Hugging Face: feature i of a head
//! turns with feature i + D/2. It also changes the layout, since attention wants heads apart: rows of T x (heads D)
//! become heads of (T, D), and back in the backward pass.

use super::matmul::View;
use rayon::prelude::*;

/// Cosines and sines by row, each T x D/2, scaled by the attention factor of yarn (1 elsewhere). Where only a part of a head
/// turns, D/2 is half of that part, and the features after it are left as they are.
#[derive(Debug, Clone, Default)]
pub struct Angles {
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
    head_dim: usize,
}

impl Angles {
    /// `inverse_frequencies` has D/2 values, or fewer where less than the head turns; angles are products in f32, as every
    /// implementation makes them.
    pub fn new(positions: &[u32], inverse_frequencies: &[f32], factor: f32, head_dim: usize) -> Angles {
        assert!(2 * inverse_frequencies.len() <= head_dim);
        let angles = || positions.iter().flat_map(|&p| inverse_frequencies.iter().map(move |f| p as f32 * f));
        Angles {
            cos: angles().map(|a| a.cos() * factor).collect(),
            sin: angles().map(|a| a.sin() * factor).collect(),
            half: inverse_frequencies.len(),
            head_dim,
        }
    }

    fn row(&self, t: usize) -> (&[f32], &[f32]) {
        let range = t * self.half..(t + 1) * self.half;
        (&self.cos[range.clone()], &self.sin[range])
    }
}

/// `heads (n, T, D)` = rows of `x (T x nD)`, turned.
pub fn forward(x: &[f32], angles: &Angles, heads: &mut [f32], rows: usize) {
    let (d, half) = (angles.head_dim, angles.half);
    let stride = x.len() / rows;
    heads.par_chunks_mut(rows * d).enumerate().for_each(|(head, out)| {
        for (t, out) in out.chunks_exact_mut(d).enumerate() {
            let (cos, sin) = angles.row(t);
            let x = &x[t * stride + head * d..][..d];
            out[2 * half..].copy_from_slice(&x[2 * half..]);
            let (x1, x2) = x.split_at(half);
            let (y1, y2) = out.split_at_mut(half);
            for i in 0..half {
                y1[i] = x1[i] * cos[i] - x2[i] * sin[i];
                y2[i] = x2[i] * cos[i] + x1[i] * sin[i];
            }
        }
    });
}

/// `dx (T x nD)` = `dheads (n, T, D)`, turned back. Row t of both is row `first + t` of the angles.
pub fn backward(dheads: &[f32], angles: &Angles, first: usize, dx: &mut [f32], rows: usize) {
    let (d, half) = (angles.head_dim, angles.half);
    let stride = dx.len() / rows;
    dx.par_chunks_mut(stride).enumerate().for_each(|(t, dx)| {
        let (cos, sin) = angles.row(first + t);
        for (head, dx) in dx.chunks_exact_mut(d).enumerate() {
            let dy = &dheads[(head * rows + t) * d..][..d];
            dx[2 * half..].copy_from_slice(&dy[2 * half..]);
            let (y1, y2) = dy.split_at(half);
            let (x1, x2) = dx.split_at_mut(half);
            for i in 0..half {
                x1[i] = y1[i] * cos[i] + y2[i] * sin[i];
                x2[i] = y2[i] * cos[i] - y1[i] * sin[i];
            }
        }
    });
}

/// `heads (n, T, D)` = rows of `x (T x nD)`, only moved.
pub fn split_heads(x: &[f32], heads: &mut [f32], rows: usize, d: usize) {
    let stride = x.len() / rows;
    heads.par_chunks_mut(rows * d).enumerate().for_each(|(head, out)| {
        for (t, out) in out.chunks_exact_mut(d).enumerate() {
            out.copy_from_slice(&x[t * stride + head * d..][..d]);
        }
    });
}

/// `x (T x nD)` = `heads (n, T, D)`, only moved.
pub fn join_heads(heads: &[f32], x: &mut [f32], rows: usize, d: usize) {
    let stride = x.len() / rows;
    x.par_chunks_mut(stride).enumerate().for_each(|(t, x)| {
        for (head, x) in x.chunks_exact_mut(d).enumerate() {
            x.copy_from_slice(&heads[(head * rows + t) * d..][..d]);
        }
    });
}

/// One head of (n, T, D) as a matrix of rows `first..end`.
pub(super) fn head_rows(heads: &[f32], head: usize, total: usize, first: usize, end: usize, d: usize) -> View<'_> {
    View::new(&heads[(head * total + first) * d..(head * total + end) * d], end - first, d)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{check_gradient, random, weigh};
    use super::*;

    #[test]
    fn gradients_agree_with_finite_differences() {
        for d in [6, 11] {
            whole_or_part(d);
        }
    }

    /// Six features turn.
    fn whole_or_part(d: usize) {
        let (t, n) = (4, 3);
        let angles = Angles::new(&[0, 1, 5, 40], &[1.0, 0.3, 0.01], 1.2, d);
        let (x, up) = (random(t * n * d, 1), random(t * n * d, 2));
        let mut dx = vec![0.0; t * n * d];
        backward(&up, &angles, 0, &mut dx, t);
        check_gradient("x", &x, &dx, |x| {
            let mut y = vec![0.0; t * n * d];
            forward(x, &angles, &mut y, t);
            weigh(&y, &up)
        });
    }

    #[test]
    fn heads_split_and_join_again() {
        let x = random(5 * 3 * 4, 1);
        let (mut heads, mut back) = (vec![0.0; x.len()], vec![0.0; x.len()]);
        split_heads(&x, &mut heads, 5, 4);
        join_heads(&heads, &mut back, 5, 4);
        assert_eq!(x, back);
        assert_eq!(heads[4..8], x[12..16], "head 0, row 1");
    }
}
