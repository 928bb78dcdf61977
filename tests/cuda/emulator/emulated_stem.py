"""The stem's operators with CPU kernels: those of the GPU, run by the emulator."""

import ctypes

import torch

TYPES = {torch.float16: 2, torch.bfloat16: 3}


class Shape(ctypes.Structure):
    """ngd_fast::StemShape of csrc/cuda/stem_cuda.h; Forward and Backward likewise."""

    _fields_ = [
        ("images", ctypes.c_int64),
        ("height", ctypes.c_int),
        ("width", ctypes.c_int),
        ("channels", ctypes.c_int),
    ] + [("inputs", ctypes.c_int), ("plane_step", ctypes.c_int), ("tap_step", ctypes.c_int), ("type", ctypes.c_int)]


class Forward(ctypes.Structure):
    _fields_ = (
        [("shape", Shape)]
        + [(name, ctypes.c_void_p) for name in ("image", "weight", "gamma", "beta", "mean", "variance")]
        + [("batch_statistics", ctypes.c_bool), ("epsilon", ctypes.c_double)]
        + [(name, ctypes.c_void_p) for name in ("kernel", "statistics", "taps", "out", "index", "workspace")]
    )


class Backward(ctypes.Structure):
    _fields_ = (
        [("shape", Shape), ("image", ctypes.c_void_p), ("gamma", ctypes.c_void_p), ("batch_statistics", ctypes.c_bool)]
        + [(name, ctypes.c_void_p) for name in ("kernel", "statistics", "taps", "index", "grad_out")]
        + [(name, ctypes.c_void_p) for name in ("grad_weight", "grad_gamma", "grad_beta", "workspace")]
    )


def pointer(tensor):
    return None if tensor is None else tensor.data_ptr()


def shape_of(images, weight):
    planes = weight.is_contiguous()
    assert images.is_contiguous() and (planes or weight.is_contiguous(memory_format=torch.channels_last))
    steps = (49, 1) if planes else (1, weight.shape[1])
    height, width = images.shape[2:]
    return Shape(len(images), height, width, *weight.shape[:2], *steps, TYPES[images.dtype])


def unwritten(*shape, dtype, memory_format=torch.contiguous_format):
    """NaN, or 255."""
    empty = torch.empty(shape, dtype=dtype, memory_format=memory_format)
    return empty.fill_(255 if dtype == torch.uint8 else torch.nan)


def give_cpu_kernels(emulator) -> torch.library.Library:
    """Register the emulated kernels for CPU tensors, until the library that is returned is destroyed."""
    library = torch.library.Library("ngd_fast", "IMPL")

    def run(name, args, inputs, outputs):
        buffers = dict(enumerate(inputs)), dict(enumerate(outputs, len(inputs)))
        emulator.run(name, args, *buffers, emulator.library.stem_workspace(ctypes.byref(args.shape)))

    def forward(images, weight, gamma, beta, mean, variance, batch_statistics, epsilon, want_index):
        count, _, height, width = images.shape
        shape = (count, len(weight), height // 4, width // 4)
        out = unwritten(*shape, dtype=images.dtype, memory_format=torch.channels_last)
        index = unwritten(*(shape if want_index else (0,)), dtype=torch.uint8)
        index = index.contiguous(memory_format=torch.channels_last) if want_index else index
        kernel = unwritten(len(weight), 56, dtype=images.dtype)
        statistics = unwritten(5, len(weight), dtype=torch.float32)
        taps = unwritten(1 + len(weight) if batch_statistics else 0, 56, dtype=torch.float32)
        args = Forward(
            shape_of(images, weight), *map(pointer, (images, weight, gamma, beta, mean, variance)), batch_statistics,
            epsilon, *map(pointer, (kernel, statistics, taps, out)), pointer(index) if want_index else None, None,
        )  # fmt: skip
        run("stem_forward", args, (images, weight, gamma, beta, mean, variance), (out, index, kernel, statistics, taps))
        return out, index, kernel, statistics, taps

    def backward(grad_out, images, weight, gamma, index, kernel, statistics, taps, batch_statistics):
        grad_out = grad_out.to(images.dtype).contiguous(memory_format=torch.channels_last)
        grad_weight = torch.empty_like(weight).fill_(torch.nan)
        grad_gamma, grad_beta = (unwritten(len(weight), dtype=torch.float32) for _ in range(2))
        args = Backward(
            shape_of(images, weight), pointer(images), pointer(gamma), batch_statistics,
            *map(pointer, (kernel, statistics, taps, index, grad_out, grad_weight, grad_gamma, grad_beta)), None,
        )  # fmt: skip
        inputs = (grad_out, images, weight, gamma, index, kernel, statistics, taps)
        run("stem_backward", args, inputs, (grad_weight, grad_gamma, grad_beta))
        return grad_weight, grad_gamma, grad_beta

    emulator.library.stem_workspace.restype = ctypes.c_size_t
    library.impl("stem_fwd", forward, "CPU")
    library.impl("stem_bwd", backward, "CPU")
    return library
