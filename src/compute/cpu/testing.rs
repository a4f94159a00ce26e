//! For the tests of operations: random values and gradients by finite differences.

use crate::compute::rng::{Purpose, Stream};

/// Standard normals times 0.5, by a number.
pub fn random(n: usize, seed: u64) -> Vec<f32> {
    let mut x = vec![0.0; n];
    Stream::new(seed, Purpose::Projection, "test", 0).fill_normals(0, &mut x);
    x.iter_mut().for_each(|x| *x *= 0.5);
    x
}

/// Checks `gradient` of `loss` at `x` by central differences in every element (`loss` sums in f64).
/// The step is large for f32's sake: the operations' third derivatives stay below some ten.
pub fn check_gradient(what: &str, x: &[f32], gradient: &[f32], loss: impl Fn(&[f32]) -> f64) {
    const STEP: f32 = 1e-2;
    assert_eq!(x.len(), gradient.len(), "{what}");
    let mut x = x.to_vec();
    let (mut error, mut norm) = (0.0, 0.0);
    for i in 0..x.len() {
        let old = x[i];
        x[i] = old + STEP;
        let up = loss(&x);
        x[i] = old - STEP;
        let down = loss(&x);
        x[i] = old;
        let want = (up - down) / (2.0 * STEP as f64);
        error += (want - gradient[i] as f64).powi(2);
        norm += want.powi(2);
    }
    assert!(norm > 0.0, "{what}: the gradient is zero, which tests nothing");
    assert!(error.sqrt() < 2e-3 * norm.sqrt(), "{what}: relative error {}", (error / norm).sqrt());
}

/// The scalar that turns an output into a loss: its product with fixed random weights, which are its gradient.
pub fn weigh(y: &[f32], weights: &[f32]) -> f64 {
    y.iter().zip(weights).map(|(&y, &w)| y as f64 * w as f64).sum()
}
