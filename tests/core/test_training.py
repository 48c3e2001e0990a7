"""The learning rate's corners and slopes; one step of training, whole, in parts, resumed, and gone wrong."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import differences

from src.diffusion import Diffusion
from src.model import UNet
from src.training import Diverged, Learner, learning_rate
from src.utils.distributed import World


def rates(steps: int, warmup: int, decay: float) -> list[float]:
    return [learning_rate(step, steps, 2.0, warmup, decay) for step in range(1, steps + 2)]


def test_without_warmup_and_decay_it_is_constant():
    assert rates(10, 0, 0.0) == [2.0] * 11


def test_it_rises_in_equal_steps_and_reaches_its_peak_at_the_last_of_them():
    assert rates(10, 4, 0.0) == pytest.approx([0.5, 1.0, 1.5] + [2.0] * 8)


def test_it_falls_in_equal_steps_and_would_be_0_after_the_last():
    assert rates(10, 0, 0.5) == pytest.approx([2.0] * 6 + [1.6, 1.2, 0.8, 0.4, 0.0])


def test_decay_over_the_whole_training_is_a_straight_line():
    assert rates(4, 0, 1.0) == pytest.approx([2.0, 1.5, 1.0, 0.5, 0.0])


def test_after_the_last_step_it_stays_0():
    assert learning_rate(30, 20, 1.0, 0, 0.5) == 0


def test_where_rise_and_fall_overlap_the_lower_counts():
    assert rates(4, 4, 1.0) == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.0])


# ---- one step ----------------------------------------------------------------------------------------------

CPU = torch.device("cpu")
IMAGES = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
LABELS = torch.arange(8) % 3


def learner(**changes: object) -> Learner:
    settings = {
        "batch_size": 8,
        "ema_decay": 0.9,
        "grad_clip": 1.0,
        "class_dropout": 0.5,
        "time_sampling": "uniform",
        "accumulate": 1,
        "compile": False,
        "objective": "denoising",
        **changes,
    }
    torch.manual_seed(0)
    model = UNet(image_size=8, dim=16, dim_mults=(1, 2), num_classes=3, dropout=settings.get("dropout", 0.0))
    return Learner(model, Diffusion(50, "cosine", prediction="v"), World(CPU), torch.float32, settings)


def test_adam_has_its_authors_betas():
    """Its first steps are lr · m̂ / (√v̂ + 1e-8) (Kingma & Ba 2015, Algorithm 1), replayed from the gradients."""
    ours, beta2 = learner(), 0.999
    weight = ours.model.conv_out.bias
    expected, m, v = weight.detach().double().clone(), 0.0, 0.0
    for n in range(1, 4):
        ours.step(IMAGES, LABELS, 0.01 * n)
        g = weight.grad.double()
        m, v = 0.9 * m + 0.1 * g, beta2 * v + (1 - beta2) * g**2
        expected -= 0.01 * n * (m / (1 - 0.9**n)) / ((v / (1 - beta2**n)).sqrt() + 1e-8)
    torch.testing.assert_close(weight.double(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_a_batch_in_parts_is_the_batch(parts):
    """With plain gradient descent in place of Adam, which makes whole steps of gradients that are only rounding."""
    whole, divided = learner(), learner(accumulate=parts)
    for ours in (whole, divided):
        ours.optimizer = torch.optim.SGD(ours.model.parameters(), fused=True)
    for seed in range(3):
        torch.manual_seed(seed)
        loss, norm = whole.step(IMAGES, LABELS, 0.1)
        torch.manual_seed(seed)
        part_loss, part_norm = divided.step(IMAGES, LABELS, 0.1)
        torch.testing.assert_close(part_loss, loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(part_norm, norm, rtol=1e-4, atol=1e-6)
    for a, b in zip(whole.model.parameters(), divided.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("changes", [{}, {"accumulate": 4}, {"time_sampling": "stratified"}, {"dropout": 0.5}])
def test_a_step_from_a_saved_state_is_the_step_that_would_have_been(changes):
    ours = learner(**changes)
    ours.step(IMAGES, LABELS, 1e-3)
    saved = copy.deepcopy(ours.state())
    ours.step(IMAGES, LABELS, 1e-3)
    other = learner(**changes)
    other.load(saved)
    other.step(IMAGES, LABELS, 1e-3)
    assert not differences(ours.state(), other.state())


@pytest.mark.parametrize("factor", [float("nan"), 1e30])
def test_a_gradient_that_is_not_finite_changes_nothing_nor_do_the_steps_after_it(factor):
    """The step itself does not look, so that nobody waits for a device; who does hears of the first such step."""

    def parts() -> list[dict[str, Any]]:
        return [ours.model.state_dict(), ours.ema.model.state_dict(), ours.optimizer.state_dict()]

    ours = learner()
    ours.step(IMAGES, LABELS, 1e-3)
    before = copy.deepcopy(parts())
    ours.step(IMAGES * factor, LABELS, 1e-3)
    for _ in range(3):
        ours.step(IMAGES, LABELS, 1e-3)
    assert not differences(before, parts())
    for look in (ours.synchronize, ours.state):
        with pytest.raises(Diverged, match=r"gradient of step 2 is (nan|inf)"):
            look()


def test_the_sum_of_losses_does_not_depend_on_when_the_device_was_asked():
    often, seldom = learner(), learner()
    losses = []
    for ours in (often, seldom):
        torch.manual_seed(0)
        for _ in range(5):
            loss, _ = ours.step(IMAGES, LABELS, 1e-3)
            losses.append(loss.item())
            if ours is often:
                ours.synchronize()
    assert torch.equal(often.state()["loss_sum"], seldom.state()["loss_sum"])
    assert often.loss_sum.dtype == torch.float64 and often.loss_sum.item() == pytest.approx(sum(losses[:5]), rel=1e-12)


def test_a_gradient_that_is_not_finite_in_the_very_first_step_changes_nothing_either():
    ours = learner()
    before = copy.deepcopy([ours.model.state_dict(), ours.ema.model.state_dict()])
    for x0 in (IMAGES * float("nan"), IMAGES):
        ours.step(x0, LABELS, 1e-3)
    assert not differences(before, [ours.model.state_dict(), ours.ema.model.state_dict()])
    with pytest.raises(Diverged, match="gradient of step 1 is nan"):
        ours.synchronize()


def test_learners_that_start_from_one_state_add_up_their_losses_apart():
    ours, other = learner(), learner()
    ours.step(IMAGES, LABELS, 1e-3)
    state = ours.state()
    other.load(state)
    before = ours.loss_sum.clone()
    loss, _ = other.step(IMAGES, LABELS, 1e-3)
    other.synchronize()
    assert torch.equal(ours.loss_sum, before) and torch.equal(state["loss_sum"], before)
    assert other.loss_sum.item() == pytest.approx(before.item() + loss.item(), rel=1e-12)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_gradients_travel_between_processes_once_a_step_with_its_last_part(parts, monkeypatch):
    ours, silent, seen = learner(accumulate=parts), [], []
    backward = torch.Tensor.backward

    @contextmanager
    def silence(network: torch.nn.Module) -> Iterator[None]:
        silent.append(network)
        yield
        silent.pop()

    def spy(loss: torch.Tensor) -> None:
        seen.append(silent == [ours.network])
        backward(loss)

    monkeypatch.setattr(ours.world, "no_sync", silence)
    monkeypatch.setattr(torch.Tensor, "backward", spy)
    ours.step(IMAGES, LABELS, 1e-3)
    assert seen == [True] * (parts - 1) + [False]
