"""Consistency distillation by the scripts: from a trained model to one that is sampled in two steps."""

import os
import signal

import pytest
import torch
from conftest import arguments, differences

import eval as evaluate
import sample
from src.diffusion import Diffusion
from src.generation import Generator
from src.scores import evaluation
from src.training import Learner
from src.utils import checkpoint, errors, flags


@pytest.fixture
def fast(quick, tmp_path):
    """The folder of checkpoints of a distillation of an ordinary model."""
    assert quick("slow", "--epochs", 1) == 0
    flags = ["--objective", "consistency", "--init_from", tmp_path / "slow/checkpoint/weights.pth"]
    assert quick("fast", "--epochs", 2, *flags) == 0
    return tmp_path / "fast/checkpoint"


@pytest.fixture
def used(monkeypatch) -> list[tuple[str, int]]:
    """Sampler and steps of every Generator."""
    made, init = [], Generator.__init__

    def spy(self: Generator, *args: object, **kwargs: object) -> None:
        init(self, *args, **kwargs)
        made.append((self.sampler, self.steps))

    monkeypatch.setattr(Generator, "__init__", spy)
    return made


def test_a_model_is_sampled_as_it_was_trained_by_all_scripts(used, fast, tmp_path, caplog):
    dpmpp, two = ("dpmpp_2m_sde", 3), ("consistency", 3)  # --steps 3 is among the flags of `quick`
    assert used == [dpmpp, two, two]  # the grids of both trainings, the ordinary one with one epoch

    used.clear()
    for asked in [], ["--steps", 4], ["--sampler", "ddim"], ["--interpolate"]:
        how = ["--checkpoint", fast / "weights.pth", "--output_dir", tmp_path / "images", "--num_samples", 2, *asked]
        assert sample.main(arguments(sample, *how)) == 0
    assert used == [("consistency", 2), ("consistency", 4), ("ddim", 50), ("consistency", 2)]
    assert [r.message for r in caplog.records if r.levelname == "WARNING" and "expect" in r.message] == [
        "expect bad images: --sampler is ddim, and the model was trained for consistency"
    ]

    with pytest.raises(errors.SettingError, match="--eta is for --sampler ddim"):
        flags.pick_sampler("ddim", ["eta"], {"objective": "consistency"})

    args = arguments(evaluate, "--checkpoint", fast / "best.pth")
    ways = {"steps": 0, "eta": 0.0, "precision": "float32", "classes": [], "guidance_scale": 1.0}
    used.clear()
    for given in args.given, ["sampler"]:
        evaluation.load_model(args.checkpoint, "cpu", given=given, sampler=args.sampler, **ways)
    assert [sampler for sampler, _ in used] == ["consistency", args.sampler]


def test_stopped_and_resumed_it_ends_with_the_same_bits(fast, quick, saved, tmp_path, monkeypatch):
    flags = ["--objective", "consistency", "--init_from", tmp_path / "slow/checkpoint/weights.pth"]
    step = Learner.step

    def stopped(self: Learner, *batch: object) -> tuple:
        if self.steps == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", stopped)
        assert quick("stopped", "--epochs", 2, *flags) == 143
    torch.manual_seed(99)
    assert quick("stopped", "--epochs", 2, *flags) == 0
    assert not differences(saved("stopped", "final.pth"), saved("fast", "final.pth"))


def test_best_is_the_last_and_the_objective_cannot_change(fast, quick):
    """`best.pth` holds the last state, whatever the validation loss."""
    assert checkpoint.load(fast / "best.pth")["epoch"] == 2
    assert checkpoint.load(fast / "weights.pth")["settings"]["objective"] == "consistency"
    with pytest.raises(errors.SettingError, match="OBJECTIVE was 'consistency' and is now 'denoising'"):
        quick("fast", "--epochs", 3)


def test_the_teacher_is_the_model_that_it_started_from(fast, saved, quick, tmp_path):
    """Also after a resumed training, for which the file may have gone."""
    start, end = checkpoint.load(tmp_path / "slow/checkpoint/weights.pth")["ema"], checkpoint.load(fast / "final.pth")
    assert not differences(end["teacher"], start)
    assert differences(end["ema"], start)
    assert "teacher" not in checkpoint.load(fast / "weights.pth")
    (tmp_path / "slow/checkpoint/weights.pth").unlink()
    assert quick("fast", "--epochs", 3, "--objective", "consistency") == 0
    assert not differences(saved("fast", "final.pth")["teacher"], start)


def test_without_a_teacher_there_is_nothing_to_distil(quick, tmp_path):
    with pytest.raises(errors.SettingError, match="give it as --init_from FILE"):
        quick("fast", "--objective", "consistency")
    assert not list((tmp_path / "fast").rglob("*.pth"))


def test_training_and_validation_both_ask_the_teacher(quick, tmp_path, monkeypatch):
    """Two epochs, each of four batches and of two of held-out images."""
    quick("slow", "--epochs", 1)
    asked, loss = [], Diffusion.consistency_loss
    monkeypatch.setattr(Diffusion, "consistency_loss", lambda self, *x: asked.append(x[1]) or loss(self, *x))
    monkeypatch.setattr(Diffusion, "loss", None)
    flags = ["--objective", "consistency", "--init_from", tmp_path / "slow/checkpoint/weights.pth"]
    assert quick("fast", "--epochs", 2, *flags) == 0
    modules = [getattr(ask.func, "__self__", ask.func) for ask in asked]  # of partial(teacher, y=y)
    assert modules == [modules[0]] * 12


def test_a_run_without_its_teacher_cannot_go_on(fast, quick):
    """Such as one that an older version of this program has left."""
    state = checkpoint.load(fast / "latest.pth")
    del state["teacher"]
    checkpoint.save(fast / "latest.pth", state)
    with pytest.raises(errors.UserError, match=r"latest\.pth was written by another version of this program"):
        quick("fast", "--epochs", 3, "--objective", "consistency")
