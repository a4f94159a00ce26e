//! Device memory of a step. Allocating and freeing make the device stand still, and a step takes and drops thousands of
//! buffers of many sizes: they are cut from a few large pieces, and what is free beside each other is one again. What stays
//! for much of a step and what passes at once are cut from a piece's two ends, so that neither leaves holes in the other.

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

/// The end of a piece that a buffer is cut from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// Of what stays, and of what is given back in no order.
    Low,
    /// Of what passes.
    High,
}

/// Sizes are rounded up to this, which is also what addresses are multiples of.
pub(super) const GRAIN: u64 = 512;
/// The least that is asked of the device at a time.
const PIECE: u64 = 64 << 20;

impl Free {
    fn all(length: u64) -> Free {
        Free(BTreeMap::from([(0, length)]))
    }

    /// Takes `size` of the free run nearest to `end` that has as much, and that run's part nearest to it: its offset.
    fn take(&mut self, size: u64, end: End) -> Option<u64> {
        let fits = |(_, length): &(&u64, &u64)| **length >= size;
        let (&run, &length) = match end {
            End::Low => self.0.iter().find(fits)?,
            End::High => self.0.iter().rfind(fits)?,
        };
        self.0.remove(&run);
        let (offset, rest) = match end {
            End::Low => (run, run + size),
            End::High => (run + length - size, run),
        };
        if length > size {
            self.0.insert(rest, length - size);
        }
        Some(offset)
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

    pub fn take(&self, bytes: u64, end: End) -> Result<Buffer> {
        let size = bytes.max(1).next_multiple_of(GRAIN);
        let mut state = self.0.state.lock();
        let address = match state.take(size, end) {
            Some(address) => address,
            None => {
                let memory = self.more(&mut state, size)?;
                state.add(memory);
                state.take(size, end).expect("the piece was made for it")
            }
        };
        Ok(self.cut(&mut state, address, size, bytes))
    }

    /// A buffer of what lies free, if that has room for it.
    pub fn spare(&self, bytes: u64) -> Option<Buffer> {
        let size = bytes.max(1).next_multiple_of(GRAIN);
        let mut state = self.0.state.lock();
        let address = state.take(size, End::High)?;
        Some(self.cut(&mut state, address, size, bytes))
    }

    fn cut(&self, state: &mut State, address: u64, size: u64, bytes: u64) -> Buffer {
        state.used += size;
        state.used_peak = state.used_peak.max(state.used);
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
    /// The address of `size` bytes of the first piece, or of the last for what passes, that has them.
    fn take(&mut self, size: u64, end: End) -> Option<u64> {
        let take = |p: &mut Piece| Some(p.memory.address() + p.free.take(size, end)?);
        match end {
            End::Low => self.pieces.iter_mut().find_map(take),
            End::High => self.pieces.iter_mut().rev().find_map(take),
        }
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
            assert_eq!(free.take(size, End::Low), Some(offset));
        }
        free.give(30, 20);
        assert_eq!(free.take(41, End::Low), None);
        assert_eq!(free.take(15, End::Low), Some(30), "the first that fits");
        assert_eq!(free.take(25, End::Low), Some(60));
        assert_eq!(free.take(15, End::High), Some(85));
        assert_eq!(free.take(5, End::High), Some(45), "the last that fits");
        for (offset, size) in [(30, 15), (60, 25), (85, 15), (45, 5), (0, 30), (50, 10)] {
            free.give(offset, size);
        }
        assert_eq!(free, Free::all(100));
    }

    /// As layers of a forward pass: each leaves something, made while something else passes.
    #[test]
    fn what_passes_leaves_no_holes_in_what_stays() {
        let rest = |stays: End, passes: End| {
            let mut free = Free::all(200);
            for _ in 0..5 {
                let passing = free.take(20, passes).unwrap();
                free.take(30, stays).unwrap();
                free.give(passing, 20);
            }
            *free.0.values().max().unwrap()
        };
        assert_eq!(rest(End::Low, End::High), 50);
        assert_eq!(rest(End::Low, End::Low), 30, "one end for both would");
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
