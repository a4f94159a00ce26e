//! What training needs of the live weights: their bytes by HF name, and a step that readers see whole or not at all.

use crate::compute::cpu::weight::Kind;
use crate::image::ImageError;
use crate::memory::cuda::Device;
use crate::model::Dtype;
use std::any::Any;
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

/// A tensor on a device: element (i, j) at `address + (i * stride + j) * bytes of an element`; a vector is one row, and of
/// more than two dimensions all but the first are columns.
#[derive(Clone)]
pub struct DeviceTensor {
    pub device: Arc<Device>,
    pub address: u64,
    pub stride: u64,
    /// While it lives, the address stays mapped.
    pub held: Arc<dyn Any + Send + Sync>,
}

/// Where a tensor is, as far as training cares.
pub enum Location {
    /// Its rows are read and written.
    Host,
    /// All of it on one device, in whole rows: it trains in place.
    Device(DeviceTensor),
    /// On devices, but not so: why, as the end of a sentence about the tensor.
    Scattered(String),
}

/// Live weights, trained in place. Rows are indices of a tensor's first dimension; bytes are its row-major elements,
/// little-endian, of the dtype that [`Weights::tensor`] says.
pub trait Weights: Send + Sync {
    /// `None` for a tensor that is not there or that cannot be written (opaque, held by no engine).
    fn tensor(&self, name: &str) -> Option<TensorSpec>;

    fn read_rows(&self, name: &str, rows: Range<u64>, dst: &mut [u8]) -> Result<(), ImageError>;

    /// Called only between [`Step::begin_update`] and [`Step::finish`].
    fn write_rows(&self, name: &str, rows: Range<u64>, src: &[u8]) -> Result<(), ImageError>;

    /// Where a tensor that [`Weights::tensor`] knows is, in the dtype that it says.
    fn location(&self, _name: &str) -> Location {
        Location::Host
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

/// The device that tensors are on, each in a way that trains in place there; `None` for weights in host memory. The error says
/// in a sentence which tensor keeps them from training, and why.
pub fn device_of<'a>(
    weights: &dyn Weights,
    names: impl IntoIterator<Item = &'a str>,
) -> Result<Option<Arc<Device>>, String> {
    let (mut device, mut on_host): (Option<(Arc<Device>, &str)>, Option<&str>) = (None, None);
    for name in names {
        match weights.location(name) {
            Location::Host => on_host = on_host.or(Some(name)),
            Location::Scattered(why) => {
                return Err(format!(
                    "tensor '{name}' {why}: training on a GPU needs every tensor whole, in rows evenly apart, on one GPU"
                ));
            }
            Location::Device(tensor) => match &device {
                Some((d, other)) if d.id != tensor.device.id => {
                    return Err(format!(
                        "tensor '{name}' is on {} and '{other}' on {}: training on a GPU needs the weights on one GPU",
                        tensor.device.id.uuid, d.id.uuid
                    ));
                }
                Some(_) => {}
                None => device = Some((tensor.device, name)),
            },
        }
    }
    match (device, on_host) {
        (Some((_, name)), Some(other)) => Err(format!(
            "tensor '{name}' is on a GPU and '{other}' in host memory: training needs the weights in one of them"
        )),
        (device, _) => Ok(device.map(|(d, _)| d)),
    }
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
                .file()
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Only asked where its tensors are.
    struct Places(&'static [(&'static str, Option<&'static str>)]);

    impl Weights for Places {
        fn tensor(&self, _: &str) -> Option<TensorSpec> {
            None
        }

        fn read_rows(&self, _: &str, _: Range<u64>, _: &mut [u8]) -> Result<(), ImageError> {
            unreachable!("nobody reads")
        }

        fn write_rows(&self, _: &str, _: Range<u64>, _: &[u8]) -> Result<(), ImageError> {
            unreachable!("nobody writes")
        }

        fn location(&self, name: &str) -> Location {
            let (_, why) = self.0.iter().find(|(n, _)| *n == name).expect("one of them");
            why.map_or(Location::Host, |why| Location::Scattered(why.into()))
        }

        fn begin_step(&self) -> Result<Box<dyn Step + '_>, ImageError> {
            unreachable!("nobody trains")
        }
    }

    #[test]
    fn a_tensor_that_keeps_a_model_from_training_is_named_with_the_reason() {
        let places = Places(&[("a", None), ("b", Some("lies in several memories"))]);
        assert!(device_of(&places, ["a"]).unwrap().is_none());
        let why = device_of(&places, ["a", "b"]).unwrap_err();
        assert!(why.starts_with("tensor 'b' lies in several memories: "), "{why}");
    }
}
