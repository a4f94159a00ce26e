//! The operations on the CPU, in f32. Work is cut by sizes alone, never by the number of threads, and every sum has one
//! fixed order, so that results are equal to the bit for any number of threads. Threads are rayon's current pool.

pub mod apollo;
pub mod attention;
pub mod cross_entropy;
pub mod embedding;
pub mod linear;
mod math;
mod matmul;
pub mod rms_norm;
pub mod rope;
pub mod swiglu;
#[cfg(test)]
mod testing;
pub mod weight;

pub use math::dot;

use rayon::prelude::*;

/// Rows that one task of an element-wise operation takes.
const ROWS: usize = 16;

/// `x += y`.
pub fn add(x: &mut [f32], y: &[f32]) {
    assert_eq!(x.len(), y.len());
    x.par_chunks_mut(1 << 14).zip(y.par_chunks(1 << 14)).for_each(|(x, y)| {
        for (x, y) in x.iter_mut().zip(y) {
            *x += y;
        }
    });
}

/// Adds the columns of `x` (T x H) into `sums` (H): the gradient of a bias. Rows are added in order.
pub fn add_columns(x: &[f32], sums: &mut [f32]) {
    for row in x.chunks_exact(sums.len()) {
        for (s, x) in sums.iter_mut().zip(row) {
            *s += x;
        }
    }
}

/// Is every value finite? Without an early exit, so that it runs at memory speed.
pub fn all_finite(x: &[f32]) -> bool {
    x.par_chunks(1 << 14).all(|x| x.iter().fold(true, |ok, v| ok & v.is_finite()))
}
