"""The race between this repository and its peers, on tiny networks and in a fraction of a second."""

from types import SimpleNamespace

import benchmark
import contestants
import pytest
import race
import torch

from src.generation import Generator

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH = torch.zeros(4, 1, 32, 32), torch.zeros(4, dtype=torch.long)


def batches():
    while True:
        yield BATCH


def test_they_train_in_turns_for_the_same_time_and_are_scored_at_their_minutes(monkeypatch):
    now, order = [0.0], []

    def racer(name, seconds):
        def train_step(x0, y):
            now[0] += seconds
            order.append(name)

        return SimpleNamespace(name=name, train_step=train_step)

    def score(contestant):
        now[0] += 100  # which does not count
        return float(len(contestant.name))

    monkeypatch.setattr(race, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    racers = [racer("fast", 1.0), racer("slow", 5.0)]
    first, second = race.race(racers, [batches(), batches()], [0.5, 1], score)
    assert [(row["name"], row["minutes"], row["images"]) for row in first + second] == [
        ("fast", 0.5, 4 * 30),  # a step of 4 images a second
        ("slow", 0.5, 4 * 6),
        ("fast", 1, 4 * 60),
        ("slow", 1, 4 * 12),
    ]
    assert {row["fid"] for row in first} == {4.0}
    assert order[:24] == (["fast"] * 10 + ["slow"] * 2) * 2


def test_the_table_has_a_line_for_each_and_gaps_where_there_is_no_score():
    row = {"minutes": 5, "images": 1000, "fid": 20.04}
    rows = [row | {"name": "a"}, row | {"name": "a", "minutes": 10, "images": 2000}, row | {"name": "b"}]
    assert race.table(rows).splitlines() == [
        "| FID (images seen) after | 5 minutes | 10 minutes |",
        "| --- | --- | --- |",
        "| a | 20.0 (1,000) | 20.0 (2,000) |",
        "| b | 20.0 (1,000) |  |",
    ]


def test_a_plot_is_drawn(tmp_path):
    race.plot([{"name": "a", "minutes": m, "images": m, "fid": 30 / m} for m in (1, 2, 4)], tmp_path / "race.png")
    assert (tmp_path / "race.png").read_bytes()[:4] == b"\x89PNG"


def test_ours_learns_by_the_schedule_of_the_learning_rate(monkeypatch):
    run = contestants.trainer(64, **benchmark.QUICK.settings, lr_warmup=10, device="cpu")
    rates = []
    monkeypatch.setattr(run.learner, "step", lambda x0, y, rate: rates.append(rate))
    contestants.ours("", run).train_step(*BATCH)
    assert rates == [pytest.approx(run.args.learning_rate / 10)]


@pytest.mark.parametrize("peer", contestants.PEERS, ids=lambda p: p.__name__)
def test_a_peer_generates_images_through_its_own_noise_schedule(peer):
    pytest.importorskip(peer.__name__)
    contestant = peer(torch.device("cpu"))
    contestant.train_step(*BATCH)
    images = Generator(contestant.averaged(), contestant.diffusion, steps=2).images(0, range(2))
    assert images.shape == (2, 1, 32, 32) and images.dtype == torch.uint8


def test_the_process_of_diffusers_is_its_own():
    scheduler = pytest.importorskip("diffusers").DDPMScheduler(clip_sample=False)
    process = contestants.diffusers(torch.device("cpu")).diffusion
    assert torch.allclose(process.alpha_bar, scheduler.alphas_cumprod.double(), rtol=1e-4)  # theirs is in float32
    x_t, output = torch.randn(2, 1, 1, 32, 32)
    theirs = scheduler.step(output, 500, x_t).pred_original_sample
    # α̅_500 is about 0.078, so 1e-4 of it changes x_0 by about 1e-4 of 1/0.28 times |x_t| + |output| < 10
    assert torch.allclose(process.predict_x0(x_t, torch.tensor([500]), output), theirs, atol=2e-3)


def test_the_process_of_denoising_diffusion_pytorch_is_its_own():
    pytest.importorskip("denoising_diffusion_pytorch")
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    theirs = GaussianDiffusion(Unet(dim=8, dim_mults=(1, 2), channels=1), image_size=32)
    process = contestants.denoising_diffusion_pytorch(torch.device("cpu")).diffusion
    x_t, output = torch.randn(2, 1, 1, 32, 32)
    t = torch.tensor([500])
    assert torch.allclose(process.predict_x0(x_t, t, output), theirs.predict_start_from_v(x_t, t, output), atol=1e-5)
