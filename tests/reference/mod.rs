//! A model directory and an engine's memories, made at random, and the image of them by its definition: every element
//! is kept in a plain list with the places that hold it, and a shard's bytes are made element by element. Nothing here
//! knows of runs, extents or blocks.
#![allow(dead_code, unused_imports)] // each test file uses a part of it

mod cast;
mod layout;
mod recipe;

pub use cast::{CASTABLE, cast, value};
pub use layout::MEMORIES;
pub use recipe::{Keep, Recipe, ShardRecipe, TensorRecipe, recipes};

use serde_json::{Map, Value, json};
use std::fs::File;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use weightfs::image::Image;
use weightfs::model::{Dtype, ModelDirectory};
use weightfs::source::{Source, SourceError};

pub struct Reference {
    dir: tempfile::TempDir,
    pub shards: Vec<ShardFile>,
    /// In order of their place in the files.
    pub tensors: Vec<Tensor>,
    pub memories: Vec<MemoryFile>,
    pub manifests: Vec<PathBuf>,
    pub json: Vec<Value>,
}

pub struct ShardFile {
    pub name: String,
    pub disk: Vec<u8>,
}

pub struct Tensor {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub shard: usize,
    /// Place of the first byte in the shard file.
    pub start: usize,
    /// Bytes of one element, 1 for types smaller than a byte, whose bytes stand for elements.
    pub width: usize,
    /// Each element's bytes in the file.
    pub disk: Vec<Vec<u8>>,
    /// Each element's places in memories, the one that is read first.
    pub homes: Vec<Vec<Home>>,
}

#[derive(Debug, Clone, Copy)]
pub struct Home {
    pub memory: usize,
    pub at: usize,
    pub dtype: Dtype,
    pub width: usize,
}

/// A file that an engine shares, and what is in it.
pub struct MemoryFile {
    pub path: PathBuf,
    pub bytes: Vec<u8>,
}

impl Tensor {
    pub fn is_live(&self) -> bool {
        self.homes.iter().any(|h| !h.is_empty())
    }

    /// Of a type smaller than a byte: shared as a whole only.
    pub fn is_packed(&self) -> bool {
        self.width * 8 > self.dtype.bitsize()
    }

    pub fn castable(&self) -> bool {
        CASTABLE.contains(&self.dtype)
    }

    pub fn end(&self) -> usize {
        self.start + self.disk.len() * self.width
    }
}

impl MemoryFile {
    pub fn set(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        let file = File::options().write(true).open(&self.path).unwrap();
        file.write_all_at(bytes, at as u64).unwrap();
    }
}

impl Reference {
    pub fn new(recipe: &Recipe) -> Reference {
        let mut random = Random(recipe.seed);
        let dir = tempfile::tempdir().unwrap();
        let file = |name: String| dir.path().join(name);
        let memories = (0..recipe.ranks * MEMORIES)
            .map(|n| MemoryFile { path: file(format!("memory-{n}")), bytes: Vec::new() })
            .collect();
        let manifests: Vec<PathBuf> = (0..recipe.ranks).map(|r| file(format!("rank-{r}.json"))).collect();
        let json = (0..recipe.ranks).map(|rank| {
            json!({"weightfs": 1, "engine": {"rank": rank, "world_size": recipe.ranks}, "memories": [],
                "tensors": {"only.live": {"dtype": "F32", "shape": [1], "segments": []}}, "opaque": {}})
        });
        let json = json.collect();
        let mut it = Reference { dir, shards: Vec::new(), tensors: Vec::new(), memories, manifests, json };
        std::fs::create_dir(it.model()).unwrap();
        let count = recipe.shards.len();
        for (s, shard) in recipe.shards.iter().enumerate() {
            it.add_shard(s, count, shard, &mut random);
        }
        it.write_index(recipe.index);
        it.write_memories();
        it.write_manifests();
        it
    }

    pub fn model(&self) -> PathBuf {
        self.dir.path().join("model")
    }

    /// Any file name beside the model directory.
    pub fn beside(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn add_shard(&mut self, s: usize, count: usize, recipe: &ShardRecipe, random: &mut Random) {
        let name = match count {
            1 => "model.safetensors".to_string(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", s + 1),
        };
        let mut recipes = recipe.tensors.clone();
        if s + 1 == count {
            // Manifests that hold nothing of the model are refused: something is always live.
            let keep = Keep::Live { cuts: vec![], dtype: None, strided: false, replicas: false };
            recipes.push(TensorRecipe { dtype: Dtype::BF16, shape: vec![3], keep });
        }
        let mut entries: Vec<(String, Value)> = Vec::new();
        let (mut at, mut tensors) = (0, Vec::new());
        for (n, recipe) in recipes.iter().enumerate() {
            let (mut dtype, mut shape, mut tied) = (recipe.dtype, recipe.shape.clone(), None);
            if matches!(recipe.keep, Keep::Tied)
                && let Some(first) = self.tensors.iter().rfind(|t| t.is_live())
            {
                (dtype, shape, tied) = (first.dtype, first.shape.clone(), Some(first.disk.clone()));
            }
            let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
            let width = (dtype.bitsize() / 8).max(1);
            let fresh = (0..bytes / width).map(|_| random.element(dtype, width)).collect();
            let disk: Vec<Vec<u8>> = tied.unwrap_or(fresh);
            let name = format!("layers.{s}.{n}.w\"é");
            let homes = vec![Vec::new(); disk.len()];
            let mut tensor = Tensor { name, dtype, shape, shard: s, start: at, width, disk, homes };
            self.place(&mut tensor, &recipe.keep, random);
            let entry = json!({"dtype": layout::name(tensor.dtype), "shape": tensor.shape,
                "data_offsets": [at, at + bytes]});
            entries.push((tensor.name.clone(), entry));
            at += bytes;
            // A tied tensor looks for the one before it, in this shard too.
            self.tensors.push(tensor);
            tensors.push(self.tensors.len() - 1);
        }
        // The order of names in a header says nothing about the order of data.
        random.shuffle(&mut entries);
        let mut header = Map::from_iter(entries);
        header.insert("__metadata__".into(), json!({"padding": "p".repeat(recipe.padding)}));
        let text = serde_json::to_string(&header).unwrap();
        let mut disk = [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
        let data = disk.len();
        for n in tensors {
            self.tensors[n].start += data;
            disk.extend(self.tensors[n].disk.concat());
        }
        std::fs::write(self.model().join(&name), &disk).unwrap();
        self.shards.push(ShardFile { name, disk });
    }

    fn write_index(&self, wanted: bool) {
        if wanted {
            let map = self.tensors.iter().map(|t| (t.name.clone(), Value::from(self.shards[t.shard].name.as_str())));
            let index = json!({"metadata": {}, "weight_map": Map::from_iter(map)});
            std::fs::write(self.model().join("model.safetensors.index.json"), index.to_string()).unwrap();
        }
    }

    fn write_memories(&mut self) {
        for (n, memory) in self.memories.iter().enumerate() {
            std::fs::write(&memory.path, &memory.bytes).unwrap();
            let entry = json!({"kind": "file", "path": memory.path, "bytes": memory.bytes.len()});
            self.json[n / MEMORIES]["memories"].as_array_mut().unwrap().push(entry);
        }
    }

    pub fn write_manifests(&self) {
        for (path, json) in self.manifests.iter().zip(&self.json) {
            write_manifest(path, json.to_string().as_bytes());
        }
    }

    pub fn open(&self) -> Result<Image, SourceError> {
        let directory = Arc::new(ModelDirectory::open(&self.model())?);
        let source = Source::from_manifests(&directory, &self.manifests, true)?;
        Ok(Image::new(directory, Arc::new(source)))
    }

    // -- the image by its definition --

    fn element(&self, t: &Tensor, n: usize) -> Vec<u8> {
        let Some(home) = t.homes[n].first() else { return t.disk[n].clone() };
        let live = &self.memories[home.memory].bytes[home.at..home.at + home.width];
        if home.dtype == t.dtype {
            live.to_vec()
        } else if cast(t.dtype, &t.disk[n], home.dtype) == live {
            t.disk[n].clone() // it is what the file's value becomes there: nobody touched it
        } else {
            cast(home.dtype, live, t.dtype)
        }
    }

    /// The bytes of a shard file as they are live.
    pub fn shard(&self, s: usize) -> Vec<u8> {
        let mut bytes = self.shards[s].disk.clone();
        for t in self.tensors.iter().filter(|t| t.shard == s) {
            for n in 0..t.disk.len() {
                let at = t.start + n * t.width;
                bytes[at..at + t.width].copy_from_slice(&self.element(t, n));
            }
        }
        bytes
    }

    pub fn all(&self) -> Vec<Vec<u8>> {
        (0..self.shards.len()).map(|s| self.shard(s)).collect()
    }

    /// File bytes written back into every place that holds an element. `at` and its end lie between elements.
    pub fn write(&mut self, s: usize, at: usize, bytes: &[u8]) {
        for t in self.tensors.iter().filter(|t| t.shard == s) {
            for (n, homes) in t.homes.iter().enumerate() {
                let place = t.start + n * t.width;
                if place < at || place + t.width > at + bytes.len() {
                    continue;
                }
                let element = &bytes[place - at..][..t.width];
                for h in homes {
                    let live = if h.dtype == t.dtype { element.to_vec() } else { cast(t.dtype, element, h.dtype) };
                    self.memories[h.memory].bytes[h.at..h.at + h.width].copy_from_slice(&live);
                }
            }
        }
    }

    /// Puts `at` on the nearest place before it that does not cut an element.
    pub fn between_elements(&self, s: usize, at: usize) -> usize {
        let cut = self.tensors.iter().find(|t| t.shard == s && t.start <= at && at < t.end());
        cut.map_or(at, |t| at - (at - t.start) % t.width)
    }

    // -- the engine --

    /// Gives `count` random elements new values, in the memory files, as an engine would.
    pub fn change(&mut self, random: &mut Random, count: usize) {
        let live: Vec<usize> = (0..self.tensors.len()).filter(|&t| self.tensors[t].is_live()).collect();
        for _ in 0..count {
            let t = &self.tensors[live[random.below(live.len())]];
            let homes = t.homes[random.below(t.homes.len())].clone();
            let first = homes[0];
            let new = random.element(first.dtype, first.width);
            for h in homes {
                let same = h.dtype == first.dtype;
                let live = if same { new.clone() } else { cast(first.dtype, &new, h.dtype) };
                self.memories[h.memory].set(h.at, &live);
            }
        }
    }

    /// Changes bytes of the memories that no element has.
    pub fn change_gaps(&mut self, random: &mut Random) {
        let mut used: Vec<Vec<bool>> = self.memories.iter().map(|m| vec![false; m.bytes.len()]).collect();
        for h in self.tensors.iter().flat_map(|t| t.homes.iter().flatten()) {
            used[h.memory][h.at..h.at + h.width].fill(true);
        }
        for (memory, used) in self.memories.iter_mut().zip(used) {
            for at in (0..used.len()).filter(|&at| !used[at]).take(200) {
                memory.set(at, &[random.next() as u8]);
            }
        }
    }
}

pub fn write_manifest(path: &Path, bytes: &[u8]) {
    std::fs::write(path, bytes).unwrap();
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o600)).unwrap();
}

/// splitmix64: the same every time, so that a failure comes back.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for n in (1..items.len()).rev() {
            items.swap(n, self.below(n + 1));
        }
    }

    /// Any bits; of numbers that may be cast also ordinary ones, those half way between two of a narrower type, and
    /// those a little beside it. One NaN only: a cast may change which.
    pub fn element(&mut self, dtype: Dtype, width: usize) -> Vec<u8> {
        let bits = self.next().to_le_bytes()[..width].to_vec();
        if !CASTABLE.contains(&dtype) {
            return bits;
        }
        let tie = 1.0 + (2 * self.below(64) + 1) as f64 / [256.0, 2048.0, 16777216.0][self.below(3)];
        let beside = tie + [0.0, 1e-9, -1e-9][self.below(3)];
        let number = match self.below(4) {
            0 => value(dtype, &bits),
            1 => (self.below(2001) as f64 - 1000.0) / 256.0,
            2 => beside * [1.0, -1.0, 1e-39, 6e-8][self.below(4)],
            _ => [0.0, -0.0, f64::INFINITY, f64::NAN, 65520.0, 3.4e38, 1e300, 5e-324][self.below(8)],
        };
        let number = if number.is_nan() { f64::NAN } else { number };
        cast(Dtype::F64, &number.to_le_bytes(), dtype)
    }
}
