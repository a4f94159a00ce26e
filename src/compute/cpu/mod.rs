//! The operations on the CPU, in f32. Work is cut by sizes alone, never by the number of threads, and every sum has one
//! fixed order, so that results are equal to the bit for any number of threads. Threads are rayon's current pool.

pub mod apollo;
pub mod attention;
pub mod buffers;
pub mod causal_conv;
pub mod cross_entropy;
pub mod delta_gates;
pub mod delta_rule;
pub mod embedding;
pub mod gated_norm;
pub mod linear;
mod math;
mod matmul;
pub mod output_gate;
pub mod rms_norm;
pub mod rope;
pub mod swiglu;
#[cfg(test)]
mod testing;
pub mod weight;

pub use math::dot;

pub(crate) use math::vectorized;
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

/// The largest absolute value; infinity where one is infinite or NaN.
pub fn largest(x: &[f32]) -> f32 {
    vectorized! {
        fn run(x: &[f32]) -> f32 {
            // As integers, absolute floats are ordered, with infinity and then NaN at the end.
            f32::from_bits(x.iter().fold(0, |m, x| m.max(x.to_bits() & 0x7fff_ffff)))
        }
    }
    let largest = x.par_chunks(1 << 15).map(run).reduce(|| 0.0, |a, b| if a >= b || a.is_nan() { a } else { b });
    if largest.is_nan() { f32::INFINITY } else { largest }
}
