//! The gated activation of the feed-forward block: `silu(gate) * up` (Shazeer, arXiv 2002.05202).

use super::math::{exp, vectorized};
use rayon::prelude::*;

const CHUNK: usize = 1 << 13;

vectorized! {
    fn forward_chunk(gate: &[f32], up: &[f32], out: &mut [f32]) {
        for ((out, &g), &u) in out.iter_mut().zip(gate).zip(up) {
            *out = g / (1.0 + exp(-g)) * u;
        }
    }
}

vectorized! {
    fn backward_chunk(dout: &mut [f32], gate: &mut [f32], up: &mut [f32]) {
        for ((d, g), u) in dout.iter_mut().zip(gate).zip(up) {
            let sigmoid = 1.0 / (1.0 + exp(-*g));
            let silu = *g * sigmoid;
            let (dg, du) = (*d * *u * (sigmoid + silu * (1.0 - sigmoid)), *d * silu);
            *d = silu * *u;
            (*g, *u) = (dg, du);
        }
    }
}

/// `out = silu(gate) * up`.
pub fn forward(gate: &[f32], up: &[f32], out: &mut [f32]) {
    assert_eq!((gate.len(), up.len()), (out.len(), out.len()));
    (gate.par_chunks(CHUNK), up.par_chunks(CHUNK), out.par_chunks_mut(CHUNK))
        .into_par_iter()
        .for_each(|(g, u, o)| forward_chunk(g, u, o));
}

/// In place, since all three come and go together: `dout` becomes the activation of the forward pass, `gate` becomes
/// `dgate`, `up` becomes `dup`.
pub fn backward(dout: &mut [f32], gate: &mut [f32], up: &mut [f32]) {
    assert_eq!((gate.len(), up.len()), (dout.len(), dout.len()));
    (dout.par_chunks_mut(CHUNK), gate.par_chunks_mut(CHUNK), up.par_chunks_mut(CHUNK))
        .into_par_iter()
        .for_each(|(d, g, u)| backward_chunk(d, g, u));
}

#[cfg(test)]
mod tests {
    use super::super::testing::{check_gradient, random, weigh};
    use super::*;

    #[test]
    fn gradients_agree_with_finite_differences() {
        let n = 40;
        let (gate, up, w) = (random(n, 1), random(n, 2), random(n, 3));
        let loss = |gate: &[f32], up: &[f32]| {
            let mut y = vec![0.0; n];
            forward(gate, up, &mut y);
            weigh(&y, &w)
        };
        let (mut d, mut dgate, mut dup) = (w.clone(), gate.clone(), up.clone());
        backward(&mut d, &mut dgate, &mut dup);
        check_gradient("gate", &gate, &dgate, |g| loss(g, &up));
        check_gradient("up", &up, &dup, |u| loss(&gate, u));
        let mut y = vec![0.0; n];
        forward(&gate, &up, &mut y);
        assert!(y.iter().zip(&d).all(|(a, b)| (a - b).abs() < 1e-6));
    }
}
