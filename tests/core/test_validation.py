"""The validation loss, which chooses best.pth, against its closed form."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from src.data import datasets
from src.diffusion import Diffusion
from src.training import validation_loss
from src.utils.distributed import World

CPU = torch.device("cpu")
EPS32 = torch.finfo(torch.float32).eps


class Informed(nn.Module):
    """A network of noise that knows that all pixels of all images are `x0`, and errs by `error(t)` on purpose.

    Its loss at timestep t is then error(t)², whatever the noise. `calls` keeps what it was shown.
    """

    def __init__(self, diffusion: Diffusion, x0: float, error: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.diffusion, self.error = diffusion, error
        self.x0 = nn.Parameter(torch.full((1, 1, 1, 1), x0))
        self.calls: list[tuple[Tensor, Tensor]] = []

    def noise(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.diffusion.predict_eps(x_t, t, self.x0)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()  # or every activation would be kept
        self.calls.append((x_t, t))
        return self.noise(x_t, t) + self.error(t).view(-1, 1, 1, 1)

    def times(self) -> list[int]:
        return [time for _, t in self.calls for time in t.tolist()]

    def noises(self) -> Tensor:
        """(N, pixels), in the order of the images."""
        return torch.cat([self.noise(*call).flatten(1) for call in self.calls])


def one_more(t: Tensor) -> Tensor:
    """The errors 1, 2, … T: the mean of their squares is (T + 1)(2T + 1) / 6."""
    return t + 1.0


def process(rank: int, size: int) -> World:
    """One of several that are not there: the mean over all is its own part of it."""
    world = World(CPU)
    world.rank, world.size = rank, size
    world.mean = lambda value: value / size
    return world


def validate(network: Informed, count: int, batch_size: int, seed: int = 0, world: World | None = None) -> float:
    grey = round(127.5 * (1 + network.x0.item()))  # 0 or 255: white is x_0 = 1
    batches = datasets.in_order(torch.full((count, 1, 4, 4), grey, dtype=torch.uint8), batch_size)
    return validation_loss(network, network.diffusion, batches, count, seed, world or World(CPU))


@pytest.mark.parametrize("x0", [-1.0, 1.0])
@pytest.mark.parametrize("batch_size", [1, 7, 20, 64])  # 7 leaves a smaller batch at the end
@pytest.mark.parametrize("count", [10, 20, 50])
def test_validation_loss_is_the_mean_over_all_timesteps(x0, batch_size, count):
    """T = 10: 11 · 21 / 6 = 38.5. With t fixed in the middle it would be 36, with a last batch of full weight more.

    predict_eps divides the rounding of x_t, of size 5 at most, by √(1 - α̅_0) = 0.1; of an error of 1 to 10 that
    changes the square by less than 1e-4.
    """
    diffusion = Diffusion(10, "linear")
    assert 4 * 5 * EPS32 / diffusion.signal_and_noise(torch.tensor([0]))[1].item() < 1e-4 / 2
    assert validate(Informed(diffusion, x0, one_more), count, batch_size) == pytest.approx(38.5, rel=1e-4)


@pytest.mark.parametrize(
    ("count", "expected"), [(30, sorted([*range(10)] * 3)), (10, [*range(10)]), (5, [0, 2, 4, 6, 8])]
)
def test_validation_gives_every_timestep_as_many_images(count, expected):
    network = Informed(Diffusion(10, "cosine"), 1.0, one_more)
    validate(network, count, 4)
    assert network.times() == expected


def test_validation_looks_at_the_same_noise_every_time_and_at_another_for_every_image():
    """Two epochs' losses are then of the same task. The seed decides on the noise, and nothing else in the process."""
    diffusion = Diffusion(50, "cosine")

    def noises(seed: int) -> Tensor:
        network = Informed(diffusion, 1.0, one_more)
        validate(network, 50, 8, seed)
        return network.noises()

    before = torch.get_rng_state()
    first = noises(3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(noises(3), first)
    other = noises(4)
    assert torch.cdist(torch.cat([first, other]), torch.cat([first, other])).fill_diagonal_(9).min() > 0.5
    # 800 standard normal numbers: their mean and mean square, within 4.5 standard errors.
    assert abs(first.mean().item()) < 4.5 / 800**0.5
    assert abs(first.square().mean().item() - 1) < 4.5 * (2 / 800) ** 0.5


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("count", [20, 13, 2])  # 2 and the last 1 of 13 are fewer images than processes
def test_processes_divide_the_validation_and_its_loss_among_them(size, count):
    diffusion = Diffusion(10, "linear")
    whole = Informed(diffusion, 1.0, one_more)
    expected = validate(whole, count, 4)
    parts = [Informed(diffusion, 1.0, one_more) for _ in range(size)]
    losses = [validate(part, count, 4, world=process(rank, size)) for rank, part in enumerate(parts)]
    assert sum(losses) == pytest.approx(expected, rel=1e-5)
    assert sorted(t for part in parts for t in part.times()) == whole.times()
    assert all(len(x_t) for part in parts for x_t, _ in part.calls)  # no empty batch, whose mean is NaN
    seen = torch.cat([part.noises() for part in parts if part.calls])
    assert torch.cdist(whole.noises(), seen).min(dim=1).values.max() < 1e-3  # each image with its own noise


def test_validation_tells_after_every_batch_that_it_is_alive():
    diffusion, told = Diffusion(10, "linear"), []
    network, images = Informed(diffusion, 1.0, one_more), torch.full((10, 1, 4, 4), 255, dtype=torch.uint8)
    batches = datasets.in_order(images, 4)
    on_batch = lambda: told.append(len(network.calls))  # noqa: E731
    validation_loss(network, diffusion, batches, 10, 0, World(CPU), on_batch)
    assert told == [1, 2, 3]


def test_the_sum_over_the_batches_loses_no_small_loss_beside_a_large_one():
    """In float32, 2²⁴ + 1 is 2²⁴ again; in float64, the mean of 2²⁴ and fifteen ones is exact."""
    losses = iter([2.0**24] + [1.0] * 15)
    diffusion = SimpleNamespace(time_steps=10, loss=lambda *_: torch.tensor(next(losses)))
    diffusion.device = CPU
    found = validation_loss(nn.Linear(1, 1), diffusion, [(torch.zeros(1, 1, 4, 4), None)] * 16, 16, 0, World(CPU))
    assert type(found) is float and found == (2**24 + 15) / 16
