//! Loops that the compiler should turn into wide vectors where the machine has them, from one text.

/// Compiles the same body three times, for AVX-512, for AVX2 and for the baseline, and picks at run time. Nothing in the
/// body is fused or reordered by that (Rust contracts no floats), so that all three give the same bits.
macro_rules! vectorized {
    ($(#[$doc:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$doc])*
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
                fn avx512($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }
                #[target_feature(enable = "avx2")]
                fn avx2($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }
                if is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl") && is_x86_feature_detected!("avx512f")
                {
                    // SAFETY: the features it is compiled for were found on this machine in the line above.
                    return unsafe { avx512($($arg),*) };
                }
                if is_x86_feature_detected!("avx2") {
                    // SAFETY: as above.
                    return unsafe { avx2($($arg),*) };
                }
            }
            body($($arg),*)
        }
    };
}
pub(crate) use vectorized;

/// e^x to 2 ulp; 0 below -87.3, infinity above 88.7. Range reduction by ln 2 in two parts, then the polynomial of
/// Cephes' `expf`. In plain operations, so that loops over it become vectors.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding and subtracting it rounds to an integer
    let clamped = x.clamp(-87.3, 88.7);
    let n = (clamped * std::f32::consts::LOG2_E + ROUND) - ROUND;
    let r = (clamped - n * 0.693_359_4) - n * -2.121_944_4e-4;
    let mut p = 1.987_569_2e-4;
    for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p * r + c;
    }
    let y = p * r * r + r + 1.0;
    // 2^n in two factors, since n reaches 128.
    let half = (n * 0.5).floor();
    let pow2 = |e: f32| f32::from_bits(((e as i32 + 127) as u32) << 23);
    let y = y * pow2(half) * pow2(n - half);
    let y = if x < -87.3 { 0.0 } else { y };
    let y = if x > 88.7 { f32::INFINITY } else { y };
    if x.is_nan() { x } else { y }
}

/// Sixteen running sums, one a vector lane, added up in a fixed order at the end.
const LANES: usize = 16;

#[inline(always)]
fn lane_sum(lanes: [f32; LANES]) -> f32 {
    let mut lanes = lanes;
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

#[inline(always)]
pub fn dot_inline(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0; LANES];
    let (ac, bc) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let tail: f32 = ac.remainder().iter().zip(bc.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in ac.zip(bc) {
        for i in 0..LANES {
            lanes[i] += a[i] * b[i];
        }
    }
    lane_sum(lanes) + tail
}

#[inline(always)]
pub fn sum_inline(a: &[f32]) -> f32 {
    let mut lanes = [0.0; LANES];
    let chunks = a.chunks_exact(LANES);
    let tail: f32 = chunks.remainder().iter().sum();
    for a in chunks {
        for i in 0..LANES {
            lanes[i] += a[i];
        }
    }
    lane_sum(lanes) + tail
}

#[inline(always)]
pub fn max_inline(a: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = a.chunks_exact(LANES);
    let tail = chunks.remainder().iter().fold(f32::NEG_INFINITY, |m, &x| m.max(x));
    for a in chunks {
        for i in 0..LANES {
            lanes[i] = if a[i] > lanes[i] { a[i] } else { lanes[i] };
        }
    }
    lanes.iter().fold(tail, |m, &x| m.max(x))
}

vectorized! {
    /// Sum of products, in one fixed order.
    pub fn dot(a: &[f32], b: &[f32]) -> f32 {
        assert_eq!(a.len(), b.len());
        dot_inline(a, b)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_three_ulp_and_keeps_its_ends() {
        let mut worst = 0.0f64;
        let mut x = -87.0f32;
        while x < 88.0 {
            worst = worst.max((exp(x) as f64 / (x as f64).exp() - 1.0).abs());
            x += 0.000_731;
        }
        assert!(worst < 3.0 * 1.2e-7, "{worst}");
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-1000.0), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(1000.0), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn every_compiled_width_sums_alike() {
        let a: Vec<f32> = (0..1003).map(|i| (i as f32 * 0.37).sin()).collect();
        assert_eq!(dot(&a, &a), dot_inline(&a, &a));
    }
}
