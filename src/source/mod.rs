//! Where the live weights are: an engine's manifests, or a model that weightfs loaded into memory of its own.
//!
//! A [`Source`] is the checked result: memories that are mapped, and for every tensor the segments of those memories
//! that hold it. What cannot be trusted (paths, offsets, shapes, who wrote the manifest) has been checked by then.

mod boundary;
mod cover;
mod device_memory;
mod discover;
mod engine;
mod engine_http;
mod handles;
mod manifest;
mod matching;
mod own;
mod shared_file;
mod updates;

pub use boundary::{Boundary, HoldGuard, StepGuard};
pub use discover::{ENGINES, directories as manifest_directories, discover};
pub use engine::{Engine, ManifestId};
pub use engine_http::{EngineHttpError, EngineSync, Options as EngineHttpOptions, Pause, Synced, When};
pub use manifest::{CudaDevice, Manifest, MemoryEntry, TensorMap};
pub use matching::{Diagnosis, diagnose};
pub use own::{OwnWeights, load_own};
pub use updates::Updates;

use crate::memory::cuda::CudaError;
use crate::memory::{Accelerator, Memory, MemoryError};
use crate::model::{Dtype, ModelDirectory};
use matching::{matching, read_all};
use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
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
    #[error("{path} is not a usable handle file: {why}")]
    BadHandles { path: PathBuf, why: String },
    #[error("{path} is not to be trusted: {why}")]
    Untrusted { path: PathBuf, why: String },
    #[error("the engine of {path} is gone: {why}; start it again and use its new manifest")]
    EngineGone { path: PathBuf, why: String },
    #[error("the engine of {path} does not share its weights: {why}")]
    Refused { path: PathBuf, why: String },
    #[error(
        "no {engine} that serves {model} has left a manifest in {looked}{serving}: start it with its plugin (docs/vllm.md), \
         or name the manifest"
    )]
    NoEngine { engine: String, model: PathBuf, looked: String, serving: String },
    #[error(
        "several {engine} serve {model}, {list}: name one of them by its manifests, --weights MANIFEST for each of its ranks"
    )]
    SeveralEngines { engine: String, model: PathBuf, list: String },
    #[error("tensor '{tensor}' does not fit the model directory: {why} (`weightfs diagnose` lists every tensor)")]
    Mismatch { tensor: String, why: String },
    #[error("{path} names memory of a GPU: {why}")]
    NoCuda { path: PathBuf, why: String },
    #[error("memory {number} of {path} cannot be opened: {why}")]
    CudaMemory { path: PathBuf, number: usize, why: String },
    #[error("the weights cannot be loaded to the GPU: {0}")]
    Device(#[from] CudaError),
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
    /// Whether an update of them was cut.
    pub updates: Updates,
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
        // That an engine has freed memory of a GPU cannot be seen; that it takes back what it said of it can.
        if self.memories.iter().any(|m| m.device().is_some()) {
            for (engine, manifest) in self.engines.iter().zip(self.boundary.manifests()) {
                if manifest.metadata().is_ok_and(|m| m.nlink() == 0) {
                    return Err(format!("the engine took its manifest {} back", engine.manifest.display()));
                }
            }
        }
        Ok(())
    }

    /// Of the manifests as they were opened, one a rank.
    pub fn manifest_ids(&self) -> Vec<ManifestId> {
        let metadata = self.boundary.manifests().iter().filter_map(|file| file.metadata().ok());
        metadata.map(|m| ManifestId::of(&m)).collect()
    }

    /// Lets go of the memories of engines that have ended, so that theirs is free again.
    pub fn release(&self) {
        self.memories.iter().for_each(|m| m.release());
    }

    /// The devices that hold live weights, as `status` names them: `cpu`, or a GPU's name and UUID.
    pub fn devices(&self) -> Vec<String> {
        let mut names: Vec<String> = Vec::new();
        for memory in &self.memories {
            let name = memory.device().map_or_else(|| "cpu".to_string(), |d| d.accelerator().name());
            if !names.contains(&name) {
                names.push(name);
            }
        }
        names
    }

    pub fn live_bytes(&self) -> u64 {
        self.memories.iter().map(|m| m.bytes()).sum()
    }

    /// Every device that holds live weights, once.
    pub fn accelerators(&self) -> Vec<Arc<dyn Accelerator>> {
        let mut found: Vec<Arc<dyn Accelerator>> = Vec::new();
        for accelerator in self.memories.iter().filter_map(|m| m.device()).map(|d| d.accelerator()) {
            if !found.iter().any(|f| Arc::ptr_eq(f, &accelerator)) {
                found.push(accelerator);
            }
        }
        found
    }

    /// Reads the manifests of all ranks, maps their memories and matches their tensors to `directory`.
    /// Fails at the first tensor that does not fit; [`diagnose`] lists them all.
    pub fn from_manifests(
        directory: &ModelDirectory,
        paths: &[PathBuf],
        writable: bool,
    ) -> Result<Source, SourceError> {
        let manifests = read_all(directory, paths)?;
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
            for (number, memory) in manifest.memories.iter().enumerate() {
                memories.push(memory.map(manifest, number, writable)?);
            }
        }
        let (engines, locks): (Vec<Engine>, Vec<_>) = manifests.into_iter().map(|m| (m.engine, m.file)).unzip();
        let boundary = Arc::new(Boundary::new(locks));
        let updates = Updates::of(&directory.path, &engines);
        if updates.is_marked() {
            // By a weightfs that writes at this moment, or by one that was killed while it did: the first ends.
            let hold = boundary.hold();
            updates.end(hold.is_ok() && !updates.is_marked());
        }
        Ok(Source { memories, places: matched.places, only_live: matched.only_live, engines, boundary, updates })
    }
}

/// Row-major strides of `shape`, in elements.
pub fn row_major(shape: &[u64]) -> Vec<u64> {
    let mut strides = vec![1u64; shape.len()];
    for d in (0..shape.len().saturating_sub(1)).rev() {
        strides[d] = strides[d + 1].saturating_mul(shape[d + 1].max(1));
    }
    strides
}
