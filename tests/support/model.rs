//! Small model directories, written by the safetensors crate: what a hub repository holds, in a few kilobytes.

use super::mixed;
use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use std::path::{Path, PathBuf};

/// A directory that goes away with the test.
pub struct Scratch(tempfile::TempDir);

impl Scratch {
    pub fn new() -> Scratch {
        Scratch(tempfile::Builder::new().prefix("weightfs-test-").tempdir().unwrap())
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path().join(name)
    }

    /// A new empty directory in it.
    pub fn dir(&self, name: &str) -> PathBuf {
        let path = self.join(name);
        std::fs::create_dir_all(&path).unwrap();
        path
    }
}

pub const EMBED: &str = "model.embed_tokens.weight";
pub const Q: &str = "model.layers.0.self_attn.q_proj.weight";
pub const K: &str = "model.layers.0.self_attn.k_proj.weight";
pub const V: &str = "model.layers.0.self_attn.v_proj.weight";
pub const O: &str = "model.layers.0.self_attn.o_proj.weight";
pub const EXPERTS: &str = "model.layers.0.mlp.experts.down_proj";
pub const A_LOG: &str = "model.layers.0.linear_attn.A_log";
pub const NORM: &str = "model.norm.weight";
pub const LM_HEAD: &str = "lm_head.weight";
pub const ONLY_ON_DISK: &str = "visual.patch_embed.weight";
pub const OPAQUE: &str = "model.layers.0.mlp.packed";
pub const EMPTY: &str = "model.empty";

/// One tensor of the made-up model.
#[derive(Clone)]
pub struct Spec {
    pub name: &'static str,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
}

fn spec(name: &'static str, dtype: Dtype, shape: &[usize]) -> Spec {
    Spec { name, dtype, shape: shape.to_vec() }
}

/// The tensors of each shard; `rows` scales the embedding (64 columns of BF16).
fn specs(rows: usize) -> Vec<Vec<Spec>> {
    vec![
        vec![
            spec(EMBED, Dtype::BF16, &[rows, 64]),
            spec(Q, Dtype::BF16, &[64, 64]),
            spec(K, Dtype::BF16, &[32, 64]),
            spec(V, Dtype::BF16, &[32, 64]),
        ],
        vec![
            spec(O, Dtype::BF16, &[64, 128]),
            spec(EXPERTS, Dtype::F16, &[4, 32, 48]),
            spec(A_LOG, Dtype::BF16, &[300]),
            spec(NORM, Dtype::F32, &[1500]),
        ],
        vec![
            spec(LM_HEAD, Dtype::BF16, &[rows, 64]),
            spec(ONLY_ON_DISK, Dtype::U8, &[5000]),
            spec(OPAQUE, Dtype::F8_E4M3, &[3000]),
            spec(EMPTY, Dtype::F32, &[0, 4]),
        ],
    ]
}

/// A model directory.
pub struct Model {
    pub path: PathBuf,
    /// File names of the weights, sorted.
    pub shards: Vec<String>,
    pub specs: Vec<Spec>,
}

impl Model {
    /// Three shards and an index.
    pub fn sharded(path: impl Into<PathBuf>) -> Model {
        Model::sharded_of(path, 250)
    }

    pub fn sharded_of(path: impl Into<PathBuf>, rows: usize) -> Model {
        Model::write(path.into(), specs(rows))
    }

    /// One `model.safetensors`.
    pub fn single(path: impl Into<PathBuf>) -> Model {
        Model::write(path.into(), vec![specs(250).concat()])
    }

    /// As the hub's cache lays a snapshot out: links into `blobs/`. The model's path is the snapshot's.
    pub fn in_hub_cache(cache: &Path) -> Model {
        let mut model = Model::sharded(cache.join("models--toy/snapshots/0123abcd"));
        let blobs = cache.join("models--toy/blobs");
        std::fs::create_dir_all(&blobs).unwrap();
        for entry in std::fs::read_dir(&model.path).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            let blob = format!("{:016x}", mixed(7, name.len() as u64 + name.bytes().map(u64::from).sum::<u64>()));
            std::fs::rename(&path, blobs.join(&blob)).unwrap();
            std::os::unix::fs::symlink(format!("../../blobs/{blob}"), &path).unwrap();
        }
        model.path = model.path.canonicalize().unwrap();
        model
    }

    fn write(path: PathBuf, shards: Vec<Vec<Spec>>) -> Model {
        std::fs::create_dir_all(&path).unwrap();
        let count = shards.len();
        let mut names = Vec::new();
        let mut map = serde_json::Map::new();
        for (i, tensors) in shards.iter().enumerate() {
            let name = match count {
                1 => "model.safetensors".to_string(),
                _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
            };
            write_shard(&path.join(&name), tensors);
            map.extend(tensors.iter().map(|t| (t.name.to_string(), name.clone().into())));
            names.push(name);
        }
        if count > 1 {
            let index = serde_json::json!({"metadata": {"total_size": 0}, "weight_map": map});
            std::fs::write(path.join("model.safetensors.index.json"), index.to_string()).unwrap();
        }
        std::fs::write(path.join("config.json"), r#"{"architectures": ["ToyForCausalLM"]}"#).unwrap();
        std::fs::write(path.join("tokenizer.json"), vec![b'x'; 9001]).unwrap();
        Model { path, shards: names, specs: shards.concat() }
    }

    pub fn spec(&self, name: &str) -> &Spec {
        self.specs.iter().find(|s| s.name == name).unwrap()
    }

    pub fn shard(&self, i: usize) -> PathBuf {
        self.path.join(&self.shards[i])
    }

    /// The weights files as they are on disk now.
    pub fn disk(&self) -> Vec<Vec<u8>> {
        weights_in(&self.path, &self.shards)
    }

    /// mtimes of the weights files in nanoseconds.
    pub fn mtimes(&self) -> Vec<i128> {
        self.shards.iter().map(|s| mtime(&self.path.join(s))).collect()
    }
}

fn write_shard(path: &Path, tensors: &[Spec]) {
    let data: Vec<(&str, Vec<u8>)> = tensors.iter().map(|t| (t.name, initial(t))).collect();
    let views: Vec<(&str, TensorView)> = tensors
        .iter()
        .zip(&data)
        .map(|(t, (name, bytes))| (*name, TensorView::new(t.dtype, t.shape.clone(), bytes).unwrap()))
        .collect();
    let metadata = Some([("format".to_string(), "pt".to_string())].into());
    safetensors::serialize_to_file(views, metadata, path).unwrap();
}

/// Finite values between -4 and 4; F32 ones do not fit into 16 bits, so that a lossy cast would show.
fn initial(tensor: &Spec) -> Vec<u8> {
    // Tied: the same values under both names.
    let seed = if tensor.name == LM_HEAD { EMBED.len() } else { tensor.name.len() } as u64;
    let count = tensor.shape.iter().product::<usize>() as u64;
    let value = |i| (mixed(seed, i) % 8_000_001) as f32 / 1_000_000.0 - 4.0;
    (0..count)
        .flat_map(|i| match tensor.dtype {
            Dtype::BF16 => bf16::from_f32(value(i)).to_le_bytes().to_vec(),
            Dtype::F16 => f16::from_f32(value(i)).to_le_bytes().to_vec(),
            Dtype::F32 => value(i).to_le_bytes().to_vec(),
            _ => vec![mixed(seed, i) as u8],
        })
        .collect()
}

pub fn weights_in(dir: &Path, shards: &[String]) -> Vec<Vec<u8>> {
    let read = |s: &String| std::fs::read(dir.join(s)).unwrap_or_else(|e| panic!("{}: {e}", dir.join(s).display()));
    shards.iter().map(read).collect()
}

pub fn mtime(path: &Path) -> i128 {
    use std::os::unix::fs::MetadataExt;
    let m = std::fs::metadata(path).unwrap();
    m.mtime() as i128 * 1_000_000_000 + m.mtime_nsec() as i128
}

/// How many 4096-byte blocks of the files differ.
pub fn changed_blocks(before: &[Vec<u8>], after: &[Vec<u8>]) -> usize {
    let blocks = |(a, b): (&Vec<u8>, &Vec<u8>)| a.chunks(4096).zip(b.chunks(4096)).filter(|(x, y)| x != y).count();
    before.iter().zip(after).map(blocks).sum()
}

/// Which files differ, and where first: shorter to read than the files.
#[track_caller]
pub fn assert_same(what: &str, got: &[Vec<u8>], want: &[Vec<u8>]) {
    assert_eq!(got.len(), want.len(), "{what}: number of weights files");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert_eq!(g.len(), w.len(), "{what}: size of weights file {i}");
        if let Some(at) = g.iter().zip(w).position(|(a, b)| a != b) {
            let wrong = g.iter().zip(w).filter(|(a, b)| a != b).count();
            panic!("{what}: weights file {i} has {wrong} wrong bytes, the first at {at}");
        }
    }
}
