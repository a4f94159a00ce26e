//! The gated delta rule (Yang et al., "Gated Delta Networks", arXiv 2412.06464), linear attention with a state S (k_dim x
//! v_dim) a value head:
//!
//! ```text
//! S <- e^g S;   d = beta (v - S^T k);   S <- S + k d^T;   o = S^T q
//! ```
//!
//! in chunks of tokens, so that the work is matrix products. With G the running sum of g in a chunk, D_ij = e^(G_i - G_j)
//! for i >= j, and r_i = e^(G_last - G_i), the chunk's d are the rows of N, which solve
//!
//! ```text
//! (I + A) N = diag(beta) (V - diag(e^G) K S),     A = strictly lower part of diag(beta) K K^T * D
//! O = diag(e^G) Q S + P N,     P = lower part of Q K^T * D
//! S+ = e^(G_last) S + (diag(r) K)^T N
//! ```
//!
//! The backward pass runs the chunks in reverse, makes each chunk's values again, and carries the gradient of S. Nothing of
//! size T x k_dim x v_dim is ever kept. Inputs are rows `[q | k | v]` of all heads as the convolution leaves them; q and k are
//! divided by their length here (with 1e-6 under the root), and q by the root of k_dim. Each k head serves
//! v_heads / k_heads v heads in a row.

use super::attention::Span;
use super::math::{dot, exp, vectorized};
use super::matmul::{View, matmul_here};
use rayon::prelude::*;
use std::ops::Range;

/// Tokens of a chunk, as in every implementation.
const CHUNK: usize = 64;
/// Added to the squared length that q and k are divided by the root of.
const EPS: f32 = 1e-6;

/// Sizes of one call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    pub k_heads: usize,
    pub v_heads: usize,
    pub k_dim: usize,
    pub v_dim: usize,
}

impl Shape {
    /// Width of a row `[q | k | v]`.
    pub fn channels(&self) -> usize {
        2 * self.k_heads * self.k_dim + self.v_heads * self.v_dim
    }

    /// Elements of the states of one sequence, all heads.
    pub fn state(&self) -> usize {
        self.v_heads * self.k_dim * self.v_dim
    }
}

/// Rows that are one sequence, or the end of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sequence {
    pub rows: Range<usize>,
    /// Which state it begins with; none is zero.
    pub begins: Option<usize>,
    /// Where its last state is kept, if it is.
    pub ends: Option<usize>,
}

/// The spans of a batch whose first `frozen` rows are contexts: a context's last state is what its continuations begin with.
/// States are numbered as the contexts are.
pub fn sequences(spans: &[Span], frozen: usize) -> Vec<Sequence> {
    let contexts: Vec<&Span> = spans.iter().filter(|s| s.rows.end <= frozen).collect();
    let of = |prefix: &Range<usize>| contexts.iter().position(|c| !prefix.is_empty() && c.rows == *prefix);
    let sequence = |span: &Span| Sequence { rows: span.rows.clone(), begins: of(&span.prefix), ends: of(&span.rows) };
    spans.iter().map(sequence).collect()
}

/// Input rows: `qkv (T x channels)`, `g` and `beta (T x v_heads)`.
#[derive(Clone, Copy)]
pub struct Input<'a> {
    pub qkv: &'a [f32],
    pub g: &'a [f32],
    pub beta: &'a [f32],
}

/// One chunk of one head: n rows of everything.
#[derive(Default)]
struct Chunk {
    n: usize,
    /// Normalised, q with its scale.
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    beta: Vec<f32>,
    /// What q and k were multiplied with.
    q_inverse: Vec<f32>,
    k_inverse: Vec<f32>,
    /// e^G and r, and e^(G_last).
    kept: Vec<f32>,
    rest: Vec<f32>,
    whole: f32,
    /// n x n: D below and on the diagonal, K K^T, A, P.
    decay: Vec<f32>,
    kk: Vec<f32>,
    a: Vec<f32>,
    p: Vec<f32>,
    /// K S, and N.
    ks: Vec<f32>,
    new: Vec<f32>,
}

vectorized! {
    fn add_scaled(y: &mut [f32], x: &[f32], factor: f32) {
        for (y, x) in y.iter_mut().zip(x) {
            *y += factor * x;
        }
    }
}

fn scale_rows(x: &mut [f32], factors: &[f32]) {
    let width = x.len() / factors.len();
    for (row, f) in x.chunks_exact_mut(width).zip(factors) {
        row.iter_mut().for_each(|x| *x *= f);
    }
}

/// Rows of one head, divided by their length and multiplied with `scale`.
fn normalised(rows: &[f32], width: usize, at: usize, d: usize, scale: f32, out: &mut Vec<f32>, inverse: &mut Vec<f32>) {
    out.clear();
    inverse.clear();
    for row in rows.chunks_exact(width) {
        let x = &row[at..at + d];
        let by = scale / (dot(x, x) + EPS).sqrt();
        inverse.push(by);
        out.extend(x.iter().map(|x| x * by));
    }
}

impl Chunk {
    fn load(&mut self, input: Input, rows: Range<usize>, head: usize, shape: &Shape) {
        let Shape { k_heads, v_heads, k_dim, v_dim } = *shape;
        let (n, width) = (rows.len(), shape.channels());
        let k_head = head / (v_heads / k_heads);
        let all = &input.qkv[rows.start * width..rows.end * width];
        self.n = n;
        let scale = 1.0 / (k_dim as f32).sqrt();
        normalised(all, width, k_head * k_dim, k_dim, scale, &mut self.q, &mut self.q_inverse);
        normalised(all, width, (k_heads + k_head) * k_dim, k_dim, 1.0, &mut self.k, &mut self.k_inverse);
        let at = 2 * k_heads * k_dim + head * v_dim;
        self.v.clear();
        self.v.extend(all.chunks_exact(width).flat_map(|row| &row[at..at + v_dim]));
        let of_head = |x: &[f32]| {
            x[rows.start * v_heads..rows.end * v_heads].iter().skip(head).step_by(v_heads).copied().collect()
        };
        self.beta = of_head(input.beta);
        let mut sums: Vec<f32> = of_head(input.g);
        for i in 1..n {
            sums[i] += sums[i - 1];
        }
        let last = sums[n - 1];
        self.whole = exp(last);
        self.kept = sums.iter().map(|&s| exp(s)).collect();
        self.rest = sums.iter().map(|&s| exp(last - s)).collect();
        let (q, k) = (View::new(&self.q, n, k_dim), View::new(&self.k, n, k_dim));
        for square in [&mut self.decay, &mut self.kk, &mut self.a, &mut self.p] {
            square.resize(n * n, 0.0);
        }
        matmul_here(&mut self.kk, n, k, k.t(), false);
        matmul_here(&mut self.p, n, q, k.t(), false);
        for i in 0..n {
            for j in 0..n {
                let at = i * n + j;
                let decay = if j <= i { exp(sums[i] - sums[j]) } else { 0.0 };
                self.decay[at] = decay;
                self.p[at] = if j <= i { self.p[at] * decay } else { 0.0 };
                self.a[at] = if j < i { self.beta[i] * self.kk[at] * decay } else { 0.0 };
            }
        }
    }

    /// K S, and N by forward substitution.
    fn solve(&mut self, s: &[f32], shape: &Shape) {
        let (n, d) = (self.n, shape.v_dim);
        self.ks.resize(n * d, 0.0);
        matmul_here(&mut self.ks, d, View::new(&self.k, n, shape.k_dim), View::new(s, shape.k_dim, d), false);
        self.new.clear();
        for i in 0..n {
            let (v, ks) = (&self.v[i * d..][..d], &self.ks[i * d..][..d]);
            self.new.extend(v.iter().zip(ks).map(|(v, ks)| self.beta[i] * (v - self.kept[i] * ks)));
            let (before, row) = self.new.split_at_mut(i * d);
            for (known, &a) in before.chunks_exact(d).zip(&self.a[i * n..]) {
                add_scaled(row, known, -a);
            }
        }
    }

    /// `out (n x v_dim)` = O.
    fn read(&self, s: &[f32], shape: &Shape, out: &mut [f32]) {
        let (n, d) = (self.n, shape.v_dim);
        matmul_here(out, d, View::new(&self.q, n, shape.k_dim), View::new(s, shape.k_dim, d), false);
        scale_rows(out, &self.kept);
        matmul_here(out, d, View::new(&self.p, n, n), View::new(&self.new, n, d), true);
    }

    /// S becomes S+.
    fn write(&self, s: &mut [f32], shape: &Shape) {
        let (n, d) = (self.n, shape.v_dim);
        let mut k = self.k.clone();
        scale_rows(&mut k, &self.rest);
        s.iter_mut().for_each(|s| *s *= self.whole);
        matmul_here(s, d, View::new(&k, n, shape.k_dim).t(), View::new(&self.new, n, d), true);
    }
}

fn chunks(rows: &Range<usize>, chunk: usize) -> impl DoubleEndedIterator<Item = Range<usize>> + use<> {
    let end = rows.end;
    rows.clone().step_by(chunk).map(move |c| c..end.min(c + chunk))
}

/// `out (v_heads, T, v_dim)` for the rows of every sequence, and in `states (v_heads, contexts, k_dim, v_dim)` the last states
/// of those that others begin with, which must come before them.
pub fn forward(input: Input, sequences: &[Sequence], shape: &Shape, out: &mut [f32], states: &mut [f32]) {
    forward_by(CHUNK, input, sequences, shape, out, states)
}

fn forward_by(chunk: usize, input: Input, sequences: &[Sequence], shape: &Shape, out: &mut [f32], states: &mut [f32]) {
    let (rows, d, size) = (input.qkv.len() / shape.channels(), shape.v_dim, shape.k_dim * shape.v_dim);
    let contexts = states.len() / shape.state();
    assert_eq!(
        (input.g.len(), input.beta.len(), out.len()),
        (rows * shape.v_heads, rows * shape.v_heads, rows * shape.v_heads * d)
    );
    let one = |head: usize, out: &mut [f32], states: &mut [f32]| {
        let (mut now, mut s) = (Chunk::default(), vec![0.0; size]);
        for sequence in sequences {
            match sequence.begins {
                Some(context) => s.copy_from_slice(&states[context * size..][..size]),
                None => s.fill(0.0),
            }
            for rows in chunks(&sequence.rows, chunk) {
                now.load(input, rows.clone(), head, shape);
                now.solve(&s, shape);
                now.read(&s, shape, &mut out[rows.start * d..rows.end * d]);
                now.write(&mut s, shape);
            }
            if let Some(context) = sequence.ends {
                states[context * size..][..size].copy_from_slice(&s);
            }
        }
    };
    // One task a head; without contexts there are no states to hand out.
    if contexts == 0 {
        out.par_chunks_mut(rows * d).enumerate().for_each(|(head, out)| one(head, out, &mut []));
    } else {
        let heads = out.par_chunks_mut(rows * d).zip(states.par_chunks_mut(contexts * size)).enumerate();
        heads.for_each(|(head, (out, states))| one(head, out, states));
    }
}

/// Gradients of the inputs of rows that train. `input` holds those rows alone, and `sequences` counts them from 0; `states` are
/// the forward pass's. `dout` is (v_heads, T, v_dim). Written: `dq` and `dk (k_heads, T, k_dim)`, `dv (v_heads, T, v_dim)`, `dg`
/// and `dbeta (v_heads, T)`. States that a sequence begins with are constants and get none.
#[allow(clippy::too_many_arguments)]
pub fn backward(
    dout: &[f32],
    input: Input,
    sequences: &[Sequence],
    states: &[f32],
    shape: &Shape,
    (dq, dk, dv): (&mut [f32], &mut [f32], &mut [f32]),
    (dg, dbeta): (&mut [f32], &mut [f32]),
) {
    backward_by(CHUNK, dout, input, sequences, states, shape, (dq, dk, dv), (dg, dbeta))
}

#[allow(clippy::too_many_arguments)]
fn backward_by(
    chunk: usize,
    dout: &[f32],
    input: Input,
    sequences: &[Sequence],
    states: &[f32],
    shape: &Shape,
    (dq, dk, dv): (&mut [f32], &mut [f32], &mut [f32]),
    (dg, dbeta): (&mut [f32], &mut [f32]),
) {
    let Shape { k_heads, v_heads, k_dim, v_dim } = *shape;
    let (total, group, size) = (input.qkv.len() / shape.channels(), v_heads / k_heads, k_dim * v_dim);
    let contexts = states.len() / shape.state();
    let (values, gates, keys) = (total * v_heads * v_dim, total * v_heads, total * k_heads * k_dim);
    assert_eq!((dout.len(), dv.len(), dg.len(), dbeta.len()), (values, values, gates, gates));
    assert_eq!((dq.len(), dk.len()), (keys, keys));
    let of_k_head = dq.par_chunks_mut(total * k_dim).zip(dk.par_chunks_mut(total * k_dim));
    let of_v_heads = dv.par_chunks_mut(group * total * v_dim);
    let of_gates = dg.par_chunks_mut(group * total).zip(dbeta.par_chunks_mut(group * total));
    of_k_head.zip(of_v_heads).zip(of_gates).enumerate().for_each(|(k_head, (((dq, dk), dv), (dg, dbeta)))| {
        dq.fill(0.0);
        dk.fill(0.0);
        let (mut now, mut back) = (Chunk::default(), Backward::default());
        for member in 0..group {
            let head = k_head * group + member;
            let state = |context: usize| &states[(head * contexts + context) * size..][..size];
            for sequence in sequences {
                // The state before each chunk, in the order of the forward pass.
                let parts: Vec<Range<usize>> = chunks(&sequence.rows, chunk).collect();
                let mut before = vec![sequence.begins.map_or(vec![0.0; size], |context| state(context).to_vec())];
                for rows in &parts[..parts.len().saturating_sub(1)] {
                    let mut s = before.last().expect("there is one to begin with").clone();
                    now.load(input, rows.clone(), head, shape);
                    now.solve(&s, shape);
                    now.write(&mut s, shape);
                    before.push(s);
                }
                let mut ds = vec![0.0; size];
                for (rows, s) in parts.iter().zip(&before).rev() {
                    now.load(input, rows.clone(), head, shape);
                    now.solve(s, shape);
                    let dout = &dout[(head * total + rows.start) * v_dim..][..rows.len() * v_dim];
                    back.chunk(&now, s, dout, shape, &mut ds);
                    // Among the heads of the group.
                    let of_head = member * total + rows.start..member * total + rows.end;
                    dg[of_head.clone()].copy_from_slice(&back.dg);
                    dbeta[of_head.clone()].copy_from_slice(&back.dbeta);
                    dv[of_head.start * v_dim..of_head.end * v_dim].copy_from_slice(&back.dv);
                    // Through the lengths: n = x / |x|, dx = (dn - n (n dn)) / |x|, where q carries its scale.
                    let scale = 1.0 / (k_dim as f32).sqrt();
                    for (i, t) in rows.clone().enumerate() {
                        let at = t * k_dim..(t + 1) * k_dim;
                        let here = i * k_dim..(i + 1) * k_dim;
                        length_backward(
                            &now.q[here.clone()],
                            &back.dq[here.clone()],
                            now.q_inverse[i],
                            scale,
                            &mut dq[at.clone()],
                        );
                        length_backward(&now.k[here.clone()], &back.dk[here], now.k_inverse[i], 1.0, &mut dk[at]);
                    }
                }
            }
        }
    });
}

/// `dx +=` of `y = x * by`, `by = scale / |x|`.
fn length_backward(y: &[f32], dy: &[f32], by: f32, scale: f32, dx: &mut [f32]) {
    let along = dot(y, dy) / (scale * scale);
    for ((dx, y), dy) in dx.iter_mut().zip(y).zip(dy) {
        *dx += by * (dy - y * along);
    }
}

/// Gradients of one chunk's rows.
#[derive(Default)]
struct Backward {
    dq: Vec<f32>,
    dk: Vec<f32>,
    dv: Vec<f32>,
    dg: Vec<f32>,
    dbeta: Vec<f32>,
    square: Vec<f32>,
    rows: Vec<f32>,
    wide: Vec<f32>,
}

impl Backward {
    /// `ds` is the gradient of S+ and becomes that of S.
    fn chunk(&mut self, c: &Chunk, s: &[f32], dout: &[f32], shape: &Shape, ds: &mut [f32]) {
        let (n, kd, vd) = (c.n, shape.k_dim, shape.v_dim);
        let Backward { dq, dk, dv, dg, dbeta, square, rows, wide } = self;
        for (buffer, size) in
            [(&mut *dq, n * kd), (dk, n * kd), (rows, n * kd), (dv, n * vd), (wide, n * vd), (square, n * n)]
        {
            buffer.resize(size, 0.0);
        }
        dg.clear();
        dg.resize(n, 0.0);
        dbeta.clear();
        dbeta.resize(n, 0.0);
        let (q, k) = (View::new(&c.q, n, kd), View::new(&c.k, n, kd));
        let (state, dout_view) = (View::new(s, kd, vd), View::new(dout, n, vd));

        // dN = P^T dO + diag(r) K dS+; it lies in `dv`, where it becomes X and then dV.
        matmul_here(dv, vd, k, View::new(ds, kd, vd), false);
        scale_rows(dv, &c.rest);
        matmul_here(dv, vd, View::new(&c.p, n, n).t(), dout_view, true);

        // Through O: dQ = diag(e^G) dO S^T + (dP * D) K, and the same for K.
        matmul_here(dq, kd, dout_view, state.t(), false);
        scale_rows(dq, &c.kept);
        for i in 0..n {
            dg[i] += dot(&c.q[i * kd..][..kd], &dq[i * kd..][..kd]);
        }
        matmul_here(square, n, dout_view, View::new(&c.new, n, vd).t(), false);
        for i in 0..n {
            for j in 0..n {
                // Above the diagonal P is zero, and D with it.
                let through = square[i * n + j] * c.p[i * n + j];
                dg[i] += through;
                dg[j] -= through;
                square[i * n + j] *= c.decay[i * n + j];
            }
        }
        matmul_here(dq, kd, View::new(square, n, n), k, true);
        matmul_here(dk, kd, View::new(square, n, n).t(), q, false);

        // Through S+ = e^(G_last) S + (diag(r) K)^T N.
        matmul_here(rows, kd, View::new(&c.new, n, vd), View::new(ds, kd, vd).t(), false);
        scale_rows(rows, &c.rest);
        let mut last = c.whole * dot(s, ds);
        for i in 0..n {
            let through = dot(&c.k[i * kd..][..kd], &rows[i * kd..][..kd]);
            dg[i] -= through;
            last += through;
        }
        dg[n - 1] += last;
        add_scaled(dk, rows, 1.0);

        // (I + A)^T X = dN, by backward substitution.
        for i in (0..n).rev() {
            let (above, row) = dv.split_at_mut(i * vd);
            for (j, above) in above.chunks_exact_mut(vd).enumerate() {
                add_scaled(above, &row[..vd], -c.a[i * n + j]);
            }
        }
        // Through A: dA = -(X N^T) below the diagonal.
        matmul_here(square, n, View::new(dv, n, vd), View::new(&c.new, n, vd).t(), false);
        for i in 0..n {
            for j in 0..n {
                let at = i * n + j;
                let da = if j < i { -square[at] } else { 0.0 };
                let through = da * c.a[at];
                dg[i] += through;
                dg[j] -= through;
                let decayed = da * c.decay[at];
                dbeta[i] += decayed * c.kk[at];
                square[at] = c.beta[i] * decayed;
            }
        }
        matmul_here(dk, kd, View::new(square, n, n), k, true);
        matmul_here(dk, kd, View::new(square, n, n).t(), k, true);
        // Through the right side, beta (V - e^G K S). `wide` becomes the gradient of K S.
        for i in 0..n {
            let row = i * vd..(i + 1) * vd;
            let (x, ks) = (&mut dv[row.clone()], &c.ks[row.clone()]);
            dbeta[i] += dot(x, &c.v[row.clone()]) - c.kept[i] * dot(x, ks);
            let factor = c.beta[i];
            for (x, w) in x.iter_mut().zip(&mut wide[row.clone()]) {
                *x *= factor;
                *w = -c.kept[i] * *x;
            }
            dg[i] += dot(&wide[row.clone()], ks);
        }
        matmul_here(dk, kd, View::new(wide, n, vd), state.t(), true);

        // dS = e^(G_last) dS+ + (diag(e^G) Q)^T dO + K^T d(K S).
        rows.copy_from_slice(&c.q);
        scale_rows(rows, &c.kept);
        ds.iter_mut().for_each(|ds| *ds *= c.whole);
        matmul_here(ds, vd, View::new(rows, n, kd).t(), dout_view, true);
        matmul_here(ds, vd, k.t(), View::new(wide, n, vd), true);

        // G is a running sum.
        for i in (0..n - 1).rev() {
            dg[i] += dg[i + 1];
        }
    }
}

/// Puts gradients of heads back into rows: `dqkv (T x channels)`.
pub fn join(dq: &[f32], dk: &[f32], dv: &[f32], shape: &Shape, dqkv: &mut [f32]) {
    let Shape { k_heads, v_heads, k_dim, v_dim } = *shape;
    let (width, rows) = (shape.channels(), dqkv.len() / shape.channels());
    dqkv.par_chunks_mut(width).enumerate().for_each(|(t, row)| {
        let mut rest = row;
        for (heads, x, d) in [(k_heads, dq, k_dim), (k_heads, dk, k_dim), (v_heads, dv, v_dim)] {
            let (now, later) = rest.split_at_mut(heads * d);
            for (head, out) in now.chunks_exact_mut(d).enumerate() {
                out.copy_from_slice(&x[(head * rows + t) * d..][..d]);
            }
            rest = later;
        }
    });
}

#[cfg(test)]
mod tests {
    use super::super::testing::{check_gradient, random};
    use super::*;

    const SHAPE: Shape = Shape { k_heads: 2, v_heads: 4, k_dim: 3, v_dim: 2 };

    /// The rule a token at a time, in f64: rows of o (T x v_heads v_dim).
    fn plain(qkv: &[f32], g: &[f32], beta: &[f32], spans: &[Span], shape: &Shape) -> Vec<f64> {
        let Shape { k_heads, v_heads, k_dim, v_dim } = *shape;
        let (width, rows) = (shape.channels(), qkv.len() / shape.channels());
        let mut out = vec![0.0; rows * v_heads * v_dim];
        for head in 0..v_heads {
            let k_head = head / (v_heads / k_heads);
            let unit = |t: usize, at: usize| -> Vec<f64> {
                let x: Vec<f64> = qkv[t * width + at..][..k_dim].iter().map(|&x| x as f64).collect();
                let length = (x.iter().map(|x| x * x).sum::<f64>() + EPS as f64).sqrt();
                x.iter().map(|x| x / length).collect()
            };
            for span in spans {
                let mut s = vec![0.0f64; k_dim * v_dim];
                for t in span.prefix.clone().chain(span.rows.clone()) {
                    let (q, k) = (unit(t, k_head * k_dim), unit(t, (k_heads + k_head) * k_dim));
                    s.iter_mut().for_each(|s| *s *= (g[t * v_heads + head] as f64).exp());
                    for j in 0..v_dim {
                        let v = qkv[t * width + 2 * k_heads * k_dim + head * v_dim + j] as f64;
                        let known: f64 = (0..k_dim).map(|i| s[i * v_dim + j] * k[i]).sum();
                        let d = beta[t * v_heads + head] as f64 * (v - known);
                        (0..k_dim).for_each(|i| s[i * v_dim + j] += k[i] * d);
                        if span.rows.contains(&t) {
                            let o: f64 = (0..k_dim).map(|i| s[i * v_dim + j] * q[i]).sum();
                            out[(t * v_heads + head) * v_dim + j] = o / (k_dim as f64).sqrt();
                        }
                    }
                }
            }
        }
        out
    }

    /// A context with two continuations, a longer context with one, and a sequence alone; chunks of 4 cut them raggedly.
    fn batch() -> (Vec<Span>, usize, usize) {
        let span = |rows, prefix| Span { rows, prefix };
        (
            vec![
                span(0..5, 0..0),
                span(5..14, 0..0),
                span(14..16, 0..5),
                span(16..25, 5..14),
                span(25..30, 0..5),
                span(30..38, 0..0),
            ],
            14,
            38,
        )
    }

    fn inputs(rows: usize) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
        let gates = rows * SHAPE.v_heads;
        let g = random(gates, 2).iter().map(|x| -x.abs()).collect();
        let beta = random(gates, 3).iter().map(|x| 1.0 / (1.0 + (-2.0 * x).exp())).collect();
        // Long enough that a step of finite differences turns q and k little.
        let qkv = random(rows * SHAPE.channels(), 1).iter().map(|x| x + 2.0 * x.signum()).collect();
        (qkv, g, beta)
    }

    #[test]
    fn chunks_and_contexts_give_what_the_rule_gives_token_by_token() {
        let (spans, frozen, rows) = batch();
        let (qkv, g, beta) = inputs(rows);
        let want = plain(&qkv, &g, &beta, &spans, &SHAPE);
        for chunk in [1, 4, CHUNK] {
            let (mut out, mut states) = (vec![0.0; want.len()], vec![0.0; 2 * SHAPE.state()]);
            let input = Input { qkv: &qkv, g: &g, beta: &beta };
            forward_by(chunk, input, &sequences(&spans, frozen), &SHAPE, &mut out, &mut states);
            for (i, want) in want.iter().enumerate() {
                let (t, head, j) = (i / 8, i / 2 % 4, i % 2);
                let got = out[(head * rows + t) * 2 + j] as f64;
                assert!((got - want).abs() < 1e-6, "chunks of {chunk}, row {t}: {got} {want}");
            }
        }
    }

    #[test]
    fn long_sequences_at_full_chunks_stay_exact() {
        let shape = Shape { k_heads: 1, v_heads: 1, k_dim: 16, v_dim: 8 };
        let rows = 3 * CHUNK + 7;
        let (qkv, g) = (random(rows * shape.channels(), 1), vec![-0.01; rows]);
        let beta = vec![0.9; rows];
        let spans = [Span { rows: 0..rows, prefix: 0..0 }];
        let want = plain(&qkv, &g, &beta, &spans, &shape);
        let mut out = vec![0.0; want.len()];
        forward(Input { qkv: &qkv, g: &g, beta: &beta }, &sequences(&spans, 0), &shape, &mut out, &mut []);
        let worst = out.iter().zip(&want).map(|(&a, b)| (a as f64 - b).abs()).fold(0.0, f64::max);
        assert!(worst < 1e-5, "{worst}");
    }

    #[test]
    fn gradients_agree_with_finite_differences_and_a_context_gets_none() {
        let (spans, frozen, rows) = batch();
        let (qkv, g, beta) = inputs(rows);
        let (v_heads, v_dim, width) = (SHAPE.v_heads, SHAPE.v_dim, SHAPE.channels());
        let mut up = random(rows * v_heads * v_dim, 4);
        up[..frozen * v_heads * v_dim].fill(0.0);
        let loss = |qkv: &[f32], g: &[f32], beta: &[f32]| -> f64 {
            plain(qkv, g, beta, &spans, &SHAPE).iter().zip(&up).map(|(o, &u)| o * u as f64).sum()
        };
        let trained = rows - frozen;
        for chunk in [4, CHUNK] {
            let (mut out, mut states) = (vec![0.0; up.len()], vec![0.0; 2 * SHAPE.state()]);
            let all = sequences(&spans, frozen);
            forward_by(chunk, Input { qkv: &qkv, g: &g, beta: &beta }, &all, &SHAPE, &mut out, &mut states);
            let own: Vec<Sequence> = all.into_iter().filter(|s| s.rows.start >= frozen).collect();
            let own: Vec<Sequence> =
                own.into_iter().map(|s| Sequence { rows: s.rows.start - frozen..s.rows.end - frozen, ..s }).collect();
            let mut dout = vec![0.0; trained * v_heads * v_dim];
            for (i, x) in up[frozen * v_heads * v_dim..].iter().enumerate() {
                let (t, head, j) = (i / (v_heads * v_dim), i / v_dim % v_heads, i % v_dim);
                dout[(head * trained + t) * v_dim + j] = *x;
            }
            let input =
                Input { qkv: &qkv[frozen * width..], g: &g[frozen * v_heads..], beta: &beta[frozen * v_heads..] };
            let keys = trained * SHAPE.k_heads * SHAPE.k_dim;
            let (mut dq, mut dk, mut dv) = (vec![9.0; keys], vec![9.0; keys], vec![9.0; dout.len()]);
            let (mut dg, mut dbeta) = (vec![9.0; trained * v_heads], vec![9.0; trained * v_heads]);
            backward_by(chunk, &dout, input, &own, &states, &SHAPE, (&mut dq, &mut dk, &mut dv), (&mut dg, &mut dbeta));
            let mut dqkv = vec![9.0; trained * width];
            join(&dq, &dk, &dv, &SHAPE, &mut dqkv);
            let by_row =
                |x: &[f32]| -> Vec<f32> { (0..x.len()).map(|i| x[i % v_heads * trained + i / v_heads]).collect() };
            let with = |all: &[f32], part: &[f32]| [&all[..all.len() - part.len()], part].concat();
            check_gradient("qkv", input.qkv, &dqkv, |x| loss(&with(&qkv, x), &g, &beta));
            check_gradient("g", input.g, &by_row(&dg), |x| loss(&qkv, &with(&g, x), &beta));
            check_gradient("beta", input.beta, &by_row(&dbeta), |x| loss(&qkv, &g, &with(&beta, x)));
        }
    }
}
