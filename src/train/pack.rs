//! Samples as rows of one pass: contexts first, whose rows give keys and values and no gradient, then the rows that
//! train. Several samples lie side by side and attend only to themselves; equal contexts are run once.

use super::families::{Architecture, Layer, Mixer};
use crate::compute::cpu::attention::Span;
use std::collections::HashMap;
use std::ops::Range;

/// One sample in token ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tokens {
    pub context: Vec<u32>,
    pub continuation: Vec<u32>,
    /// Which continuation tokens the loss counts; empty means all.
    pub trained: Vec<bool>,
}

impl Tokens {
    pub fn new(context: Vec<u32>, continuation: Vec<u32>) -> Tokens {
        Tokens { context, continuation, trained: Vec::new() }
    }

    /// Continuation tokens that the loss counts. The first token of a sequence without context has no predecessor to
    /// predict it from.
    pub fn targets(&self) -> usize {
        let from = self.context.is_empty() as usize;
        match self.trained.is_empty() {
            true => self.continuation.len().saturating_sub(from),
            false => self.trained.iter().skip(from).filter(|&&t| t).count(),
        }
    }

    pub fn len(&self) -> usize {
        self.context.len() + self.continuation.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The rows of one step.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    /// Token of each row: `frozen` rows of contexts, then the rows that train.
    pub ids: Vec<u32>,
    /// Place of each row in its own sequence.
    pub positions: Vec<u32>,
    pub frozen: usize,
    pub spans: Vec<Span>,
    /// Rows (counted from the first that trains) with a token to predict, and that token.
    pub targets: Vec<(usize, u32)>,
    /// Rows (counted from the first that trains) of each sample, and the caller's number for it.
    pub samples: Vec<(Range<usize>, usize)>,
}

impl Batch {
    /// Packs `samples`, each with the caller's number for it. Contexts stop one token early: their last token runs with
    /// gradient, since what it predicts is the first token of the continuation.
    pub fn pack<'a>(samples: impl IntoIterator<Item = (usize, &'a Tokens)>) -> Batch {
        let samples: Vec<_> = samples.into_iter().filter(|(_, s)| s.targets() > 0).collect();
        let mut batch = Batch::default();
        let mut contexts: HashMap<&[u32], Range<usize>> = HashMap::new();
        for (_, sample) in &samples {
            let frozen = &sample.context[..sample.context.len().saturating_sub(1)];
            if !frozen.is_empty() && !contexts.contains_key(frozen) {
                let rows = batch.append(frozen, 0, 0..0);
                contexts.insert(frozen, rows);
            }
        }
        batch.frozen = batch.ids.len();
        for (number, sample) in samples {
            let last = sample.context.len().saturating_sub(1);
            let prefix = contexts.get(&sample.context[..last]).cloned().unwrap_or(0..0);
            let sequence: Vec<u32> = sample.context[last..].iter().chain(&sample.continuation).copied().collect();
            let given = sample.context.len() - last; // 1, or 0 without a context
            let counts = |i: usize| match i.checked_sub(given) {
                None => false,
                Some(i) => sample.trained.is_empty() || sample.trained[i],
            };
            // Rows after the last that predicts something would change nothing.
            let end = (1..sequence.len()).rev().find(|&i| counts(i)).expect("a sample with targets has a last one");
            let rows = batch.append(&sequence[..end], prefix.len(), prefix);
            let first = rows.start - batch.frozen;
            let targets = (0..end).filter(|&i| counts(i + 1)).map(|i| (first + i, sequence[i + 1]));
            batch.targets.extend(targets);
            batch.samples.push((first..first + end, number));
        }
        batch
    }

    fn append(&mut self, ids: &[u32], position: usize, prefix: Range<usize>) -> Range<usize> {
        let rows = self.ids.len()..self.ids.len() + ids.len();
        self.ids.extend(ids);
        self.positions.extend((0..ids.len()).map(|i| (position + i) as u32));
        self.spans.push(Span { rows: rows.clone(), prefix });
        rows
    }

    /// The same with the last sequence continued until the rows that train are a multiple of `multiple`. Rows that come after
    /// all others and predict nothing change nothing.
    pub fn padded(&self, multiple: usize) -> Batch {
        let mut batch = self.clone();
        let missing = self.trained().next_multiple_of(multiple) - self.trained();
        if let (Some(span), Some(&id), Some(&position)) =
            (batch.spans.last_mut(), self.ids.last(), self.positions.last())
        {
            batch.ids.extend(std::iter::repeat_n(id, missing));
            batch.positions.extend((1..=missing as u32).map(|i| position + i));
            span.rows.end += missing;
        }
        batch
    }

    pub fn rows(&self) -> usize {
        self.ids.len()
    }

    /// Rows that train.
    pub fn trained(&self) -> usize {
        self.ids.len() - self.frozen
    }

    /// The caller's number for the sample of a trained row.
    pub fn sample_of(&self, row: usize) -> Option<usize> {
        self.samples.iter().find(|(rows, _)| rows.contains(&row)).map(|(_, number)| *number)
    }

    /// Bytes that a step of this batch holds beyond the weights and the optimizer's state, at its peak: the end of the
    /// backward pass, or the first update. Follows what `step.rs` and `apollo.rs` take; the benchmark prints it beside
    /// what was measured.
    pub fn memory(&self, model: &Architecture, rank: usize) -> u64 {
        let (t, all, l) = (self.trained() as u64, self.rows() as u64, self.targets.len() as u64);
        let (h, i, v) = (model.hidden as u64, model.intermediate as u64, model.vocabulary as u64);
        let q = (model.heads * model.head_dim) as u64;
        let kv = (model.kv_heads * model.head_dim) as u64;
        let sequences = self.spans.len() as u64;
        let contexts = self.spans.iter().filter(|s| s.rows.end <= self.frozen).count() as u64;
        // Of every layer: two inputs and two gradients of the stream, and the feed-forward's gate, up and act. `widest` and
        // `at_once` are the largest mixer's: its widest matrix, and values that only pass through, a row.
        let (mut layers, mut widest, mut at_once) = (model.layers.len() as u64 * t * (4 * h + 3 * i), h * i, 0);
        for layer in &model.layers {
            match &layer.mixer {
                // Attention's output and q's gradient, and the gate; k's and v's gradients, in the buffers of k and v of all
                // rows.
                Mixer::Attention(attention) => {
                    let gate = attention.output_gate as u64;
                    layers += t * (2 + gate) * q + 2 * all * kv;
                    (widest, at_once) = (widest.max(h * (1 + gate) * q), at_once.max((3 + 2 * gate) * q + 4 * kv));
                }
                // What enters the convolution (with what stands before each sequence), the two gates, what enters and
                // leaves the norm, and states.
                Mixer::DeltaNet(net) => {
                    let (width, values) = (net.shape.channels() as u64, net.out.inputs as u64);
                    let (heads, state) = (net.shape.v_heads as u64, net.shape.state() as u64);
                    layers += t * (width + 2 * values + 3 * heads);
                    layers += sequences * (net.kernel as u64 - 1) * width + contexts * state;
                    (widest, at_once) = (widest.max(h * width), at_once.max(3 * width + 4 * values));
                }
            }
        }
        // The states before each chunk, of the heads that are worked on.
        let chunks = |layer: &Layer| match &layer.mixer {
            Mixer::Attention(_) => 0,
            Mixer::DeltaNet(net) => (t / 64 + 2) * (net.shape.k_dim * net.shape.v_dim) as u64,
        };
        let states = model.layers.iter().map(chunks).max().unwrap_or(0) * rayon::current_num_threads() as u64;
        // The gradient of the logits, or of the head where that is smaller, made from a block of logits at a time; the
        // head's input and its gradient.
        let block = if l > h { (super::head::LOGITS as u64).min(l * v) } else { 0 };
        let head = l.min(h) * v + block + 3 * l * h;
        // One layer's passing values in the forward pass; in the backward pass fewer rows of about as many.
        let passing = all * (3 * h + 3 * i + at_once) + states;
        // A matrix as bytes, widened, and its gradient; what it is projected to.
        let matrix = widest.max(1 << 20);
        let update = 3 * matrix + rank as u64 * v.max(i);
        // Threads' stacks and the packing buffers of matrix products.
        const FIXED: u64 = 12 << 20;
        4 * (layers + head + passing.max(update)) + FIXED
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_context_token_trains_and_equal_contexts_are_run_once() {
        let a = Tokens::new(vec![1, 2, 3], vec![4, 5]);
        let b = Tokens::new(vec![1, 2, 3], vec![6]);
        let batch = Batch::pack([(10, &a), (11, &b)]);
        assert_eq!(batch.ids, [1, 2, 3, 4, 3]);
        assert_eq!(batch.positions, [0, 1, 2, 3, 2]);
        assert_eq!(batch.frozen, 2);
        assert_eq!(batch.targets, [(0, 4), (1, 5), (2, 6)]);
        assert_eq!(batch.samples, [(0..2, 10), (2..3, 11)]);
        assert_eq!(batch.spans[1..], [Span { rows: 2..4, prefix: 0..2 }, Span { rows: 4..5, prefix: 0..2 }]);
        assert_eq!((batch.sample_of(1), batch.sample_of(2), batch.sample_of(3)), (Some(10), Some(11), None));
    }

    #[test]
    fn a_padded_batch_continues_its_last_sequence() {
        let (a, b) = (Tokens::new(vec![1, 2, 3], vec![4, 5]), Tokens::new(vec![], vec![6, 7, 8, 9]));
        let batch = Batch::pack([(10, &a), (11, &b)]);
        let padded = batch.padded(8);
        assert_eq!((padded.frozen, padded.trained(), batch.trained()), (2, 8, 5));
        assert_eq!(padded.ids[..7], batch.ids[..]);
        assert_eq!((&padded.ids[7..], &padded.positions[4..]), (&[8, 8, 8][..], &[0, 1, 2, 3, 4, 5][..]));
        assert_eq!(padded.spans.last().map(|s| s.rows.clone()), Some(4..10));
        assert_eq!((&padded.targets, &padded.samples), (&batch.targets, &batch.samples));
        assert_eq!(padded.padded(8), padded);
        assert_eq!(Batch::default().padded(8), Batch::default());
    }

    #[test]
    fn without_a_context_the_first_token_only_predicts() {
        let batch = Batch::pack([(0, &Tokens::new(vec![], vec![7, 8, 9]))]);
        assert_eq!((batch.ids, batch.frozen), (vec![7, 8], 0));
        assert_eq!(batch.targets, [(0, 8), (1, 9)]);
        // One token of context has nothing before it to freeze.
        let batch = Batch::pack([(0, &Tokens::new(vec![7], vec![8, 9]))]);
        assert_eq!((batch.ids, batch.frozen), (vec![7, 8], 0));
        assert_eq!(batch.targets, [(0, 8), (1, 9)]);
    }

    #[test]
    fn masked_tokens_are_read_but_not_counted_and_a_masked_tail_is_cut() {
        let trained = vec![true, false, true, false];
        let sample = Tokens { context: vec![1, 2], continuation: vec![3, 4, 5, 6], trained };
        let batch = Batch::pack([(0, &sample)]);
        assert_eq!(batch.ids, [1, 2, 3, 4]);
        assert_eq!(batch.targets, [(0, 3), (2, 5)]);
        assert_eq!(sample.targets(), 2);
    }
}
