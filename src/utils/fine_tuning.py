"""Fine-tuning: a new training that starts from the weights of another one."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from src.utils import checkpoint
from src.utils.errors import SettingError

log = logging.getLogger(__name__)

DATA_LAYERS = {"conv_in", "conv_out", "label"}  # their shapes depend on the channels and classes of the data
SHAPE_SETTINGS = "image_size channels unet_dim unet_dim_mults encoder_attention classes".split()
PROCESS_SETTINGS = "image_size prediction schedule_type time_steps".split()  # what the network is trained to predict
LINEAR_SETTINGS = "beta_start beta_end".split()  # likewise, on the linear schedule


def initialise(
    network: nn.Module, settings: Mapping[str, Any], path: Path, ignore_mismatched_sizes: bool = False
) -> str:
    """Load the averaged weights of another run's checkpoint, or of its weights.pth, into a new network.

    Args:
        network: with random weights, built from `settings`.
        settings: of the new training, with "classes".
        path: the checkpoint.
        ignore_mismatched_sizes: keep the random weights of the layers that depend on the data (first and last
            convolution, class embedding) if their shapes differ. All other layers must fit.

    Returns:
        The SHA-256 of the file.

    Raises:
        UserError: the file cannot be read, or has no averaged weights (see `checkpoint.load_with_hash`).
        SettingError: the weights are those of another network, or cannot be the teacher of a distillation.
    """
    state, sha256 = checkpoint.load_with_hash(path, "ema")
    source, own, before = state["ema"], network.state_dict(), state["settings"]
    fitting = {name: weight for name, weight in source.items() if name in own and weight.shape == own[name].shape}
    misfits = {name.split(".")[0] for name in (source.keys() | own.keys()) - fitting.keys()}
    if misfits and not (ignore_mismatched_sizes and misfits <= DATA_LAYERS):
        changes = [
            f"{name.upper()} is {before.get(name)} there and {settings[name]} here"
            for name in SHAPE_SETTINGS
            if before.get(name) != settings[name]
        ]
        remedy = "use the same values"
        if misfits <= DATA_LAYERS and settings["objective"] != "consistency":  # a teacher needs all its weights
            remedy += f", or add --ignore_mismatched_sizes to start {', '.join(sorted(misfits))} from random weights"
        raise SettingError(f"--init_from {path} is another network: {'; '.join(changes) or 'its layers'}: {remedy}")
    names = PROCESS_SETTINGS + LINEAR_SETTINGS * (settings["schedule_type"] == "linear")
    changed = [name for name in names if before.get(name) != settings[name]]
    if settings["objective"] == "consistency":
        _check_teacher(path, before, settings, changed)
    elif "label" not in misfits and before.get("classes") != settings["classes"]:
        old, new = ", ".join(before["classes"]), ", ".join(settings["classes"])
        log.warning("the classes %s begin with what %s learnt of %s, in this order", new, path, old)
    if before["objective"] == "consistency":
        log.warning("%s was distilled: it has learnt to predict the end of a path, not the mean of x_0", path)
    for name in changed:
        log.warning("%s was trained with %s %s, not %s", path, name.upper(), before.get(name), settings[name])
    network.load_state_dict(own | fitting)
    return sha256


def _check_teacher(path: Path, before: Mapping[str, Any], settings: Mapping[str, Any], changed: Sequence[str]) -> None:
    """Raise SettingError if the model at `path` cannot be the teacher, which is used as it is, without training."""
    if before["objective"] == "consistency":
        raise SettingError(f"--init_from {path} is distilled already: give the model that it was distilled from")
    if before.get("prediction") != "v":
        raise SettingError(f"--init_from {path} predicts {before.get('prediction')}: give a model of PREDICTION v")
    reasons = [f"{name.upper()} is {before.get(name)} there and {settings[name]} here" for name in changed]
    if before.get("classes") != settings["classes"]:
        reasons.append("its classes are not those of the data")
    if reasons:
        raise SettingError(f"--init_from {path} cannot be distilled: {'; '.join(reasons)}: use its settings and data")
