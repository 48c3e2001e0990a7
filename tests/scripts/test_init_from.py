"""`train.py --init_from`: another run's averaged weights as a start, and nothing else of it."""

import hashlib
import logging

import pytest
import torch
from conftest import ROOT, differences

from src import generation
from src.training import Learner
from src.utils import checkpoint, fine_tuning
from src.utils.errors import SettingError, UserError

BUNDLED = ROOT / "weights/fashion-mnist.pth"


@pytest.fixture
def source(quick, tmp_path):
    """Checkpoint folder of a finished run, whose averaged weights are not its weights."""
    quick("source", "--epochs", 1)
    return tmp_path / "source/checkpoint"


@pytest.fixture
def first_state(monkeypatch):
    """What the coming run has before its first step."""
    seen, step = {}, Learner.step

    def spy(self, *batch):
        if not seen:
            seen.update({part: {k: v.clone() for k, v in self.state()[part].items()} for part in ("model", "ema")})
            seen["optimizer"], seen["step"] = self.state()["optimizer"]["state"], self.steps
        return step(self, *batch)

    monkeypatch.setattr(Learner, "step", spy)
    return seen


@pytest.mark.parametrize("file", ["weights.pth", "best.pth", "latest.pth"])
def test_weights_and_average_are_the_averaged_weights_of_the_file_and_all_else_is_fresh(
    file, source, quick, saved, first_state
):
    theirs = saved("source", file)
    first_state.clear()
    assert quick("run", "--epochs", 1, "--seed", 5, "--init_from", source / file) == 0
    assert not differences(first_state["model"], theirs["ema"])
    assert not differences(first_state["ema"], theirs["ema"])
    assert (first_state["optimizer"], first_state["step"]) == ({}, 0)
    origin = {"file": file, "sha256": hashlib.sha256((source / file).read_bytes()).hexdigest()}
    for written in ("best.pth", "latest.pth", "final.pth", "weights.pth"):
        assert saved("run", written)["init_from"] == origin
    assert saved("run")["epoch"] == 1 and len(saved("run")["history"]["train"]) == 1
    assert saved("source")["init_from"] is None


def test_a_run_may_start_from_the_one_that_it_replaces(source, quick, saved, first_state):
    theirs = saved("source", "best.pth")
    first_state.clear()
    quick("source", "--epochs", 1, "--fresh", "--overwrite", "--init_from", source / "best.pth")
    assert not differences(first_state["model"], theirs["ema"])


def test_a_resumed_run_keeps_its_origin_and_needs_neither_flag_nor_file(source, quick, saved):
    quick("run", "--epochs", 1, "--init_from", source / "weights.pth")
    origin = saved("run")["init_from"]
    weights = (source / "weights.pth").read_bytes()
    (source / "weights.pth").unlink()
    quick("run", "--epochs", 2, "--init_from", source / "weights.pth")  # the same command
    quick("run", "--epochs", 3)
    assert saved("run")["init_from"] == origin and saved("run")["epoch"] == 3
    (source / "weights.pth").write_bytes(weights)
    quick("other", "--epochs", 3, "--init_from", source / "weights.pth")
    assert not differences(saved("run", "final.pth"), saved("other", "final.pth"))  # stopped and resumed, to the bit


def test_a_run_that_began_otherwise_is_not_resumed_with_the_flag(source, quick):
    with pytest.raises(SettingError, match="did not start from that file"):
        quick("source", "--epochs", 2, "--init_from", BUNDLED)


def test_a_file_is_known_by_its_content_not_by_its_name(source, quick, tmp_path):
    quick("run", "--epochs", 1, "--init_from", source / "weights.pth")
    renamed, namesake = tmp_path / "renamed.pth", tmp_path / "run/checkpoint/weights.pth"
    renamed.write_bytes((source / "weights.pth").read_bytes())
    quick("run", "--epochs", 2, "--init_from", renamed)
    with pytest.raises(SettingError, match="did not start from that file"):
        quick("run", "--epochs", 3, "--init_from", namesake)


# ---- weights that do not fit ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--unet_dim", 16], "UNET_DIM is 8 there and 16 here: use the same values"),
        (["--unet_dim_mults", 1, 2, 2], r"UNET_DIM_MULTS is \[1, 2\] there and \[1, 2, 2\] here"),
        (["--unet_dim", 16, "--ignore_mismatched_sizes"], "UNET_DIM is 8 there and 16 here: use the same values"),
        (["--no-class_conditional"], "or add --ignore_mismatched_sizes to start label from random weights"),
    ],
)
def test_another_network_is_refused_in_one_line_and_costs_no_file(flags, message, source, quick, tmp_path):
    with pytest.raises(SettingError, match=message):
        quick("run", "--epochs", 1, "--init_from", source / "weights.pth", *flags)
    assert not list((tmp_path / "run/checkpoint").glob("*.pth"))
    before = (source / "best.pth").read_bytes()
    with pytest.raises(SettingError, match=message):
        quick("source", "--fresh", "--overwrite", "--epochs", 1, "--init_from", source / "weights.pth", *flags)
    assert (source / "best.pth").read_bytes() == before


def test_other_classes_in_the_same_number_are_a_warning(source, caplog):
    state = checkpoint.load(source / "weights.pth")
    unet, _ = generation.build(state["settings"])
    fine_tuning.initialise(unet, state["settings"], source / "weights.pth")
    assert not caplog.messages
    digits = {**state["settings"], "classes": list("0123456789")}
    fine_tuning.initialise(unet, digits, source / "weights.pth")
    assert "the classes 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 begin with what" in caplog.text


def test_another_image_size_is_a_warning_where_all_weights_fit_but_not_for_a_teacher(source, caplog):
    state = checkpoint.load(source / "weights.pth")
    settings = {**state["settings"], "image_size": 32}
    unet, _ = generation.build(settings)
    fine_tuning.initialise(unet, settings, source / "weights.pth")
    assert "was trained with IMAGE_SIZE 28, not 32" in caplog.text
    with pytest.raises(SettingError, match="cannot be distilled: IMAGE_SIZE is 28 there and 32 here"):
        fine_tuning.initialise(unet, {**settings, "objective": "consistency"}, source / "weights.pth")


def test_layers_of_other_data_start_anew_where_that_is_asked_for(source, quick, saved, tmp_path):
    """Three channels and two classes instead of one and ten."""
    state = checkpoint.load(source / "weights.pth")
    settings = {**state["settings"], "channels": 3, "classes": ["a", "b"]}
    torch.manual_seed(1)
    unet, _ = generation.build(settings, torch.device("cpu"))
    fresh = {name: weight.clone() for name, weight in unet.state_dict().items()}
    with pytest.raises(
        SettingError, match=r"CHANNELS is 1 there and 3 here; CLASSES is .* start conv_in, conv_out, l"
    ):
        fine_tuning.initialise(unet, settings, source / "weights.pth")
    assert not differences(unet.state_dict(), fresh)
    fine_tuning.initialise(unet, settings, source / "weights.pth", ignore_mismatched_sizes=True)
    kept = {"conv_in.weight", "conv_out.weight", "conv_out.bias", "label.weight"}
    for name, weight in unet.state_dict().items():
        assert torch.equal(weight, fresh[name] if name in kept else state["ema"][name]), name


def test_another_objective_is_a_warning(source, quick, caplog):
    with caplog.at_level(logging.WARNING):
        quick("run", "--epochs", 1, "--init_from", source / "weights.pth", "--prediction", "noise")
    assert "was trained with PREDICTION v, not noise" in caplog.text


def test_a_distilled_start_is_a_warning(source, quick, caplog, tmp_path):
    quick("distilled", "--epochs", 1, "--objective", "consistency", "--init_from", source / "weights.pth")
    assert "was distilled" not in caplog.text
    quick("run", "--epochs", 1, "--init_from", tmp_path / "distilled/checkpoint/weights.pth")
    assert "was distilled: it has learnt to predict the end of a path, not the mean of x_0" in caplog.text


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--time_steps 40", "TIME_STEPS is 50 there and 40 here"),
        ("--schedule_type linear", "SCHEDULE_TYPE is cosine there and linear here"),
    ],
)
def test_another_process_cannot_be_distilled(flags, reason, source, quick, tmp_path):
    start = ["--objective", "consistency", "--init_from", source / "weights.pth"]
    with pytest.raises(SettingError, match=f"weights.pth cannot be distilled: {reason}: use its settings and data"):
        quick("run", "--epochs", 1, *start, *flags.split())
    assert not (tmp_path / "run/checkpoint/latest.pth").exists()


def test_the_betas_of_a_teacher_count_on_the_linear_schedule(source):
    state = checkpoint.load(source / "weights.pth")
    unet, _ = generation.build(state["settings"])

    def distil(schedule):
        checkpoint.save(source / "odd.pth", {**state, "settings": {**state["settings"], "schedule_type": schedule}})
        wanted = {**state["settings"], "schedule_type": schedule, "beta_end": 0.01, "objective": "consistency"}
        return fine_tuning.initialise(unet, wanted, source / "odd.pth")

    assert distil("cosine") == checkpoint.sha256(source / "odd.pth")
    with pytest.raises(SettingError, match=r"BETA_END is 0\.02 there and 0\.01 here"):
        distil("linear")


def test_what_knows_other_classes_predicts_noise_or_is_distilled_already_cannot_be_distilled(source):
    state = checkpoint.load(source / "weights.pth")
    unet, wanted = generation.build(state["settings"])[0], {**state["settings"], "objective": "consistency"}
    for change, odd, reason in (
        ("classes", list("abcdefghij"), "its classes are not those of the data: use its settings and data"),
        ("objective", "consistency", "is distilled already: give the model that it was distilled from"),
        ("prediction", "noise", "predicts noise: give a model of PREDICTION v"),
    ):
        checkpoint.save(source / "odd.pth", {**state, "settings": {**state["settings"], change: odd}})
        with pytest.raises(SettingError, match=reason):
            fine_tuning.initialise(unet, wanted, source / "odd.pth")


def test_a_file_without_averaged_weights_is_refused(quick, tmp_path):
    checkpoint.save(tmp_path / "odd.pth", {"content": 1})
    with pytest.raises(UserError, match="holds no averaged weights"):
        quick("run", "--epochs", 1, "--init_from", tmp_path / "odd.pth")


def test_the_bundled_weights_are_of_the_default_network_and_no_other():
    state = checkpoint.load(BUNDLED, "ema")
    settings, (unet, _) = state["settings"], generation.restore(state)
    assert settings["encoder_attention"] is True and sum(p.numel() for p in unet.parameters()) == 2_292_801
    fresh, _ = generation.build(settings, torch.device("cpu"))
    fine_tuning.initialise(fresh, settings, BUNDLED)
    assert not differences(fresh.state_dict(), unet.state_dict())
    older = {**settings, "encoder_attention": False}
    with pytest.raises(SettingError, match="ENCODER_ATTENTION is True there and False here"):
        fine_tuning.initialise(generation.build(older, torch.device("cpu"))[0], older, BUNDLED)
