//! Causal attention with grouped query heads over packed sequences, without a T x T matrix: a block of query rows at a
//! time meets its keys, and the backward pass makes the block's probabilities again from the saved log-sum (Dao et al.,
//! FlashAttention, arXiv 2205.14135). Layout of queries, keys and values: (heads, T, D).

use super::math::{exp, max_inline, sum_inline, vectorized};
use super::matmul::{View, matmul_here};
use super::rope::head_rows;
use rayon::prelude::*;
use std::ops::Range;

/// Query rows of one block. Scratch of a task is this times the keys of a sequence.
const BLOCK: usize = 64;

/// Rows that attend to each other, causally, after all of a prefix that they share with other spans.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    pub rows: Range<usize>,
    /// Rows that stand before `rows` in the sequence: the context, at positions 0.. of it.
    pub prefix: Range<usize>,
}

/// Sizes of one call.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// All rows: frozen ones first, then those that train.
    pub rows: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub scale: f32,
    /// A row sees itself and `window - 1` rows before.
    pub window: Option<usize>,
}

/// What a block of query rows can see: some rows of the prefix, then own rows.
struct Keys {
    prefix: Range<usize>,
    own: Range<usize>,
    /// Position of the first key.
    position: usize,
}

impl Shape {
    fn keys(&self, span: &Span, block: &Range<usize>) -> Keys {
        let prefix = span.prefix.len();
        let first_query = prefix + block.start - span.rows.start;
        let from = self.window.map_or(0, |w| (first_query + 1).saturating_sub(w));
        let skip = from.min(prefix);
        Keys {
            prefix: span.prefix.start + skip..span.prefix.end,
            own: span.rows.start + from.saturating_sub(prefix)..block.end,
            position: from,
        }
    }

    /// First and end of the keys that query row `t` sees, as columns of its block.
    fn visible(&self, span: &Span, keys: &Keys, t: usize) -> Range<usize> {
        let position = span.prefix.len() + t - span.rows.start;
        let from = self.window.map_or(0, |w| (position + 1).saturating_sub(w));
        from.saturating_sub(keys.position)..position + 1 - keys.position
    }
}

impl Keys {
    fn len(&self) -> usize {
        self.prefix.len() + self.own.len()
    }
}

fn blocks(rows: &Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
    let end = rows.end;
    rows.clone().step_by(BLOCK).map(move |b| b..end.min(b + BLOCK))
}

/// `out (rows x keys) = a keys^T`, the keys in their two parts.
fn times_keys(out: &mut [f32], a: View, kv: &[f32], kv_head: usize, total: usize, keys: &Keys, d: usize) {
    let n = keys.len();
    let prefix = head_rows(kv, kv_head, total, keys.prefix.start, keys.prefix.end, d);
    let own = head_rows(kv, kv_head, total, keys.own.start, keys.own.end, d);
    matmul_here(out, n, a, prefix.t(), false);
    matmul_here(&mut out[prefix.rows..], n, a, own.t(), false);
}

/// `out (rows x D) = p (rows x keys) values`, the values in their two parts.
fn weigh_values(out: &mut [f32], p: &[f32], kv: &[f32], kv_head: usize, total: usize, keys: &Keys, d: usize) {
    let (n, split) = (keys.len(), keys.prefix.len());
    let rows = out.len() / d;
    let prefix = head_rows(kv, kv_head, total, keys.prefix.start, keys.prefix.end, d);
    let own = head_rows(kv, kv_head, total, keys.own.start, keys.own.end, d);
    matmul_here(out, d, View::strided(&p[split..], rows, own.rows, n), own, false);
    matmul_here(out, d, View::strided(p, rows, split, n), prefix, true);
}

vectorized! {
    /// Softmax of `row[visible]` times `scale`; zero elsewhere. Returns the log of the sum.
    fn softmax_row(row: &mut [f32], from: usize, end: usize, scale: f32) -> f32 {
        row[..from].fill(0.0);
        row[end..].fill(0.0);
        let seen = &mut row[from..end];
        let max = max_inline(seen) * scale;
        for x in seen.iter_mut() {
            *x = exp(*x * scale - max);
        }
        let sum = sum_inline(seen);
        let inverse = 1.0 / sum;
        for x in seen.iter_mut() {
            *x *= inverse;
        }
        max + sum.ln()
    }
}

vectorized! {
    /// Turns a row of scores into probabilities, by the saved log-sum, and a row of `dP` into `dS`.
    fn backward_row(s: &mut [f32], dp: &mut [f32], from: usize, end: usize, scale: f32, log_sum: f32, delta: f32) {
        s[..from].fill(0.0);
        s[end..].fill(0.0);
        dp[..from].fill(0.0);
        dp[end..].fill(0.0);
        for (s, dp) in s[from..end].iter_mut().zip(&mut dp[from..end]) {
            *s = exp(*s * scale - log_sum);
            *dp = *s * (*dp - delta) * scale;
        }
    }
}

/// `out (heads, T, D)` and `log_sums (heads, T)` for every row of every span. Rows of no span are left as they were.
pub fn forward(q: &[f32], k: &[f32], v: &[f32], spans: &[Span], shape: &Shape, out: &mut [f32], log_sums: &mut [f32]) {
    let Shape { rows: total, head_dim: d, .. } = *shape;
    let group = shape.heads / shape.kv_heads;
    assert_eq!((q.len(), k.len(), v.len()), (shape.heads * total * d, shape.kv_heads * total * d, k.len()));
    let heads = out.par_chunks_mut(total * d).zip(log_sums.par_chunks_mut(total)).enumerate();
    heads.for_each(|(head, (out, log_sums))| {
        let mut scores = Vec::new();
        for span in spans {
            for block in blocks(&span.rows) {
                let keys = shape.keys(span, &block);
                let n = keys.len();
                scores.resize(block.len() * n, 0.0);
                let q = head_rows(q, head, total, block.start, block.end, d);
                times_keys(&mut scores, q, k, head / group, total, &keys, d);
                for (row, t) in scores.chunks_exact_mut(n).zip(block.clone()) {
                    let seen = shape.visible(span, &keys, t);
                    log_sums[t] = softmax_row(row, seen.start, seen.end, shape.scale);
                }
                let out = &mut out[block.start * d..block.end * d];
                weigh_values(out, &scores, v, head / group, total, &keys, d);
            }
        }
    });
}

/// Gradients of the rows `first..` (the trained ones; every prefix lies before them and gets none).
/// `q`, `dout` and `dq` are (heads, T - first, D), `k` and `v` (kv heads, T, D), `dk` and `dv` (kv heads, T - first, D);
/// `dq`, `dk` and `dv` are written. `delta` (heads, T - first) is the row sum of `dout * out`; `log_sums` (heads,
/// T - first) is from the forward pass.
#[allow(clippy::too_many_arguments)]
pub fn backward(
    dout: &[f32],
    delta: &[f32],
    (q, k, v): (&[f32], &[f32], &[f32]),
    log_sums: &[f32],
    spans: &[Span],
    shape: &Shape,
    first: usize,
    (dq, dk, dv): (&mut [f32], &mut [f32], &mut [f32]),
) {
    let Shape { rows: total, head_dim: d, scale, .. } = *shape;
    let trained = total - first;
    let group = shape.heads / shape.kv_heads;
    (dq.par_chunks_mut(group * trained * d), dk.par_chunks_mut(trained * d), dv.par_chunks_mut(trained * d))
        .into_par_iter()
        .enumerate()
        .for_each(|(kv_head, (dq, dk, dv))| {
            dk.fill(0.0);
            dv.fill(0.0);
            let (mut p, mut ds) = (Vec::new(), Vec::new());
            for span in spans.iter().filter(|s| s.rows.start >= first) {
                debug_assert!(span.prefix.end <= first, "a prefix is never trained");
                for block in blocks(&span.rows) {
                    let keys = shape.keys(span, &block);
                    let (n, split) = (keys.len(), keys.prefix.len());
                    p.resize(block.len() * n, 0.0);
                    ds.resize(block.len() * n, 0.0);
                    for member in 0..group {
                        let head = kv_head * group + member;
                        let query = head_rows(q, head, trained, block.start - first, block.end - first, d);
                        let dout = head_rows(dout, head, trained, block.start - first, block.end - first, d);
                        times_keys(&mut p, query, k, kv_head, total, &keys, d);
                        times_keys(&mut ds, dout, v, kv_head, total, &keys, d);
                        for ((p, ds), t) in p.chunks_exact_mut(n).zip(ds.chunks_exact_mut(n)).zip(block.clone()) {
                            let seen = shape.visible(span, &keys, t);
                            let at = head * trained + t - first;
                            let (log_sum, delta) = (log_sums[at], delta[at]);
                            backward_row(p, ds, seen.start, seen.end, scale, log_sum, delta);
                        }
                        let dq = &mut dq[(member * trained + block.start - first) * d..][..block.len() * d];
                        weigh_values(dq, &ds, k, kv_head, total, &keys, d);
                        let own = (keys.own.start - first) * d..(keys.own.end - first) * d;
                        let (rows, width) = (block.len(), keys.own.len());
                        let ds_own = View::strided(&ds[split..], rows, width, n);
                        let p_own = View::strided(&p[split..], rows, width, n);
                        matmul_here(&mut dk[own.clone()], d, ds_own.t(), query, true);
                        matmul_here(&mut dv[own], d, p_own.t(), dout, true);
                    }
                }
            }
        });
}

/// `delta (heads, T)` = sums over D of `dout * out`, both T x (heads D).
pub fn delta(dout: &[f32], out: &[f32], heads: usize, d: usize, delta: &mut [f32]) {
    let rows = delta.len() / heads;
    delta.par_chunks_mut(rows).enumerate().for_each(|(head, delta)| {
        for (t, delta) in delta.iter_mut().enumerate() {
            let at = (t * heads + head) * d;
            *delta = super::dot(&dout[at..at + d], &out[at..at + d]);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::super::rope::{join_heads, split_heads};
    use super::super::testing::{check_gradient, random, weigh};
    use super::*;

    /// The textbook: every score of every pair, in f64.
    fn plain(q: &[f32], k: &[f32], v: &[f32], spans: &[Span], s: &Shape) -> Vec<f64> {
        let d = s.head_dim;
        let mut out = vec![0.0; s.heads * s.rows * d];
        for head in 0..s.heads {
            let kv = head * s.kv_heads / s.heads;
            for span in spans {
                let sequence: Vec<usize> = span.prefix.clone().chain(span.rows.clone()).collect();
                for at in span.prefix.len()..sequence.len() {
                    let from = s.window.map_or(0, |w| (at + 1).saturating_sub(w));
                    let dot = |j: usize| -> f64 {
                        let (a, b) = ((head * s.rows + sequence[at]) * d, (kv * s.rows + sequence[j]) * d);
                        (0..d).map(|i| q[a + i] as f64 * k[b + i] as f64).sum::<f64>() * s.scale as f64
                    };
                    let e: Vec<f64> = (from..=at).map(|j| dot(j).exp()).collect();
                    let sum: f64 = e.iter().sum();
                    for (j, e) in (from..=at).zip(e) {
                        for i in 0..d {
                            out[(head * s.rows + sequence[at]) * d + i] +=
                                e / sum * v[(kv * s.rows + sequence[j]) * d + i] as f64;
                        }
                    }
                }
            }
        }
        out
    }

    fn cases() -> Vec<(Shape, Vec<Span>, usize)> {
        let shape = |rows, window| Shape { rows, heads: 4, kv_heads: 2, head_dim: 3, scale: 0.7, window };
        // A context of 3 with two continuations, and a sequence alone; the same with a window; one longer than a block.
        let packed = vec![
            Span { rows: 0..3, prefix: 0..0 },
            Span { rows: 3..7, prefix: 0..3 },
            Span { rows: 7..8, prefix: 0..3 },
            Span { rows: 8..13, prefix: 0..0 },
        ];
        let long = vec![Span { rows: 0..10, prefix: 0..0 }, Span { rows: 10..150, prefix: 0..10 }];
        vec![
            (shape(13, None), packed.clone(), 3),
            (shape(13, Some(2)), packed.clone(), 3),
            (shape(13, Some(4)), packed, 3),
            (shape(150, None), long.clone(), 10),
            (shape(150, Some(70)), long, 10),
        ]
    }

    #[test]
    fn packed_attention_equals_every_sequence_by_itself() {
        for (s, spans, _) in cases() {
            let n = s.rows * s.head_dim;
            let (q, k, v) = (random(4 * n, 1), random(2 * n, 2), random(2 * n, 3));
            let (mut out, mut log_sums) = (vec![0.0; 4 * n], vec![0.0; 4 * s.rows]);
            forward(&q, &k, &v, &spans, &s, &mut out, &mut log_sums);
            for (got, want) in out.iter().zip(plain(&q, &k, &v, &spans, &s)) {
                assert!((*got as f64 - want).abs() < 1e-5, "window {:?}", s.window);
            }
        }
    }

    #[test]
    fn gradients_agree_with_finite_differences_and_a_prefix_gets_none() {
        for (s, spans, first) in cases() {
            let (d, trained) = (s.head_dim, s.rows - first);
            let n = s.rows * d;
            let (q, k, v) = (random(4 * n, 1), random(2 * n, 2), random(2 * n, 3));
            let mut up = random(4 * n, 4);
            for (i, u) in up.iter_mut().enumerate() {
                if i / d % s.rows < first {
                    *u = 0.0; // what a frozen row gives is not part of the loss
                }
            }
            let (mut out, mut log_sums) = (vec![0.0; 4 * n], vec![0.0; 4 * s.rows]);
            forward(&q, &k, &v, &spans, &s, &mut out, &mut log_sums);
            let cut = |x: &[f32]| -> Vec<f32> {
                x.chunks_exact(n).flat_map(|head| head[first * d..].iter().copied()).collect()
            };
            let (out, dout, q_cut) = (cut(&out), cut(&up), cut(&q));
            let log_sums: Vec<f32> = log_sums.chunks_exact(s.rows).flat_map(|head| &head[first..]).copied().collect();
            let (mut rows_out, mut rows_dout) = (vec![0.0; out.len()], vec![0.0; out.len()]);
            join_heads(&out, &mut rows_out, trained, d);
            join_heads(&dout, &mut rows_dout, trained, d);
            let mut sums = vec![0.0; 4 * trained];
            delta(&rows_dout, &rows_out, 4, d, &mut sums);
            let mut again = vec![0.0; out.len()];
            split_heads(&rows_dout, &mut again, trained, d);
            let mut dq = vec![9.0; 4 * trained * d];
            let (mut dk, mut dv) = (vec![9.0; 2 * trained * d], vec![9.0; 2 * trained * d]);
            backward(&again, &sums, (&q_cut, &k, &v), &log_sums, &spans, &s, first, (&mut dq, &mut dk, &mut dv));
            let loss = |q: &[f32], k: &[f32], v: &[f32]| {
                let out = plain(q, k, v, &spans, &s);
                out.iter().zip(&up).map(|(o, &u)| o * u as f64).sum::<f64>()
            };
            // Put a trained part back into the whole, so that only it moves.
            let with = |whole: &[f32], part: &[f32]| -> Vec<f32> {
                let mut whole = whole.to_vec();
                for (w, p) in whole.chunks_exact_mut(n).zip(part.chunks_exact(trained * d)) {
                    w[first * d..].copy_from_slice(p);
                }
                whole
            };
            if s.rows < 100 {
                check_gradient("q", &cut(&q), &dq, |x| loss(&with(&q, x), &k, &v));
                check_gradient("k", &cut(&k), &dk, |x| loss(&q, &with(&k, x), &v));
                check_gradient("v", &cut(&v), &dv, |x| loss(&q, &k, &with(&v, x)));
            } else {
                // Too many elements for that: one direction each.
                for (which, x, dx) in [(0, &q, &dq), (1, &k, &dk), (2, &v, &dv)] {
                    let direction = random(dx.len(), 9);
                    let slope = |step: f32| {
                        let moved: Vec<f32> = cut(x).iter().zip(&direction).map(|(x, d)| x + step * d).collect();
                        let moved = with(x, &moved);
                        match which {
                            0 => loss(&moved, &k, &v),
                            1 => loss(&q, &moved, &v),
                            _ => loss(&q, &k, &moved),
                        }
                    };
                    let want = (slope(1e-2) - slope(-1e-2)) / 2e-2;
                    let got = weigh(dx, &direction);
                    assert!((got - want).abs() < 2e-3 * want.abs().max(1.0), "{which}: {got} {want}");
                }
            }
        }
    }
}
