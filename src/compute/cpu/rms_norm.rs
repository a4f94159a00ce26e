//! Root-mean-square norm: `y = x / sqrt(mean(x^2) + eps) * w` (Zhang and Sennrich, arXiv 1910.07467).

use super::ROWS;
use super::math::{dot_inline, vectorized};
use rayon::prelude::*;

vectorized! {
    fn forward_rows(x: &[f32], w: &[f32], eps: f32, y: &mut [f32], rstd: &mut [f32]) {
        let h = w.len();
        for ((x, y), rstd) in x.chunks_exact(h).zip(y.chunks_exact_mut(h)).zip(rstd) {
            *rstd = 1.0 / (dot_inline(x, x) / h as f32 + eps).sqrt();
            for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
                *y = x * *rstd * w;
            }
        }
    }
}

vectorized! {
    fn apply_rows(x: &[f32], w: &[f32], rstd: &[f32], y: &mut [f32]) {
        let h = w.len();
        for ((x, y), rstd) in x.chunks_exact(h).zip(y.chunks_exact_mut(h)).zip(rstd) {
            for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
                *y = x * *rstd * w;
            }
        }
    }
}

vectorized! {
    fn backward_rows(dy: &[f32], x: &[f32], w: &[f32], rstd: &[f32], dx: &mut [f32], dw: &mut [f32], wdy: &mut [f32]) {
        let h = w.len();
        for (((dy, x), dx), &rstd) in dy.chunks_exact(h).zip(x.chunks_exact(h)).zip(dx.chunks_exact_mut(h)).zip(rstd) {
            for i in 0..h {
                wdy[i] = w[i] * dy[i];
                dw[i] += dy[i] * x[i] * rstd;
            }
            let mean = dot_inline(wdy, x) * rstd * rstd / h as f32;
            for i in 0..h {
                dx[i] += rstd * (wdy[i] - x[i] * mean);
            }
        }
    }
}

/// `y (T x H)` and `rstd (T)` = norm of `x (T x H)`.
pub fn forward(x: &[f32], w: &[f32], eps: f32, y: &mut [f32], rstd: &mut [f32]) {
    let h = w.len();
    assert_eq!((x.len(), y.len()), (rstd.len() * h, rstd.len() * h));
    (x.par_chunks(ROWS * h), y.par_chunks_mut(ROWS * h), rstd.par_chunks_mut(ROWS))
        .into_par_iter()
        .for_each(|(x, y, rstd)| forward_rows(x, w, eps, y, rstd));
}

/// `y = x * rstd * w`: the forward pass again, from the saved `rstd`.
pub fn apply(x: &[f32], w: &[f32], rstd: &[f32], y: &mut [f32]) {
    let h = w.len();
    assert_eq!((x.len(), y.len()), (rstd.len() * h, rstd.len() * h));
    (x.par_chunks(ROWS * h), y.par_chunks_mut(ROWS * h), rstd.par_chunks(ROWS))
        .into_par_iter()
        .for_each(|(x, y, rstd)| apply_rows(x, w, rstd, y));
}

/// `dx += ...`, `dw += ...`. Sums over rows run inside blocks of 16 rows and then over blocks, both in order.
pub fn backward(dy: &[f32], x: &[f32], w: &[f32], rstd: &[f32], dx: &mut [f32], dw: &mut [f32]) {
    let h = w.len();
    assert_eq!((x.len(), dy.len(), dx.len(), dw.len()), (rstd.len() * h, rstd.len() * h, rstd.len() * h, h));
    let partial: Vec<Vec<f32>> = (dy.par_chunks(ROWS * h), x.par_chunks(ROWS * h), dx.par_chunks_mut(ROWS * h))
        .into_par_iter()
        .zip(rstd.par_chunks(ROWS))
        .map(|((dy, x, dx), rstd)| {
            let (mut dw, mut scratch) = (vec![0.0; h], vec![0.0; h]);
            backward_rows(dy, x, w, rstd, dx, &mut dw, &mut scratch);
            dw
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
        let (t, h) = (37, 12);
        let (x, w, up) = (random(t * h, 1), random(h, 2), random(t * h, 3));
        let loss = |x: &[f32], w: &[f32]| {
            let (mut y, mut rstd) = (vec![0.0; t * h], vec![0.0; t]);
            forward(x, w, 1e-5, &mut y, &mut rstd);
            weigh(&y, &up)
        };
        let (mut y, mut rstd) = (vec![0.0; t * h], vec![0.0; t]);
        forward(&x, &w, 1e-5, &mut y, &mut rstd);
        let (mut dx, mut dw) = (vec![0.0; t * h], vec![0.0; h]);
        backward(&up, &x, &w, &rstd, &mut dx, &mut dw);
        check_gradient("x", &x, &dx, |x| loss(x, &w));
        check_gradient("w", &w, &dw, |w| loss(&x, w));
        let mut again = vec![0.0; t * h];
        apply(&x, &w, &rstd, &mut again);
        assert_eq!(y, again);
    }
}
