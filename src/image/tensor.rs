//! One live tensor: any range of its elements, between the file's byte order and dtype and the engine's segments.

use super::runs::{Run, Walk};
use crate::memory::{Memory, MemoryError, Strided};
use crate::model::{Dtype, TensorEntry, bytes_of, cast_bytes, element_bytes, round_trips, same_value};
use crate::source::{Segment, row_major};
use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;

thread_local! {
    /// Scratch for casts, kept between calls so that hashing a cast tensor does not allocate a block at a time.
    static CAST: RefCell<(Vec<u8>, Vec<u8>)> = const { RefCell::new((Vec::new(), Vec::new())) };
}

/// Copies elements of a memory (its number in the source, and itself), packed, into a place of that size.
pub(super) type Fetch<'a> = &'a mut dyn FnMut(usize, &dyn Memory, Strided, &mut [u8]) -> Result<(), MemoryError>;

/// The plain way to fetch.
pub(super) fn copy(_: usize, memory: &dyn Memory, run: Strided, dst: &mut [u8]) -> Result<(), MemoryError> {
    match run.stride == run.element as u64 {
        true => memory.read(run.offset, dst),
        false => memory.read_strided(run, dst),
    }
}

/// Rows of a tensor that lie evenly apart in one memory: row i at `offset + i * stride` elements.
#[derive(Debug, Clone)]
pub struct EvenRows {
    pub memory: Arc<dyn Memory>,
    /// Bytes from the start of the memory.
    pub offset: u64,
    pub columns: u64,
    pub rows: u64,
    /// In elements of the engine's dtype.
    pub stride: u64,
    /// Bytes of one element.
    pub element: u64,
}

impl EvenRows {
    /// From the first row's start to the last one's end.
    pub fn bytes(&self) -> u64 {
        if self.rows == 0 { 0 } else { ((self.rows - 1) * self.stride + self.columns) * self.element }
    }
}

/// A tensor whose bytes are in engine memory.
#[derive(Debug)]
pub(super) struct LiveTensor {
    /// Bytes in the shard file.
    pub file: Range<u64>,
    dtype: Dtype,
    /// Bytes of one element in the file; 1 for types smaller than a byte, which are copied as bytes.
    element: u64,
    /// Primary pieces in order of their first element, then replicas.
    pieces: Vec<Piece>,
}

#[derive(Debug)]
struct Piece {
    /// Of the memory, in the source.
    number: usize,
    memory: Arc<dyn Memory>,
    offset: u64,
    element: u64,
    dtype: Dtype,
    walk: Walk,
    replica: bool,
}

impl LiveTensor {
    pub fn new(tensor: &TensorEntry, segments: &[Segment], memories: &[Arc<dyn Memory>]) -> LiveTensor {
        let pieces = segments.iter().map(|s| {
            let walk = match element_bytes(tensor.dtype) {
                Some(_) => Walk::new(s, &row_major(&tensor.shape)),
                None => Walk::new(&as_bytes(tensor, s), &[1]),
            };
            let element = element_bytes(s.dtype).unwrap_or(1) as u64;
            let memory = memories[s.memory].clone();
            Piece { number: s.memory, memory, offset: s.offset, element, dtype: s.dtype, walk, replica: s.replica }
        });
        let mut pieces: Vec<Piece> = pieces.collect();
        pieces.sort_by_key(|p| (p.replica, p.walk.span().start));
        let element = element_bytes(tensor.dtype).unwrap_or(1) as u64;
        LiveTensor { file: tensor.start..tensor.end, dtype: tensor.dtype, element, pieces }
    }

    /// True when a live value may stand for several file values (a BF16 weight over an F32 file), so that reading it
    /// needs the file's bytes: those are kept where the live value is what they round to.
    pub fn needs_base(&self) -> bool {
        self.pieces.iter().any(|p| !p.replica && !round_trips(self.dtype, p.dtype))
    }

    /// Copies file bytes `offset..` of the shard (inside [`LiveTensor::file`]) into `dst`. `base` fetches the same
    /// range as it is on disk and is called only if [`LiveTensor::needs_base`]; `fetch` copies live bytes, in an order
    /// that is the same each time.
    pub fn read<E: From<MemoryError>>(
        &self,
        offset: u64,
        dst: &mut [u8],
        base: impl Fn(u64, &mut [u8]) -> Result<(), E>,
        fetch: Fetch<'_>,
    ) -> Result<(), E> {
        let (from, to) = (offset - self.file.start, offset - self.file.start + dst.len() as u64);
        let (first, last) = (from / self.element, to.div_ceil(self.element));
        if from % self.element == 0 && to % self.element == 0 {
            return self.read_elements(first, last, dst, &base, fetch);
        }
        // A range that cuts an element (a block of a file whose data is not aligned): read whole ones, keep the part.
        let mut whole = vec![0; ((last - first) * self.element) as usize];
        self.read_elements(first, last, &mut whole, &base, fetch)?;
        let skip = (from - first * self.element) as usize;
        dst.copy_from_slice(&whole[skip..skip + dst.len()]);
        Ok(())
    }

    fn read_elements<E: From<MemoryError>>(
        &self,
        first: u64,
        last: u64,
        dst: &mut [u8],
        base: &impl Fn(u64, &mut [u8]) -> Result<(), E>,
        fetch: Fetch<'_>,
    ) -> Result<(), E> {
        if self.needs_base() {
            base(self.file.start + first * self.element, dst)?;
        }
        for piece in self.pieces.iter().take_while(|p| !p.replica) {
            piece.walk.runs(first, last, |run| -> Result<(), E> {
                let a = ((run.tensor - first) * self.element) as usize;
                let out = &mut dst[a..a + (run.count * self.element) as usize];
                if piece.dtype == self.dtype {
                    fetch(piece.number, &*piece.memory, piece.strided(run), out)?;
                } else {
                    piece.cast_out(run, self.dtype, out, fetch)?;
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Writes whole elements of file bytes into every piece, replicas included.
    pub fn write(&self, offset: u64, src: &[u8]) -> Result<(), MemoryError> {
        let (from, to) = (offset - self.file.start, offset - self.file.start + src.len() as u64);
        debug_assert!(from % self.element == 0 && to % self.element == 0, "whole elements");
        self.write_elements(from / self.element, to / self.element, self.dtype, src)
    }

    /// What the engine keeps the tensor in: of its first piece, and so of all unless ranks differ.
    pub fn live_dtype(&self) -> Dtype {
        self.pieces.first().map_or(self.dtype, |p| p.dtype)
    }

    /// Whether any piece is on a device.
    pub fn is_on_devices(&self) -> bool {
        self.pieces.iter().any(|p| p.memory.device().is_some())
    }

    /// The tensor as a matrix of rows of `columns` elements, if all of it lies so in one memory; else why not, as the end of
    /// a sentence about it. Pieces that follow each other as the rows of one matrix do are as good as one.
    pub fn even_rows(&self, columns: u64) -> Result<EvenRows, &'static str> {
        let mut whole: Option<(usize, EvenRows)> = None;
        for piece in &self.pieces {
            if piece.replica {
                return Err("is kept by several ranks at once");
            }
            let (first, rows, stride) = piece.walk.rows(columns).ok_or("is split or turned within its rows")?;
            let EvenRows { offset, .. } = match &mut whole {
                None if first == 0 => {
                    let (memory, element) = (piece.memory.clone(), piece.element);
                    let rows = EvenRows { memory, offset: piece.offset, columns, rows, stride, element };
                    whole = Some((piece.number, rows));
                    continue;
                }
                Some((number, _)) if *number != piece.number => return Err("lies in several memories"),
                Some((_, w)) if w.rows == first && w.element == piece.element && piece.dtype == self.live_dtype() => w,
                _ => return Err("lies in pieces that are not one behind the other"),
            };
            let offset = *offset;
            let Some((_, w)) = &mut whole else { unreachable!("found just now") };
            // A single row has no stride of its own.
            if w.rows == 1 {
                let Some(apart) = piece.offset.checked_sub(offset).filter(|d| d.is_multiple_of(w.element)) else {
                    return Err("lies in pieces that are not one behind the other");
                };
                w.stride = apart / w.element;
            }
            let follows = piece.offset == offset + w.rows * w.stride * w.element;
            if !follows || w.stride < columns || (rows > 1 && stride != w.stride) {
                return Err("lies in pieces that are not one behind the other");
            }
            w.rows += rows;
        }
        let (_, rows) = whole.ok_or("is held by nobody")?;
        match rows.rows * columns * self.element == self.file.end - self.file.start {
            true => Ok(rows),
            false => Err("is not held whole"),
        }
    }

    /// Copies elements from `first` on as values of [`LiveTensor::live_dtype`], not of the file's dtype.
    pub fn read_live(&self, first: u64, dst: &mut [u8]) -> Result<(), MemoryError> {
        let dtype = self.live_dtype();
        let element = element_bytes(dtype).unwrap_or(1) as u64;
        for piece in self.pieces.iter().take_while(|p| !p.replica) {
            piece.walk.runs(first, first + dst.len() as u64 / element, |run| -> Result<(), MemoryError> {
                let a = ((run.tensor - first) * element) as usize;
                let out = &mut dst[a..a + (run.count * element) as usize];
                if piece.dtype == dtype {
                    return copy(piece.number, &*piece.memory, piece.strided(run), out);
                }
                CAST.with_borrow_mut(|(live, _)| {
                    live.resize((run.count * piece.element) as usize, 0);
                    copy(piece.number, &*piece.memory, piece.strided(run), live)?;
                    cast_bytes(piece.dtype, live, dtype, out);
                    Ok(())
                })
            })?;
        }
        Ok(())
    }

    /// The reverse, into every piece, replicas included.
    pub fn write_live(&self, first: u64, src: &[u8]) -> Result<(), MemoryError> {
        let dtype = self.live_dtype();
        let count = src.len() as u64 / element_bytes(dtype).unwrap_or(1) as u64;
        self.write_elements(first, first + count, dtype, src)
    }

    /// Elements `first..last`, given as `dtype`, into every piece.
    fn write_elements(&self, first: u64, last: u64, dtype: Dtype, src: &[u8]) -> Result<(), MemoryError> {
        let element = element_bytes(dtype).unwrap_or(1) as u64;
        for piece in &self.pieces {
            piece.walk.runs(first, last, |run| {
                let a = ((run.tensor - first) * element) as usize;
                let bytes = &src[a..a + (run.count * element) as usize];
                if piece.dtype == dtype { piece.copy_in(run, bytes) } else { piece.cast_in(run, dtype, bytes) }
            })?;
        }
        Ok(())
    }

    /// If the file's bytes from `offset` on lie contiguously in one memory: that memory, where, and how many.
    pub fn direct(&self, offset: u64) -> Option<(&Arc<dyn Memory>, u64, u64)> {
        let from = offset - self.file.start;
        let (element, within) = (from / self.element, from % self.element);
        let piece = self.pieces.iter().take_while(|p| !p.replica).find(|p| p.walk.span().contains(&element))?;
        if piece.dtype != self.dtype {
            return None;
        }
        let mut found = None;
        let total = (self.file.end - self.file.start) / self.element;
        // The first run is the one wanted; the error only ends the walk.
        let _ = piece.walk.runs(element, total, |run| {
            found = Some(run);
            Err(())
        });
        let run = found.filter(|r| r.tensor == element && (r.stride == 1 || r.count == 1))?;
        let at = piece.offset + run.memory * self.element + within;
        Some((&piece.memory, at, run.count * self.element - within))
    }
}

/// A tensor of a type smaller than a byte, as the bytes it is packed in (its one segment is whole and packed: checked).
fn as_bytes(tensor: &TensorEntry, segment: &Segment) -> Segment {
    let bytes = bytes_of(tensor.dtype, tensor.elements()).unwrap_or(0);
    Segment { at: vec![0], shape: vec![bytes], strides: vec![1], dtype: Dtype::U8, ..segment.clone() }
}

impl Piece {
    /// As bytes of the memory; a single element is contiguous, whatever its stride.
    fn strided(&self, run: Run) -> Strided {
        Strided {
            offset: self.offset + run.memory * self.element,
            stride: if run.count == 1 { self.element } else { run.stride * self.element },
            element: self.element as usize,
            count: run.count,
        }
    }

    fn copy_in(&self, run: Run, src: &[u8]) -> Result<(), MemoryError> {
        match run.stride {
            1 => self.memory.write(self.offset + run.memory * self.element, src),
            _ => self.memory.write_strided(self.strided(run), src),
        }
    }

    /// `dst` holds the file's present bytes if the cast loses anything; an element whose live value is what its file
    /// value rounds to keeps the file's.
    fn cast_out(&self, run: Run, file: Dtype, dst: &mut [u8], fetch: Fetch<'_>) -> Result<(), MemoryError> {
        CAST.with_borrow_mut(|(live, rounded)| {
            let bytes = (run.count * self.element) as usize;
            live.resize(bytes, 0);
            fetch(self.number, &*self.memory, self.strided(run), live)?;
            if round_trips(file, self.dtype) {
                cast_bytes(self.dtype, live, file, dst);
                return Ok(());
            }
            rounded.resize(bytes, 0);
            cast_bytes(file, dst, self.dtype, rounded);
            let (n, m) = (self.element as usize, dst.len() / run.count as usize);
            for ((now, was), out) in live.chunks_exact(n).zip(rounded.chunks_exact(n)).zip(dst.chunks_exact_mut(m)) {
                if !same_value(self.dtype, now, was) {
                    cast_bytes(self.dtype, now, file, out);
                }
            }
            Ok(())
        })
    }

    fn cast_in(&self, run: Run, from: Dtype, src: &[u8]) -> Result<(), MemoryError> {
        CAST.with_borrow_mut(|(live, _)| {
            live.resize((run.count * self.element) as usize, 0);
            cast_bytes(from, src, self.dtype, live);
            self.copy_in(run, live)
        })
    }
}
