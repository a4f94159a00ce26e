//! Device memory of a step. Allocating and freeing make the device stand still, and a step takes and drops thousands of
//! buffers of many sizes: they are cut from a few large pieces, and what is free beside each other is one again.

use super::{GpuError, Result};
use crate::memory::cuda::{Device, DeviceBuffer};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;

#[derive(Clone)]
pub(super) struct Pool(Arc<Inner>);

struct Inner {
    device: Arc<Device>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    pieces: Vec<Piece>,
    /// Bytes of all pieces, and the most there were.
    held: u64,
    peak: u64,
    /// Bytes in buffers, and the most there were.
    used: u64,
    used_peak: u64,
}

/// One allocation and what of it is free: length by offset.
struct Piece {
    memory: DeviceBuffer,
    free: Free,
}

#[derive(Debug, Default, PartialEq)]
struct Free(BTreeMap<u64, u64>);

/// Bytes on the device that go back to their pool on drop.
pub struct Buffer {
    address: u64,
    size: u64,
    bytes: u64,
    pool: Arc<Inner>,
}

/// Some bytes of a [`Buffer`], or of a weight. Whoever made it keeps what it lies in until the work that uses it has been
/// asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    pub(super) address: u64,
    pub(super) bytes: u64,
}

/// Sizes are rounded up to this, which is also what addresses are multiples of.
pub(super) const GRAIN: u64 = 512;
/// The least that is asked of the device at a time.
const PIECE: u64 = 64 << 20;

impl Free {
    fn all(length: u64) -> Free {
        Free(BTreeMap::from([(0, length)]))
    }

    /// The offset of the smallest free run that has `size`, as `(length of the run, offset)`.
    fn find(&self, size: u64) -> Option<(u64, u64)> {
        self.0.iter().filter(|(_, length)| **length >= size).map(|(&offset, &length)| (length, offset)).min()
    }

    fn take(&mut self, offset: u64, size: u64) {
        let length = self.0.remove(&offset).expect("a free run begins there");
        if length > size {
            self.0.insert(offset + size, length - size);
        }
    }

    fn give(&mut self, mut offset: u64, mut size: u64) {
        if let Some(next) = self.0.remove(&(offset + size)) {
            size += next;
        }
        if let Some((&before, &length)) = self.0.range(..offset).next_back()
            && before + length == offset
        {
            (offset, size) = (before, length + size);
        }
        self.0.insert(offset, size);
    }
}

impl Pool {
    pub fn new(device: &Arc<Device>) -> Pool {
        Pool(Arc::new(Inner { device: device.clone(), state: Default::default() }))
    }

    pub fn take(&self, bytes: u64) -> Result<Buffer> {
        let size = bytes.max(1).next_multiple_of(GRAIN);
        let mut state = self.0.state.lock();
        let place = match state.best(size) {
            Some(found) => found,
            None => {
                let memory = self.more(&mut state, size)?;
                state.add(memory);
                (state.pieces.len() - 1, 0)
            }
        };
        Ok(self.cut(&mut state, place, size, bytes))
    }

    /// A buffer of what lies free, if that has room for it.
    pub fn spare(&self, bytes: u64) -> Option<Buffer> {
        let size = bytes.max(1).next_multiple_of(GRAIN);
        let mut state = self.0.state.lock();
        let place = state.best(size)?;
        Some(self.cut(&mut state, place, size, bytes))
    }

    fn cut(&self, state: &mut State, (piece, offset): (usize, u64), size: u64, bytes: u64) -> Buffer {
        state.pieces[piece].free.take(offset, size);
        state.used += size;
        state.used_peak = state.used_peak.max(state.used);
        let address = state.pieces[piece].memory.address() + offset;
        Buffer { address, size, bytes, pool: self.0.clone() }
    }

    /// Holds at least `bytes` from here on, so that as much can be taken without asking the device. In one piece, where
    /// nothing is taken yet: pieces waste what is left at their ends.
    pub fn reserve(&self, bytes: u64) -> Result<()> {
        let mut state = self.0.state.lock();
        if state.held >= bytes {
            return Ok(());
        }
        state.drop_free();
        let size = (bytes - state.held).next_multiple_of(GRAIN);
        match self.0.device.alloc(size) {
            Err(e) if e.is_out_of_memory() => Err(GpuError::Memory(size)),
            done => {
                state.add(done?);
                Ok(())
            }
        }
    }

    /// One piece of just `bytes`, where less lies free.
    pub fn extend(&self, bytes: u64) -> Result<()> {
        let mut state = self.0.state.lock();
        let free: u64 = state.pieces.iter().map(|p| p.free.0.values().sum::<u64>()).sum();
        if free >= bytes {
            return Ok(());
        }
        let size = bytes.next_multiple_of(GRAIN);
        match self.0.device.alloc(size) {
            Err(e) if e.is_out_of_memory() => Err(GpuError::Memory(size)),
            done => {
                state.add(done?);
                Ok(())
            }
        }
    }

    /// A piece for at least `size`; where there is no memory for a whole one, without those that lie free, or just that.
    fn more(&self, state: &mut State, size: u64) -> Result<DeviceBuffer> {
        let device = &self.0.device;
        match device.alloc(size.max(PIECE)) {
            Err(e) if e.is_out_of_memory() => {}
            done => return Ok(done?),
        }
        state.drop_free();
        match device.alloc(size) {
            Err(e) if e.is_out_of_memory() => Err(GpuError::Memory(size)),
            done => Ok(done?),
        }
    }

    /// Bytes held, and the most there were.
    pub fn held(&self) -> (u64, u64) {
        let state = self.0.state.lock();
        (state.held, state.peak)
    }

    /// The most bytes that were in buffers.
    pub fn used_peak(&self) -> u64 {
        self.0.state.lock().used_peak
    }

    pub fn forget_peak(&self) {
        let mut state = self.0.state.lock();
        (state.peak, state.used_peak) = (state.held, state.used);
    }

    /// Gives pieces that are free throughout back to the device.
    pub fn release(&self) {
        self.0.state.lock().drop_free();
    }
}

impl State {
    /// The piece and offset of the smallest free run of at least `size`.
    fn best(&self, size: u64) -> Option<(usize, u64)> {
        let runs = self.pieces.iter().enumerate().filter_map(|(i, p)| Some((p.free.find(size)?, i)));
        runs.min().map(|((_, offset), i)| (i, offset))
    }

    fn add(&mut self, memory: DeviceBuffer) {
        self.held += memory.bytes();
        self.peak = self.peak.max(self.held);
        let free = Free::all(memory.bytes());
        self.pieces.push(Piece { memory, free });
    }

    fn drop_free(&mut self) {
        self.pieces.retain(|p| p.free != Free::all(p.memory.bytes()));
        self.held = self.pieces.iter().map(|p| p.memory.bytes()).sum();
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut state = self.pool.state.lock();
        state.used -= self.size;
        let holds =
            |p: &&mut Piece| (p.memory.address()..p.memory.address() + p.memory.bytes()).contains(&self.address);
        if let Some(piece) = state.pieces.iter_mut().find(holds) {
            piece.free.give(self.address - piece.memory.address(), self.size);
        }
    }
}

impl Buffer {
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    pub fn part(&self) -> Part {
        Part { address: self.address, bytes: self.bytes }
    }

    /// From byte `offset` on.
    pub fn from(&self, offset: u64) -> Part {
        self.part().from(offset)
    }
}

impl Part {
    /// No operand, where one may be left out.
    pub const NONE: Part = Part { address: 0, bytes: 0 };

    pub fn bytes(self) -> u64 {
        self.bytes
    }

    pub fn address(self) -> u64 {
        self.address
    }

    /// From byte `offset` on.
    pub fn from(self, offset: u64) -> Part {
        assert!(offset <= self.bytes, "byte {offset} of {}", self.bytes);
        Part { address: self.address + offset, bytes: self.bytes - offset }
    }

    /// The first `bytes`.
    pub fn first(self, bytes: u64) -> Part {
        assert!(bytes <= self.bytes, "{bytes} bytes of {}", self.bytes);
        Part { bytes, ..self }
    }

    /// Its address, after a check that it has `count` values of `size` bytes.
    pub(super) fn holds(self, count: usize, size: usize) -> u64 {
        assert!((count * size) as u64 <= self.bytes, "{count} values of {size} bytes in {} bytes", self.bytes);
        self.address
    }

    pub(super) fn bf16(self, count: usize) -> u64 {
        self.holds(count, 2)
    }

    pub(super) fn f32(self, count: usize) -> u64 {
        self.holds(count, 4)
    }

    /// As [`Part::f32`] and so on, but an operand that may be left out.
    pub(super) fn f32_or_none(self, count: usize) -> u64 {
        if self == Part::NONE { 0 } else { self.f32(count) }
    }

    pub(super) fn bf16_or_none(self, count: usize) -> u64 {
        if self == Part::NONE { 0 } else { self.bf16(count) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_free_beside_each_other_is_one_again() {
        let mut free = Free::all(100);
        for (offset, size) in [(0, 30), (30, 20), (50, 10)] {
            assert_eq!(free.find(size), Some((100 - offset, offset)));
            free.take(offset, size);
        }
        free.give(30, 20);
        assert_eq!(free.find(15), Some((20, 30)), "the smallest that fits");
        assert_eq!(free.find(25), Some((40, 60)));
        assert_eq!(free.find(41), None);
        free.give(0, 30);
        assert_eq!(free.find(50), Some((50, 0)));
        free.give(50, 10);
        assert_eq!(free, Free::all(100));
    }

    #[test]
    fn a_part_knows_its_end() {
        let part = Part { address: 4096, bytes: 100 };
        assert_eq!(part.from(40), Part { address: 4136, bytes: 60 });
        assert_eq!(part.f32(25), 4096);
        assert!(std::panic::catch_unwind(|| part.f32(26)).is_err());
        assert!(std::panic::catch_unwind(|| part.from(101)).is_err());
        assert_eq!(Part::NONE.f32_or_none(9), 0);
    }
}
