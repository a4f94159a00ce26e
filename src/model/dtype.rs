//! Element types as safetensors names them, and the float casts between a live weight and its file.

use half::{bf16, f16};
pub use safetensors::Dtype;

/// The dtype that `name` (as in a header: "BF16", "F32", …) stands for.
pub fn parse_dtype(name: &str) -> Option<Dtype> {
    serde_json::from_value(serde_json::Value::String(name.to_string())).ok()
}

/// Bytes of `elements` values of `dtype`, or `None` when they do not fill whole bytes or overflow.
pub fn bytes_of(dtype: Dtype, elements: u64) -> Option<u64> {
    let bits = elements.checked_mul(dtype.bitsize() as u64)?;
    bits.is_multiple_of(8).then_some(bits / 8)
}

/// Bytes of one element, or `None` for the types smaller than a byte (F4, F6).
pub fn element_bytes(dtype: Dtype) -> Option<usize> {
    let bits = dtype.bitsize();
    bits.is_multiple_of(8).then_some(bits / 8)
}

/// The float types that may differ between an engine's memory and the file (vLLM keeps `A_log` in F32 over a BF16 file).
pub fn is_castable(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F16 | Dtype::BF16 | Dtype::F32 | Dtype::F64)
}

/// True when every value of `from` survives a cast to `to` and back, so that a cast tensor nobody touched is
/// recognised without looking at the file.
pub fn round_trips(from: Dtype, to: Dtype) -> bool {
    match (from, to) {
        (a, b) if a == b => true,
        (Dtype::F16 | Dtype::BF16, Dtype::F32 | Dtype::F64) | (Dtype::F32, Dtype::F64) => true,
        _ => false,
    }
}

/// Reads one element as f64, which holds every value of the four castable types exactly.
fn read_float(dtype: Dtype, bytes: &[u8]) -> f64 {
    match dtype {
        Dtype::F16 => f16::from_le_bytes([bytes[0], bytes[1]]).to_f64(),
        Dtype::BF16 => bf16::from_le_bytes([bytes[0], bytes[1]]).to_f64(),
        Dtype::F32 => f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as f64,
        Dtype::F64 => {
            f64::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3], bytes[4], bytes[5], bytes[6], bytes[7]])
        }
        other => unreachable!("{other:?} is not castable: callers check is_castable first"),
    }
}

/// Casts `src` (elements of `from`) into `dst` (elements of `to`), rounding as PyTorch does, so that a weight that an
/// engine cast when it loaded is recognised: to nearest even, and from F64 to the 16-bit types through F32.
/// Both types must be castable, and both slices hold the same number of whole elements.
pub fn cast_bytes(from: Dtype, src: &[u8], to: Dtype, dst: &mut [u8]) {
    let (a, b) = (from.bitsize() / 8, to.bitsize() / 8);
    debug_assert_eq!(src.len() / a, dst.len() / b);
    for (s, d) in src.chunks_exact(a).zip(dst.chunks_exact_mut(b)) {
        match (from, to) {
            // The pair that engines use (A_log in F32 over a BF16 file), by bits: signalling NaNs survive both ways.
            (Dtype::BF16, Dtype::F32) => d.copy_from_slice(&[0, 0, s[0], s[1]]),
            (Dtype::F32, Dtype::BF16) => d.copy_from_slice(&to_bf16([s[0], s[1], s[2], s[3]]).to_le_bytes()),
            (_, Dtype::F16) => d.copy_from_slice(&f16::from_f32(read_float(from, s) as f32).to_le_bytes()),
            (_, Dtype::BF16) => d.copy_from_slice(&bf16::from_f32(read_float(from, s) as f32).to_le_bytes()),
            (_, Dtype::F32) => d.copy_from_slice(&(read_float(from, s) as f32).to_le_bytes()),
            (_, Dtype::F64) => d.copy_from_slice(&read_float(from, s).to_le_bytes()),
            (_, other) => unreachable!("{other:?} is not castable: callers check is_castable first"),
        }
    }
}

/// Rounds to nearest even; a NaN keeps the bits that fit, unless that would make it an infinity.
fn to_bf16(bytes: [u8; 4]) -> u16 {
    let bits = u32::from_le_bytes(bytes);
    if f32::from_bits(bits).is_nan() {
        let top = (bits >> 16) as u16;
        return if top & 0x7f == 0 { top | 0x40 } else { top };
    }
    bf16::from_f32(f32::from_bits(bits)).to_bits()
}

/// Are two elements of a castable type the same value? NaNs are all one: engines make one of another as they load.
pub fn same_value(dtype: Dtype, a: &[u8], b: &[u8]) -> bool {
    a == b || (read_float(dtype, a).is_nan() && read_float(dtype, b).is_nan())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pattern_of_bf16_survives_a_round_trip_through_f32() {
        for bits in 0..=u16::MAX {
            let mut wide = [0; 4];
            cast_bytes(Dtype::BF16, &bits.to_le_bytes(), Dtype::F32, &mut wide);
            let mut back = [0; 2];
            cast_bytes(Dtype::F32, &wide, Dtype::BF16, &mut back);
            assert_eq!(u16::from_le_bytes(back), bits);
        }
    }

    #[test]
    fn narrowing_rounds_to_nearest_even() {
        // 1 + 2^-8 lies half way between two bf16 values, 1 and 1 + 2^-7: the even one is 1.
        let mut out = [0; 2];
        cast_bytes(Dtype::F32, &(1.0f32 + 0.00390625).to_le_bytes(), Dtype::BF16, &mut out);
        assert_eq!(bf16::from_le_bytes(out).to_f32(), 1.0);
    }

    #[test]
    fn narrowing_from_f64_goes_through_f32_as_in_pytorch() {
        // torch.tensor(1 + 2**-8 + 2**-40, dtype=torch.float64).to(torch.bfloat16) is 1.0 (torch 2.13): the last term is
        // lost in F32, which leaves a tie. The same for float16 at 2**-11.
        let mut out = [0; 2];
        for (to, tie) in [(Dtype::BF16, 8), (Dtype::F16, 11)] {
            let value = 1.0 + 2f64.powi(-tie) + 2f64.powi(-40);
            cast_bytes(Dtype::F64, &value.to_le_bytes(), to, &mut out);
            assert_eq!(read_float(to, &out), 1.0);
            let value = 1.0 + 2f64.powi(-tie) + 2f64.powi(-20);
            cast_bytes(Dtype::F64, &value.to_le_bytes(), to, &mut out);
            assert_eq!(read_float(to, &out), 1.0 + 2f64.powi(1 - tie));
        }
    }

    #[test]
    fn every_dtype_of_safetensors_has_a_name_we_parse() {
        for name in [
            "BOOL",
            "F4",
            "F6_E2M3",
            "F6_E3M2",
            "U8",
            "I8",
            "F8_E5M2",
            "F8_E4M3",
            "F8_E8M0",
            "F8_E4M3FNUZ",
            "F8_E5M2FNUZ",
            "I16",
            "U16",
            "F16",
            "BF16",
            "I32",
            "U32",
            "F32",
            "C64",
            "F64",
            "I64",
            "U64",
        ] {
            assert!(parse_dtype(name).is_some(), "{name}");
        }
        assert_eq!(parse_dtype("F128"), None);
    }
}
