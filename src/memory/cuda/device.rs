//! A GPU of this machine, opened once for the whole process.

use super::error::Doing;
use super::{CudaError, DeviceBuffer, NoCuda, driver, modules::Modules};
use crate::memory::DeviceRange;
use cudarc::driver::sys::{self, CUdevice_attribute, CUevent_flags};
use cudarc::driver::{CudaContext, CudaEvent, CudaFunction, CudaStream, result};
use parking_lot::Mutex;
use std::fmt;
use std::sync::{Arc, OnceLock, Weak};

/// A device as the driver lists it. Without a context: listing devices takes no memory on them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceId {
    pub ordinal: usize,
    /// `GPU-` and 32 hex digits in five groups, as nvidia-smi and manifests write it.
    pub uuid: String,
    pub name: String,
}

/// The devices that this process may use (`CUDA_VISIBLE_DEVICES` hides others).
pub fn devices() -> Result<Vec<DeviceId>, NoCuda> {
    driver()?;
    let list = || -> Result<Vec<DeviceId>, CudaError> {
        let count = result::device::get_count().doing("count the devices")?;
        (0..count as usize).map(device_id).collect()
    };
    list().map_err(|e| NoCuda(e.to_string()))
}

fn device_id(ordinal: usize) -> Result<DeviceId, CudaError> {
    let device = result::device::get(ordinal as i32).doing("find a device")?;
    let mut uuid = sys::CUuuid { bytes: [0; 16] };
    // SAFETY: fills the 16 bytes. The second version of the call tells parts of a divided GPU (MIG) apart.
    unsafe { sys::cuDeviceGetUuid_v2(&mut uuid, device) }.doing("ask a device's UUID")?;
    let name = result::device::get_name(device).doing("ask a device's name")?;
    Ok(DeviceId { ordinal, uuid: uuid_text(&uuid.bytes.map(|b| b as u8)), name })
}

fn uuid_text(bytes: &[u8; 16]) -> String {
    let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
    format!("GPU-{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

/// How somebody names a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceName {
    /// As manifests and nvidia-smi write it; only the digits count.
    Uuid(String),
    /// As this process counts them.
    Ordinal(usize),
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceName::Uuid(uuid) => write!(f, "{uuid}"),
            DeviceName::Ordinal(n) => write!(f, "cuda:{n}"),
        }
    }
}

impl DeviceName {
    /// Finds the device. `Err` says which ones there are.
    pub fn find(&self) -> Result<DeviceId, NoCuda> {
        let digits = |uuid: &str| -> String {
            let hex = uuid.split_once('-').map_or(uuid, |(_, hex)| hex);
            hex.chars().filter(char::is_ascii_hexdigit).map(|c| c.to_ascii_lowercase()).collect()
        };
        let seen = devices()?;
        let found = seen.iter().find(|d| match self {
            DeviceName::Uuid(uuid) => digits(uuid) == digits(&d.uuid),
            DeviceName::Ordinal(n) => *n == d.ordinal,
        });
        found.cloned().ok_or_else(|| {
            let seen: Vec<String> = seen.iter().map(|d| format!("cuda:{} {} {}", d.ordinal, d.name, d.uuid)).collect();
            let seen = if seen.is_empty() { "none".into() } else { seen.join(", ") };
            NoCuda(format!(
                "there is no GPU {self} here (there is: {seen}): unset CUDA_VISIBLE_DEVICES, or give the container that GPU"
            ))
        })
    }
}

/// How urgent a stream's work is against that of our other streams; priorities do not reach other processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Priority {
    Low,
    High,
}

/// An opened device: its primary context, which all of weightfs shares.
pub struct Device {
    pub id: DeviceId,
    /// Compute capability, (9, 0) for Hopper.
    pub capability: (u32, u32),
    pub multiprocessors: u32,
    context: Arc<CudaContext>,
    modules: Modules,
    /// The first fatal error: the device is of no more use to this process.
    failed: OnceLock<CudaError>,
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Device").field(&self.id).finish()
    }
}

/// Bytes of stack for each thread that the device can hold at a time. The driver's own choice, 1024, takes 200 MB of an H200
/// more, and no kernel here calls anything; what one's registers do not hold, the driver sees to by itself.
const STACK: usize = 256;

static OPEN: Mutex<Vec<Weak<Device>>> = Mutex::new(Vec::new());

impl Device {
    /// Opens a device, or returns the one that is open.
    pub fn open(id: &DeviceId) -> Result<Arc<Device>, CudaError> {
        let mut open = OPEN.lock();
        open.retain(|d| d.strong_count() > 0);
        if let Some(device) = open.iter().filter_map(Weak::upgrade).find(|d| d.id == *id) {
            return Ok(device);
        }
        let device = Arc::new(Device::new(id)?);
        open.push(Arc::downgrade(&device));
        Ok(device)
    }

    fn new(id: &DeviceId) -> Result<Device, CudaError> {
        let opening = format!("open {} ({})", id.name, id.uuid);
        let context = CudaContext::new(id.ordinal).doing(&opening)?;
        // SAFETY: no slice of cudarc's is used on more than one stream anywhere in weightfs: streams are ordered by hand.
        unsafe { context.disable_event_tracking() };
        let attribute = |a| context.attribute(a).map(|v| v as u32).doing(&opening);
        let capability = (
            attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        let multiprocessors = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        // SAFETY: a number, for the context that was made and bound above.
        let limited = unsafe { sys::cuCtxSetLimit(sys::CUlimit::CU_LIMIT_STACK_SIZE, STACK) };
        if let Err(e) = limited.doing("shrink the stacks of the device's threads") {
            log::debug!("{e}");
        }
        let (modules, failed) = (Modules::default(), OnceLock::new());
        Ok(Device { id: id.clone(), capability, multiprocessors, context, modules, failed })
    }

    /// For calls of the driver that cudarc wraps. Its own slices are not used: see [`RawDev`](super::RawDev).
    pub fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    /// Makes the device's context the one that calls of this thread go to.
    pub fn bind(&self) -> Result<(), CudaError> {
        if let Some(e) = self.failed.get() {
            return Err(e.clone());
        }
        let bound = self.context.bind_to_thread().doing("use the device");
        self.noted(bound)
    }

    /// Passes a result on; a fatal error is remembered.
    pub fn noted<T>(&self, result: Result<T, CudaError>) -> Result<T, CudaError> {
        if let Err(e) = &result
            && e.is_fatal()
        {
            let _ = self.failed.set(e.clone());
        }
        result
    }

    /// The error that ended the device's use, if there was one.
    pub fn failure(&self) -> Option<&CudaError> {
        self.failed.get()
    }

    /// A stream that does not wait for the default one.
    pub fn stream(&self, priority: Priority) -> Result<Arc<CudaStream>, CudaError> {
        self.bind()?;
        let range = result::stream::get_priority_range().doing("ask for priorities of streams")?;
        let number = match priority {
            Priority::Low => range.0,
            Priority::High => range.1,
        };
        self.context.new_stream_with_priority(number).doing("make a stream")
    }

    /// An event that who waits for it sleeps for, instead of keeping a core busy.
    pub fn event(&self) -> Result<CudaEvent, CudaError> {
        self.bind()?;
        self.context.new_event(Some(CUevent_flags::CU_EVENT_BLOCKING_SYNC)).doing("make an event")
    }

    /// The function `name` of a file of kernels, loaded once.
    pub fn function(&self, ptx: &'static super::Ptx, name: &str) -> Result<CudaFunction, CudaError> {
        self.bind()?;
        let function = self.modules.function(&self.context, self.capability, ptx, name);
        self.noted(function)
    }

    /// Memory of our own on the device, not initialised.
    pub fn alloc(self: &Arc<Self>, bytes: u64) -> Result<DeviceBuffer, CudaError> {
        DeviceBuffer::new(self, bytes)
    }

    /// Free and total bytes of the device's memory.
    pub fn memory(&self) -> Result<(u64, u64), CudaError> {
        self.bind()?;
        let (free, total) = result::mem_get_info().doing("ask for free memory")?;
        Ok((free as u64, total as u64))
    }

    /// Copies the first half of what `range` has to its second half, `bytes` of it: what the device's memory can do.
    pub fn copy(&self, range: DeviceRange, bytes: u64) -> Result<(), CudaError> {
        assert!(2 * bytes <= range.bytes(), "two halves of {bytes} bytes in {}", range.bytes());
        self.bind()?;
        let stream = self.stream(Priority::High)?;
        // SAFETY: both halves are mapped while `range` lives, and the copy is waited for.
        let code = unsafe {
            sys::cuMemcpyDtoDAsync_v2(range.address() + bytes, range.address(), bytes as usize, stream.cu_stream())
        };
        code.doing("copy on the device")?;
        let done = stream.synchronize().doing("copy on the device");
        self.noted(done)
    }

    /// Waits for everything that was asked of the device.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.bind()?;
        let done = self.context.synchronize().doing("finish its work");
        self.noted(done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_is_written_as_nvidia_smi_does() {
        let bytes = std::array::from_fn(|i| i as u8 * 17);
        assert_eq!(uuid_text(&bytes), "GPU-00112233-4455-6677-8899-aabbccddeeff");
    }

    #[test]
    fn a_machine_without_a_driver_is_told_so() {
        if let Err(e) = devices() {
            assert!(e.to_string().contains("driver"), "{e}");
        }
    }
}
