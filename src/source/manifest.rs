//! The manifest: the JSON file in which an engine says where its weights are (`docs/manifest.md`).

use super::device_memory::open_ipc;
use super::shared_file::map_file;
use super::{Engine, Segment, SourceError, handles};
use crate::memory::cuda::IpcHandle;
use crate::memory::{Memory, process_owner};
use crate::model::{Dtype, ModelDirectory, parse_dtype};
use serde::Deserialize;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A manifest is tens of bytes a segment; vLLM's largest models stay under 100 MB.
const MAX_BYTES: u64 = 1 << 30;
/// More pieces of one tensor than any engine makes (experts times ranks); bounds the work of checking them.
const MAX_SEGMENTS: usize = 16384;

/// A manifest whose JSON was read and whose author was checked. Segments are checked against a model directory later.
#[derive(Debug)]
pub struct Manifest {
    pub path: PathBuf,
    /// Kept open: writers lock it while they change weights.
    pub file: Arc<File>,
    pub engine: Engine,
    pub rank: u32,
    pub world_size: u32,
    pub memories: Vec<MemoryEntry>,
    pub tensors: HashMap<String, TensorMap>,
    pub opaque: HashMap<String, String>,
    /// Tensors that whoever made this out of something else could not place, and why.
    pub(super) wrong: HashMap<String, String>,
    /// Set when another user wrote it: its memory files must be that user's own.
    foreign_owner: Option<u32>,
}

#[derive(Debug, Clone)]
pub enum MemoryEntry {
    File { path: PathBuf, bytes: u64 },
    CudaIpc { device: CudaDevice, handle: IpcHandle, bytes: u64 },
}

/// Which GPU a memory is on.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum CudaDevice {
    /// `GPU-` and a UUID, as `nvidia-smi -L` shows it.
    Uuid(String),
    /// The engine's own number for it, which another CUDA_VISIBLE_DEVICES may have given another GPU. A handle opens on its
    /// own GPU alone, so that the right one is found by trying, this one first.
    Ordinal(u32),
}

#[derive(Debug, Clone)]
pub struct TensorMap {
    pub dtype: Dtype,
    pub shape: Vec<u64>,
    pub segments: Vec<Segment>,
}

impl MemoryEntry {
    pub fn bytes(&self) -> u64 {
        match self {
            MemoryEntry::File { bytes, .. } | MemoryEntry::CudaIpc { bytes, .. } => *bytes,
        }
    }

    /// `number`: of this memory in its manifest, for messages.
    pub fn map(&self, manifest: &Manifest, number: usize, writable: bool) -> Result<Arc<dyn Memory>, SourceError> {
        Ok(match self {
            MemoryEntry::File { path, bytes } => Arc::new(map_file(path, *bytes, manifest.foreign_owner, writable)?),
            MemoryEntry::CudaIpc { device, handle, bytes } => {
                Arc::new(open_ipc(&manifest.path, number, device, handle, *bytes, writable)?)
            }
        })
    }
}

#[derive(Deserialize)]
struct Json {
    weightfs: u32,
    #[serde(default)]
    engine: EngineJson,
    memories: Vec<MemoryJson>,
    tensors: BTreeMap<String, TensorJson>,
    #[serde(default)]
    opaque: HashMap<String, String>,
    /// Why the engine shares nothing, and what to do.
    refused: Option<String>,
}

#[derive(Deserialize, Default)]
struct EngineJson {
    #[serde(default)]
    name: String,
    #[serde(default)]
    version: String,
    pid: Option<u32>,
    /// Clock ticks since boot, as in `/proc/PID/stat`: tells a reused pid.
    start_time: Option<u64>,
    #[serde(default)]
    rank: u32,
    world_size: Option<u32>,
}

#[derive(Deserialize)]
#[serde(tag = "kind")]
enum MemoryJson {
    #[serde(rename = "file")]
    File { path: PathBuf, bytes: u64 },
    #[serde(rename = "cuda-ipc")]
    CudaIpc { device: String, handle: String, bytes: u64 },
}

#[derive(Deserialize)]
struct TensorJson {
    dtype: String,
    shape: Vec<u64>,
    segments: Vec<SegmentJson>,
}

#[derive(Deserialize)]
struct SegmentJson {
    memory: usize,
    offset: u64,
    at: Vec<u64>,
    shape: Vec<u64>,
    strides: Vec<u64>,
    dtype: String,
}

impl Manifest {
    /// Reads a manifest, or a file of torch handles, which only makes sense beside the model directory it belongs to.
    pub fn read(path: &Path, directory: &ModelDirectory) -> Result<Manifest, SourceError> {
        let io = |source| SourceError::Io { path: path.to_path_buf(), source };
        let bad = |why: String| SourceError::BadManifest { path: path.to_path_buf(), why };
        let (file, metadata) = open(path)?;
        let foreign_owner = trust(path, &metadata)?;
        let mut text = Vec::new();
        std::io::Read::read_to_end(&mut &file, &mut text).map_err(io)?;
        if handles::is_handle_file(&text) {
            return Manifest::from_handles(path, file, &metadata, &text, directory, foreign_owner);
        }
        let json: Json = serde_json::from_slice(&text).map_err(|e| bad(e.to_string()))?;
        if json.weightfs != 1 {
            return Err(bad(format!("it is of version {}, this weightfs reads version 1", json.weightfs)));
        }
        if let Some(why) = json.refused {
            return Err(SourceError::Refused { path: path.to_path_buf(), why });
        }
        let world_size = json.engine.world_size.unwrap_or(1);
        if json.engine.rank >= world_size {
            return Err(bad(format!("rank {} is not one of {world_size}", json.engine.rank)));
        }
        let memories = json.memories.into_iter().map(|m| match m {
            MemoryJson::File { path, bytes } => Ok(MemoryEntry::File { path, bytes }),
            MemoryJson::CudaIpc { device, handle, bytes } => {
                let not = || bad(format!("a CUDA IPC handle is 128 hexadecimal digits, which '{handle:.20}' is not"));
                let handle = IpcHandle::parse(&handle).ok_or_else(not)?;
                Ok(MemoryEntry::CudaIpc { device: CudaDevice::Uuid(device), handle, bytes })
            }
        });
        let tensors = json.tensors.into_iter().map(|(name, t)| {
            let tensor = tensor_map(t).map_err(|why| bad(format!("tensor '{name}': {why}")))?;
            Ok((name, tensor))
        });
        let EngineJson { name, version, pid, start_time, rank, .. } = json.engine;
        let engine = Engine::find(format!("{name} {version}").trim().to_string(), path, rank, pid, start_time)
            .map_err(|why| SourceError::EngineGone { path: path.to_path_buf(), why })?;
        trust_process(path, foreign_owner, pid)?;
        Ok(Manifest {
            path: path.to_path_buf(),
            engine,
            rank,
            world_size,
            memories: memories.collect::<Result<_, SourceError>>()?,
            tensors: tensors.collect::<Result<_, SourceError>>()?,
            opaque: json.opaque,
            wrong: HashMap::new(),
            foreign_owner,
            file: Arc::new(file),
        })
    }

    fn from_handles(
        path: &Path,
        file: File,
        metadata: &std::fs::Metadata,
        bytes: &[u8],
        directory: &ModelDirectory,
        foreign_owner: Option<u32>,
    ) -> Result<Manifest, SourceError> {
        let bad = |why: String| SourceError::BadHandles { path: path.to_path_buf(), why };
        let live = handles::read(bytes).map_err(bad)?;
        let layout = handles::place(directory, &live).map_err(bad)?;
        let gone = |why: String| SourceError::EngineGone { path: path.to_path_buf(), why };
        let start_time = match live.pid {
            Some(pid) => handles::started_before(pid, metadata).map_err(gone)?,
            None => None,
        };
        let engine = Engine::find("torch handles".into(), path, 0, live.pid, start_time).map_err(gone)?;
        trust_process(path, foreign_owner, live.pid)?;
        let entry =
            |m: handles::LiveMemory| MemoryEntry::CudaIpc { device: m.device, handle: m.handle, bytes: m.bytes };
        Ok(Manifest {
            path: path.to_path_buf(),
            file: Arc::new(file),
            engine,
            rank: 0,
            world_size: 1,
            memories: live.memories.into_iter().map(entry).collect(),
            tensors: layout.tensors,
            opaque: layout.opaque,
            wrong: layout.wrong,
            foreign_owner,
        })
    }
}

/// Opens what may be a manifest, and looks at what it is before a byte is read.
pub(super) fn open(path: &Path) -> Result<(File, std::fs::Metadata), SourceError> {
    let io = |source| SourceError::Io { path: path.to_path_buf(), source };
    let bad = |why: String| SourceError::BadManifest { path: path.to_path_buf(), why };
    // Never waits for the other end of a pipe.
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = File::options().read(true).custom_flags(flags).open(path).map_err(io)?;
    let metadata = file.metadata().map_err(io)?;
    if !metadata.is_file() {
        return Err(bad("it is not a regular file".into()));
    }
    if metadata.len() > MAX_BYTES {
        return Err(bad(format!("it has {} bytes, over the limit of {MAX_BYTES}", metadata.len())));
    }
    Ok((file, metadata))
}

fn tensor_map(json: TensorJson) -> Result<TensorMap, String> {
    let dtype = |name: &str| parse_dtype(name).ok_or_else(|| format!("unknown dtype '{name}'"));
    if json.segments.len() > MAX_SEGMENTS {
        return Err(format!("{} segments, over the limit of {MAX_SEGMENTS}", json.segments.len()));
    }
    let segments = json.segments.into_iter().map(|s| {
        let dtype = dtype(&s.dtype)?;
        Ok(Segment {
            memory: s.memory,
            offset: s.offset,
            at: s.at,
            shape: s.shape,
            strides: s.strides,
            dtype,
            replica: false,
        })
    });
    Ok(TensorMap { dtype: dtype(&json.dtype)?, shape: json.shape, segments: segments.collect::<Result<_, String>>()? })
}

/// A manifest tells us which files to write: it must come from us, from root, or (when we are root) from a user who
/// then may only name files of their own, and nobody else may have been able to edit it.
pub(super) fn trust(path: &Path, metadata: &std::fs::Metadata) -> Result<Option<u32>, SourceError> {
    let untrusted = |why: String| SourceError::Untrusted { path: path.to_path_buf(), why };
    if metadata.mode() & 0o022 != 0 {
        return Err(untrusted(format!("others may write it (mode {:o}): chmod 600 it", metadata.mode() & 0o777)));
    }
    let (owner, me) = (metadata.uid(), rustix::process::geteuid().as_raw());
    if owner == me || owner == 0 {
        return Ok(None);
    }
    if me != 0 {
        return Err(untrusted(format!("user {owner} wrote it, and you are user {me}")));
    }
    Ok(Some(owner))
}

/// Another user speaks for processes of their own only: what we take a process for decides what is done with its memory
/// and its libraries.
fn trust_process(path: &Path, foreign_owner: Option<u32>, pid: Option<u32>) -> Result<(), SourceError> {
    let (Some(owner), Some(pid)) = (foreign_owner, pid) else { return Ok(()) };
    // One that has ended since is noticed as every other that does.
    match process_owner(pid).map(|p| p.uids[1]) {
        Some(its) if its != owner => {
            let why = format!("user {owner} wrote it, and process {pid}, which it names, is another user's");
            Err(SourceError::Untrusted { path: path.to_path_buf(), why })
        }
        _ => Ok(()),
    }
}
