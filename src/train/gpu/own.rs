//! Weights of our own on a device, for tests, benchmarks and examples.

use crate::compute::cuda::{Buffer, Gpu, GpuError};
use crate::compute::rng::{Purpose, Stream};
use crate::image::ImageError;
use crate::memory::MemoryError;
use crate::memory::cuda::Device;
use crate::model::Dtype;
use crate::train::families::Architecture;
use crate::train::weights::{DeviceTensor, Location, Step, TensorSpec, Weights};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// Tensors by name, each in one place.
pub struct OnDevice {
    gpu: Gpu,
    tensors: BTreeMap<String, (TensorSpec, Arc<Buffer>)>,
    step: parking_lot::Mutex<u64>,
}

impl OnDevice {
    pub fn new(
        device: &Arc<Device>,
        tensors: impl IntoIterator<Item = (String, TensorSpec, Vec<u8>)>,
    ) -> Result<OnDevice, GpuError> {
        let gpu = Gpu::new(device)?;
        let place = |(name, spec, bytes): (String, TensorSpec, Vec<u8>)| {
            let buffer = gpu.keep(bytes.len() as u64)?;
            gpu.write(buffer.part(), &bytes)?;
            Ok::<_, GpuError>((name, (spec, Arc::new(buffer))))
        };
        let tensors = tensors.into_iter().map(place).collect::<Result<_, _>>()?;
        // Who trains them has a stream of their own.
        gpu.wait()?;
        Ok(OnDevice { gpu, tensors, step: Default::default() })
    }

    /// Random weights in bf16, made on the device: normal of deviation 0.02, norms one. All lie one behind the other, so that
    /// linears that share their input do, as an engine keeps them.
    pub fn random(device: &Arc<Device>, architecture: &Architecture) -> Result<OnDevice, GpuError> {
        let gpu = Gpu::new(device)?;
        let mut tensors = BTreeMap::new();
        gpu.reserve_lasting(architecture.tensors().iter().map(|(_, shape)| 2 * shape.iter().product::<u64>()))?;
        for (name, shape) in architecture.tensors() {
            let count: u64 = shape.iter().product();
            let buffer = gpu.keep(2 * count)?;
            if shape.len() == 1 {
                gpu.write(buffer.part(), &vec![0x3f80u16; count as usize])?;
            } else {
                let stream = Stream::new(0, Purpose::Projection, name, 0);
                crate::compute::cuda::apollo::normals(&gpu, &stream, count as usize, 0.02, buffer.part())?;
            }
            tensors.insert(name.to_string(), (TensorSpec { dtype: Dtype::BF16, shape }, Arc::new(buffer)));
        }
        gpu.wait()?;
        gpu.release();
        Ok(OnDevice { gpu, tensors, step: Default::default() })
    }

    /// All bytes of a tensor.
    pub fn bytes(&self, name: &str) -> Result<Vec<u8>, GpuError> {
        let (_, buffer) = &self.tensors[name];
        self.gpu.download(buffer.part(), buffer.bytes() as usize)
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The step that [`Step::finish`] told last.
    pub fn step(&self) -> u64 {
        *self.step.lock()
    }

    fn range(spec: &TensorSpec, rows: Range<u64>) -> Range<u64> {
        let row: u64 = spec.shape[1..].iter().product::<u64>() * spec.dtype.bitsize() as u64 / 8;
        rows.start * row..rows.end * row
    }
}

fn image_error(e: GpuError) -> ImageError {
    ImageError::Memory(MemoryError::Device { what: "device memory".into(), why: e.to_string() })
}

impl Weights for OnDevice {
    fn tensor(&self, name: &str) -> Option<TensorSpec> {
        Some(self.tensors.get(name)?.0.clone())
    }

    fn read_rows(&self, name: &str, rows: Range<u64>, dst: &mut [u8]) -> Result<(), ImageError> {
        let (spec, buffer) = &self.tensors[name];
        let bytes =
            self.gpu.download(buffer.from(OnDevice::range(spec, rows).start), dst.len()).map_err(image_error)?;
        dst.copy_from_slice(&bytes);
        Ok(())
    }

    fn write_rows(&self, name: &str, rows: Range<u64>, src: &[u8]) -> Result<(), ImageError> {
        let (spec, buffer) = &self.tensors[name];
        self.gpu.write(buffer.from(OnDevice::range(spec, rows).start), src).map_err(image_error)
    }

    fn location(&self, name: &str) -> Location {
        let (spec, buffer) = &self.tensors[name];
        let stride = if spec.shape.len() > 1 { spec.shape[1..].iter().product() } else { spec.elements() };
        let (device, address) = (self.gpu.device.clone(), buffer.part().address());
        Location::Device(DeviceTensor { device, address, stride, held: buffer.clone() })
    }

    fn begin_step(&self) -> Result<Box<dyn Step + '_>, ImageError> {
        Ok(Box::new(OnDeviceStep(self)))
    }
}

struct OnDeviceStep<'a>(&'a OnDevice);

impl Step for OnDeviceStep<'_> {
    fn begin_update(&mut self) -> Result<(), ImageError> {
        Ok(())
    }

    fn finish(self: Box<Self>, step: u64) -> Result<(), ImageError> {
        *self.0.step.lock() = step;
        Ok(())
    }

    fn withdraw(self: Box<Self>) {}
}
