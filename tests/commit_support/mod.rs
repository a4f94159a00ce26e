//! What the tests of commits share: small model directories, and live weights that are just bytes.
#![allow(dead_code)] // each test file uses a part of it

pub mod hooked;
pub mod memory;
pub mod world;

use std::path::Path;
use std::sync::Arc;
use std::sync::Mutex;
use weightfs::image::{ImageError, ShardBytes, StepHold};
use weightfs::memory::{BLOCK, Hash, hash_into};
use weightfs::model::ModelDirectory;

/// One tensor of a made-up shard: name, dtype, elements, bytes of an element.
pub type Made<'a> = (&'a str, &'a str, usize, usize);

/// The bytes of a safetensors file whose data is a pattern that depends on `seed`.
pub fn shard(tensors: &[Made], seed: u64) -> Vec<u8> {
    let mut at = 0;
    let mut json = String::from(r#"{"__metadata__":{"format":"pt"}"#);
    for (name, dtype, elements, bytes) in tensors {
        let end = at + elements * bytes;
        json += &format!(r#","{name}":{{"dtype":"{dtype}","shape":[{elements}],"data_offsets":[{at},{end}]}}"#);
        at = end;
    }
    json += "}";
    let mut file = (json.len() as u64).to_le_bytes().to_vec();
    file.extend(json.as_bytes());
    let mut random = Random(seed);
    file.extend((0..at).map(|_| random.next() as u8));
    file
}

/// Two shards with tensors that share blocks, span several, and fill less than one.
pub fn two_shards() -> Vec<(String, Vec<u8>)> {
    let first = [("a", "BF16", 3000, 2), ("b", "F32", 5, 4), ("c", "BF16", 9000, 2), ("d", "U8", 1, 1)];
    let second = [("e", "BF16", 20000, 2), ("f", "F8_E4M3", 4097, 1), ("g", "F64", 100, 8)];
    vec![
        ("model-00001-of-00002.safetensors".into(), shard(&first, 1)),
        ("model-00002-of-00002.safetensors".into(), shard(&second, 2)),
    ]
}

/// Writes the shards and their index.
pub fn write_model(directory: &Path, shards: &[(String, Vec<u8>)]) -> Arc<ModelDirectory> {
    let mut map = Vec::new();
    for (name, bytes) in shards {
        std::fs::write(directory.join(name), bytes).unwrap();
        let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + n]).unwrap();
        for tensor in header.as_object().unwrap().keys().filter(|k| *k != "__metadata__") {
            map.push(format!("\"{tensor}\":\"{name}\""));
        }
    }
    let index = format!(r#"{{"metadata":{{}},"weight_map":{{{}}}}}"#, map.join(","));
    std::fs::write(directory.join("model.safetensors.index.json"), index).unwrap();
    Arc::new(ModelDirectory::open(directory).unwrap())
}

/// Live weights in memory.
pub struct Live(pub Mutex<Vec<Vec<u8>>>);

impl Live {
    pub fn of(shards: &[(String, Vec<u8>)]) -> Live {
        Live(Mutex::new(shards.iter().map(|(_, bytes)| bytes.clone()).collect()))
    }

    pub fn bytes(&self) -> Vec<Vec<u8>> {
        self.0.lock().unwrap().clone()
    }

    pub fn set(&self, shard: usize, offset: usize, bytes: &[u8]) {
        self.0.lock().unwrap()[shard][offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    /// Changes `count` random bytes behind the headers.
    pub fn scribble(&self, random: &mut Random, count: usize) {
        let mut shards = self.0.lock().unwrap();
        for _ in 0..count {
            let s = random.below(shards.len() as u64) as usize;
            let data = 8 + u64::from_le_bytes(shards[s][..8].try_into().unwrap());
            let at = data + random.below(shards[s].len() as u64 - data);
            shards[s][at as usize] = random.next() as u8;
        }
    }
}

impl ShardBytes for Live {
    fn shards(&self) -> usize {
        self.0.lock().unwrap().len()
    }

    fn shard_bytes(&self, shard: usize) -> u64 {
        self.0.lock().unwrap()[shard].len() as u64
    }

    fn hold(&self) -> Result<StepHold, ImageError> {
        Ok(StepHold::new(()))
    }

    fn read(&self, shard: usize, offset: u64, dst: &mut [u8]) -> Result<(), ImageError> {
        dst.copy_from_slice(&self.0.lock().unwrap()[shard][offset as usize..][..dst.len()]);
        Ok(())
    }

    fn hash(&self, shard: usize, first: u64, out: &mut [Hash]) -> Result<(), ImageError> {
        let shards = self.0.lock().unwrap();
        let start = first as usize * BLOCK;
        let end = (start + out.len() * BLOCK).min(shards[shard].len());
        hash_into(&shards[shard][start..end], out);
        Ok(())
    }

    fn write(&self, shard: usize, offset: u64, src: &[u8]) -> Result<(), ImageError> {
        self.set(shard, offset as usize, src);
        Ok(())
    }
}

pub fn disk(directory: &Path, shards: &[(String, Vec<u8>)]) -> Vec<Vec<u8>> {
    shards.iter().map(|(name, _)| std::fs::read(directory.join(name)).unwrap()).collect()
}

/// splitmix64: tests need numbers that are the same every time, not good ones.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        let mut x = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.0 = x;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// `assert_eq!` for weights: says where they differ instead of printing them.
#[macro_export]
macro_rules! assert_same {
    ($left:expr, $right:expr $(, $($what:tt)+)?) => {
        match (&$left, &$right) {
            (left, right) if left != right => {
                let what = String::new() $(+ &format!($($what)+))?;
                let (left, right) = (format!("{left:?}"), format!("{right:?}"));
                let at = left.bytes().zip(right.bytes()).take_while(|(a, b)| a == b).count();
                let part = |text: &str| text.chars().skip(at.saturating_sub(20)).take(60).collect::<String>();
                panic!("{what}: they differ at character {at} of {}: …{}… and …{}…", left.len(), part(&left), part(&right));
            }
            _ => {}
        }
    };
}
