"""What the machine has, found without importing torch."""

import ctypes
import functools


@functools.cache
def has_cuda() -> bool:
    """Whether the CUDA driver sees a device that CUDA_VISIBLE_DEVICES admits."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
