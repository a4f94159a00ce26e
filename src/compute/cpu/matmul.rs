//! Matrix products, through the `gemm` crate: the one place that hands it pointers.

use gemm::Parallelism;
use rayon::prelude::*;

/// A matrix inside a slice: element (i, j) at `i * row + j * col`.
#[derive(Clone, Copy)]
pub struct View<'a> {
    pub data: &'a [f32],
    pub rows: usize,
    pub cols: usize,
    pub row: usize,
    pub col: usize,
}

impl<'a> View<'a> {
    /// Row-major `rows x cols`, rows `stride` apart.
    pub fn strided(data: &'a [f32], rows: usize, cols: usize, stride: usize) -> View<'a> {
        View { data, rows, cols, row: stride, col: 1 }
    }

    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> View<'a> {
        View::strided(data, rows, cols, cols)
    }

    pub fn t(self) -> View<'a> {
        View { data: self.data, rows: self.cols, cols: self.rows, row: self.col, col: self.row }
    }

    fn fits(&self) -> bool {
        extent(self.rows, self.cols, self.row, self.col) <= self.data.len()
    }
}

fn extent(rows: usize, cols: usize, row: usize, col: usize) -> usize {
    if rows == 0 || cols == 0 { 0 } else { (rows - 1) * row + (cols - 1) * col + 1 }
}

/// Output columns or rows that one task takes. By size alone: the cut decides how sums are blocked.
const TILE: usize = 192;

/// `out = a b`, or `out += a b` with `accumulate`; `out` is `a.rows x b.cols`, rows `stride` apart. Tasks take stripes of
/// the longer side of `out`; the sum over the inner dimension is never split.
pub fn matmul(out: &mut [f32], stride: usize, a: View, b: View, accumulate: bool) {
    run(out, stride, a, b, accumulate, true)
}

/// [`matmul`] on the calling thread, for callers that are tasks themselves.
pub fn matmul_here(out: &mut [f32], stride: usize, a: View, b: View, accumulate: bool) {
    run(out, stride, a, b, accumulate, false)
}

fn run(out: &mut [f32], stride: usize, a: View, b: View, accumulate: bool, split: bool) {
    let (m, n, k) = (a.rows, b.cols, a.cols);
    assert_eq!(k, b.rows, "inner dimensions differ");
    assert!(a.fits() && b.fits() && extent(m, n, stride, 1) <= out.len() && (stride >= n || m <= 1));
    if m == 0 || n == 0 {
        return;
    }
    struct Out(*mut f32);
    // SAFETY: tasks write through it to disjoint stripes of `out`, which outlives them (the loop below joins them).
    unsafe impl Sync for Out {}
    let out = Out(out.as_mut_ptr());
    let stripe = |i0: usize, i1: usize, j0: usize, j1: usize| {
        let out = &out;
        // SAFETY: rows i0..i1 and columns j0..j1 lie inside the three matrices, whose extents were checked against
        // their slices above; `out` is borrowed mutably and this stripe is this task's alone. gemm reads `dst` only
        // with `accumulate`.
        unsafe {
            gemm::gemm(
                i1 - i0,
                j1 - j0,
                k,
                out.0.add(i0 * stride + j0),
                1,
                stride as isize,
                accumulate,
                a.data.as_ptr().add(i0 * a.row),
                a.col as isize,
                a.row as isize,
                b.data.as_ptr().add(j0 * b.col),
                b.col as isize,
                b.row as isize,
                1.0f32,
                1.0f32,
                false,
                false,
                false,
                Parallelism::None,
            );
        }
    };
    // Below some 2 MFLOP a task costs more than it brings.
    if !split || m * n * k < 1 << 20 {
        stripe(0, m, 0, n);
    } else if n >= m {
        (0..n.div_ceil(TILE)).into_par_iter().for_each(|t| stripe(0, m, t * TILE, n.min((t + 1) * TILE)));
    } else {
        (0..m.div_ceil(TILE)).into_par_iter().for_each(|t| stripe(t * TILE, m.min((t + 1) * TILE), 0, n));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compute::cpu::testing::random;

    #[test]
    fn every_orientation_and_split_equals_the_plain_sum() {
        for (m, n, k) in [(1, 1, 1), (5, 7, 3), (33, 401, 130), (420, 17, 190), (3, 5, 0)] {
            for (ta, tb, accumulate) in [(false, false, false), (true, false, true), (false, true, true)] {
                let (av, bv) = (random(m * k, 1), random(k * n, 2));
                let a = if ta { View::new(&av, k, m).t() } else { View::new(&av, m, k) };
                let b = if tb { View::new(&bv, n, k).t() } else { View::new(&bv, k, n) };
                let stride = n + 3;
                let mut out = random(m * stride, 3);
                let before = out.clone();
                matmul(&mut out, stride, a, b, accumulate);
                for i in 0..m {
                    for j in 0..stride {
                        let old = before[i * stride + j] as f64;
                        let mut want = if accumulate || j >= n { old } else { 0.0 };
                        for l in 0..if j < n { k } else { 0 } {
                            want += (av[i * a.row + l * a.col] as f64) * (bv[l * b.row + j * b.col] as f64);
                        }
                        assert!((out[i * stride + j] as f64 - want).abs() < 1e-4, "{m}x{n}x{k} at {i},{j}");
                    }
                }
            }
        }
    }
}
