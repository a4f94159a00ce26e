//! Random numbers by place instead of by order: Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as
//! 1, 2, 3", SC 2011), keyed by a seed and counted by (what for, tensor, when, index). Any number of threads, and a
//! GPU, draw the same bits, because nothing depends on who drew before.

use super::cpu::vectorized;

/// What a draw is for; streams never meet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Purpose {
    Projection = 1,
    Rounding = 2,
}

/// All draws of one purpose for one tensor at one time (a step for rounding, a refresh for projections).
#[derive(Debug, Clone, Copy)]
pub struct Stream {
    key: [u32; 2],
    tensor: u32,
    purpose: u32,
    when: u32,
}

impl Stream {
    /// `tensor` is the HF name; it enters as its 32-bit FNV-1a, so that a stream needs no table of tensors.
    pub fn new(seed: u64, purpose: Purpose, tensor: &str, when: u64) -> Stream {
        let name = tensor.bytes().fold(0x811c_9dc5u32, |h, b| (h ^ b as u32).wrapping_mul(0x0100_0193));
        // The step counter fits 32 bits for any life of a model; the rest goes where the purpose has room to spare.
        let purpose = purpose as u32 | ((when >> 32) as u32) << 8;
        Stream { key: [seed as u32, (seed >> 32) as u32], tensor: name, purpose, when: when as u32 }
    }

    /// What a GPU needs to draw from it: key, tensor, purpose and when.
    pub fn words(&self) -> [u32; 5] {
        [self.key[0], self.key[1], self.tensor, self.purpose, self.when]
    }

    /// Four 32-bit words; block `b` holds words `4b..4b+4` of the stream. Blocks count to 2^32: 2^35 weights a tensor.
    #[inline(always)]
    pub fn block(&self, b: u32) -> [u32; 4] {
        philox4x32_10([b, self.purpose, self.tensor, self.when], self.key)
    }

    /// 16 random bits for element `i` of a tensor: two elements share a word, eight a block.
    #[inline(always)]
    pub fn bits16(&self, i: u64) -> u32 {
        let word = self.block((i / 8) as u32)[(i % 8 / 2) as usize];
        (word >> (16 * (i % 2))) & 0xffff
    }

    /// Fills `out` with elements `first..first + out.len()` of the stream's standard normals.
    pub fn fill_normals(&self, first: u64, out: &mut [f32]) {
        let (mut i, mut rest) = (first, out);
        while !rest.is_empty() {
            // Sixteen blocks at a time where they are whole, so that the work runs in vectors; else one.
            let lane = (i % 4) as usize;
            let n = if lane == 0 && rest.len() >= 64 { 64 } else { (4 - lane).min(rest.len()) };
            let (now, later) = rest.split_at_mut(n);
            match now.len() {
                64 => self.sixty_four_normals((i / 4) as u32, now),
                _ => {
                    let words = self.block((i / 4) as u32);
                    now.iter_mut().zip(&words[lane..]).for_each(|(value, word)| *value = normal(*word));
                }
            }
            i += n as u64;
            rest = later;
        }
    }

    fn sixty_four_normals(&self, block: u32, out: &mut [f32]) {
        vectorized! {
            fn run(stream: &Stream, block: u32, out: &mut [f32]) {
                let mut words = [0u32; 64];
                for (b, four) in words.chunks_exact_mut(4).enumerate() {
                    four.copy_from_slice(&stream.block(block.wrapping_add(b as u32)));
                }
                for (value, word) in out.iter_mut().zip(words) {
                    *value = normal(word);
                }
            }
        }
        run(self, block, out)
    }
}

#[inline(always)]
fn philox4x32_10(mut c: [u32; 4], mut k: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let a = 0xD251_1F53u64 * c[0] as u64;
        let b = 0xCD9E_8D57u64 * c[2] as u64;
        c = [(b >> 32) as u32 ^ c[1] ^ k[0], b as u32, (a >> 32) as u32 ^ c[3] ^ k[1], a as u32];
        k = [k[0].wrapping_add(0x9E37_79B9), k[1].wrapping_add(0xBB67_AE85)];
    }
    c
}

/// Giles' coefficients, for the middle and for the tails.
const NEAR: [f32; 9] = [
    2.810_226_4e-8,
    3.432_739_4e-7,
    -3.523_387_7e-6,
    -4.391_506_5e-6,
    0.000_218_580_87,
    -0.001_253_725,
    -0.004_177_681_6,
    0.246_640_73,
    1.501_409_4,
];
const FAR: [f32; 9] = [
    -0.000_200_214_26,
    0.000_100_950_56,
    0.001_349_343_2,
    -0.003_673_428_4,
    0.005_739_507_7,
    -0.007_622_461_3,
    0.009_438_870_5,
    1.001_674,
    2.832_976_8,
];

/// A standard normal from one word, by the inverse of its distribution: `sqrt(2) * erfinv(u)` with the polynomials of
/// M. Giles, "Approximating the erfinv function" (GPU Computing Gems, 2011), within 1e-6 of the exact inverse.
///
/// Only additions, multiplications, a division and a square root, which IEEE 754 rounds exactly, in a fixed order and
/// never fused: the bits are the same on every machine. A library's `ln` would not be.
#[inline(always)]
pub fn normal(word: u32) -> f32 {
    // 2^23 points, exact in f32, none of them at the ends: u in (-1, 1), symmetric, out to 5.3 standard deviations.
    let u = ((word >> 9) as f32 * 2.0 + 1.0) * (1.0 / 8388608.0) - 1.0;
    let w = -ln((1.0 - u) * (1.0 + u));
    // Both ends of the choice are computed, so that loops over this become vectors.
    let near = w < 5.0;
    let x = if near { w - 2.5 } else { w.sqrt() - 3.0 };
    let mut p = if near { NEAR[0] } else { FAR[0] };
    for i in 1..9 {
        p = p * x + if near { NEAR[i] } else { FAR[i] };
    }
    std::f32::consts::SQRT_2 * p * u
}

/// Natural logarithm of a positive normal number, to 2 ulp, in exactly rounded operations (see [`normal`]).
#[inline(always)]
fn ln(x: f32) -> f32 {
    let bits = x.to_bits();
    // Mantissa in [sqrt(1/2), sqrt(2)), so that the series below stays short.
    let shift = bits.wrapping_sub(0x3f35_04f3) & 0xff80_0000;
    let exponent = (shift as i32 >> 23) as f32;
    let m = f32::from_bits(bits.wrapping_sub(shift));
    // ln m = 2 atanh(s), s = (m-1)/(m+1), |s| < 0.172: the term after s^9/9 is below 2^-30 of the first.
    let s = (m - 1.0) / (m + 1.0);
    let z = s * s;
    let series = 2.0 + z * (2.0 / 3.0 + z * (2.0 / 5.0 + z * (2.0 / 7.0 + z * (2.0 / 9.0))));
    exponent * std::f32::consts::LN_2 + s * series
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_gives_the_words_of_its_authors_known_answers() {
        // Random123 1.14, kat_vectors, lines "philox4x32 10".
        assert_eq!(philox4x32_10([0; 4], [0; 2]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
        assert_eq!(philox4x32_10([u32::MAX; 4], [u32::MAX; 2]), [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
        assert_eq!(
            philox4x32_10([0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344], [0xa4093822, 0x299f31d0]),
            [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]
        );
    }

    #[test]
    fn normals_have_the_moments_of_a_standard_normal() {
        let mut x = vec![0.0; 400_000];
        Stream::new(7, Purpose::Projection, "w", 3).fill_normals(0, &mut x);
        let moment = |p: i32| x.iter().map(|&v| (v as f64).powi(p)).sum::<f64>() / x.len() as f64;
        // Standard errors at this count: 0.0016, 0.0022, 0.006, 0.015.
        assert!(moment(1).abs() < 0.008, "mean {}", moment(1));
        assert!((moment(2) - 1.0).abs() < 0.011, "variance {}", moment(2));
        assert!(moment(3).abs() < 0.03, "skew {}", moment(3));
        assert!((moment(4) - 3.0).abs() < 0.08, "kurtosis {}", moment(4));
        assert!(normal(0).is_finite() && normal(u32::MAX) == -normal(0));
    }

    #[test]
    fn the_inverse_follows_the_error_function() {
        // Quantiles of the standard normal (R, qnorm): 0.75, 0.975, 0.999, 0.999999.
        for (p, z) in [(0.75, 0.67448975), (0.975, 1.959964), (0.999, 3.0902323), (0.999999, 4.7534243)] {
            let word = (p * 4294967296.0f64) as u32;
            // Far out, neighbouring points of the grid lie apart: by 0.012 at the last.
            let tolerance = if z < 3.0 { 4e-5 } else { 0.012 };
            assert!((normal(word) - z as f32).abs() < tolerance, "{p}: {}", normal(word));
        }
    }

    #[test]
    fn a_stream_can_be_read_from_anywhere() {
        let stream = Stream::new(1, Purpose::Projection, "model.norm.weight", 0);
        let mut whole = [0.0; 23];
        stream.fill_normals(0, &mut whole);
        let mut part = [0.0; 9];
        stream.fill_normals(6, &mut part);
        assert_eq!(whole[6..15], part);
    }
}
