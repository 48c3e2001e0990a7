"""Devices: which one to compute on, in which precision, and whatever else differs from one kind to the next.

A kind is a word of torch's: cpu, cuda (NVIDIA, AMD), mps (Apple), xpu (Intel). No other file of src, and no script,
names any but the CPU: they ask here, and this file asks torch. Only the CPU has been run.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from src.errors import SettingError  # an absent device is something the user can mend

# ---- which device, which precision -------------------------------------------------------------------------


def pick_device(name: str) -> torch.device:
    """ "auto" is the accelerator that torch finds, else the CPU; other names are torch's, as "cpu" or "cuda:1".

    Of several processes on a machine, each takes an accelerator of its own for "auto" and for a kind without a number.

    Raises:
        SettingError: this machine, or this build of torch, has no such device.
    """
    accelerator, count = "", 0
    if torch.accelerator.is_available():
        accelerator, count = torch.accelerator.current_accelerator().type, torch.accelerator.device_count()
    if name == "auto":
        name = accelerator or "cpu"
    kind, _, number = name.partition(":")
    if kind == "cpu":
        return torch.device(kind)
    if not number and "LOCAL_RANK" in os.environ:  # torchrun's
        name = f"{kind}:{(number := os.environ['LOCAL_RANK'])}"
    elif number and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise SettingError(f"--device {name} is for one process: with several give {kind}, and each takes its own")
    count = count if kind == accelerator else 0
    if int(number or 0) >= count:
        raise SettingError(f"--device {name}: torch sees {count} {kind} devices; use --device {accelerator or 'cpu'}")
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """ "auto" is bfloat16 where the device is known to have instructions for it (else it is slower than float32)."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu":
        # The processor has them, and torch was not told to compute as an older one (ATEN_CPU_CAPABILITY).
        used = torch.backends.cpu.get_cpu_capability() == "AVX512"
        fast = used and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    elif hasattr(module := torch.get_device_module(device), "is_bf16_supported"):
        with module.device(device):
            fast = module.is_bf16_supported(including_emulation=False)
    else:  # Apple's does not tell
        fast = False
    return torch.bfloat16 if fast else torch.float32


def describe_device(device: torch.device, precision: torch.dtype) -> str:
    """One line for people: which device, and in which precision the network computes."""
    if device.type == "cpu":
        name = f" ({torch.get_num_threads()} threads)"
    else:
        module = torch.get_device_module(device)
        name = f" ({module.get_device_name(device)})" if hasattr(module, "get_device_name") else ""
    return f"{device}{name}, {str(precision).removeprefix('torch.')}"


# ---- arithmetic --------------------------------------------------------------------------------------------


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager[object]:
    """A context in which networks compute in `precision`; their weights and the tensors around them stay float32."""
    return torch.autocast(device.type, precision) if precision != torch.float32 else nullcontext()


@contextmanager
def float32_kernels(device: torch.device, fast: bool) -> Iterator[None]:
    """A context that decides how exact float32 arithmetic is, where a device leaves the choice; the CPU leaves none.

    fast: convolutions and matrix products may round their factors to TF32's 10 bits, and cuDNN times its algorithms
    for each new shape of a batch and keeps the fastest. That is right in training and sampling, whose batches have
    one shape or two, and whose noise is larger than the rounding.

    Not fast: float32 throughout, by the same algorithm every time. Whatever is reported as a number needs that, or it
    would depend on the device: Inception's features, the classifier, the likelihood, the validation loss.
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


# ---- traffic -----------------------------------------------------------------------------------------------


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU, on `device`. The copy is queued there: nobody waits for what the device has yet to do.

    MPS does wait. Its queued copies may read memory that was freed in the meantime (pytorch/pytorch issue 189690).
    """
    return tensor.to(device, non_blocking=device.type != "mps")


def add_up(total: Tensor, values: list[Tensor]) -> None:
    """Add scalars that are on a device to `total`, a float64 on the CPU: one by one, but they travel together."""
    if values:
        for value in torch.stack(values).cpu():
            total += value


def collective_backends(device: torch.device) -> str:
    """What carries tensors between processes, for torch.distributed: gloo the CPU's, its own library the device's."""
    if device.type == "cpu":
        return "gloo"
    return f"cpu:gloo,{device.type}:{ {'cuda': 'nccl', 'xpu': 'xccl'}.get(device.type, 'gloo') }"


def make_current(device: torch.device) -> None:
    """Let this process use `device` where a library does not say which one of its kind it means."""
    module = torch.get_device_module(device)
    if hasattr(module, "set_device"):
        module.set_device(device)


# ---- random numbers ----------------------------------------------------------------------------------------


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's global generators that training on `device` draws from, by the kind of device."""
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Put back what `rng_state` returned; on another kind of device only the CPU's state can be."""
    torch.set_rng_state(state["cpu"])
    if device.type != "cpu" and device.type in state:
        torch.get_device_module(device).set_rng_state(state[device.type], device)
