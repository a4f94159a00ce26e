//! The largest absolute values of many arrays at once.

use super::{Gpu, Part, Result, Weight, kernels, launch};
use cudarc::driver::DeviceRepr;

kernels!("peaks");

const BLOCK: usize = 256;
/// Arrays of one launch.
const MOST: usize = 16;

/// `struct Array` of the kernel.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct Array {
    x: u64,
    count: i64,
    kind: i32,
    to: i32,
}

/// `struct Arrays` of the kernel.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Arrays {
    of: [Array; MOST],
    out: u64,
}

// SAFETY: plain numbers in C's layout, the same fields in the same order as the kernel's structs.
unsafe impl DeviceRepr for Arrays {}

/// Arrays whose largest absolute values are wanted, and the number of the place for each.
#[derive(Debug, Default)]
pub struct Peaks(Vec<Array>);

impl Peaks {
    /// All of `x`, in bf16.
    pub fn bf16(&mut self, x: Part, to: usize) {
        self.0.push(Array { x: x.address, count: x.bytes as i64 / 2, kind: 0, to: to as i32 });
    }

    /// All of `x`, in f32.
    pub fn f32(&mut self, x: Part, to: usize) {
        self.0.push(Array { x: x.address, count: x.bytes as i64 / 4, kind: 2, to: to as i32 });
    }

    /// A weight of one row, as it lies there.
    pub fn vector(&mut self, w: &Weight, to: usize) {
        assert_eq!(w.rows, 1, "a vector");
        self.0.push(Array { x: w.address, count: w.columns as i64, kind: w.number(), to: to as i32 });
    }

    /// Each of `places` of `out` (f32 by its bits, as u32) becomes the largest of what was there and of its arrays; NaN is above all.
    pub fn find(&self, gpu: &Gpu, out: Part, places: usize) -> Result<()> {
        assert!(self.0.iter().all(|a| (a.to as usize) < places), "a place for each");
        let out = out.f32(places);
        for some in self.0.chunks(MOST) {
            let mut of = [Array::default(); MOST];
            of[..some.len()].copy_from_slice(some);
            let most = some.iter().map(|a| a.count as usize).max().unwrap_or(0);
            // Eight values a thread and turn; where there are many, four turns.
            let blocks = most.div_ceil(32 * BLOCK).clamp(1, 4 * gpu.device.multiprocessors as usize);
            launch!(gpu, "peaks", (blocks as u32, some.len() as u32, 1), (BLOCK as u32, 1, 1), 0; Arrays { of, out });
        }
        Ok(())
    }
}
