//! Where the live weights are: an engine's manifests, or a model that weightfs loaded into memory of its own.
//!
//! A [`Source`] is the checked result: memories that are mapped, and for every tensor the segments of those memories
//! that hold it. What cannot be trusted (paths, offsets, shapes, who wrote the manifest) has been checked by then.

mod boundary;
mod cover;
mod engine;
mod manifest;
mod own;

pub use boundary::{Boundary, HoldGuard, StepGuard};
pub use engine::Engine;
pub use manifest::Manifest;
pub use own::{OwnWeights, load_own};

use crate::memory::{HostMemory, Memory, MemoryError};
use crate::model::{Dtype, ModelDirectory, bytes_of, element_bytes, is_castable};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Why the live weights cannot be used. Each says what to do.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error("{path}: {source}")]
    Io {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{path} is not a usable manifest: {why}")]
    BadManifest { path: PathBuf, why: String },
    #[error("{path} is not to be trusted: {why}")]
    Untrusted { path: PathBuf, why: String },
    #[error("the engine of {path} is gone: {why}; start it again and use its new manifest")]
    EngineGone { path: PathBuf, why: String },
    #[error("tensor '{tensor}' does not fit the model directory: {why} (`weightfs diagnose` lists every tensor)")]
    Mismatch { tensor: String, why: String },
    #[error("{path} needs CUDA ({what}), which this version of weightfs cannot open yet")]
    NeedsCuda { path: PathBuf, what: String },
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error("memory for the weights ({bytes} bytes) could not be had: {source}")]
    NoMemory {
        bytes: u64,
        #[source]
        source: std::io::Error,
    },
    #[error(transparent)]
    Model(#[from] crate::model::ModelError),
}

/// A strided box of one tensor inside a memory. Everything is in range: boxes inside the tensor, elements inside the
/// memory, no two elements of one segment in the same place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Index into [`Source::memories`].
    pub memory: usize,
    /// Bytes from the start of that memory to the box's first element.
    pub offset: u64,
    /// Where the box starts in the tensor, one index a dimension.
    pub at: Vec<u64>,
    pub shape: Vec<u64>,
    /// In elements.
    pub strides: Vec<u64>,
    /// What the engine keeps, which may differ from the file's dtype among the float types.
    pub dtype: Dtype,
    /// A copy of a box that another rank holds as well: written, never read.
    pub replica: bool,
}

/// Why a tensor of the directory is or is not served from live memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    Live(Vec<Segment>),
    /// The engine has it in a form that is not the checkpoint's; served from disk, never written.
    Opaque(String),
    /// The engine does not hold it; served from disk.
    OnlyOnDisk,
}

/// Live weights, matched to a model directory.
#[derive(Debug)]
pub struct Source {
    pub memories: Vec<Arc<dyn Memory>>,
    /// One entry for every tensor on disk.
    pub places: HashMap<String, Place>,
    /// Tensors that manifests name and the directory does not have.
    pub only_live: Vec<String>,
    /// The processes that own the memories; empty for weights of our own.
    pub engines: Vec<Engine>,
    pub boundary: Arc<Boundary>,
}

impl Source {
    /// Weights of our own: nobody else writes them.
    pub fn is_own(&self) -> bool {
        self.engines.is_empty()
    }

    /// Is everything still there? `Err` says what is not.
    pub fn check(&self) -> Result<(), String> {
        for engine in &self.engines {
            engine.check()?;
        }
        for memory in &self.memories {
            memory.check().map_err(|e| e.to_string())?;
        }
        Ok(())
    }

    pub fn live_bytes(&self) -> u64 {
        self.memories.iter().map(|m| m.bytes()).sum()
    }

    /// Reads the manifests of all ranks, maps their memories and matches their tensors to `directory`.
    /// Fails at the first tensor that does not fit; [`diagnose`] lists them all.
    pub fn from_manifests(
        directory: &ModelDirectory,
        paths: &[PathBuf],
        writable: bool,
    ) -> Result<Source, SourceError> {
        let manifests = read_all(paths)?;
        let matched = matching(directory, &manifests);
        if let Some((tensor, why)) = matched.wrong.into_iter().next() {
            return Err(SourceError::Mismatch { tensor, why });
        }
        if !matched.places.values().any(|p| matches!(p, Place::Live(_))) {
            let why = format!(
                "none of its {} tensors is in {}: is it another model's?",
                manifests[0].tensors.len(),
                directory.path.display()
            );
            return Err(SourceError::BadManifest { path: paths[0].clone(), why });
        }
        let mut memories: Vec<Arc<dyn Memory>> = Vec::new();
        for manifest in &manifests {
            for memory in &manifest.memories {
                memories.push(Arc::new(memory.map(manifest, writable)?) as Arc<dyn Memory>);
            }
        }
        let (engines, locks) = manifests.into_iter().map(|m| (m.engine, m.file)).unzip();
        let boundary = Arc::new(Boundary::new(locks));
        Ok(Source { memories, places: matched.places, only_live: matched.only_live, engines, boundary })
    }
}

/// What `weightfs diagnose` shows: every tensor in one of five classes.
#[derive(Debug, Default, serde::Serialize)]
pub struct Diagnosis {
    pub matched: Vec<String>,
    pub only_live: Vec<String>,
    pub only_on_disk: Vec<String>,
    /// Name and what is wrong: shape, dtype, a segment outside its memory, a box missing or twice.
    pub wrong: Vec<(String, String)>,
    /// Name and the engine's reason.
    pub opaque: Vec<(String, String)>,
}

/// Compares manifests with a directory without mapping anything.
pub fn diagnose(directory: &ModelDirectory, paths: &[PathBuf]) -> Result<Diagnosis, SourceError> {
    let manifests = read_all(paths)?;
    let matched = matching(directory, &manifests);
    let mut diagnosis = Diagnosis { only_live: matched.only_live, wrong: matched.wrong, ..Diagnosis::default() };
    for (name, place) in matched.places {
        match place {
            Place::Live(_) => diagnosis.matched.push(name),
            Place::Opaque(reason) => diagnosis.opaque.push((name, reason)),
            Place::OnlyOnDisk => diagnosis.only_on_disk.push(name),
        }
    }
    diagnosis.matched.sort();
    diagnosis.only_on_disk.sort();
    diagnosis.opaque.sort();
    Ok(diagnosis)
}

/// Opens every manifest and checks them against each other: one manifest for each rank, no more.
fn read_all(paths: &[PathBuf]) -> Result<Vec<Manifest>, SourceError> {
    let manifests = paths.iter().map(|p| Manifest::read(p)).collect::<Result<Vec<_>, _>>()?;
    let world = manifests[0].world_size;
    let mut seen = BTreeMap::new();
    for manifest in &manifests {
        let bad = |why: String| SourceError::BadManifest { path: manifest.path.clone(), why };
        if manifest.world_size != world {
            return Err(bad(format!("it is one of {} ranks, the first manifest one of {world}", manifest.world_size)));
        }
        if let Some(first) = seen.insert(manifest.rank, &manifest.path) {
            return Err(bad(format!(
                "it is rank {} as {} is: one manifest a rank",
                manifest.rank,
                Path::display(first)
            )));
        }
    }
    // A rank left out would keep old values of every tensor that is replicated on all ranks.
    if let Some(missing) = (0..world).find(|rank| !seen.contains_key(rank)) {
        let why = format!("rank {missing} of {world} is missing: pass the manifests of all ranks");
        return Err(SourceError::BadManifest { path: paths[0].clone(), why });
    }
    Ok(manifests)
}

struct Matched {
    places: HashMap<String, Place>,
    only_live: Vec<String>,
    wrong: Vec<(String, String)>,
}

fn matching(directory: &ModelDirectory, manifests: &[Manifest]) -> Matched {
    let mut matched = Matched { places: HashMap::new(), only_live: Vec::new(), wrong: Vec::new() };
    for (_, tensor) in directory.tensors() {
        let place = match live_segments(tensor, manifests) {
            Ok(segments) if segments.is_empty() && tensor.elements() == 0 => Place::OnlyOnDisk,
            Ok(segments) if segments.is_empty() => match manifests.iter().find_map(|m| m.opaque.get(&tensor.name)) {
                Some(reason) => Place::Opaque(reason.clone()),
                None => Place::OnlyOnDisk,
            },
            Ok(segments) => Place::Live(segments),
            Err(why) => {
                matched.wrong.push((tensor.name.clone(), why));
                continue;
            }
        };
        matched.places.insert(tensor.name.clone(), place);
    }
    let on_disk: std::collections::HashSet<&str> = directory.tensors().map(|(_, t)| t.name.as_str()).collect();
    let live = manifests.iter().flat_map(|m| m.tensors.keys());
    matched.only_live = live.filter(|n| !on_disk.contains(n.as_str())).cloned().collect();
    matched.only_live.sort();
    matched.only_live.dedup();
    matched.wrong.sort();
    matched
}

/// The checked segments of one tensor over all ranks, or what is wrong with them. Empty: no manifest has it.
fn live_segments(tensor: &crate::model::TensorEntry, manifests: &[Manifest]) -> Result<Vec<Segment>, String> {
    let mut segments = Vec::new();
    let (mut first_memory, mut named) = (0, false);
    for (rank, manifest) in manifests.iter().enumerate() {
        if let Some(entry) = manifest.tensors.get(&tensor.name) {
            named = true;
            if entry.shape != tensor.shape {
                return Err(format!("its shape is {:?} live and {:?} on disk", entry.shape, tensor.shape));
            }
            if entry.dtype != tensor.dtype {
                return Err(format!("its dtype is {:?} in the manifest and {:?} on disk", entry.dtype, tensor.dtype));
            }
            for segment in &entry.segments {
                let mut segment = segment.clone();
                check_segment(&segment, tensor, manifest)?;
                segment.memory += first_memory;
                segments.push((rank, segment));
            }
        }
        first_memory += manifest.memories.len();
    }
    if !named {
        return Ok(Vec::new());
    }
    cover::check(&tensor.shape, segments)
}

fn check_segment(s: &Segment, tensor: &crate::model::TensorEntry, manifest: &Manifest) -> Result<(), String> {
    let rank = tensor.shape.len();
    if s.at.len() != rank || s.shape.len() != rank || s.strides.len() != rank {
        return Err(format!(
            "a segment has {}, {} and {} values in at, shape and strides; the tensor has {rank} dimensions",
            s.at.len(),
            s.shape.len(),
            s.strides.len()
        ));
    }
    for d in 0..rank {
        if s.at[d].checked_add(s.shape[d]).is_none_or(|end| end > tensor.shape[d]) {
            return Err(format!(
                "a segment at {:?} of shape {:?} lies outside the tensor's shape {:?}",
                s.at, s.shape, tensor.shape
            ));
        }
    }
    if s.shape.contains(&0) {
        return Err(format!("a segment of shape {:?} holds nothing", s.shape));
    }
    if s.dtype != tensor.dtype && !(is_castable(s.dtype) && is_castable(tensor.dtype)) {
        return Err(format!("a segment holds {:?}, which is not cast to the file's {:?}", s.dtype, tensor.dtype));
    }
    let Some(memory) = manifest.memories.get(s.memory) else {
        return Err(format!("a segment names memory {}, but the manifest has {}", s.memory, manifest.memories.len()));
    };
    let outside =
        || format!("a segment at byte {} of memory {} lies outside its {} bytes", s.offset, s.memory, memory.bytes());
    let Some(element) = element_bytes(s.dtype) else {
        // Types smaller than a byte: only as a whole tensor in one piece, which is copied as bytes.
        let whole = s.shape == tensor.shape && s.strides == row_major(&s.shape);
        let bytes = bytes_of(s.dtype, tensor.elements()).ok_or_else(outside)?;
        return match whole {
            false => Err(format!("a segment of {:?} must hold the whole tensor, packed", s.dtype)),
            true if s.offset.checked_add(bytes).is_none_or(|e| e > memory.bytes()) => Err(outside()),
            true => Ok(()),
        };
    };
    let last =
        s.shape.iter().zip(&s.strides).try_fold(0u64, |n, (&d, &stride)| n.checked_add((d - 1).checked_mul(stride)?));
    let end = last.and_then(|n| n.checked_add(1)?.checked_mul(element as u64)?.checked_add(s.offset));
    if end.is_none_or(|e| e > memory.bytes()) {
        return Err(outside());
    }
    // Sorted by stride, each dimension must step over the whole extent of the smaller ones: then no two elements share
    // a place, and writing one never changes another.
    let mut dims: Vec<(u64, u64)> =
        s.shape.iter().zip(&s.strides).filter(|&(&d, _)| d > 1).map(|(&d, &st)| (st, d)).collect();
    dims.sort_unstable();
    let mut extent = 0u64;
    for (stride, size) in dims {
        if stride <= extent {
            return Err(format!(
                "a segment of shape {:?} with strides {:?} puts several elements in one place",
                s.shape, s.strides
            ));
        }
        extent += (size - 1) * stride;
    }
    Ok(())
}

/// Row-major strides of `shape`, in elements.
pub fn row_major(shape: &[u64]) -> Vec<u64> {
    let mut strides = vec![1u64; shape.len()];
    for d in (0..shape.len().saturating_sub(1)).rev() {
        strides[d] = strides[d + 1].saturating_mul(shape[d + 1].max(1));
    }
    strides
}

fn map_file(path: &Path, bytes: u64, owner: Option<u32>, writable: bool) -> Result<HostMemory, SourceError> {
    use rustix::fs::{Mode, OFlags};
    use std::os::unix::fs::MetadataExt;
    let io = |source| SourceError::Io { path: path.to_path_buf(), source };
    let access = if writable { OFlags::RDWR } else { OFlags::RDONLY };
    // NOFOLLOW: a manifest names the file itself. NONBLOCK: a FIFO must not hold us up before we see what it is.
    let flags = access | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let follow = path.starts_with("/proc"); // /proc/PID/fd/N is a magic link to a memfd
    let flags = if follow { flags } else { flags | OFlags::NOFOLLOW };
    let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(|e| io(e.into()))?;
    let file = std::fs::File::from(fd);
    let metadata = file.metadata().map_err(io)?;
    if !metadata.is_file() {
        return Err(SourceError::Untrusted { path: path.to_path_buf(), why: "it is not a regular file".into() });
    }
    if owner.is_some_and(|owner| owner != metadata.uid()) {
        let why = "the manifest that names it was written by another user than the one who owns it".to_string();
        return Err(SourceError::Untrusted { path: path.to_path_buf(), why });
    }
    let what = format!("engine memory {}", path.display());
    HostMemory::shared(file, bytes, &what, writable).map_err(io)
}
