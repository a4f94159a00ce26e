//! An engine: weights in shared memory, laid out as engines do (rows merged, transposed, padded, split over memories,
//! cast), a manifest that says so, and copies of every value, from which it knows what each file should hold.

use super::model::*;
use half::{bf16, f16};
use memmap2::MmapRaw;
use rustix::fs::{FlockOperation, flock};
use safetensors::{Dtype, SafeTensors};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

#[derive(Clone)]
struct Segment {
    memory: usize,
    offset: usize,
    at: Vec<usize>,
    shape: Vec<usize>,
    strides: Vec<usize>,
    dtype: Dtype,
}

struct Tensor {
    dtype: Dtype,
    shape: Vec<usize>,
    segments: Vec<Segment>,
    /// Every value as it is in memory.
    values: Vec<f32>,
}

struct Memory {
    file: tempfile::NamedTempFile,
    map: MmapRaw,
}

pub struct Engine {
    pub manifest: PathBuf,
    memories: Vec<Memory>,
    tensors: BTreeMap<String, Tensor>,
    process: Option<Child>,
}

/// Whose life is the weights' life.
pub enum Life {
    /// The test's own process.
    Test,
    /// A child that can be killed.
    Child,
    /// Nobody's: the manifest has no pid.
    Unwatched,
}

impl Engine {
    pub fn new(model: &Model, manifest: impl Into<PathBuf>) -> Engine {
        Engine::living(model, manifest, Life::Test)
    }

    pub fn living(model: &Model, manifest: impl Into<PathBuf>, life: Life) -> Engine {
        let (sizes, mut tensors) = plan(model);
        let memories: Vec<Memory> = sizes.into_iter().map(Memory::new).collect();
        for shard in &model.disk() {
            let file = SafeTensors::deserialize(shard).unwrap();
            for (name, view) in file.tensors() {
                if let Some(tensor) = tensors.get_mut(&name) {
                    let live = tensor.segments[0].dtype;
                    tensor.values = decode(tensor.dtype, view.data()).map(|v| round(live, v)).collect();
                }
            }
        }
        let process = matches!(life, Life::Child).then(|| {
            let mut sleep = Command::new("sleep");
            sleep.arg("infinity").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            sleep.spawn().unwrap()
        });
        let engine = Engine { manifest: manifest.into(), memories, tensors, process };
        for name in engine.tensors.keys() {
            for i in 0..engine.tensors[name].values.len() {
                engine.store(name, i);
            }
        }
        let pid = match life {
            Life::Test => Some(std::process::id()),
            Life::Child => engine.process.as_ref().map(Child::id),
            Life::Unwatched => None,
        };
        publish(&engine.manifest, &engine.description(model, pid));
        engine
    }

    /// What the manifest says; tests of bad input change it before they [`publish`] it.
    pub fn description(&self, model: &Model, pid: Option<u32>) -> serde_json::Value {
        let memories: Vec<_> = self
            .memories
            .iter()
            .map(|m| serde_json::json!({"kind": "file", "path": m.file.path(), "bytes": m.map.len()}))
            .collect();
        let segment = |s: &Segment| {
            serde_json::json!({"memory": s.memory, "offset": s.offset, "at": s.at, "shape": s.shape,
                "strides": s.strides, "dtype": format!("{:?}", s.dtype)})
        };
        let tensors: serde_json::Map<_, _> = self
            .tensors
            .iter()
            .map(|(name, t)| {
                let segments: Vec<_> = t.segments.iter().map(segment).collect();
                let entry =
                    serde_json::json!({"dtype": format!("{:?}", t.dtype), "shape": t.shape, "segments": segments});
                (name.clone(), entry)
            })
            .collect();
        let mut engine = serde_json::json!({"name": "toy", "version": "7", "rank": 0, "world_size": 1});
        if let Some(pid) = pid {
            engine["pid"] = pid.into();
            engine["start_time"] = start_time(pid).into();
        }
        serde_json::json!({"weightfs": 1, "engine": engine, "model": model.path, "memories": memories,
            "tensors": tensors, "opaque": {OPAQUE: "repacked after loading"}})
    }

    pub fn live(&self) -> usize {
        self.tensors.len()
    }

    pub fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    pub fn value(&self, name: &str, i: usize) -> f32 {
        self.tensors[name].values[i]
    }

    pub fn pid(&self) -> u32 {
        self.process.as_ref().map_or_else(std::process::id, Child::id)
    }

    /// The file that memory `i` is.
    pub fn memory(&self, i: usize) -> &Path {
        self.memories[i].file.path()
    }

    /// Sets one value, without taking the lock.
    pub fn set(&mut self, name: &str, i: usize, value: f32) {
        // Tied tensors are one place in memory.
        let tied: &[&str] = if name == EMBED || name == LM_HEAD { &[EMBED, LM_HEAD] } else { &[name] };
        for name in tied {
            let tensor = self.tensors.get_mut(*name).unwrap();
            tensor.values[i] = round(tensor.segments[0].dtype, value);
            self.store(name, i);
        }
    }

    /// Holds the manifest's lock while `change` changes weights, as engines do.
    pub fn step<T>(&mut self, change: impl FnOnce(&mut Engine) -> T) -> T {
        let lock = self.lock_file();
        flock(&lock, FlockOperation::LockExclusive).unwrap();
        let result = change(self);
        flock(&lock, FlockOperation::Unlock).unwrap();
        result
    }

    pub fn lock_file(&self) -> File {
        File::open(&self.manifest).unwrap()
    }

    /// One step that gives every live value another one.
    pub fn change_all(&mut self, seed: u64) {
        self.step(|e| {
            for name in e.names() {
                for i in 0..e.tensors[&name].values.len() {
                    // Eighths up to 16: exact in every type there is. Off the old value whatever that was.
                    let old = e.value(&name, i);
                    let new = (mixed_eighth(seed, i) + 0.125 * f32::from(name.len() as u8 % 8)).min(16.0);
                    e.set(&name, i, if new == old { -17.0 } else { new });
                }
            }
        });
    }

    /// One step after which every live value is `number` (below 256, exact in every type). As in a trainer, the values
    /// are found without the lock, which is then held while they are written.
    pub fn fill(&mut self, number: u8) {
        let steps = self.filling(number);
        self.step(|e| e.write(&steps));
    }

    /// What has to be written for `fill`: memory, byte, bytes. In no order that a reader would guess.
    pub fn filling(&mut self, number: u8) -> Vec<(usize, usize, Vec<u8>)> {
        let mut writes = Vec::new();
        for (name, tensor) in &mut self.tensors {
            tensor.values.fill(f32::from(number));
            for s in tensor.segments.iter().filter(|_| name != LM_HEAD) {
                let run = encode(s.dtype, f32::from(number)).repeat(s.shape.iter().product());
                let pieces = run.chunks(8192).enumerate();
                writes.extend(pieces.map(|(i, piece)| (s.memory, s.offset + i * 8192, piece.to_vec())));
            }
        }
        writes.sort_by_key(|w| super::mixed(3, (w.0 + w.1) as u64));
        writes
    }

    /// Writes what `filling` found.
    pub fn write(&mut self, writes: &[(usize, usize, Vec<u8>)]) {
        for (memory, at, bytes) in writes {
            // SAFETY: the layouts of `plan` lie inside their memories, those segments without holes.
            unsafe {
                let to = self.memories[*memory].map.as_mut_ptr().add(*at);
                std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
            }
            std::thread::yield_now();
        }
    }

    /// What the weights files should show, given what they hold on disk.
    pub fn expected(&self, model: &Model) -> Vec<Vec<u8>> {
        self.over(model.disk())
    }

    /// The same over other bytes of the files.
    pub fn over(&self, mut shards: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
        for shard in &mut shards {
            let (header, metadata) = SafeTensors::read_metadata(shard).unwrap();
            for (name, info) in metadata.tensors() {
                let Some(tensor) = self.tensors.get(&name) else { continue };
                let (start, end) = info.data_offsets;
                let bytes = &mut shard[8 + header + start..8 + header + end];
                let live = tensor.segments[0].dtype;
                let on_disk: Vec<f32> = decode(tensor.dtype, bytes).collect();
                let size = bytes.len() / on_disk.len();
                for (i, place) in bytes.chunks_mut(size).enumerate() {
                    // A value that is what the disk's rounds to is left as the disk has it.
                    if round(live, on_disk[i]) != tensor.values[i] {
                        place.copy_from_slice(&encode(tensor.dtype, tensor.values[i]));
                    }
                }
            }
        }
        shards
    }

    /// Reads every value back from memory: what a rollback wrote there.
    pub fn reload(&mut self) {
        for name in self.names() {
            for i in 0..self.tensors[&name].values.len() {
                let (memory, at, dtype) = self.place(&name, i);
                let size = encode(dtype, 0.0).len();
                let mut bytes = vec![0; size];
                // SAFETY: the layouts of `plan` lie inside their memories; bytes have no alignment.
                unsafe {
                    let from = self.memories[memory].map.as_ptr().add(at);
                    std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), size);
                }
                let value = decode(dtype, &bytes).next().unwrap();
                self.tensors.get_mut(&name).unwrap().values[i] = value;
            }
        }
    }

    /// Ends the engine's process as a crash would.
    pub fn kill(&mut self) {
        let mut process = self.process.take().expect("this engine has a process of its own");
        process.kill().unwrap();
        process.wait().unwrap();
    }

    /// Where element `i` of a tensor is: memory, byte, dtype.
    fn place(&self, name: &str, i: usize) -> (usize, usize, Dtype) {
        let tensor = &self.tensors[name];
        let mut index = vec![0; tensor.shape.len()];
        let mut rest = i;
        for d in (0..index.len()).rev() {
            index[d] = rest % tensor.shape[d];
            rest /= tensor.shape[d];
        }
        let inside = |s: &&Segment| (0..index.len()).all(|d| (s.at[d]..s.at[d] + s.shape[d]).contains(&index[d]));
        let s = tensor.segments.iter().find(inside).unwrap();
        let element: usize = (0..index.len()).map(|d| (index[d] - s.at[d]) * s.strides[d]).sum();
        (s.memory, s.offset + element * encode(s.dtype, 0.0).len(), s.dtype)
    }

    fn store(&self, name: &str, i: usize) {
        let (memory, at, dtype) = self.place(name, i);
        let bytes = encode(dtype, self.tensors[name].values[i]);
        // SAFETY: the layouts of `plan` lie inside their memories; bytes have no alignment.
        unsafe {
            let to = self.memories[memory].map.as_mut_ptr().add(at);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

impl Memory {
    fn new(bytes: usize) -> Memory {
        let file = tempfile::Builder::new().prefix("weightfs-test-").tempfile_in("/dev/shm").unwrap();
        file.as_file().set_len(bytes as u64).unwrap();
        let map = MmapRaw::map_raw(file.as_file()).unwrap();
        Memory { file, map }
    }
}

/// Writes a manifest as engines do: whole under another name, mode 0600, then renamed.
pub fn publish(path: &Path, manifest: &serde_json::Value) {
    let draft = path.with_extension("draft");
    let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&draft).unwrap();
    std::io::Write::write_all(&mut file, manifest.to_string().as_bytes()).unwrap();
    std::fs::rename(&draft, path).unwrap();
}

/// Field 22 of `/proc/PID/stat`.
pub fn start_time(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    stat.rsplit_once(')').unwrap().1.split_whitespace().nth(19).unwrap().parse().unwrap()
}

/// Sizes of the memories, and every live tensor's place in them.
fn plan(model: &Model) -> (Vec<usize>, BTreeMap<String, Tensor>) {
    let rows = model.spec(EMBED).shape[0];
    let mut sizes = vec![0, 64];
    let mut take = |memory: usize, bytes: usize| {
        let offset = sizes[memory];
        sizes[memory] = (offset + bytes).next_multiple_of(256);
        offset
    };
    // Vocabulary rows padded to a multiple of 64: nobody names the rest.
    let embed = take(0, rows.next_multiple_of(64) * 64 * 2);
    let qkv = take(0, 128 * 64 * 2);
    let halves = [take(0, 64 * 64 * 2), take(1, 64 * 64 * 2)];
    let experts = take(1, 4 * 32 * 48 * 2);
    let a_log = take(0, 300 * 4);
    let norm = take(1, 1500 * 2);
    let segment = |memory, offset, at: &[usize], shape: &[usize], strides: &[usize], dtype| Segment {
        memory,
        offset,
        at: at.to_vec(),
        shape: shape.to_vec(),
        strides: strides.to_vec(),
        dtype,
    };
    let b = Dtype::BF16;
    let live = [
        (EMBED, vec![segment(0, embed, &[0, 0], &[rows, 64], &[64, 1], b)]),
        (LM_HEAD, vec![segment(0, embed, &[0, 0], &[rows, 64], &[64, 1], b)]),
        (Q, vec![segment(0, qkv, &[0, 0], &[64, 64], &[64, 1], b)]),
        (K, vec![segment(0, qkv + 64 * 128, &[0, 0], &[32, 64], &[64, 1], b)]),
        (V, vec![segment(0, qkv + 96 * 128, &[0, 0], &[32, 64], &[64, 1], b)]),
        (
            O,
            vec![
                segment(0, halves[0], &[0, 0], &[64, 64], &[64, 1], b),
                segment(1, halves[1], &[0, 64], &[64, 64], &[64, 1], b),
            ],
        ),
        (EXPERTS, vec![segment(1, experts, &[0, 0, 0], &[4, 32, 48], &[32 * 48, 1, 32], Dtype::F16)]),
        (A_LOG, vec![segment(0, a_log, &[0], &[300], &[1], Dtype::F32)]),
        (NORM, vec![segment(1, norm, &[0], &[1500], &[1], b)]),
    ];
    let tensor = |(name, segments): (&str, _)| {
        let spec = model.spec(name);
        (name.to_string(), Tensor { dtype: spec.dtype, shape: spec.shape.clone(), segments, values: Vec::new() })
    };
    let tensors = live.into_iter().map(tensor).collect();
    (sizes, tensors)
}

fn mixed_eighth(seed: u64, i: usize) -> f32 {
    (super::mixed(seed, i as u64) % 255) as f32 / 8.0 - 16.0
}

fn encode(dtype: Dtype, value: f32) -> Vec<u8> {
    match dtype {
        Dtype::BF16 => bf16::from_f32(value).to_le_bytes().to_vec(),
        Dtype::F16 => f16::from_f32(value).to_le_bytes().to_vec(),
        Dtype::F32 => value.to_le_bytes().to_vec(),
        other => panic!("no live tensor of these tests is {other:?}"),
    }
}

pub fn decode(dtype: Dtype, bytes: &[u8]) -> Box<dyn Iterator<Item = f32> + '_> {
    let two = |b: &[u8]| [b[0], b[1]];
    match dtype {
        Dtype::BF16 => Box::new(bytes.chunks(2).map(move |b| bf16::from_le_bytes(two(b)).to_f32())),
        Dtype::F16 => Box::new(bytes.chunks(2).map(move |b| f16::from_le_bytes(two(b)).to_f32())),
        Dtype::F32 => Box::new(bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()))),
        other => panic!("no live tensor of these tests is {other:?}"),
    }
}

/// The value as that type can hold it.
fn round(dtype: Dtype, value: f32) -> f32 {
    match dtype {
        Dtype::BF16 => bf16::from_f32(value).to_f32(),
        Dtype::F16 => f16::from_f32(value).to_f32(),
        _ => value,
    }
}
