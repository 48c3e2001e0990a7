"""Fine-tuning: a new training that starts from the weights of another one."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from src.utils import checkpoint
from src.utils.errors import SettingError, UserError

log = logging.getLogger(__name__)

DATA_LAYERS = {"conv_in", "conv_out", "label"}  # their shapes depend on the channels and classes of the data
SHAPE_SETTINGS = "image_size channels unet_dim unet_dim_mults encoder_attention classes".split()
OBJECTIVE_SETTINGS = "prediction schedule_type time_steps".split()


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
        UserError: the file cannot be read (see `checkpoint.load`), or has no averaged weights.
        SettingError: the weights are those of another network.
    """
    state = checkpoint.load(path)
    if "ema" not in state or "settings" not in state:
        raise UserError(f"{path} holds no averaged weights: give another file as --init_from")
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
        if misfits <= DATA_LAYERS:
            remedy += f", or add --ignore_mismatched_sizes to start {', '.join(sorted(misfits))} from random weights"
        raise SettingError(f"--init_from {path} is another network: {'; '.join(changes) or 'its layers'}: {remedy}")
    for name in OBJECTIVE_SETTINGS:
        if before.get(name) != settings[name]:
            log.warning("%s was trained with %s %s, not %s", path, name.upper(), before.get(name), settings[name])
    network.load_state_dict(own | fitting)
    return checkpoint.sha256(path)
