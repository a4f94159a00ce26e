//! The weights of a mounted model, as training sees them: through the image, in the dtype that the engine keeps them in,
//! with steps that readers and commits see whole or not at all.

use super::weights::{DeviceTensor, Location, Step, TensorSpec, Weights};
use crate::image::{Image, ImageError, ShardBytes, StepHold};
use crate::model::element_bytes;
use std::any::Any;
use std::ops::Range;
use std::sync::Arc;

/// What became of a step, told while readers are still shut out: whoever holds the next step boundary knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StepEnd {
    /// The weights are those of the next step.
    Taken,
    /// Cut between its first write and its last: the weights are of no step until a rollback.
    Torn,
}

/// Live weights of a model directory.
pub struct LiveWeights {
    image: Arc<Image>,
    begins: Option<Box<Begins>>,
    ended: Box<dyn Fn(StepEnd) + Send + Sync>,
}

/// What it returns is dropped when the step's writing is over, readers let in again.
type Begins = dyn Fn() -> Box<dyn Any> + Send + Sync;

impl LiveWeights {
    /// `ended` must not ask for a hold of the weights.
    pub fn new(image: Arc<Image>, ended: impl Fn(StepEnd) + Send + Sync + 'static) -> LiveWeights {
        LiveWeights { image, begins: None, ended: Box::new(ended) }
    }

    /// `begins` runs before a step's first write: here the engine is made to stand still. Not earlier, since a freeze may keep
    /// the step waiting; like `ended`, it must not ask for a hold.
    pub fn around_steps(self, begins: impl Fn() -> Box<dyn Any> + Send + Sync + 'static) -> LiveWeights {
        LiveWeights { begins: Some(Box::new(begins)), ..self }
    }

    /// The tensor, and how many elements a row of it has. Whoever asks has been given its [`TensorSpec`].
    fn rows(&self, name: &str) -> (crate::image::TensorRef, u64) {
        let tensor = self.image.tensor(name).expect("only tensors with a spec are read and written");
        let row = tensor.shape().get(1..).unwrap_or_default().iter().product();
        (tensor, row)
    }
}

impl Weights for LiveWeights {
    fn tensor(&self, name: &str) -> Option<TensorSpec> {
        let tensor = self.image.tensor(name)?;
        // A type smaller than a byte has no elements to read one by one.
        element_bytes(tensor.dtype())?;
        Some(TensorSpec { dtype: tensor.dtype(), shape: tensor.shape().to_vec() })
    }

    fn read_rows(&self, name: &str, rows: Range<u64>, dst: &mut [u8]) -> Result<(), ImageError> {
        let (tensor, row) = self.rows(name);
        tensor.read(rows.start * row, dst)
    }

    fn write_rows(&self, name: &str, rows: Range<u64>, src: &[u8]) -> Result<(), ImageError> {
        let (tensor, row) = self.rows(name);
        tensor.write(rows.start * row, src)
    }

    fn location(&self, name: &str) -> Location {
        let (tensor, _) = self.rows(name);
        let scattered = |why: &str| Location::Scattered(why.into());
        let rows = match tensor.even_rows() {
            Ok(rows) => rows,
            Err(_) if !tensor.is_on_devices() => return Location::Host,
            Err(why) => return scattered(why),
        };
        let Some(memory) = rows.memory.device() else { return Location::Host };
        let Some(device) = memory.cuda() else { return scattered("is on a device that does not train") };
        match memory.range(rows.offset, rows.bytes()) {
            Ok(range) => {
                let (device, address, stride) = (device.clone(), range.address(), rows.stride);
                Location::Device(DeviceTensor { device, address, stride, held: Arc::new(range) })
            }
            Err(e) => scattered(&format!("cannot be reached ({e})")),
        }
    }

    fn begin_step(&self) -> Result<Box<dyn Step + '_>, ImageError> {
        // The queue takes one step at a time, and nothing else writes while it has jobs.
        self.image.check()?;
        if self.image.source().updates.are_torn() {
            return Err(ImageError::Torn);
        }
        Ok(Box::new(LiveStep { weights: self, alone: None, around: None }))
    }
}

struct LiveStep<'a> {
    weights: &'a LiveWeights,
    /// Everybody is shut out, from `begin_update` on.
    alone: Option<StepHold>,
    /// Dropped after `alone`.
    around: Option<Box<dyn Any>>,
}

impl Step for LiveStep<'_> {
    fn begin_update(&mut self) -> Result<(), ImageError> {
        self.alone = Some(self.weights.image.exclude()?);
        self.around = self.weights.begins.as_ref().map(|begins| begins());
        self.weights.image.update_begins();
        Ok(())
    }

    fn finish(mut self: Box<Self>, _step: u64) -> Result<(), ImageError> {
        // An engine that died half way took the weights with it: nobody has the rest of this step.
        self.weights.image.check()?;
        if let Some(alone) = self.alone.take() {
            self.weights.image.update_ended(true);
            (self.weights.ended)(StepEnd::Taken);
            drop(alone);
        }
        Ok(())
    }

    fn withdraw(mut self: Box<Self>) {
        // Nothing ended: whoever waits reads what was there before.
        if let Some(alone) = self.alone.take() {
            self.weights.image.update_ended(true);
            drop(alone);
        }
    }
}

impl Drop for LiveStep<'_> {
    fn drop(&mut self) {
        if let Some(alone) = self.alone.take() {
            self.weights.image.update_ended(false);
            (self.weights.ended)(StepEnd::Torn);
            drop(alone);
        }
    }
}
