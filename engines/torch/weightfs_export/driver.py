"""The few CUDA driver calls that say where an allocation is and let another process map it. No torch here.

PyTorch's own sharing (torch.multiprocessing) counts references across processes and changes the storages it shares; a
handle of the driver's does neither. CUDA Driver API, "Unified Addressing" and "Memory Management".
"""

import ctypes
import functools

SUCCESS = 0
# CUpointer_attribute
DEVICE_ORDINAL = 9
IS_LEGACY_CUDA_IPC_CAPABLE = 10


class DriverError(Exception):
    pass


class IpcHandle(ctypes.Structure):
    """CUipcMemHandle: 64 opaque bytes."""

    _fields_ = [("reserved", ctypes.c_ubyte * 64)]


class Uuid(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_ubyte * 16)]


@functools.lru_cache(maxsize=None)
def _library():
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as e:
        raise DriverError(f"the CUDA driver is not there: {e}") from e
    # The plain names of these are of an older interface (32-bit sizes, contexts of one device).
    prototypes = {
        "cuInit": [ctypes.c_uint],
        "cuGetErrorName": [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)],
        "cuPointerGetAttribute": [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64],
        "cuMemGetAddressRange_v2": [ctypes.POINTER(ctypes.c_uint64), ctypes.POINTER(ctypes.c_size_t), ctypes.c_uint64],
        "cuIpcGetMemHandle": [ctypes.POINTER(IpcHandle), ctypes.c_uint64],
        "cuDeviceGet": [ctypes.POINTER(ctypes.c_int), ctypes.c_int],
        "cuDeviceGetUuid_v2": [ctypes.POINTER(Uuid), ctypes.c_int],
        "cuDevicePrimaryCtxRetain": [ctypes.POINTER(ctypes.c_void_p), ctypes.c_int],
        "cuCtxPushCurrent_v2": [ctypes.c_void_p],
        "cuCtxPopCurrent_v2": [ctypes.POINTER(ctypes.c_void_p)],
    }
    for name, arguments in prototypes.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, ctypes.c_int
    _check(library, "cuInit", library.cuInit(0))
    return library


def _check(library, call, code):
    if code != SUCCESS:
        name = ctypes.c_char_p()
        known = library.cuGetErrorName(code, ctypes.byref(name)) == SUCCESS and name.value
        raise DriverError(f"{call}: {name.value.decode() if known else code}")


def _call(name, *arguments):
    library = _library()
    _check(library, name, getattr(library, name)(*arguments))


def device_of(pointer):
    """The ordinal of the device that holds `pointer`."""
    ordinal = ctypes.c_int()
    _call("cuPointerGetAttribute", ctypes.byref(ordinal), DEVICE_ORDINAL, pointer)
    return ordinal.value


def can_be_shared(pointer):
    """Was this memory allocated so that `ipc_handle` can work (cudaMalloc, not cuMemCreate or a pool)?"""
    capable = ctypes.c_int()
    _call("cuPointerGetAttribute", ctypes.byref(capable), IS_LEGACY_CUDA_IPC_CAPABLE, pointer)
    return bool(capable.value)


def address_range(pointer):
    """Start and size in bytes of the allocation that `pointer` lies in."""
    base, size = ctypes.c_uint64(), ctypes.c_size_t()
    with _Context(device_of(pointer)):
        _call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), pointer)
    return base.value, size.value


def ipc_handle(base):
    """The 64 bytes by which another process opens the allocation that starts at `base`."""
    handle = IpcHandle()
    with _Context(device_of(base)):
        _call("cuIpcGetMemHandle", ctypes.byref(handle), base)
    return bytes(handle.reserved)


def device_uuid(ordinal):
    """As nvidia-smi writes it: `GPU-` and the 16 bytes in groups of 8-4-4-4-12 digits."""
    device, uuid = ctypes.c_int(), Uuid()
    _call("cuDeviceGet", ctypes.byref(device), ordinal)
    _call("cuDeviceGetUuid_v2", ctypes.byref(uuid), device)
    digits = bytes(uuid.bytes).hex()
    return "GPU-" + "-".join(digits[a:b] for a, b in ((0, 8), (8, 12), (12, 16), (16, 20), (20, 32)))


class _Context:
    """The device's primary context, the one PyTorch uses, as the calling thread's current one."""

    # Retained once and never released: the engine keeps it alive for as long as its weights are there anyway.
    _retained = {}

    def __init__(self, ordinal):
        if ordinal not in self._retained:
            context = ctypes.c_void_p()
            _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), ordinal)
            self._retained[ordinal] = context
        self.context = self._retained[ordinal]

    def __enter__(self):
        _call("cuCtxPushCurrent_v2", self.context)

    def __exit__(self, *_):
        _call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))
