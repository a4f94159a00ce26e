//! The image as everybody holds it: it stays the same when the engine behind it is another one.

use super::shard::Attached;
use super::tensor::EvenRows;
use super::{ImageError, Part, ShardBytes, StepHold};
use crate::memory::{Accelerator, Hash};
use crate::model::{Dtype, ModelDirectory};
use crate::source::Source;
use parking_lot::RwLock;
use std::ops::Range;
use std::sync::Arc;

/// The live shard files of one model.
pub struct Image {
    directory: Arc<ModelDirectory>,
    attached: RwLock<Arc<Attached>>,
}

impl Image {
    pub fn new(directory: Arc<ModelDirectory>, source: Arc<Source>) -> Image {
        let attached = RwLock::new(Arc::new(Attached::new(directory.clone(), source)));
        Image { directory, attached }
    }

    /// Weights of `source` from here on; those of the one before are let go of. What is under way on that one fails or ends
    /// on its own; the caller lets nothing begin that spans both.
    pub fn attach(&self, source: Arc<Source>) {
        let next = Arc::new(Attached::new(self.directory.clone(), source));
        let before = std::mem::replace(&mut *self.attached.write(), next);
        before.source().release();
    }

    fn now(&self) -> Arc<Attached> {
        self.attached.read().clone()
    }

    /// What is attached now, for several calls that must be of one engine.
    pub fn attached(&self) -> Arc<dyn ShardBytes> {
        self.now()
    }

    pub fn source(&self) -> Arc<Source> {
        self.now().source().clone()
    }

    pub fn directory(&self) -> &Arc<ModelDirectory> {
        &self.directory
    }

    /// A live tensor by its name; `None` for one that the engine does not hold as it is on disk.
    pub fn tensor(&self, name: &str) -> Option<TensorRef> {
        let attached = self.now();
        let shape = attached.tensor(name)?.1.shape.clone();
        Some(TensorRef { attached, name: name.to_string(), shape })
    }
}

/// A live tensor, element by element, in the engine's dtype.
#[derive(Clone)]
pub struct TensorRef {
    attached: Arc<Attached>,
    name: String,
    shape: Vec<u64>,
}

impl TensorRef {
    fn live(&self) -> &super::tensor::LiveTensor {
        let (live, _) = self.attached.tensor(&self.name).expect("looked up when this was made");
        live
    }

    /// What the engine keeps it in, which may differ from the file's dtype among the float types.
    pub fn dtype(&self) -> Dtype {
        self.live().live_dtype()
    }

    pub fn shape(&self) -> &[u64] {
        &self.shape
    }

    /// Whether any of it is on a device.
    pub fn is_on_devices(&self) -> bool {
        self.live().is_on_devices()
    }

    /// Where it lies, as rows of the elements that its first dimension counts (a vector is one row), if those are whole and
    /// evenly apart in one memory; else why not, as the end of a sentence about it.
    pub fn even_rows(&self) -> Result<EvenRows, &'static str> {
        let columns: u64 = match &self.shape[..] {
            [] => 1,
            [n] => *n,
            [_, rest @ ..] => rest.iter().product(),
        };
        self.live().even_rows(columns)
    }

    /// Copies elements, row-major from number `first` on, into `dst`.
    pub fn read(&self, first: u64, dst: &mut [u8]) -> Result<(), ImageError> {
        Ok(self.live().read_live(first, dst)?)
    }

    /// Writes elements from number `first` on, on every rank that holds them. The caller [excludes](ShardBytes::exclude)
    /// readers.
    pub fn write(&self, first: u64, src: &[u8]) -> Result<(), ImageError> {
        Ok(self.live().write_live(first, src)?)
    }
}

impl ShardBytes for Image {
    fn shards(&self) -> usize {
        self.directory.shards.len()
    }

    fn shard_bytes(&self, shard: usize) -> u64 {
        self.directory.shards[shard].bytes()
    }

    fn live_blocks(&self, shard: usize) -> Vec<Range<u64>> {
        self.now().live_blocks(shard)
    }

    fn check(&self) -> Result<(), ImageError> {
        self.now().check()
    }

    fn hold(&self) -> Result<StepHold, ImageError> {
        self.now().hold()
    }

    fn exclude(&self) -> Result<StepHold, ImageError> {
        self.now().exclude()
    }

    fn update_begins(&self) {
        self.now().update_begins();
    }

    fn update_ended(&self, whole: bool) {
        self.now().update_ended(whole);
    }

    fn read(&self, shard: usize, offset: u64, dst: &mut [u8]) -> Result<(), ImageError> {
        self.now().read(shard, offset, dst)
    }

    fn hash(&self, shard: usize, first: u64, out: &mut [Hash]) -> Result<(), ImageError> {
        self.now().hash(shard, first, out)
    }

    fn read_parts(&self, parts: &mut [Part<'_>]) -> Result<(), ImageError> {
        self.now().read_parts(parts)
    }

    fn changed(
        &self,
        ranges: &[(usize, Range<u64>)],
        known: &[&[Hash]],
    ) -> Result<Vec<(usize, Range<u64>)>, ImageError> {
        self.now().changed(ranges, known)
    }

    fn accelerator(&self) -> Option<Arc<dyn Accelerator>> {
        self.now().accelerator()
    }

    fn write(&self, shard: usize, offset: u64, src: &[u8]) -> Result<(), ImageError> {
        self.now().write(shard, offset, src)
    }
}
