//! How an f32 result becomes a weight: to the nearest value, or to one of its two neighbours with the probability that
//! makes the mean exact. The second keeps updates far smaller than the spacing of bf16 values alive (Zamirai et al.,
//! "Revisiting BFloat16 Training", arXiv 2010.06192).

use half::{bf16, f16};

/// f32 to bf16 by 16 random bits (0..65536): truncates after adding them below the kept bits. A value that would
/// round up to infinity is kept at the largest finite one; infinities and NaN pass as they are.
#[inline(always)]
pub fn stochastic_bf16(x: f32, random: u32) -> u16 {
    let bits = x.to_bits();
    let up = (bits.wrapping_add(random) >> 16) as u16;
    let down = (bits >> 16) as u16;
    // An exponent of all ones after the addition means infinity, or NaN that was one before.
    if up & 0x7f80 == 0x7f80 {
        // The top half of a NaN may lose every mantissa bit: keep it quiet.
        if x.is_nan() { down | 0x40 } else { down }
    } else {
        up
    }
}

/// f32 to f16 by 16 random bits, of which the 13 that f16 drops are used.
#[inline(always)]
pub fn stochastic_f16(x: f32, random: u32) -> u16 {
    // The spacing of f16 values around x: 2^(e-10), and 2^-24 where they are subnormal.
    let exponent = ((x.to_bits() >> 23) & 0xff) as i32 - 127;
    if !x.is_finite() || exponent > 15 {
        return f16::from_f32(x).to_bits();
    }
    let spacing = 2f32.powi(exponent.max(-14) - 10);
    let scaled = x / spacing; // exact: a power of two, and |scaled| < 2^11
    let floor = scaled.floor();
    let up = (scaled - floor) * 65536.0 > random as f32;
    let rounded = f16::from_f32((floor + up as u8 as f32) * spacing);
    if rounded.is_infinite() { f16::from_f32(f16::MAX.to_f32().copysign(x)).to_bits() } else { rounded.to_bits() }
}

#[inline(always)]
pub fn nearest_bf16(x: f32) -> u16 {
    bf16::from_f32(x).to_bits()
}

#[inline(always)]
pub fn nearest_f16(x: f32) -> u16 {
    f16::from_f32(x).to_bits()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_random_value_once_gives_the_exact_mean() {
        for x in [1.0f32 + 0.3 / 128.0, -0.017_345, 3.0e-5, -65000.0, 1.0, 6.0e-8] {
            let (mut b, mut h) = (0.0f64, 0.0f64);
            for r in 0..65536 {
                b += bf16::from_bits(stochastic_bf16(x, r)).to_f64();
                h += f16::from_bits(stochastic_f16(x, r)).to_f64();
            }
            let spacing = (x.abs() as f64).log2().floor().exp2();
            assert!((b / 65536.0 - x as f64).abs() < spacing / 128.0 / 60000.0, "bf16 {x}: {}", b / 65536.0);
            let f16_spacing = spacing.max(2f64.powi(-14)) / 1024.0;
            assert!((h / 65536.0 - x as f64).abs() < f16_spacing / 1000.0, "f16 {x}: {}", h / 65536.0);
        }
    }

    #[test]
    fn a_value_that_the_type_holds_never_moves() {
        for bits in (0..=u16::MAX).step_by(7) {
            let (b, h) = (bf16::from_bits(bits), f16::from_bits(bits));
            for random in [0, 1, 32768, 65535] {
                if b.is_nan() || h.is_nan() {
                    continue;
                }
                assert_eq!(stochastic_bf16(b.to_f32(), random), bits);
                assert_eq!(stochastic_f16(h.to_f32(), random), bits);
            }
        }
    }

    #[test]
    fn no_finite_value_becomes_infinite_and_nan_stays_nan() {
        assert!(bf16::from_bits(stochastic_bf16(f32::MAX, 65535)).is_finite());
        assert!(bf16::from_bits(stochastic_bf16(f32::MIN, 65535)).is_finite());
        assert!(f16::from_bits(stochastic_f16(65519.0, 0)).is_finite());
        assert!(bf16::from_bits(stochastic_bf16(f32::from_bits(0x7f80_0001), 3)).is_nan());
        assert_eq!(bf16::from_bits(stochastic_bf16(f32::INFINITY, 9)), bf16::INFINITY);
    }
}
