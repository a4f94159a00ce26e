//! Float casts by their definition: of the two neighbours in the target type the nearer one, of two equally near ones
//! the even one. Nothing here knows how the product does it.

use half::{bf16, f16};
use weightfs::model::Dtype;

pub const CASTABLE: [Dtype; 4] = [Dtype::F16, Dtype::BF16, Dtype::F32, Dtype::F64];

/// The value of one element; f64 holds those of all four types.
pub fn value(dtype: Dtype, bytes: &[u8]) -> f64 {
    match dtype {
        Dtype::F16 => f16::from_le_bytes(bytes.try_into().unwrap()).to_f64(),
        Dtype::BF16 => bf16::from_le_bytes(bytes.try_into().unwrap()).to_f64(),
        Dtype::F32 => f64::from(f32::from_le_bytes(bytes.try_into().unwrap())),
        Dtype::F64 => f64::from_le_bytes(bytes.try_into().unwrap()),
        other => panic!("{other:?} is not cast"),
    }
}

/// One element as another type has it.
pub fn cast(from: Dtype, bytes: &[u8], to: Dtype) -> Vec<u8> {
    let v = value(from, bytes);
    // The 16-bit types are reached through F32, as PyTorch does.
    let single = f64::from(v as f32);
    match to {
        Dtype::F16 => nearest(single, 0x7c00, |bits| f16::from_bits(bits).to_f64()).to_le_bytes().to_vec(),
        Dtype::BF16 => nearest(single, 0x7f80, |bits| bf16::from_bits(bits).to_f64()).to_le_bytes().to_vec(),
        Dtype::F32 => (v as f32).to_le_bytes().to_vec(),
        Dtype::F64 => v.to_le_bytes().to_vec(),
        other => panic!("{other:?} is not cast"),
    }
}

/// `infinity`: the bit pattern of the type's infinity; the patterns below it are its positive numbers in order.
fn nearest(v: f64, infinity: u16, number: impl Fn(u16) -> f64) -> u16 {
    if v.is_nan() {
        return infinity | (infinity & infinity.wrapping_neg()) >> 1;
    }
    let (sign, v) = (u16::from(v.is_sign_negative()) << 15, v.abs());
    // Infinity stands where the next number would: from half way to there, values are rounded up to it.
    let top = 2.0 * number(infinity - 1) - number(infinity - 2);
    let number = |bits: u16| if bits >= infinity { top } else { number(bits) };
    let (mut below, mut above) = (0, infinity);
    if v >= top {
        return sign | infinity;
    }
    while above - below > 1 {
        let middle = below + (above - below) / 2;
        if number(middle) <= v { below = middle } else { above = middle }
    }
    let middle = (number(below) + number(above)) / 2.0;
    let up = v > middle || (v == middle && below % 2 == 1);
    sign | if up { above } else { below }
}
