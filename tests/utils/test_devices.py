"""Which device is taken and how it computes; that none is asked for float64, or waited for; and one that is there."""

import copy
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT, arguments, differences, torchrun_variables
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sample
import train
from src import generation
from src.data import datasets
from src.diffusion import Diffusion, send
from src.model import UNet
from src.samplers import SAMPLERS
from src.scores import classifier, inception, likelihood
from src.training import Learner, rng_state, set_rng_state, validation_loss
from src.utils import checkpoint, devices
from src.utils.devices import float32_kernels, pick_device, pick_precision
from src.utils.distributed import World
from src.utils.errors import SettingError

CPU, META = torch.device("cpu"), torch.device("meta")
KINDS = re.compile(r"\b(cuda|mps|xpu|nccl|xccl)\b|cudnn|tf32", re.IGNORECASE)


def test_one_file_names_the_kinds_of_devices():
    """Beside it, settings.py gives examples of the user's flag, and `send` of the core makes its one exception."""
    files = [*(ROOT / "src").rglob("*.py"), *(ROOT / f"{script}.py" for script in ("train", "sample", "eval"))]
    assert {path.name for path in files if KINDS.search(path.read_text())} == {
        "devices.py",
        "settings.py",
        "diffusion.py",
    }


# ---- which one, and how precise ----------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch) -> Callable[[str, int], None]:
    """`machine(kind, count)`: torch sees so many accelerators of a kind; "" for none."""

    def build(kind: str, count: int) -> None:
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))

    return build


def test_auto_is_the_accelerator_and_else_the_cpu(machine):
    for kind in ("cuda", "mps", "xpu"):
        machine(kind, 1)
        assert pick_device("auto") == pick_device(kind) == torch.device(kind)
        assert pick_device("cpu") == CPU
    machine("", 0)
    assert pick_device("auto") == CPU


def test_each_process_takes_an_accelerator_of_its_own(machine, monkeypatch):
    machine("xpu", 2)
    for name, value in torchrun_variables(1, 3).items():
        monkeypatch.setenv(name, value)
    assert pick_device("auto") == pick_device("xpu") == torch.device("xpu:1")
    with pytest.raises(SettingError, match="--device xpu:0 is for one process: with several give xpu"):
        pick_device("xpu:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(SettingError, match="--device xpu:2: torch sees 2 xpu devices; start at most 2 processes"):
        pick_device("auto")


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps:1", "xpu:2", "tpu", "meta"])
def test_an_absent_device_is_refused_with_one_that_is_there(name, machine):
    machine("mps", 1)
    with pytest.raises(SettingError, match=f"--device {name}: torch sees . {name[:3]}.* devices?; use --device mps"):
        pick_device(name)
    machine("", 0)
    with pytest.raises(SettingError, match="use --device cpu"):
        pick_device(name)


def test_auto_precision_asks_the_device_s_own_module(monkeypatch):
    chosen = []

    @contextmanager
    def current(device: torch.device) -> Iterator[None]:
        chosen.append(device)
        yield

    knowing = SimpleNamespace(device=current, is_bf16_supported=lambda including_emulation: including_emulation)
    monkeypatch.setattr(torch, "get_device_module", lambda device: knowing)
    second = torch.device("xpu:1")
    assert pick_precision("auto", second) == torch.float32  # emulated is not fast
    knowing.is_bf16_supported = lambda including_emulation: True
    assert pick_precision("auto", second) == torch.bfloat16 and chosen == [second, second]
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace())
    assert pick_precision("auto", torch.device("mps")) == torch.float32
    assert pick_precision("bfloat16", torch.device("mps")) == torch.bfloat16


def test_random_states_of_the_device_and_of_the_cpu_are_kept_apart(monkeypatch):
    module = Mock()
    module.get_rng_state.return_value = torch.tensor([7], dtype=torch.uint8)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    state = rng_state(torch.device("mps"))
    assert set(state) == {"cpu", "mps"}
    expected = torch.rand(3)
    set_rng_state(state, torch.device("xpu"))  # another kind: there is nothing to put back but the CPU's
    assert torch.equal(torch.rand(3), expected) and not module.set_rng_state.called
    set_rng_state(state, torch.device("mps"))
    module.set_rng_state.assert_called_once_with(state["mps"], torch.device("mps"))


def test_nothing_waits_for_a_copy_but_where_it_would_be_wrong():
    for kind in ("cpu", "cuda", "xpu", "mps"):
        tensor = Mock()
        send(tensor, torch.device(kind))
        tensor.to.assert_called_once_with(torch.device(kind), non_blocking=kind != "mps")


def test_processes_talk_through_the_library_of_their_devices():
    found = {kind: devices.collective_backends(torch.device(kind)) for kind in ("cpu", "cuda", "xpu", "mps")}
    expected = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl", "xpu": "cpu:gloo,xpu:xccl", "mps": "cpu:gloo,mps:gloo"}
    assert found == expected


# ---- fast or exact float32 ---------------------------------------------------------------------------------


def flags() -> tuple[bool, ...]:
    cudnn = torch.backends.cudnn
    return torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, not cudnn.deterministic


def test_float32_is_fast_or_exact_within_the_block_and_as_before_after_it():
    before = flags()
    for fast in (True, False):
        with pytest.raises(KeyError), float32_kernels(torch.device("cuda"), fast):
            assert flags() == (fast,) * 4
            raise KeyError
        assert flags() == before
        with float32_kernels(CPU, fast):
            assert flags() == before


def test_training_and_sampling_are_fast_and_what_is_reported_is_exact(monkeypatch, quick, tmp_path):
    """The innermost block counts: train.py is fast, but for the validation within it."""
    blocks: list[bool] = []
    used: list[bool] = []
    at_work: dict[str, set[bool]] = {}

    @contextmanager
    def spy(device: torch.device, fast: bool) -> Iterator[None]:
        used.append(fast)
        blocks.append(fast)
        yield
        blocks.pop()

    def watch(owner: Any, name: str, what: str) -> None:
        function = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            at_work.setdefault(what, set()).add(blocks[-1])
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for module in (classifier, inception, likelihood, devices):
        monkeypatch.setattr(module, "float32_kernels", spy)
    watch(Learner, "step", "training")
    watch(train, "validation_loss", "validation")
    watch(generation.Generator, "images", "sampling")
    assert quick("run", "--epochs", 1) == 0
    assert at_work == {"training": {True}, "validation": {False}, "sampling": {True}}
    at_work.clear()
    flags = ["--checkpoint", tmp_path / "run/checkpoint/best.pth", "--output_dir", tmp_path / "samples"]
    assert sample.main(arguments(sample, *flags, "--num_samples", 2, "--steps", 2, "--device", "cpu")) == 0
    assert at_work == {"sampling": {True}} and not blocks

    unet, diffusion = network(CPU)
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    uses = {
        "likelihood": lambda: likelihood.bits_per_dim(unet, diffusion, images, 0, 2, 4),
        "classifier": lambda: classifier.Classifier(classifier._network(1, 2))(images),
        "Inception": lambda: inception.Extractor.forward(SimpleNamespace(network=fake_inception(), frame=0), images),
    }
    for what, use in uses.items():
        used.clear()
        use()
        assert set(used) == {False}, what


def fake_inception() -> torch.nn.Module:
    class Fake(torch.nn.Module):
        fc = torch.nn.Linear(3 * 64, 4)

        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1).float()

    return Fake()


# ---- no float64 on the device, and no waiting for it -------------------------------------------------------


class Float64(TypeError):
    pass


class NoFloat64(TorchDispatchMode):
    """Makes of torch's device "meta", which only knows shapes, an accelerator that has no float64.

    meta itself raises where a value would be needed on the CPU, as `.item()` or an `if` do, and where tensors of two
    devices meet. Here an explicit copy to the CPU is let through and counted; it holds zeros.
    """

    fetched = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # in inference mode, operators arrive that are made of others
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        if func is torch.ops.aten._to_copy.default and args[0].is_meta and kwargs.get("device") == CPU:
            self.fetched += 1
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        result = func(*args, **kwargs)
        for x in tree_leaves((args, kwargs, result)):
            if isinstance(x, Tensor) and x.is_meta and x.dtype == torch.float64:
                raise Float64(str(func))
        return result


def network(device: torch.device, **options: Any) -> tuple[UNet, Diffusion]:
    torch.manual_seed(0)
    unet = UNet(image_size=8, dim=16, dim_mults=(1, 2), num_classes=3)
    return unet.to(device), Diffusion(50, "cosine", **{"prediction": "v", "device": device, **options})


def make_learner(device: torch.device, **changes: Any) -> Learner:
    settings = {
        "batch_size": 8, "ema_decay": 0.9, "grad_clip": 1.0, "class_dropout": 0.5,
        "time_sampling": "stratified", "accumulate": 1, "compile": False, "objective": "denoising",
    } | changes  # fmt: skip
    options = {name: changes[name] for name in ("prediction", "loss_weight") if name in changes}
    return Learner(*network(device, **options), World(device), changes.get("precision", torch.float32), settings)


def batch(device: torch.device) -> tuple[Tensor, Tensor]:
    """x0 (8,1,8,8) and y (8,), as a training step gets them; its work on the device begins with such copies."""
    images = torch.randint(256, (8, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    x0, y = next(datasets.batches(images, torch.arange(8) % 3, 8, seed=0, epoch=0))
    return x0.to(device), y.to(device)


def validate(unet: UNet, diffusion: Diffusion, count: int, device: torch.device) -> float:
    """The validation loss on black images, in batches of four."""
    images = torch.zeros(count, 1, 8, 8, dtype=torch.uint8)
    return validation_loss(unet, diffusion, datasets.in_order(images, 4), count, 0, World(device))


@pytest.fixture
def device(monkeypatch) -> Iterator[NoFloat64]:
    """META as a device without float64, for which torch has a fused Adam."""
    module = sys.modules["torch.optim.optimizer"]  # torch.optim hides it
    supported = module._get_fused_kernels_supported_devices()
    monkeypatch.setattr(module, "_get_fused_kernels_supported_devices", lambda: [*supported, "meta"])
    with NoFloat64() as mode:
        yield mode


@pytest.mark.parametrize(
    ("prediction", "weight", "times", "parts"),
    [("noise", "uniform", "uniform", 1), ("x0", "min_snr", "stratified", 2), ("v", "min_snr", "uniform", 1)],
)
def test_a_training_step_needs_no_float64_and_never_waits(prediction, weight, times, parts, device):
    ours = make_learner(META, prediction=prediction, loss_weight=weight, time_sampling=times, accumulate=parts)
    for _ in range(2):
        loss, norm = ours.step(*batch(META), 1e-3)
    assert loss.is_meta and norm.is_meta and ours.model.conv_in.weight.grad.is_meta
    assert device.fetched == 0


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("prediction", ["noise", "x0", "v"])
def test_sampling_needs_no_float64_and_waits_for_the_images_only(sampler, prediction, device):
    unet, diffusion = network(META, prediction=prediction)
    eta = 0.5 if sampler == "ddim" else 0.0
    generator = generation.Generator(unet, diffusion, sampler, 3, eta, classes=[0, 2], guidance_scale=2.0)
    images = generator.images(0, range(4))
    assert images.device == CPU and device.fetched == 1
    if sampler == "dpmpp_2m":
        assert generator.interpolate(0, 3, 3).device == CPU


def test_validation_needs_no_float64_and_waits_once(device):
    assert validate(*network(META), 10, META) == 0
    assert device.fetched == 1


def test_the_likelihood_needs_no_float64_on_the_device(device):
    unet, diffusion = network(META)
    images = torch.zeros(10, 1, 8, 8, dtype=torch.uint8)
    likelihood.bits_per_dim(unet, diffusion, images, 0, 3, 4)  # of nothing, for the device only knows shapes
    assert device.fetched > 0


@pytest.mark.parametrize("use", ["training", "sampling", "validation"])
def test_a_table_on_the_device_is_caught(use, device):
    """The negative control of the tests above."""
    ours = make_learner(META)
    with pytest.raises(Float64):
        ours.diffusion.alpha_bar = ours.diffusion.alpha_bar.to(META)
        if use == "training":
            ours.step(*batch(META), 1e-3)
        elif use == "sampling":
            generation.Generator(ours.model, ours.diffusion, "ddpm", 2).images(0, range(1))
        else:
            validate(ours.model, ours.diffusion, 4, META)


def test_a_step_that_looks_at_its_gradient_is_caught(device, monkeypatch):
    """So is waiting: the control of `fetched == 0`."""
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: clip(*args, error_if_nonfinite=True))
    with pytest.raises(RuntimeError, match="meta tensors"):
        make_learner(META).step(*batch(META), 1e-3)


# ---- an accelerator that is there --------------------------------------------------------------------------

there = pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator: torch sees none here")


@pytest.mark.accelerator
@there
@pytest.mark.parametrize("precision", ["float32", "auto", "bfloat16"])
def test_an_accelerator_trains_and_its_state_comes_back_to_the_last_bit(precision, tmp_path):
    device = pick_device("auto")
    ours, other = (make_learner(device, precision=pick_precision(precision, device)) for _ in range(2))
    first, _ = ours.step(*batch(device), 1e-3)
    expected, _ = make_learner(CPU).step(*batch(CPU), 1e-3)
    assert 0.5 < first.item() / expected.item() < 2  # other noise, for the device draws its own
    torch.save(copy.deepcopy(ours.state()), path := Path(tmp_path, "state.pth"))
    drawn = torch.rand(5, device=device)
    other.load(torch.load(path, map_location="cpu", weights_only=True))
    assert torch.equal(torch.rand(5, device=device), drawn)
    before, after = ours.state(), other.state()
    assert not differences({**before, "rng": 0}, {**after, "rng": 0})


@pytest.mark.accelerator
@there
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_accelerator_samples_the_cpu_s_images(sampler):
    state = checkpoint.load(ROOT / "weights/fashion-mnist.pth", "ema")
    images = generation.Generator(*generation.restore(state, pick_device("auto")), sampler, 4).images(0, range(4))
    expected = generation.Generator(*generation.restore(state, CPU), sampler, 4).images(0, range(4))
    assert (images.int() - expected.int()).abs().float().mean() < 2  # grey levels


@pytest.mark.accelerator
@there
def test_an_accelerator_leaves_weights_alone_after_a_gradient_that_is_not_finite():
    ours = make_learner(device := pick_device("auto"))
    x0, y = batch(device)
    ours.step(x0, y, 1e-3)
    before = copy.deepcopy((ours.model.state_dict(), ours.ema.model.state_dict()))
    ours.step(x0 * float("nan"), y, 1e-3)
    assert not differences(before, (ours.model.state_dict(), ours.ema.model.state_dict()))
