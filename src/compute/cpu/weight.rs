//! Weights between the bytes they are kept as and f32.

use half::{bf16, f16};
use rayon::prelude::*;

use super::math::vectorized;

/// The dtypes that train.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    Bf16,
    F16,
    F32,
}

impl Kind {
    pub fn bytes(self) -> usize {
        match self {
            Kind::Bf16 | Kind::F16 => 2,
            Kind::F32 => 4,
        }
    }
}

const CHUNK: usize = 1 << 14;

vectorized! {
    fn widen_bf16(bytes: &[u8], out: &mut [f32]) {
        for (b, x) in bytes.chunks_exact(2).zip(out) {
            *x = f32::from_bits((u16::from_le_bytes([b[0], b[1]]) as u32) << 16);
        }
    }
}

/// `out` = the little-endian values in `bytes`.
pub fn widen(kind: Kind, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(bytes.len(), out.len() * kind.bytes());
    bytes.par_chunks(CHUNK * kind.bytes()).zip(out.par_chunks_mut(CHUNK)).for_each(|(bytes, out)| match kind {
        Kind::Bf16 => widen_bf16(bytes, out),
        Kind::F16 => {
            for (b, x) in bytes.chunks_exact(2).zip(out) {
                *x = f16::from_le_bytes([b[0], b[1]]).to_f32();
            }
        }
        Kind::F32 => {
            for (b, x) in bytes.chunks_exact(4).zip(out) {
                *x = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            }
        }
    });
}

/// One value of `bytes`, by its index.
#[inline(always)]
pub fn get(kind: Kind, bytes: &[u8], i: usize) -> f32 {
    match kind {
        Kind::Bf16 => bf16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]).to_f32(),
        Kind::F16 => f16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]).to_f32(),
        Kind::F32 => f32::from_le_bytes([bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]]),
    }
}
