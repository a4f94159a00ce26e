//! The change of one tensor between two commits, as two zstd frames: `xor` has one byte for each byte of the tensor, old
//! ^ new, as other tools that apply weight deltas read it; `values` has the new byte for each byte of `xor` that is not
//! zero. Together they give the new bytes and the old ones as absolute values, so that applying them, either way, twice
//! or over a half-written file, ends in the same place.

use super::error::CommitError;
use crate::memory::Hash;
use std::io::{self, Read, Write};
use xxhash_rust::xxh3::Xxh3Default;
use zstd::stream::Decoder;
use zstd::stream::raw::{self, CParameter, Operation};
use zstd::stream::zio::Writer;

/// zstd's level: 1 is what the other tools use. Runs of zeros are nearly free at any level.
const LEVEL: i32 = 1;

/// No difference.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// What a finished encoder knows about its tensor.
#[derive(Debug, Clone)]
pub struct Summary {
    /// XXH3-128 of the tensor's new bytes.
    pub checksum: Hash,
    pub changed_bytes: u64,
    pub changed_elements: u64,
}

/// What an encoder works in, kept from tensor to tensor: making it anew costs as much as encoding a small tensor.
pub struct Scratch {
    xor: raw::Encoder<'static>,
    values: raw::Encoder<'static>,
}

impl Scratch {
    /// `threads` beyond one compress parts of a large tensor at the same time, still into one frame.
    pub fn new(threads: u32) -> io::Result<Scratch> {
        let encoder = || {
            let mut encoder = raw::Encoder::new(LEVEL)?;
            encoder.set_parameter(CParameter::ChecksumFlag(true))?;
            if threads > 1 {
                encoder.set_parameter(CParameter::NbWorkers(threads))?;
            }
            Ok::<_, io::Error>(encoder)
        };
        Ok(Scratch { xor: encoder()?, values: encoder()? })
    }
}

/// What a piece of a tensor adds to the two frames. Made on any thread; the encoder takes the pieces in order.
#[derive(Default)]
pub struct Difference {
    xor: Vec<u8>,
    /// The first `taken` count.
    values: Vec<u8>,
    taken: usize,
    /// Elements with a difference, if the piece begins with one and none is cut at its end.
    elements: Option<u64>,
}

impl Difference {
    /// Compares `old` and `new`, of the same length, of a tensor whose elements have `element` bytes.
    pub fn compare(&mut self, old: &[u8], new: &[u8], element: usize) {
        self.xor.clear();
        self.xor.extend(old.iter().zip(new).map(|(a, b)| a ^ b));
        // Room for eight more than there can be: a word's values are put down together, and those that count stay.
        self.values.resize(new.len() + 8, 0);
        let mut taken = 0;
        let (words, tail) = self.xor.as_chunks::<8>();
        for (difference, new) in words.iter().zip(new.as_chunks::<8>().0) {
            if u64::from_le_bytes(*difference) != 0 {
                let place = &mut self.values[taken..taken + 8];
                let mut n = 0;
                for (&difference, &value) in difference.iter().zip(new) {
                    place[n & 7] = value;
                    n += (difference != 0) as usize;
                }
                taken += n;
            }
        }
        for (&difference, &value) in tail.iter().zip(&new[words.len() * 8..]) {
            self.values[taken] = value;
            taken += (difference != 0) as usize;
        }
        self.taken = taken;
        let mut elements = ElementCounter::new(element);
        elements.count(&self.xor);
        self.elements = (elements.phase == 0).then_some(elements.count);
    }
}

/// Takes a tensor's old and new bytes in order, and writes the two frames.
pub struct DeltaEncoder<X: Write, V: Write> {
    xor: Writer<X, raw::Encoder<'static>>,
    values: Writer<V, raw::Encoder<'static>>,
    hasher: Xxh3Default,
    elements: ElementCounter,
    changed_bytes: u64,
}

impl<X: Write, V: Write> DeltaEncoder<X, V> {
    /// For a tensor of `bytes` bytes whose elements have `element` bytes.
    pub fn new(scratch: Scratch, xor: X, values: V, bytes: u64, element: usize) -> io::Result<DeltaEncoder<X, V>> {
        let Scratch { xor: mut xor_frame, values: mut values_frame } = scratch;
        xor_frame.reinit()?;
        values_frame.reinit()?;
        xor_frame.set_pledged_src_size(Some(bytes))?; // readers that decompress in one call want the size in the frame
        Ok(DeltaEncoder {
            xor: Writer::new(xor, xor_frame),
            values: Writer::new(values, values_frame),
            hasher: Xxh3Default::new(),
            elements: ElementCounter::new(element),
            changed_bytes: 0,
        })
    }

    /// The next bytes of the tensor, as they are `new`, and what was found to differ.
    pub fn push(&mut self, new: &[u8], difference: &Difference) -> io::Result<()> {
        self.hasher.update(new);
        match difference.elements {
            Some(changed) if self.elements.phase == 0 => self.elements.count += changed,
            _ => self.elements.count(&difference.xor),
        }
        self.changed_bytes += difference.taken as u64;
        self.xor.write_all(&difference.xor)?;
        self.values.write_all(&difference.values[..difference.taken])
    }

    /// The next bytes of the tensor, where old and new are the same.
    pub fn push_unchanged(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.hasher.update(bytes);
        self.elements.pass(bytes.len());
        let mut left = bytes.len();
        while left > 0 {
            let n = left.min(ZEROS.len());
            self.xor.write_all(&ZEROS[..n])?;
            left -= n;
        }
        Ok(())
    }

    /// The summary, the two writers with their frames complete, and the scratch for the next tensor.
    pub fn finish(mut self) -> io::Result<(Summary, X, V, Scratch)> {
        self.elements.end();
        let summary = Summary {
            checksum: self.hasher.digest128(),
            changed_bytes: self.changed_bytes,
            changed_elements: self.elements.count,
        };
        self.xor.finish()?;
        self.values.finish()?;
        let Self { xor, values, .. } = self;
        let ((xor, xor_frame), (values, values_frame)) = (xor.into_inner(), values.into_inner());
        Ok((summary, xor, values, Scratch { xor: xor_frame, values: values_frame }))
    }
}

/// Counts elements with any byte that differs, over pieces that may end inside an element.
struct ElementCounter {
    element: usize,
    /// Bytes of the current element seen.
    phase: usize,
    changed: bool,
    count: u64,
}

impl ElementCounter {
    fn new(element: usize) -> ElementCounter {
        ElementCounter { element, phase: 0, changed: false, count: 0 }
    }

    /// `bytes` bytes without a difference.
    fn pass(&mut self, bytes: usize) {
        let end = self.phase + bytes;
        if end >= self.element && self.phase > 0 {
            self.end();
        }
        self.phase = end % self.element;
    }

    fn count(&mut self, difference: &[u8]) {
        let mut rest = difference;
        if self.phase == 0 && matches!(self.element, 1 | 2 | 4 | 8) {
            let (words, tail) = rest.as_chunks::<8>();
            let (low, high) = match self.element {
                1 => (0x7f7f_7f7f_7f7f_7f7f, 0x8080_8080_8080_8080),
                2 => (0x7fff_7fff_7fff_7fff, 0x8000_8000_8000_8000),
                4 => (0x7fff_ffff_7fff_ffff, 0x8000_0000_8000_0000),
                _ => (0x7fff_ffff_ffff_ffff, 0x8000_0000_0000_0000u64),
            };
            let lane = 8 * self.element;
            let ones = high >> (lane - 1);
            for word in words {
                let word = u64::from_le_bytes(*word);
                if word != 0 {
                    // The top bit of a lane ends up set when any bit of the lane is: below it by the carry, or itself.
                    // The multiplication adds the lanes up in the topmost.
                    let tops = (((word & low) + low) | word) & high;
                    self.count += (tops >> (lane - 1)).wrapping_mul(ones) >> (64 - lane);
                }
            }
            rest = tail;
        }
        for &byte in rest {
            self.changed |= byte != 0;
            self.phase += 1;
            if self.phase == self.element {
                self.end();
            }
        }
    }

    fn end(&mut self) {
        self.count += self.changed as u64;
        (self.phase, self.changed) = (0, false);
    }
}

/// Reads the two frames in order.
pub struct DeltaDecoder<R: Read> {
    xor: Decoder<'static, io::BufReader<R>>,
    values: Decoder<'static, io::BufReader<R>>,
    difference: Vec<u8>,
    new_values: Vec<u8>,
}

impl<R: Read> DeltaDecoder<R> {
    pub fn new(xor: R, values: R) -> io::Result<DeltaDecoder<R>> {
        let (mut xor, mut values) = (Decoder::new(xor)?, Decoder::new(values)?);
        // One frame each; and no more memory than level 1 needs, whatever the frame claims.
        for decoder in [&mut xor, &mut values] {
            decoder.window_log_max(27)?;
        }
        Ok(DeltaDecoder {
            xor: xor.single_frame(),
            values: values.single_frame(),
            difference: Vec::new(),
            new_values: Vec::new(),
        })
    }

    /// Decodes the next `len` bytes of the tensor; `each(i, new, old)` is called for those that changed, `i` from 0 to
    /// `len`.
    pub fn next(&mut self, len: usize, mut each: impl FnMut(usize, u8, u8)) -> io::Result<()> {
        self.difference.resize(len, 0);
        self.xor.read_exact(&mut self.difference)?;
        let changed = self.difference.iter().filter(|&&b| b != 0).count();
        self.new_values.resize(changed, 0);
        self.values.read_exact(&mut self.new_values)?;
        let mut values = self.new_values.iter();
        let (words, tail) = self.difference.as_chunks::<8>();
        let tail_start = words.len() * 8;
        for (i, word) in words.iter().enumerate() {
            let mut left = u64::from_le_bytes(*word);
            while left != 0 {
                let byte = left.trailing_zeros() / 8;
                if let Some(&new) = values.next() {
                    each(i * 8 + byte as usize, new, new ^ (left >> (byte * 8)) as u8);
                }
                left &= !(0xff << (byte * 8));
            }
        }
        for (i, &difference) in tail.iter().enumerate().filter(|(_, b)| **b != 0) {
            if let Some(&new) = values.next() {
                each(tail_start + i, new, new ^ difference);
            }
        }
        Ok(())
    }

    /// Both frames must be at their ends, where their checksums are compared.
    pub fn finish(&mut self) -> io::Result<()> {
        let mut one = [0];
        match (self.xor.read(&mut one)?, self.values.read(&mut one)?) {
            (0, 0) => Ok(()),
            _ => Err(io::Error::new(io::ErrorKind::InvalidData, "a tensor's delta is longer than the tensor")),
        }
    }
}

/// Errors of decoding are damage to the record, not trouble with the disk.
pub fn decode_error(path: std::path::PathBuf, tensor: &str, e: io::Error) -> CommitError {
    match e.raw_os_error() {
        Some(_) => CommitError::io("read", path, e),
        None => CommitError::corrupt(path, format!("tensor '{tensor}': {e}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use xxhash_rust::xxh3::xxh3_128;

    fn encode(old: &[u8], new: &[u8], element: usize, cuts: &[usize]) -> (Summary, Vec<u8>, Vec<u8>) {
        let scratch = Scratch::new(if old.len().is_multiple_of(2) { 1 } else { 2 }).unwrap();
        let mut encoder = DeltaEncoder::new(scratch, Vec::new(), Vec::new(), new.len() as u64, element).unwrap();
        let mut difference = Difference::default();
        let mut at = 0;
        for &cut in cuts.iter().chain([&new.len()]) {
            let cut = cut.clamp(at, new.len());
            if old[at..cut] == new[at..cut] {
                encoder.push_unchanged(&new[at..cut]).unwrap();
            } else {
                difference.compare(&old[at..cut], &new[at..cut], element);
                encoder.push(&new[at..cut], &difference).unwrap();
            }
            at = cut;
        }
        let (summary, xor, values, _) = encoder.finish().unwrap();
        (summary, xor, values)
    }

    proptest! {
        #[test]
        fn a_delta_gives_back_old_and_new_bytes_over_anything_in_between(
            old in prop::collection::vec(any::<u8>(), 1..300),
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..40),
            mix in any::<u64>(),
            element in prop::sample::select(vec![1usize, 2, 4, 8, 16]),
            cuts in prop::collection::vec(0usize..300, 0..4),
        ) {
            let mut new = old.clone();
            for (at, value) in changes {
                let at = at.index(new.len());
                new[at] = value;
            }
            let mut cuts = cuts;
            cuts.sort();
            let (summary, xor, values) = encode(&old, &new, element, &cuts);
            prop_assert_eq!(summary.checksum, xxh3_128(&new));
            prop_assert_eq!(summary.changed_bytes, old.iter().zip(&new).filter(|(a, b)| a != b).count() as u64);
            let changed = old.chunks(element).zip(new.chunks(element)).filter(|(a, b)| a != b).count();
            prop_assert_eq!(summary.changed_elements, changed as u64);
            let torn: Vec<u8> = (0..old.len()).map(|i| if mix >> (i % 64) & 1 == 0 { old[i] } else { new[i] }).collect();
            let (mut forward, mut back) = (torn.clone(), torn);
            let mut decoder = DeltaDecoder::new(&xor[..], &values[..]).unwrap();
            let mut at = 0;
            for &cut in cuts.iter().chain([&new.len()]) {
                let cut = cut.clamp(at, new.len());
                decoder.next(cut - at, |i, n, o| {
                    forward[at + i] = n;
                    back[at + i] = o;
                }).unwrap();
                at = cut;
            }
            decoder.finish().unwrap();
            prop_assert_eq!(forward, new);
            prop_assert_eq!(back, old);
        }

        #[test]
        fn hostile_frames_are_errors(bytes in prop::collection::vec(any::<u8>(), 0..200), flip in any::<prop::sample::Index>()) {
            let read = |xor: &[u8], values: &[u8]| -> io::Result<()> {
                let mut decoder = DeltaDecoder::new(xor, values)?;
                decoder.next(100, |_, _, _| ())?;
                decoder.finish()
            };
            prop_assert!(read(&bytes, &bytes).is_err());
            let (_, mut xor, values) = encode(&[1; 100], &[2; 100], 1, &[]);
            read(&xor, &values).unwrap();
            let at = flip.index(xor.len());
            xor[at] ^= 0x10;
            // A flipped bit is caught by the frame's checksum, or it was in a field that does not matter (reserved bits).
            let mut all_old = true;
            let outcome = DeltaDecoder::new(&xor[..], &values[..])
                .and_then(|mut d| d.next(100, |_, _, o| all_old &= o == 1).and_then(|()| d.finish()));
            prop_assert!(outcome.is_err() || all_old);
        }
    }
}
