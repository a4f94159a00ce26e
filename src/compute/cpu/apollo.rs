//! The arithmetic of one update, of a matrix seen in blocks of rows: APOLLO (Zhu et al., arXiv 2412.05270) and Adam for
//! what is too small to project. The gradient is passed over twice. The first pass projects it and sums its squares by
//! channel; everything that follows from those (moments, factors, limiter) is small. The second scales and applies.
//!
//! A channel is an index of the larger dimension: a row of a tall matrix (rows >= columns), a column of a wide one.

use super::math::{dot_inline, vectorized};
use super::matmul::{View, matmul};
use super::weight::Kind;
use crate::compute::rng::Stream;
use crate::compute::rounding;
use rayon::prelude::*;

/// First pass over rows `first..` of a gradient (block of `g`, n columns) of a matrix m x n, for a tall one:
/// `r (m x rank)` rows of the block `= g P^T`, `P (rank x n)`; `squares (m)` = sums of squares by row.
pub fn project_tall(g: &[f32], p: &[f32], first: usize, n: usize, rank: usize, r: &mut [f32], squares: &mut [f64]) {
    let rows = g.len() / n;
    let r = &mut r[first * rank..(first + rows) * rank];
    matmul(r, rank, View::new(g, rows, n), View::new(p, rank, n).t(), false);
    squares[first..first + rows].par_iter_mut().zip(g.par_chunks(n)).for_each(|(s, row)| *s = square_sum(row));
}

/// The same for a wide matrix, whose sums run over the blocks: `r (rank x n) += P^T g`, `P (m x rank)`;
/// `squares (n) +=` by column.
pub fn project_wide(g: &[f32], p: &[f32], first: usize, n: usize, rank: usize, r: &mut [f32], squares: &mut [f64]) {
    let rows = g.len() / n;
    let p = View::new(&p[first * rank..(first + rows) * rank], rows, rank);
    matmul(r, n, p.t(), View::new(g, rows, n), true);
    // Columns in tasks of a fixed width, rows in order.
    squares.par_chunks_mut(256).enumerate().for_each(|(c, squares)| column_squares(g, n, c * 256, squares));
}

vectorized! {
    fn column_squares(g: &[f32], n: usize, first: usize, squares: &mut [f64]) {
        for row in g.chunks_exact(n) {
            for (s, &x) in squares.iter_mut().zip(&row[first..]) {
                *s += x as f64 * x as f64;
            }
        }
    }
}

/// Sum of squares: f32 in runs of 256, f64 over the runs.
pub fn square_sum(x: &[f32]) -> f64 {
    vectorized! {
        fn run(x: &[f32]) -> f64 {
            x.chunks(256).map(|x| dot_inline(x, x) as f64).sum()
        }
    }
    run(x)
}

/// Moments after one more gradient `r`, and in `r` the normalised `m / (sqrt(v) + eps)`.
pub fn moments(r: &mut [f32], m: &mut [f32], v: &mut [f32], betas: (f32, f32), eps: f32) {
    const CHUNK: usize = 1 << 13;
    (r.par_chunks_mut(CHUNK), m.par_chunks_mut(CHUNK), v.par_chunks_mut(CHUNK))
        .into_par_iter()
        .for_each(|(r, m, v)| moments_chunk(r, m, v, betas, eps));
}

vectorized! {
    fn moments_chunk(r: &mut [f32], m: &mut [f32], v: &mut [f32], betas: (f32, f32), eps: f32) {
        let (b1, b2) = betas;
        for ((r, m), v) in r.iter_mut().zip(m).zip(v) {
            *m = b1 * *m + (1.0 - b1) * *r;
            *v = b2 * *v + (1.0 - b2) * (*r * *r);
            *r = *m / (v.sqrt() + eps);
        }
    }
}

/// Sums of squares of `r` by channel: of its rows (`channels x rank`) when tall, of its columns (`rank x channels`) when not.
pub fn channel_squares(r: &[f32], channels: usize, tall: bool) -> Vec<f64> {
    if tall {
        r.par_chunks(r.len() / channels).map(square_sum).collect()
    } else {
        let mut squares = vec![0.0; channels];
        squares.par_chunks_mut(256).enumerate().for_each(|(c, s)| column_squares(r, channels, c * 256, s));
        squares
    }
}

/// Where the update of one tensor goes and how it is rounded.
pub struct Apply<'a> {
    pub kind: Kind,
    /// `None` rounds to nearest.
    pub stochastic: Option<&'a Stream>,
    /// `1 - lr * weight_decay`.
    pub keep: f32,
}

/// What multiplies the gradient.
#[derive(Clone, Copy)]
pub enum Factors<'a> {
    One(f32),
    /// By row of the whole matrix.
    Rows(&'a [f32]),
    Columns(&'a [f32]),
}

/// Second pass: `w <- round((w - factor * g) * keep)` for rows `first..` of a matrix with n columns; `w` holds just
/// those rows' bytes. Element (i, j) of the matrix draws the random bits of index i n + j, wherever it is computed.
pub fn apply(w: &mut [u8], g: &[f32], first: usize, n: usize, factors: Factors, how: &Apply) {
    let bytes = how.kind.bytes();
    assert_eq!(w.len(), g.len() * bytes);
    // Tasks of whole rows, some 16 K elements each.
    let rows = (1usize << 14).div_ceil(n);
    w.par_chunks_mut(rows * n * bytes).zip(g.par_chunks(rows * n)).enumerate().for_each(|(task, (w, g))| {
        let mut bits = vec![0u16; n + 16];
        for (i, (w, g)) in w.chunks_exact_mut(n * bytes).zip(g.chunks_exact(n)).enumerate() {
            let row = first + task * rows + i;
            let (one, columns): (f32, &[f32]) = match factors {
                Factors::One(f) => (f, &[]),
                Factors::Rows(f) => (f[row], &[]),
                Factors::Columns(f) => (1.0, f),
            };
            let start = (row * n) as u64;
            let random = how.stochastic.map(|stream| random_bits(stream, start, n, &mut bits));
            match (how.kind, random) {
                (Kind::F32, _) => apply_f32(w, g, one, columns, how.keep),
                (Kind::Bf16, Some(random)) => apply_bf16(w, g, one, columns, how.keep, random),
                (kind, random) => {
                    for (j, (w, &g)) in w.chunks_exact_mut(2).zip(g).enumerate() {
                        let f = one * columns.get(j).copied().unwrap_or(1.0);
                        let x = (super::weight::get(kind, w, 0) - f * g) * how.keep;
                        let rounded = match (kind, random) {
                            (Kind::Bf16, _) => rounding::nearest_bf16(x),
                            (_, None) => rounding::nearest_f16(x),
                            (_, Some(random)) => rounding::stochastic_f16(x, random[j] as u32),
                        };
                        w.copy_from_slice(&rounded.to_le_bytes());
                    }
                }
            }
        }
    });
}

/// The random bits of elements `start..start + n`, whole blocks at a time.
fn random_bits<'a>(stream: &Stream, start: u64, n: usize, bits: &'a mut [u16]) -> &'a [u16] {
    vectorized! {
        fn fill(stream: &Stream, block: u32, bits: &mut [u16]) {
            for (i, eight) in bits.chunks_exact_mut(8).enumerate() {
                let words = stream.block(block.wrapping_add(i as u32));
                for (pair, word) in eight.chunks_exact_mut(2).zip(words) {
                    pair[0] = word as u16;
                    pair[1] = (word >> 16) as u16;
                }
            }
        }
    }
    let skip = (start % 8) as usize;
    let whole = (skip + n).next_multiple_of(8);
    fill(stream, (start / 8) as u32, &mut bits[..whole]);
    &bits[skip..skip + n]
}

vectorized! {
    fn apply_bf16(w: &mut [u8], g: &[f32], one: f32, columns: &[f32], keep: f32, random: &[u16]) {
        if columns.is_empty() {
            for ((w, &g), &random) in w.chunks_exact_mut(2).zip(g).zip(random) {
                let old = f32::from_bits((u16::from_le_bytes([w[0], w[1]]) as u32) << 16);
                let new = rounding::stochastic_bf16((old - one * g) * keep, random as u32);
                w.copy_from_slice(&new.to_le_bytes());
            }
        } else {
            for (((w, &g), &random), &f) in w.chunks_exact_mut(2).zip(g).zip(random).zip(columns) {
                let old = f32::from_bits((u16::from_le_bytes([w[0], w[1]]) as u32) << 16);
                let new = rounding::stochastic_bf16((old - one * f * g) * keep, random as u32);
                w.copy_from_slice(&new.to_le_bytes());
            }
        }
    }
}

fn apply_f32(w: &mut [u8], g: &[f32], one: f32, columns: &[f32], keep: f32) {
    for (j, (w, &g)) in w.chunks_exact_mut(4).zip(g).enumerate() {
        let f = one * columns.get(j).copied().unwrap_or(1.0);
        let new = (super::weight::get(Kind::F32, w, 0) - f * g) * keep;
        w.copy_from_slice(&new.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::random;
    use super::*;
    use crate::compute::rng::Purpose;

    #[test]
    fn rows_draw_the_same_bits_alone_as_in_the_whole_matrix() {
        let (m, n) = (9, 13);
        let g = random(m * n, 1);
        let stream = Stream::new(5, Purpose::Rounding, "w", 2);
        let how = Apply { kind: Kind::Bf16, stochastic: Some(&stream), keep: 0.999 };
        let start: Vec<u8> = random(m * n, 2).iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect();
        let factors: Vec<f32> = (0..m).map(|i| 1e-3 * i as f32).collect();
        let mut whole = start.clone();
        apply(&mut whole, &g, 0, n, Factors::Rows(&factors), &how);
        let mut parts = start.clone();
        apply(&mut parts[..4 * n * 2], &g[..4 * n], 0, n, Factors::Rows(&factors), &how);
        apply(&mut parts[4 * n * 2..], &g[4 * n..], 4, n, Factors::Rows(&factors), &how);
        assert_eq!(whole, parts);
        for i in 0..m * n {
            let old = super::super::weight::get(Kind::Bf16, &start, i);
            let x = (old - factors[i / n] * g[i]) * 0.999;
            let want = rounding::stochastic_bf16(x, stream.bits16(i as u64));
            assert_eq!([whole[2 * i], whole[2 * i + 1]], want.to_le_bytes(), "element {i}");
        }
    }

    #[test]
    fn blocks_of_rows_project_as_the_whole_does() {
        for (m, n) in [(12, 5), (5, 12)] {
            let (g, rank) = (random(m * n, 1), 2);
            let p = random(rank * m.min(n), 2);
            let project = if m >= n { project_tall } else { project_wide };
            let channels = m.max(n);
            let (mut r, mut s) = (vec![0.0; rank * channels], vec![0.0; channels]);
            project(&g, &p, 0, n, rank, &mut r, &mut s);
            let (mut r2, mut s2) = (vec![0.0; rank * channels], vec![0.0; channels]);
            project(&g[..3 * n], &p, 0, n, rank, &mut r2, &mut s2);
            project(&g[3 * n..], &p, 3, n, rank, &mut r2, &mut s2);
            assert!(r.iter().zip(&r2).all(|(a, b)| (a - b).abs() < 1e-6));
            assert!(s.iter().zip(&s2).all(|(a, b)| (a - b).abs() < 1e-6));
        }
    }
}
