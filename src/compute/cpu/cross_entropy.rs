//! Softmax cross-entropy of rows of logits, and its gradient in their place. The head above works on blocks of rows or of
//! the vocabulary; here a row is whole.

use super::math::{exp, max_inline, sum_inline, vectorized};
use rayon::prelude::*;

vectorized! {
    /// Returns the loss of one row; the row becomes `(softmax - target) * weight`.
    fn row_loss(row: &mut [f32], target: usize, weight: f32) -> f32 {
        let max = max_inline(row);
        let at_target = row[target];
        for x in row.iter_mut() {
            *x = exp(*x - max);
        }
        let sum = sum_inline(row);
        let factor = weight / sum;
        for x in row.iter_mut() {
            *x *= factor;
        }
        row[target] -= weight;
        // An infinite or NaN logit shows here or in the sum, whichever of the two the maximum skipped.
        sum.ln() + (max - at_target)
    }
}

/// `losses (T)` of `logits (T x V)` against `targets`; the logits become their gradient, each row times `weight`.
pub fn forward_backward(logits: &mut [f32], targets: &[u32], weight: f32, losses: &mut [f32]) {
    let vocabulary = logits.len() / targets.len();
    (logits.par_chunks_mut(vocabulary), targets, losses)
        .into_par_iter()
        .for_each(|(row, &target, loss)| *loss = row_loss(row, target as usize, weight));
}

#[cfg(test)]
mod tests {
    use super::super::testing::{check_gradient, random};
    use super::*;

    #[test]
    fn gradients_agree_with_finite_differences() {
        let (t, v) = (3, 21);
        let (logits, targets) = (random(t * v, 1), [20, 0, 7]);
        let loss = |x: &[f32]| {
            let mut losses = vec![0.0; t];
            forward_backward(&mut x.to_vec(), &targets, 0.3, &mut losses);
            losses.iter().map(|&l| l as f64 * 0.3).sum::<f64>()
        };
        let mut gradient = logits.clone();
        forward_backward(&mut gradient, &targets, 0.3, &mut vec![0.0; t]);
        check_gradient("logits", &logits, &gradient, loss);
    }

    #[test]
    fn logits_that_are_not_finite_give_a_loss_that_is_not() {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut logits = random(40, 1);
            logits[3] = bad;
            let mut loss = [0.0];
            forward_backward(&mut logits, &[5], 1.0, &mut loss);
            assert!(!loss[0].is_finite(), "{bad} gave {}", loss[0]);
        }
    }
}
