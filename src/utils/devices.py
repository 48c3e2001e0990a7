"""Devices: choice of the device and the precision, exactness of float32, and other differences between device types.

Device types have torch's names: cpu, cuda (NVIDIA, AMD), mps (Apple), xpu (Intel). Only the CPU and one
NVIDIA H200 have been tried.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from src.utils.errors import SettingError, first_line
from src.utils.progress import counted
from src.utils.torchrun import place

log = logging.getLogger(__name__)


def pick_device(name: str) -> torch.device:
    """Convert the setting DEVICE to a device.

    Args:
        name: "auto" for an accelerator, or for the CPU if there is none; or torch's name, such as "cpu" or "cuda:1".
            With "auto" or a type without a number, each process of a machine gets its own accelerator.

    Raises:
        SettingError: the machine, or this build of torch, has no such device; or several processes would share one.
    """
    here = place()
    accelerator, count = "", 0
    if torch.accelerator.is_available() and (current := torch.accelerator.current_accelerator()):
        accelerator, count = current.type, torch.accelerator.device_count()
    if name == "auto":
        name = accelerator or "cpu"
    kind, _, number = name.partition(":")
    if kind == "cpu":
        return torch.device(kind)
    if here.size > 1:
        if number:
            raise SettingError(f"--device {name} is for one process: with several give {kind}, and each takes its own")
        name = f"{kind}:{(number := str(here.local_rank))}"
    count = count if kind == accelerator else 0
    if int(number or 0) >= count:
        remedy = f"use --device {accelerator or 'cpu'}"
        if count and here.size > 1:
            remedy = f"start at most {count} processes (torchrun --nproc_per_node {count}), or use --device cpu"
        raise SettingError(f"--device {name}: torch sees {counted(count, f'{kind} device')}; {remedy}")
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """Convert the setting PRECISION to a dtype.

    "auto" is bfloat16 if the device has instructions for it; without them, bfloat16 is slower than float32.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu":
        # The variable ATEN_CPU_CAPABILITY can forbid torch the instructions that the processor has.
        used = torch.backends.cpu.get_cpu_capability() == "AVX512"
        fast = used and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    elif hasattr(module := torch.get_device_module(device), "is_bf16_supported"):
        with module.device(device):
            fast = module.is_bf16_supported(including_emulation=False)
    else:  # torch cannot tell for Apple's GPUs
        fast = False
    return torch.bfloat16 if fast else torch.float32


def describe_device(device: torch.device, precision: torch.dtype) -> str:
    """Describe the device and the precision for the log, as "cpu (2 threads), bfloat16"."""
    if device.type == "cpu":
        name = f" ({counted(torch.get_num_threads(), 'thread')})"
    else:
        module = torch.get_device_module(device)
        name = f" ({module.get_device_name(device)})" if hasattr(module, "get_device_name") else ""
    return f"{device}{name}, {str(precision).removeprefix('torch.')}"


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works here, tried with one operation. A warning says why not.

    It needs a C++ compiler or, on a GPU, Triton; what it prepares is used again for the network.
    """
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:  # there are many kinds
        log.warning("training without --compile, for torch.compile fails here: %s", first_line(error))
        return False
    return True


@contextmanager
def float32_kernels(device: torch.device, fast: bool) -> Iterator[None]:
    """Context that makes float32 arithmetic fast or exact on CUDA devices; it changes nothing on others.

    Args:
        device: on which the context computes.
        fast: True for training and sampling. Convolutions and matrix products may round their factors to the 10
            mantissa bits of TF32, and cuDNN measures its algorithms for each new shape and keeps the fastest. The
            rounding is small compared with the noise of training, and batches have one or two shapes.
            False for reported numbers (Inception features, classifier, likelihood, validation loss), which should
            not depend on the device: full float32 and deterministic algorithms.
    """
    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = fast
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=fast, deterministic=not fast, allow_tf32=fast):
            yield
    finally:
        matmul.allow_tf32 = before


def collective_backends(device: torch.device) -> str:
    """The backends for torch.distributed: gloo for tensors on the CPU, the device's own library for those on it."""
    if device.type == "cpu":
        return "gloo"
    return f"cpu:gloo,{device.type}:{ {'cuda': 'nccl', 'xpu': 'xccl'}.get(device.type, 'gloo') }"


def make_current(device: torch.device) -> None:
    """Make `device` the default of its type in this process, for libraries that do not name a device."""
    module = torch.get_device_module(device)
    if hasattr(module, "set_device"):
        module.set_device(device)
