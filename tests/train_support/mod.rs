//! Tiny models whose weights follow from their names, for the tests of training.
#![allow(dead_code)]

use std::sync::Arc;
use weightfs::model::Dtype;
use weightfs::train::{Architecture, Config, InMemory, Model, TensorSpec};

pub fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

/// Norm of the difference over the norm of what is wanted.
pub fn relative_error(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let square = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let difference = square(&mut got.iter().zip(want).map(|(&a, &b)| a as f64 - b as f64));
    difference / square(&mut want.iter().map(|&x| x as f64)).max(1e-30)
}

pub fn splitmix64(x: u64) -> u64 {
    let x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// The weights of a golden, as `weights` in tests/goldens/make.py; `offset` is what the family's norms add.
pub fn golden_weights(name: &str, count: usize, offset: f32) -> Vec<f32> {
    let hash = name.bytes().fold(0xCBF2_9CE4_8422_2325, |h: u64, b| (h ^ b as u64).wrapping_mul(0x100_0000_01B3));
    let value = |i: usize| {
        let bits = splitmix64(hash.wrapping_add(i as u64)) >> 56;
        if name.contains("norm") {
            0.75 + (bits >> 3) as f32 / 64.0 - if name.contains("linear_attn") { 0.0 } else { offset }
        } else if name.ends_with("A_log") {
            -(bits as f32) / 64.0
        } else {
            let scale = if name.ends_with(".weight") { -9 } else { -11 };
            (2.0 * bits as f32 - 255.0) * 2f32.powi(scale)
        }
    };
    (0..count).map(value).collect()
}

pub fn to_bytes(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    match dtype {
        Dtype::BF16 => values.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect(),
        Dtype::F16 => values.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
    }
}

/// The weights that a config asks for.
pub fn golden_memory(config: &str, dtype: Dtype) -> (Architecture, Arc<InMemory>) {
    let architecture = Architecture::from_config(&Config::parse(config).unwrap()).unwrap();
    let tensors = architecture.tensors().into_iter().map(|(name, shape)| {
        let values = golden_weights(name, shape.iter().product::<u64>() as usize, architecture.norm_offset);
        (name.to_string(), TensorSpec { dtype, shape }, to_bytes(dtype, &values))
    });
    let weights = Arc::new(InMemory::new(tensors));
    (architecture, weights)
}

pub fn golden_model(config: &str, dtype: Dtype) -> Model {
    let (architecture, weights) = golden_memory(config, dtype);
    Model::new(architecture, weights).unwrap()
}
