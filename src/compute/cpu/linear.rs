//! `y = x W^T + b`, weights as PyTorch keeps them: out x in.

use super::matmul::{View, matmul};
use super::{ROWS, add_columns};
use rayon::prelude::*;

/// `y (T x out) = x (T x in) W^T + b`.
pub fn forward(x: &[f32], w: &[f32], bias: Option<&[f32]>, y: &mut [f32], inputs: usize, outputs: usize) {
    let rows = x.len() / inputs;
    assert_eq!((x.len(), w.len(), y.len()), (rows * inputs, outputs * inputs, rows * outputs));
    matmul(y, outputs, View::new(x, rows, inputs), View::new(w, outputs, inputs).t(), false);
    if let Some(bias) = bias {
        y.par_chunks_mut(ROWS * outputs).for_each(|rows| {
            for row in rows.chunks_exact_mut(outputs) {
                for (y, b) in row.iter_mut().zip(bias) {
                    *y += b;
                }
            }
        });
    }
}

/// `dx (T x in) = dy (T x out) W`, or `+=` with `accumulate`.
pub fn backward_input(dy: &[f32], w: &[f32], dx: &mut [f32], inputs: usize, outputs: usize, accumulate: bool) {
    let rows = dy.len() / outputs;
    assert_eq!((dy.len(), w.len(), dx.len()), (rows * outputs, outputs * inputs, rows * inputs));
    matmul(dx, inputs, View::new(dy, rows, outputs), View::new(w, outputs, inputs), accumulate);
}

/// Columns of `y (T x stride)` from its start on, `part` of them: `x (T x in) W^T` for a part of W's rows.
pub fn forward_part(x: &[f32], w: &[f32], y: &mut [f32], inputs: usize, part: usize, stride: usize) {
    let rows = x.len() / inputs;
    matmul(y, stride, View::new(x, rows, inputs), View::new(w, part, inputs).t(), false);
}

/// `dx = dy W` or `+=` for a part of W's rows; `dy (T x stride)` from that part's first column on.
pub fn backward_input_part(
    dy: &[f32],
    w: &[f32],
    dx: &mut [f32],
    inputs: usize,
    part: usize,
    stride: usize,
    accumulate: bool,
) {
    let rows = dx.len() / inputs;
    matmul(dx, inputs, View::strided(dy, rows, part, stride), View::new(w, part, inputs), accumulate);
}

/// Rows `first..first + dw.len() / in` of `dW = dy^T x`, or `+=` with `accumulate`.
pub fn backward_weight(
    dy: &[f32],
    x: &[f32],
    dw: &mut [f32],
    inputs: usize,
    outputs: usize,
    first: usize,
    accumulate: bool,
) {
    let rows = dy.len() / outputs;
    let part = dw.len() / inputs;
    assert_eq!((dy.len(), x.len(), dw.len()), (rows * outputs, rows * inputs, part * inputs));
    assert!(first + part <= outputs);
    if rows == 0 {
        if !accumulate {
            dw.fill(0.0);
        }
        return;
    }
    let dy = View::strided(&dy[first..], rows, part, outputs);
    matmul(dw, inputs, dy.t(), View::new(x, rows, inputs), accumulate);
}

/// `db += sum of the rows of dy`.
pub fn backward_bias(dy: &[f32], db: &mut [f32]) {
    add_columns(dy, db);
}

#[cfg(test)]
mod tests {
    use super::super::testing::{check_gradient, random, weigh};
    use super::*;

    #[test]
    fn gradients_agree_with_finite_differences() {
        let (t, i, o) = (5, 7, 6);
        let (x, w, b, up) = (random(t * i, 1), random(o * i, 2), random(o, 3), random(t * o, 4));
        let loss = |x: &[f32], w: &[f32], b: &[f32]| {
            let mut y = vec![0.0; t * o];
            forward(x, w, Some(b), &mut y, i, o);
            weigh(&y, &up)
        };
        let (mut dx, mut dw, mut db) = (vec![0.0; t * i], vec![0.0; o * i], vec![0.0; o]);
        backward_input(&up, &w, &mut dx, i, o, false);
        backward_bias(&up, &mut db);
        // In two parts, as a large matrix is done.
        let (head, tail) = dw.split_at_mut(2 * i);
        backward_weight(&up, &x, head, i, o, 0, false);
        backward_weight(&up, &x, tail, i, o, 2, false);
        check_gradient("x", &x, &dx, |x| loss(x, &w, &b));
        check_gradient("w", &w, &dw, |w| loss(&x, w, &b));
        check_gradient("b", &b, &db, |b| loss(&x, &w, b));
    }
}
