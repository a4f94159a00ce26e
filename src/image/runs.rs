//! A segment's elements in the tensor's own order: maximal runs that are contiguous in the tensor and evenly strided in
//! memory. Reads and writes of any element range of a tensor are loops over runs.

use crate::source::Segment;

/// One dimension of a segment's box after merging: `size` steps of `tensor` elements in the tensor's row-major order and
/// of `memory` elements in the engine's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Dim {
    size: u64,
    tensor: u64,
    memory: u64,
}

/// `count` elements from element `tensor` of the tensor, at element offset `memory` from the segment's offset, `stride`
/// elements apart there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    pub tensor: u64,
    pub memory: u64,
    pub stride: u64,
    pub count: u64,
}

/// A box ready to be walked.
#[derive(Debug, Clone)]
pub(super) struct Walk {
    /// Outermost first; the last one steps 1 in the tensor.
    outer: Vec<Dim>,
    inner: Dim,
    /// The box's first element in the tensor.
    first: u64,
    /// One past its last element.
    end: u64,
}

impl Walk {
    /// `tensor_strides`: row-major strides of the whole tensor, in elements.
    pub fn new(segment: &Segment, tensor_strides: &[u64]) -> Walk {
        let first = segment.at.iter().zip(tensor_strides).map(|(a, s)| a * s).sum();
        let mut dims: Vec<Dim> = Vec::new();
        let steps = segment.shape.iter().zip(tensor_strides).zip(&segment.strides);
        for ((&size, &tensor), &memory) in steps {
            let dim = Dim { size, tensor, memory };
            if dim.size == 1 {
                continue;
            }
            // Steps of one dimension that continue where the next one's end are steps of one longer dimension.
            match dims.last_mut() {
                Some(o) if o.tensor == dim.size * dim.tensor && Some(o.memory) == dim.size.checked_mul(dim.memory) => {
                    *o = Dim { size: o.size * dim.size, ..dim };
                }
                _ => dims.push(dim),
            }
        }
        let last: u64 = dims.iter().map(|d| (d.size - 1) * d.tensor).sum();
        let inner = match dims.last() {
            Some(d) if d.tensor == 1 => dims.pop().unwrap_or(Dim { size: 1, tensor: 1, memory: 1 }),
            _ => Dim { size: 1, tensor: 1, memory: 1 },
        };
        Walk { outer: dims, inner, first, end: first + last + 1 }
    }

    /// The tensor's elements from the box's first to its last; others lie between them unless it is one run.
    pub fn span(&self) -> std::ops::Range<u64> {
        self.first..self.end
    }

    /// If the box is whole rows of a matrix of `columns` columns, each with its elements side by side in memory: the first
    /// row, how many there are, and how many elements apart. Rows of a single one are as far apart as they are long.
    pub fn rows(&self, columns: u64) -> Option<(u64, u64, u64)> {
        let whole = self.first.is_multiple_of(columns) && self.end.is_multiple_of(columns);
        let stride = match &self.outer[..] {
            [] if columns == 1 => self.inner.memory,
            [] if self.inner.memory == 1 => columns,
            [rows] if rows.tensor == columns && self.inner.size == columns && self.inner.memory == 1 => rows.memory,
            _ => return None,
        };
        let rows = (self.end - self.first) / columns;
        (whole && stride >= columns).then_some((self.first / columns, rows, stride))
    }

    /// Calls `each` for the parts of the box that lie in elements `from..to` of the tensor, in order.
    pub fn runs<E>(&self, from: u64, to: u64, mut each: impl FnMut(Run) -> Result<(), E>) -> Result<(), E> {
        if from >= self.end || to <= self.first {
            return Ok(());
        }
        let Some(mut index) = self.seek(from) else { return Ok(()) };
        loop {
            let place = |step: fn(&Dim) -> u64| index.iter().zip(&self.outer).map(|(i, d)| i * step(d)).sum::<u64>();
            let start = self.first + place(|d| d.tensor);
            if start >= to {
                return Ok(());
            }
            let memory = place(|d| d.memory);
            let skip = from.saturating_sub(start);
            let count = self.inner.size.min(to - start);
            if skip < count {
                let stride = self.inner.memory;
                each(Run { tensor: start + skip, memory: memory + skip * stride, stride, count: count - skip })?;
            }
            if !self.advance(&mut index, self.outer.len()) {
                return Ok(());
            }
        }
    }

    /// Index of the first run that ends after element `from`.
    fn seek(&self, from: u64) -> Option<Vec<u64>> {
        let mut index = vec![0; self.outer.len()];
        let mut rest = from.saturating_sub(self.first);
        for (d, dim) in self.outer.iter().enumerate() {
            let step = rest / dim.tensor;
            if step >= dim.size {
                return self.advance(&mut index, d).then_some(index);
            }
            index[d] = step;
            rest -= step * dim.tensor;
        }
        if rest >= self.inner.size {
            return self.advance(&mut index, self.outer.len()).then_some(index);
        }
        Some(index)
    }

    /// Counts dimensions `..below` up by one, and those from `below` on back to zero.
    fn advance(&self, index: &mut [u64], below: usize) -> bool {
        index[below..].fill(0);
        for d in (0..below).rev() {
            index[d] += 1;
            if index[d] < self.outer[d].size {
                return true;
            }
            index[d] = 0;
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Dtype;
    use crate::source::row_major;
    use proptest::prelude::*;

    fn boxes() -> impl Strategy<Value = (Vec<u64>, Segment)> {
        proptest::collection::vec((1u64..6, 0u64..6, 1u64..6), 0..4).prop_flat_map(|dims| {
            let n = dims.len();
            (Just(dims), Just((0..n).collect::<Vec<_>>()).prop_shuffle(), 0u64..3).prop_map(|(dims, order, gap)| {
                let tensor: Vec<u64> = dims.iter().map(|&(before, after, size)| before - 1 + size + after).collect();
                let at = dims.iter().map(|d| d.0 - 1).collect();
                let shape: Vec<u64> = dims.iter().map(|d| d.2).collect();
                let mut strides = vec![0; shape.len()];
                let mut next = 1 + gap;
                for d in order {
                    strides[d] = next;
                    next = next * shape[d] + gap;
                }
                (tensor, Segment { memory: 0, offset: 0, at, shape, strides, dtype: Dtype::U8, replica: false })
            })
        })
    }

    proptest! {
        /// Against the plain definition: every index of the box, one by one.
        #[test]
        fn runs_visit_exactly_the_elements_of_the_box_in_order((tensor, segment) in boxes(), a in 0u64..200, b in 0u64..200) {
            let strides = row_major(&tensor);
            let mut expected = Vec::new();
            let volume: u64 = segment.shape.iter().product();
            for n in 0..volume {
                let (mut rest, mut t, mut m) = (n, 0, 0);
                for d in (0..segment.shape.len()).rev() {
                    let i = rest % segment.shape[d];
                    rest /= segment.shape[d];
                    t += (segment.at[d] + i) * strides[d];
                    m += i * segment.strides[d];
                }
                if (a..b).contains(&t) {
                    expected.push((t, m));
                }
            }
            expected.sort_unstable();
            let mut seen = Vec::new();
            Walk::new(&segment, &strides).runs::<()>(a, b, |run| {
                seen.extend((0..run.count).map(|i| (run.tensor + i, run.memory + i * run.stride)));
                Ok(())
            }).unwrap();
            prop_assert_eq!(seen, expected);
        }
    }
}
