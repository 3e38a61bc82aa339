"""What the first product on a GPU would have to wait two seconds for, begun beside all that comes before it.

CUDA starts in a third of a second, and Triton knows the kernels it has compiled by a hash of its own library, which
takes as long. Neither needs torch, nor keeps Python from running: begun before torch is imported, both come for free.
"""

import contextlib
import ctypes
import threading


def warm_up(device: str) -> None:
    """Have the driver, Triton and torch load what any merge on this device needs, if it is one of CUDA's.

    Returns at once. Of what goes wrong nothing is said here: the merge will meet it again.
    """
    kind, _, index = device.partition(":")
    if kind in ("auto", "cuda") and (not index or index.isdecimal()):
        threading.Thread(target=_load, args=(int(index or 0),)).start()


def _load(index: int) -> None:
    with contextlib.suppress(Exception):
        _start_cuda(index)
        with contextlib.suppress(ImportError):
            _hash_triton()
        _load_kernels(index)


def _start_cuda(index: int) -> None:
    """The context that torch will find there.

    Raises: OSError without a driver
    """
    driver = ctypes.CDLL("libcuda.so.1")
    device, context = ctypes.c_int(), ctypes.c_void_p()
    _check(driver.cuInit(0))
    _check(driver.cuDeviceGet(ctypes.byref(device), index))
    _check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device))


def _check(code: int) -> None:
    if code:
        raise OSError(f"CUDA's driver says {code}")


def _hash_triton() -> None:
    from triton.runtime.cache import triton_key

    triton_key()  # which remembers what it found


def _load_kernels(index: int) -> None:
    import torch

    device = torch.device("cuda", index)
    torch.zeros(1, device=device)
    from adaptertools.merging.kernels import has_triton

    if has_triton():
        from adaptertools.merging import triton_kernel

        triton_kernel.warm_up(device)
