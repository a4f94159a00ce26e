//! The norm behind linear attention, gated after it: `y = x / sqrt(mean(x^2) + eps) * w * silu(z)`, a head at a time
//! (Qwen3.5's `RMSNormGated`).

use super::ROWS;
use super::math::{dot_inline, exp, vectorized};
use rayon::prelude::*;

vectorized! {
    fn forward_rows(x: &[f32], z: &[f32], w: &[f32], eps: f32, y: &mut [f32], rstd: &mut [f32]) {
        let d = w.len();
        let rows = x.chunks_exact(d).zip(z.chunks_exact(d)).zip(y.chunks_exact_mut(d)).zip(rstd);
        for (((x, z), y), rstd) in rows {
            *rstd = 1.0 / (dot_inline(x, x) / d as f32 + eps).sqrt();
            for i in 0..d {
                y[i] = x[i] * *rstd * w[i] * (z[i] / (1.0 + exp(-z[i])));
            }
        }
    }
}

vectorized! {
    /// See [`backward`]; `sums` is dw, then as much scratch.
    fn backward_rows(
        dy: &[f32], x: &mut [f32], z: &mut [f32], w: &[f32], rstd: &[f32], dx: &mut [f32], sums: &mut [f32],
    ) {
        let (dw, dn) = sums.split_at_mut(w.len());
        let d = w.len();
        let rows = dy.chunks_exact(d).zip(x.chunks_exact_mut(d)).zip(z.chunks_exact_mut(d)).zip(dx.chunks_exact_mut(d));
        for ((((dy, x), z), dx), &rstd) in rows.zip(rstd) {
            for i in 0..d {
                let sigmoid = 1.0 / (1.0 + exp(-z[i]));
                let silu = z[i] * sigmoid;
                let n = x[i] * rstd;
                dw[i] += dy[i] * n * silu;
                dn[i] = dy[i] * w[i] * silu;
                z[i] = dy[i] * w[i] * n * (sigmoid + silu * (1.0 - sigmoid));
                dx[i] = n * w[i] * silu;
            }
            let mean = dot_inline(dn, x) * rstd * rstd / d as f32;
            for i in 0..d {
                let y = dx[i];
                dx[i] = rstd * (dn[i] - x[i] * mean);
                x[i] = y;
            }
        }
    }
}

/// `y (T x D)` and `rstd (T)` of `x (T x D)` and the gate `z (T x D)`.
pub fn forward(x: &[f32], z: &[f32], w: &[f32], eps: f32, y: &mut [f32], rstd: &mut [f32]) {
    let d = w.len();
    assert_eq!((x.len(), z.len(), y.len()), (rstd.len() * d, rstd.len() * d, rstd.len() * d));
    (x.par_chunks(ROWS * d), z.par_chunks(ROWS * d), y.par_chunks_mut(ROWS * d), rstd.par_chunks_mut(ROWS))
        .into_par_iter()
        .for_each(|(x, z, y, rstd)| forward_rows(x, z, w, eps, y, rstd));
}

/// In place, since all come and go together: `x` becomes the forward pass's `y`, `z` becomes `dz`; `dx` is written, `dw += ...`.
/// Sums over rows run inside blocks of 16 rows and then over blocks, both in order.
pub fn backward(dy: &[f32], x: &mut [f32], z: &mut [f32], w: &[f32], rstd: &[f32], dx: &mut [f32], dw: &mut [f32]) {
    let d = w.len();
    let elements = rstd.len() * d;
    assert_eq!((dy.len(), x.len(), z.len(), dx.len(), dw.len()), (elements, elements, elements, elements, d));
    let partial: Vec<Vec<f32>> = (dy.par_chunks(ROWS * d), x.par_chunks_mut(ROWS * d), z.par_chunks_mut(ROWS * d))
        .into_par_iter()
        .zip(dx.par_chunks_mut(ROWS * d).zip(rstd.par_chunks(ROWS)))
        .map(|((dy, x, z), (dx, rstd))| {
            let mut sums = vec![0.0; 2 * d];
            backward_rows(dy, x, z, w, rstd, dx, &mut sums);
            sums
        })
        .collect();
    for part in partial {
        for (d, p) in dw.iter_mut().zip(part) {
            *d += p;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{check_gradient, random, weigh};
    use super::*;

    #[test]
    fn gradients_agree_with_finite_differences() {
        let (t, d) = (37, 6);
        let (x, z, w, up) = (random(t * d, 1), random(t * d, 2), random(d, 3), random(t * d, 4));
        let run = |x: &[f32], z: &[f32], w: &[f32]| {
            let (mut y, mut rstd) = (vec![0.0; t * d], vec![0.0; t]);
            forward(x, z, w, 1e-2, &mut y, &mut rstd);
            (y, rstd)
        };
        let (y, rstd) = run(&x, &z, &w);
        let (mut x_then_y, mut dz, mut dx, mut dw) = (x.clone(), z.clone(), vec![9.0; t * d], vec![0.0; d]);
        backward(&up, &mut x_then_y, &mut dz, &w, &rstd, &mut dx, &mut dw);
        check_gradient("x", &x, &dx, |x| weigh(&run(x, &z, &w).0, &up));
        check_gradient("z", &z, &dz, |z| weigh(&run(&x, z, &w).0, &up));
        check_gradient("w", &w, &dw, |w| weigh(&run(&x, &z, w).0, &up));
        assert!(y.iter().zip(&x_then_y).all(|(a, b)| (a - b).abs() < 1e-6));
    }
}
