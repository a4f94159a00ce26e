//! The dictionary of a handle file: parameter names of the engine, each with the arguments from which PyTorch would make
//! the tensor again (`torch/multiprocessing/reductions.py`, `rebuild_cuda_tensor`; their order is the same in torch 2.11 to
//! 2.15).

use super::super::manifest::CudaDevice;
use super::pickle::{Global, Object, Pickle};
use crate::memory::cuda::IpcHandle;
use crate::model::{Dtype, element_bytes, parse_dtype};
use std::collections::HashMap;

/// A tensor as the engine has it: name and layout are the engine's, not the checkpoint's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LiveTensor {
    pub dtype: Dtype,
    pub shape: Vec<u64>,
    /// In elements.
    pub strides: Vec<u64>,
    /// Index into [`LiveTensors::memories`].
    pub memory: usize,
    /// Of the first element, in bytes from the start of the memory.
    pub offset: u64,
}

/// One allocation of the engine's, as far as the tensors reach into it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LiveMemory {
    pub device: CudaDevice,
    pub handle: IpcHandle,
    pub bytes: u64,
}

#[derive(Debug, Default)]
pub struct LiveTensors {
    pub memories: Vec<LiveMemory>,
    pub tensors: HashMap<String, LiveTensor>,
    /// The process that shares them, which torch names in its reference counters (`/torch_PID_…`).
    pub pid: Option<u32>,
}

/// Reads the root of a handle file. Keys that begin and end with two underscores are about the file, not tensors.
pub fn read(pickle: &Pickle) -> Result<LiveTensors, String> {
    let Object::Dict(entries) = pickle.root() else {
        return Err("it holds no dictionary of tensors".into());
    };
    let mut live = LiveTensors::default();
    let mut by_handle = HashMap::new();
    for &(name, value) in entries {
        let Object::Text(name) = pickle.get(name) else {
            return Err("a tensor's name is not text".into());
        };
        if name.starts_with("__") && name.ends_with("__") {
            continue;
        }
        if live.tensors.contains_key(name) {
            return Err(format!("it has two tensors '{name}'"));
        }
        let in_tensor = |why: String| format!("tensor '{name}': {why}");
        let Some((tensor, pid)) = tensor(pickle, pickle.get(value)).map_err(in_tensor)? else { continue };
        if let (Some(known), Some(pid)) = (live.pid, pid)
            && known != pid
        {
            return Err(in_tensor(format!("process {pid} shares it, and process {known} the tensors before")));
        }
        live.pid = live.pid.or(pid);
        let Shared { device, handle, end, mut tensor } = tensor;
        let next = live.memories.len();
        tensor.memory = *by_handle.entry((device.clone(), handle)).or_insert(next);
        if tensor.memory == next {
            live.memories.push(LiveMemory { device, handle, bytes: 0 });
        }
        let bytes = &mut live.memories[tensor.memory].bytes;
        *bytes = end.max(*bytes);
        live.tensors.insert(name.clone(), tensor);
    }
    match live.tensors.is_empty() {
        true => Err("it holds no tensor".into()),
        false => Ok(live),
    }
}

struct Shared {
    device: CudaDevice,
    handle: IpcHandle,
    /// Where the tensor's storage ends in the memory.
    end: u64,
    tensor: LiveTensor,
}

/// One `(rebuild_cuda_tensor, (…))`, and the process that shares it. `None` for a tensor without elements.
fn tensor(pickle: &Pickle, value: &Object) -> Result<Option<(Shared, Option<u32>)>, String> {
    let Object::Tuple(pair) = value else {
        return Err("it is not what reduce_tensor gives".into());
    };
    let arguments = match pair.as_slice() {
        &[function, arguments] if *pickle.get(function) == Object::Global(Global::RebuildCudaTensor) => {
            match pickle.get(arguments) {
                Object::Tuple(arguments) => arguments,
                _ => return Err("its arguments are no tuple".into()),
            }
        }
        _ => return Err("it is not what reduce_tensor gives".into()),
    };
    let &[
        _class,
        size,
        stride,
        tensor_offset,
        _storage_class,
        dtype,
        device,
        handle,
        storage_bytes,
        storage_offset,
        _requires_grad,
        counter,
        _counter_offset,
        _event,
        _event_sync,
    ] = arguments.as_slice()
    else {
        return Err(format!("it has {} arguments, and reduce_tensor gives 15", arguments.len()));
    };
    let count = |what: &str, id| match pickle.get(id) {
        Object::Int(n) if *n >= 0 => Ok(*n as u64),
        other => Err(format!("its {what} is {other:?}, which is no count")),
    };
    let counts = |what: &str, id| match pickle.get(id) {
        Object::Tuple(ids) | Object::List(ids) if ids.len() <= 8 => ids.iter().map(|&n| count(what, n)).collect(),
        _ => Err(format!("its {what} is no list of at most 8 counts")),
    };
    let (shape, strides): (Vec<u64>, Vec<u64>) = (counts("size", size)?, counts("stride", stride)?);
    if shape.len() != strides.len() {
        return Err(format!("its size {shape:?} and stride {strides:?} differ in length"));
    }
    let dtype = match pickle.get(dtype) {
        Object::Global(Global::Dtype(name)) => parse_dtype(name).ok_or_else(|| format!("unknown dtype '{name}'"))?,
        _ => return Err("its dtype is none".into()),
    };
    let element = element_bytes(dtype).expect("torch has no types below a byte in the list") as u64;
    let (bytes, offset) = (count("storage size", storage_bytes)?, count("storage offset", storage_offset)?);
    let first = count("offset", tensor_offset)?;
    if shape.contains(&0) || matches!(pickle.get(handle), Object::None) {
        return Ok(None);
    }
    let last = (shape.iter().zip(&strides)).try_fold(first, |n, (&d, &s)| n.checked_add((d - 1).checked_mul(s)?));
    let needed = last.and_then(|n| n.checked_add(1)?.checked_mul(element));
    if needed.is_none_or(|needed| needed > bytes) {
        return Err(format!("size {shape:?} with stride {strides:?} reaches beyond its storage of {bytes} bytes"));
    }
    let far = || "its storage lies beyond any memory".to_string();
    let end = offset.checked_add(bytes).filter(|&end| end < 1 << 48).ok_or_else(far)?;
    let device = u32::try_from(count("device", device)?).map_err(|e| e.to_string())?;
    let handle = match pickle.get(handle) {
        Object::Bytes(bytes) => ipc_handle(bytes)?,
        _ => return Err("its handle is no bytes".into()),
    };
    let pid = match pickle.get(counter) {
        Object::Bytes(name) => sharing_process(name),
        _ => None,
    };
    let tensor = LiveTensor { dtype, shape, strides, memory: 0, offset: offset + first * element };
    Ok(Some((Shared { device: CudaDevice::Ordinal(device), handle, end, tensor }, pid)))
}

/// torch puts a version and a kind before CUDA's 64 bytes; older ones a kind, or nothing (c10/cuda/CUDACachingAllocator.cpp).
fn ipc_handle(bytes: &[u8]) -> Result<IpcHandle, String> {
    let handle = match bytes {
        [_, b'c', handle @ ..] if handle.len() == 64 => handle,
        [b'c', handle @ ..] if handle.len() == 64 => handle,
        handle if handle.len() == 64 => handle,
        [_, b'e', ..] | [b'e', ..] => {
            return Err("its memory is an expandable segment, which CUDA IPC cannot share: start the engine without \
                        PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
                .into());
        }
        other => return Err(format!("its handle has {} bytes, which this weightfs does not know", other.len())),
    };
    Ok(IpcHandle(handle.try_into().expect("its length was matched")))
}

/// The process in `/torch_PID_RANDOM_NUMBER`, the name of torch's shared reference counters.
fn sharing_process(name: &[u8]) -> Option<u32> {
    let name = std::str::from_utf8(name).ok()?.trim_start_matches('/');
    name.strip_prefix("torch_")?.split('_').next()?.parse().ok()
}
