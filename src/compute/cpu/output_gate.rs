//! The gate on attention's output: `attended * sigmoid(gate)`, where one projection gives query and gate, head by head:
//! rows of `[q (D) | gate (D)]` a head (Qwen3.5; Qiu et al., "Gated Attention for Large Language Models", arXiv 2505.06708).

use super::math::{exp, vectorized};
use rayon::prelude::*;

const CHUNK: usize = 1 << 13;

/// `q` and `gate` (T x heads D) out of `both` (T x heads 2D).
pub fn split(both: &[f32], d: usize, q: &mut [f32], gate: &mut [f32]) {
    assert_eq!((both.len(), both.len()), (2 * q.len(), 2 * gate.len()));
    (both.par_chunks(2 * d), q.par_chunks_mut(d), gate.par_chunks_mut(d)).into_par_iter().with_min_len(64).for_each(
        |(both, q, gate)| {
            q.copy_from_slice(&both[..d]);
            gate.copy_from_slice(&both[d..]);
        },
    );
}

/// The reverse of [`split`].
pub fn join(q: &[f32], gate: &[f32], d: usize, both: &mut [f32]) {
    assert_eq!((both.len(), both.len()), (2 * q.len(), 2 * gate.len()));
    (both.par_chunks_mut(2 * d), q.par_chunks(d), gate.par_chunks(d)).into_par_iter().with_min_len(64).for_each(
        |(both, q, gate)| {
            both[..d].copy_from_slice(q);
            both[d..].copy_from_slice(gate);
        },
    );
}

vectorized! {
    fn forward_chunk(x: &mut [f32], gate: &[f32]) {
        for (x, &g) in x.iter_mut().zip(gate) {
            *x /= 1.0 + exp(-g);
        }
    }
}

vectorized! {
    fn backward_chunk(dy: &mut [f32], x: &mut [f32], gate: &mut [f32]) {
        for ((dy, x), g) in dy.iter_mut().zip(x).zip(gate) {
            let sigmoid = 1.0 / (1.0 + exp(-*g));
            *g = *dy * *x * sigmoid * (1.0 - sigmoid);
            *x *= sigmoid;
            *dy *= sigmoid;
        }
    }
}

/// `x *= sigmoid(gate)`.
pub fn forward(x: &mut [f32], gate: &[f32]) {
    assert_eq!(x.len(), gate.len());
    x.par_chunks_mut(CHUNK).zip(gate.par_chunks(CHUNK)).for_each(|(x, gate)| forward_chunk(x, gate));
}

/// In place: `dy` becomes `dx`, `x` becomes the forward pass's `y`, `gate` becomes `dgate`.
pub fn backward(dy: &mut [f32], x: &mut [f32], gate: &mut [f32]) {
    assert_eq!((x.len(), gate.len()), (dy.len(), dy.len()));
    (dy.par_chunks_mut(CHUNK), x.par_chunks_mut(CHUNK), gate.par_chunks_mut(CHUNK))
        .into_par_iter()
        .for_each(|(dy, x, gate)| backward_chunk(dy, x, gate));
}

#[cfg(test)]
mod tests {
    use super::super::testing::{check_gradient, random, weigh};
    use super::*;

    #[test]
    fn gradients_agree_with_finite_differences() {
        let (x, gate, up) = (random(40, 1), random(40, 2), random(40, 3));
        let run = |x: &[f32], gate: &[f32]| {
            let mut y = x.to_vec();
            forward(&mut y, gate);
            y
        };
        let (mut dx, mut y, mut dgate) = (up.clone(), x.clone(), gate.clone());
        backward(&mut dx, &mut y, &mut dgate);
        check_gradient("x", &x, &dx, |x| weigh(&run(x, &gate), &up));
        check_gradient("gate", &gate, &dgate, |gate| weigh(&run(&x, gate), &up));
        assert_eq!(y.len(), 40);
        assert!(y.iter().zip(run(&x, &gate)).all(|(a, b)| (a - b).abs() < 1e-6));
    }

    #[test]
    fn a_head_has_its_query_first_and_its_gate_after() {
        let both: Vec<f32> = (0..12).map(|i| i as f32).collect();
        let (mut q, mut gate, mut again) = (vec![0.0; 6], vec![0.0; 6], vec![0.0; 12]);
        split(&both, 3, &mut q, &mut gate);
        assert_eq!(
            (q.as_slice(), gate.as_slice()),
            (&[0.0, 1.0, 2.0, 6.0, 7.0, 8.0][..], &[3.0, 4.0, 5.0, 9.0, 10.0, 11.0][..])
        );
        join(&q, &gate, 3, &mut again);
        assert_eq!(again, both);
    }
}
