//! The operations on a GPU, twins of those in [`cpu`](super::cpu): matrices are bf16, sums, norms, softmax and the update
//! f32. Kernels lie in `kernels/`, each with its launcher here; matrix products are cuBLASLt's ([`matmul`]).
//!
//! All work of one [`Gpu`] goes to one stream in the order it is asked for, which is what makes it sound that a [`Buffer`]
//! goes back to its pool as soon as the host drops it: whoever takes it next comes later in the stream. Where two of them work
//! side by side on one device, who lends a buffer to the other holds it until it has [followed](Gpu::follow) that one's work. Launchers are safe functions: they
//! check that every operand is as long as its sizes say, and kernels stay inside their operands.

pub mod apollo;
pub mod attention;
pub mod causal_conv;
pub mod cross_entropy;
pub mod delta_rule;
mod downloads;
pub mod embedding;
pub mod factored;
pub mod gated_norm;
pub mod linear;
pub mod matmul;
mod memory;
mod offload;
pub mod output_gate;
pub mod peaks;
pub mod rms_norm;
pub mod rope;
pub mod swiglu;
mod tensor_map;

pub use downloads::Downloads;
use memory::End;
pub use memory::{Buffer, Part};
pub use offload::{Offload, Shelf};

use crate::compute::cpu::weight::Kind;
use crate::memory::cuda::{CudaError, Device, Priority};
use cudarc::driver::{CudaEvent, CudaStream, result};
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// What a GPU could not do.
#[derive(Debug, Clone, thiserror::Error)]
pub enum GpuError {
    #[error(transparent)]
    Cuda(#[from] CudaError),
    #[error("the GPU has no {0} bytes left")]
    Memory(u64),
    #[error("{0}")]
    Library(String),
}

pub type Result<T> = std::result::Result<T, GpuError>;

/// A device with the stream, the memory and the plans of one user. Not for two threads at a time.
pub struct Gpu {
    pub device: Arc<Device>,
    stream: Arc<CudaStream>,
    memory: memory::Pool,
    lasting: memory::Pool,
    plans: matmul::Plans,
    profile: Mutex<Option<Vec<Timed>>>,
    poisoned: AtomicBool,
    portable: AtomicBool,
}

/// A kernel or product with the marks around it.
struct Timed {
    what: String,
    operations: u64,
    from: CudaEvent,
    to: CudaEvent,
}

/// Time in one kernel, or in products of one size.
#[derive(Debug, Clone)]
pub struct Share {
    pub what: String,
    pub count: usize,
    pub milliseconds: f64,
    /// Floating-point operations, of products.
    pub operations: u64,
}

impl Gpu {
    /// cuBLASLt must be found on this machine; the error says where it was looked for.
    pub fn new(device: &Arc<Device>) -> Result<Gpu> {
        let stream = device.stream(Priority::Low)?;
        let memory = memory::Pool::new(device);
        let lasting = memory::Pool::new(device);
        let plans = matmul::Plans::new(&lasting)?;
        Ok(Gpu {
            device: device.clone(),
            stream,
            memory,
            lasting,
            plans,
            profile: Mutex::default(),
            poisoned: Default::default(),
            portable: Default::default(),
        })
    }

    /// A buffer of whatever was there, of what passes soon.
    pub fn take(&self, bytes: u64) -> Result<Buffer> {
        self.filled(self.memory.take(bytes, End::High)?)
    }

    /// The same of what stays for much of a step.
    pub fn hold(&self, bytes: u64) -> Result<Buffer> {
        self.filled(self.memory.take(bytes, End::Low)?)
    }

    fn filled(&self, buffer: Buffer) -> Result<Buffer> {
        if self.poisoned.load(Ordering::Relaxed) {
            self.fill(buffer.part(), 0xff)?;
        }
        Ok(buffer)
    }

    /// For tests: buffers begin as NaN from here on, which shows in every result that comes of a value nobody wrote.
    pub fn poison(&self) {
        self.poisoned.store(true, Ordering::Relaxed);
    }

    /// For tests and measurements: from here on, kernels that run on every device, where the device has some of its own too.
    pub fn be_portable(&self) {
        self.portable.store(true, Ordering::Relaxed);
    }

    fn is_portable(&self) -> bool {
        self.portable.load(Ordering::Relaxed)
    }

    /// Sees to it that passing buffers of `bytes` in all can be taken without asking the device for more.
    pub fn reserve(&self, bytes: u64) -> Result<()> {
        self.memory.reserve(bytes)
    }

    /// Bytes held for passing buffers.
    pub fn passing(&self) -> u64 {
        self.memory.held().0
    }

    /// A passing buffer of what lies free, if there is room.
    fn spare(&self, bytes: u64) -> Option<Buffer> {
        self.memory.spare(bytes)
    }

    pub fn bf16(&self, elements: usize) -> Result<Buffer> {
        self.take(2 * elements as u64)
    }

    pub fn f32(&self, elements: usize) -> Result<Buffer> {
        self.take(4 * elements as u64)
    }

    /// As [`Gpu::bf16`], of what stays.
    pub fn hold_bf16(&self, elements: usize) -> Result<Buffer> {
        self.hold(2 * elements as u64)
    }

    /// As [`Gpu::f32`], of what stays.
    pub fn hold_f32(&self, elements: usize) -> Result<Buffer> {
        self.hold(4 * elements as u64)
    }

    pub fn zeros(&self, bytes: u64) -> Result<Buffer> {
        let buffer = self.take(bytes)?;
        self.clear(buffer.part())?;
        Ok(buffer)
    }

    pub fn clear(&self, part: Part) -> Result<()> {
        self.fill(part, 0)
    }

    fn fill(&self, part: Part, byte: u8) -> Result<()> {
        self.device.bind()?;
        // SAFETY: a part lies inside an allocation; the stream orders this with its other uses.
        let done = unsafe { result::memset_d8_async(part.address, byte, part.bytes as usize, self.stream.cu_stream()) };
        self.noted(done, "clear memory")
    }

    /// A buffer that stays from step to step: cut from pieces of its own, so that it holds no passing one's piece.
    pub fn keep(&self, bytes: u64) -> Result<Buffer> {
        self.lasting.take(bytes, End::Low)
    }

    /// Sees to it that as many buffers that stay, of `sizes` bytes, can be taken one behind the other.
    pub fn reserve_lasting(&self, sizes: impl IntoIterator<Item = u64>) -> Result<()> {
        self.lasting.extend(sizes.into_iter().map(|s| s.max(1).next_multiple_of(memory::GRAIN)).sum())
    }

    /// Bytes taken from the device now, and at most: see [`Gpu::forget_peak`].
    pub fn held(&self) -> (u64, u64) {
        let ((now, peak), (lasting, lasting_peak)) = (self.memory.held(), self.lasting.held());
        (now + lasting, peak + lasting_peak)
    }

    /// The most bytes that were in passing buffers at once.
    pub fn used_peak(&self) -> u64 {
        self.memory.used_peak()
    }

    /// Begins the peaks anew.
    pub fn forget_peak(&self) {
        self.memory.forget_peak();
        self.lasting.forget_peak();
    }

    /// Gives free buffers back to the device.
    pub fn release(&self) {
        self.memory.release();
        self.lasting.release();
    }

    /// A buffer with these values.
    pub fn upload<T: Plain>(&self, values: &[T]) -> Result<Buffer> {
        let buffer = self.take(size_of_val(values) as u64)?;
        self.write(buffer.part(), values)?;
        Ok(buffer)
    }

    pub fn write<T: Plain>(&self, to: Part, values: &[T]) -> Result<()> {
        assert!(size_of_val(values) as u64 <= to.bytes);
        if values.is_empty() {
            return Ok(());
        }
        self.device.bind()?;
        // SAFETY: `to` is long enough. A slice of ours is pageable, and of that the driver keeps its own copy before it
        // returns ("API synchronization behavior" in the driver's documentation).
        let done = unsafe { result::memcpy_htod_async(to.address, values, self.stream.cu_stream()) };
        self.noted(done, "copy to the device")
    }

    /// The values of a part, after all work before.
    pub fn download<T: Plain>(&self, from: Part, count: usize) -> Result<Vec<T>> {
        assert!((count * size_of::<T>()) as u64 <= from.bytes);
        let mut values = vec![T::default(); count];
        if count > 0 {
            self.device.bind()?;
            // SAFETY: `from` is long enough, and `values` outlives the copy: the wait below.
            let done = unsafe { result::memcpy_dtoh_async(&mut values, from.address, self.stream.cu_stream()) };
            self.noted(done, "copy from the device")?;
        }
        self.wait()?;
        Ok(values)
    }

    /// The values of a part that no work under way writes, without waiting for that work. Any thread may ask.
    pub fn download_beside<T: Plain>(&self, from: Part, count: usize) -> Result<Vec<T>> {
        assert!((count * size_of::<T>()) as u64 <= from.bytes);
        let mut values = vec![T::default(); count];
        if count > 0 {
            let stream = self.device.stream(Priority::High)?;
            // SAFETY: `from` is long enough, and `values` outlives the copy: the wait below.
            let done = unsafe { result::memcpy_dtoh_async(&mut values, from.address, stream.cu_stream()) };
            let done = done.and(stream.synchronize());
            self.noted(done, "copy from the device")?;
        }
        Ok(values)
    }

    pub fn copy(&self, from: Part, to: Part) -> Result<()> {
        assert!(from.bytes <= to.bytes);
        self.device.bind()?;
        // SAFETY: both are long enough; the stream orders this with their other uses.
        let done = unsafe {
            result::memcpy_dtod_async(to.address, from.address, from.bytes as usize, self.stream.cu_stream())
        };
        self.noted(done, "copy on the device")
    }

    /// What is asked of this one from here on begins after all that was asked of `other` so far.
    pub fn follow(&self, other: &Gpu) -> Result<()> {
        let event = other.stream.record_event(None).map_err(|e| CudaError::new("mark a place in a stream", e));
        let event = self.device.noted(event)?;
        self.noted(self.stream.wait(&event), "wait for another stream")
    }

    /// Waits for all work so far.
    pub fn wait(&self) -> Result<()> {
        self.noted(self.stream.synchronize(), "finish a step's work")
    }

    /// A point in the stream, to time what lies between two.
    pub fn mark(&self) -> Result<CudaEvent> {
        let flags = Some(cudarc::driver::sys::CUevent_flags::CU_EVENT_DEFAULT);
        self.stream.record_event(flags).map_err(|e| CudaError::new("mark a time", e).into())
    }

    /// Milliseconds between two marks, after the second was reached.
    pub fn between(&self, from: &CudaEvent, to: &CudaEvent) -> Result<f32> {
        self.noted(from.elapsed_ms(to), "time a step")
    }

    /// Times every kernel and product from here to [`Gpu::profile`], which costs time itself.
    pub fn begin_profile(&self) {
        *self.profile.lock() = Some(Vec::new());
    }

    /// Times since [`Gpu::begin_profile`], the longest first.
    pub fn profile(&self) -> Result<Vec<Share>> {
        self.wait()?;
        let mut shares: Vec<Share> = Vec::new();
        for t in self.profile.lock().take().unwrap_or_default() {
            let time = self.between(&t.from, &t.to)? as f64;
            match shares.iter_mut().find(|s| s.what == t.what) {
                Some(s) => {
                    (s.count, s.milliseconds, s.operations) =
                        (s.count + 1, s.milliseconds + time, s.operations + t.operations)
                }
                None => shares.push(Share { what: t.what, count: 1, milliseconds: time, operations: t.operations }),
            }
        }
        shares.sort_by(|a, b| b.milliseconds.total_cmp(&a.milliseconds));
        Ok(shares)
    }

    /// Runs `f`, which asks for one kernel or product, with marks around it where those are wanted.
    fn timed(&self, what: impl FnOnce() -> (String, u64), f: impl FnOnce() -> Result<()>) -> Result<()> {
        if self.profile.lock().is_none() {
            return f();
        }
        let from = self.mark()?;
        f()?;
        let to = self.mark()?;
        let (what, operations) = what();
        if let Some(profile) = &mut *self.profile.lock() {
            profile.push(Timed { what, operations, from, to });
        }
        Ok(())
    }

    fn function(
        &self,
        kernels: &'static crate::memory::cuda::Ptx,
        name: &str,
        shared: u32,
    ) -> Result<cudarc::driver::CudaFunction> {
        let function = self.device.function(kernels, name)?;
        if shared > 48 << 10 {
            use cudarc::driver::sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as LIMIT;
            self.noted(function.set_attribute(LIMIT, shared as i32), "give a kernel its shared memory")?;
        }
        Ok(function)
    }

    fn noted<T>(&self, done: std::result::Result<T, cudarc::driver::DriverError>, doing: &str) -> Result<T> {
        Ok(self.device.noted(done.map_err(|e| CudaError::new(doing, e)))?)
    }
}

/// Values that are copied between host and device as they are.
pub trait Plain: Copy + Default {}
impl Plain for f32 {}
impl Plain for u16 {}
impl Plain for u32 {}
impl Plain for i32 {}
impl Plain for u8 {}

/// A weight where it lives: `rows x columns` elements, rows `stride` elements apart; a vector has one row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Weight {
    pub address: u64,
    pub kind: Kind,
    pub rows: usize,
    pub columns: usize,
    pub stride: usize,
    /// A norm's that is kept as its distance from 1.
    pub from_one: bool,
}

impl Weight {
    /// Rows `first..first + rows` of it.
    pub fn rows(&self, first: usize, rows: usize) -> Weight {
        assert!(first + rows <= self.rows);
        let address = self.address + (first * self.stride * self.kind.bytes()) as u64;
        Weight { address, rows, ..*self }
    }

    /// It and `next` as one matrix, where `next` follows in memory at the same stride.
    pub fn join(&self, next: &Weight) -> Option<Weight> {
        let end = self.address + (self.rows * self.stride * self.kind.bytes()) as u64;
        let fits = (self.kind, self.columns, self.stride) == (next.kind, next.columns, next.stride);
        (fits && end == next.address).then_some(Weight { rows: self.rows + next.rows, ..*self })
    }

    fn number(&self) -> i32 {
        match self.kind {
            Kind::Bf16 => 0,
            Kind::F16 => 1,
            Kind::F32 => 2,
        }
    }

    /// The same for kernels that take norms.
    fn norm_number(&self) -> i32 {
        self.number() + if self.from_one { 4 } else { 0 }
    }
}

/// Declares the PTX of `kernels/NAME.cu`.
macro_rules! kernels {
    ($name:literal) => {
        static KERNELS: crate::memory::cuda::Ptx = crate::memory::cuda::Ptx {
            name: concat!("compute/", $name),
            baseline: (80, include_str!(concat!("kernels/", $name, ".ptx"))),
            exact: &[],
        };
    };
}
use kernels;

/// Launches a kernel of this file's `KERNELS`: name, grid, block, shared bytes; arguments. The caller has checked every
/// operand against its sizes. Nothing is launched for an empty grid.
macro_rules! launch {
    ($gpu:expr, $name:expr, $grid:expr, $block:expr, $shared:expr; $($arg:expr),* $(,)?) => {{
        use cudarc::driver::PushKernelArg;
        let (gpu, grid, shared): (&crate::compute::cuda::Gpu, (u32, u32, u32), u32) = ($gpu, $grid, $shared);
        let function = gpu.function(&KERNELS, $name, shared)?;
        let config =
            cudarc::driver::LaunchConfig { grid_dim: grid, block_dim: $block, shared_mem_bytes: shared };
        if grid.0 > 0 && grid.1 > 0 && grid.2 > 0 {
            let mut launch = gpu.stream.launch_builder(&function);
            $(
                let argument = $arg;
                launch.arg(&argument);
            )*
            // SAFETY: the arguments are those of the kernel's signature, in order; the launcher around this has checked
            // that its operands are as long as the sizes it passes, and the kernel stays inside those.
            let mut go = || gpu.noted(unsafe { launch.launch(config) }.map(drop), $name);
            gpu.timed(|| ($name.to_string(), 0), &mut go)?;
        }
    }};
}
use launch;

/// Blocks of `per` that cover `count`.
fn blocks(count: usize, per: usize) -> u32 {
    u32::try_from(count.div_ceil(per)).expect("a grid of a training step fits 32 bits")
}
