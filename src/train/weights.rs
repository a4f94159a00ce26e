//! What training needs of the live weights: their bytes by HF name, and a step that readers see whole or not at all.

use crate::compute::cpu::weight::Kind;
use crate::image::ImageError;
use crate::memory::cuda::Device;
use crate::model::Dtype;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// Type and shape of a tensor, as its bytes are read and written here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    pub dtype: Dtype,
    pub shape: Vec<u64>,
}

impl TensorSpec {
    /// The dtype as the operations know it, or `None` when it does not train.
    pub fn kind(&self) -> Option<Kind> {
        match self.dtype {
            Dtype::BF16 => Some(Kind::Bf16),
            Dtype::F16 => Some(Kind::F16),
            Dtype::F32 => Some(Kind::F32),
            _ => None,
        }
    }

    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }
}

/// A tensor on a device: element (i, j) at `address + (i * stride + j) * bytes of an element`; a vector is one row.
#[derive(Debug, Clone)]
pub struct DeviceTensor {
    pub device: Arc<Device>,
    pub address: u64,
    pub stride: u64,
}

/// Live weights, trained in place. Rows are indices of a tensor's first dimension; bytes are its row-major elements,
/// little-endian, of the dtype that [`Weights::tensor`] says.
pub trait Weights: Send + Sync {
    /// `None` for a tensor that is not there or that cannot be written (opaque, held by no engine).
    fn tensor(&self, name: &str) -> Option<TensorSpec>;

    fn read_rows(&self, name: &str, rows: Range<u64>, dst: &mut [u8]) -> Result<(), ImageError>;

    /// Called only between [`Step::begin_update`] and [`Step::finish`].
    fn write_rows(&self, name: &str, rows: Range<u64>, src: &[u8]) -> Result<(), ImageError>;

    /// Where all of a tensor lies on a device, with its rows whole and `tensor`'s dtype; `None` for one that is elsewhere, in
    /// several pieces, or turned.
    fn device(&self, _name: &str) -> Option<DeviceTensor> {
        None
    }

    /// Begins an optimizer step: until it is dropped, nobody else writes these weights. Readers may go on.
    fn begin_step(&self) -> Result<Box<dyn Step + '_>, ImageError>;
}

/// One optimizer step. The forward and backward passes come first and only read; then `begin_update`, after which
/// nothing but a failing memory can stop the step; then all writes; then `finish`. Dropped before `begin_update`, it
/// was never there; dropped between the two, the weights are torn and only a rollback mends them, unless it was
/// withdrawn.
pub trait Step {
    /// From here to the end no reader may read and no commit may begin.
    fn begin_update(&mut self) -> Result<(), ImageError>;

    /// All is written: the weights are those of step `step`.
    fn finish(self: Box<Self>, step: u64) -> Result<(), ImageError>;

    /// Ends the step after `begin_update` where nothing was written: the weights are those of the step before.
    fn withdraw(self: Box<Self>);
}

/// Weights of our own, for tests, benchmarks and examples.
#[derive(Debug, Default)]
pub struct InMemory {
    tensors: BTreeMap<String, (TensorSpec, parking_lot::RwLock<Vec<u8>>)>,
    step: parking_lot::Mutex<u64>,
}

impl InMemory {
    pub fn new(tensors: impl IntoIterator<Item = (String, TensorSpec, Vec<u8>)>) -> InMemory {
        let tensors = tensors.into_iter().map(|(name, spec, bytes)| (name, (spec, bytes.into())));
        InMemory { tensors: tensors.collect(), step: Default::default() }
    }

    /// Loads every tensor of a model directory.
    pub fn load(directory: &Path) -> Result<InMemory, crate::model::ModelError> {
        use std::os::unix::fs::FileExt;
        let directory = crate::model::ModelDirectory::open(directory)?;
        let mut tensors = Vec::new();
        for (shard, tensor) in directory.tensors() {
            let shard = &directory.shards[shard];
            let mut bytes = vec![0; tensor.bytes() as usize];
            shard
                .file
                .read_exact_at(&mut bytes, tensor.start)
                .map_err(|source| crate::model::ModelError::io(&shard.path, source))?;
            let spec = TensorSpec { dtype: tensor.dtype, shape: tensor.shape.clone() };
            tensors.push((tensor.name.clone(), spec, bytes));
        }
        Ok(InMemory::new(tensors))
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// All bytes of a tensor.
    pub fn bytes(&self, name: &str) -> Option<Vec<u8>> {
        Some(self.tensors.get(name)?.1.read().clone())
    }

    /// The step that [`Step::finish`] told last.
    pub fn step(&self) -> u64 {
        *self.step.lock()
    }

    fn range(spec: &TensorSpec, rows: Range<u64>) -> Range<usize> {
        let row: u64 = spec.shape[1..].iter().product::<u64>() * spec.dtype.bitsize() as u64 / 8;
        (rows.start * row) as usize..(rows.end * row) as usize
    }
}

impl Weights for InMemory {
    fn tensor(&self, name: &str) -> Option<TensorSpec> {
        Some(self.tensors.get(name)?.0.clone())
    }

    fn read_rows(&self, name: &str, rows: Range<u64>, dst: &mut [u8]) -> Result<(), ImageError> {
        let (spec, bytes) = &self.tensors[name];
        dst.copy_from_slice(&bytes.read()[InMemory::range(spec, rows)]);
        Ok(())
    }

    fn write_rows(&self, name: &str, rows: Range<u64>, src: &[u8]) -> Result<(), ImageError> {
        let (spec, bytes) = &self.tensors[name];
        bytes.write()[InMemory::range(spec, rows)].copy_from_slice(src);
        Ok(())
    }

    fn begin_step(&self) -> Result<Box<dyn Step + '_>, ImageError> {
        Ok(Box::new(InMemoryStep(self)))
    }
}

struct InMemoryStep<'a>(&'a InMemory);

impl Step for InMemoryStep<'_> {
    fn begin_update(&mut self) -> Result<(), ImageError> {
        Ok(())
    }

    fn finish(self: Box<Self>, step: u64) -> Result<(), ImageError> {
        *self.0.step.lock() = step;
        Ok(())
    }

    fn withdraw(self: Box<Self>) {}
}
