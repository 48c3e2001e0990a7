"""Export a trained network as ONNX, for docs/index.html and other programs: python export.py --checkpoint FILE.

It needs more packages: pip install -r docs/requirements.txt
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # Python does so itself, except with -P or PYTHONSAFEPATH

import config
from src.utils import errors, flags


def parse_args() -> argparse.Namespace:
    parser = flags.Parser(config, __doc__, [])
    parser.add_checkpoint()
    parser.add_argument(
        "--output",
        type=flags.path,
        default=f"{config.OUTPUT_PATH}/model.onnx",
        metavar="FILE",
        help="file to write (default: %(default)s)",
    )
    parser.run_defaults["output"] = "outputs/model.onnx"
    return parser.parse_args()


if __name__ == "__main__":
    errors.prepare("export.py")
    ARGS = parse_args()  # before the heavy imports: --help and mistakes are answered at once

import json
import logging
import warnings
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

from src.diffusion import Diffusion
from src.generation import Generator, restore
from src.model import UNet
from src.utils import checkpoint, directories

log = logging.getLogger("export")

OPSET = 20  # version of ONNX's operators, which docs/index.html's runtime knows
COMPARED = 16  # images of the comparison between PyTorch and ONNX Runtime
LARGE = 1000  # elements of a tensor from which on it is stored in float16
# The settings that a program needs to sample from the network; the schedule goes along as the numbers α̅_t.
SETTINGS = ("image_size", "channels", "classes", "time_steps", "prediction", "objective")


def to_onnx(unet: UNet) -> onnx.ModelProto:
    """The network as a graph: x_t (B,C,H,W) float32, t (1,) int64, y (B,) int64 → output (B,C,H,W) float32.

    y = number of classes means no class. An unconditional network has no input y.
    """
    batch = torch.export.Dim("batch", min=1)
    x_t = torch.zeros(2, unet.channels, unet.image_size, unet.image_size)
    inputs: dict[str, tuple[Tensor, Any]] = {"x_t": (x_t, {0: batch}), "t": (torch.zeros(1, dtype=torch.int64), None)}
    if unet.label is not None:
        inputs["y"] = torch.zeros(2, dtype=torch.int64), {0: batch}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the versions of its own packages
        program = torch.onnx.export(
            unet.to(memory_format=torch.contiguous_format),
            tuple(example for example, _ in inputs.values()),
            input_names=list(inputs),
            output_names=["output"],
            dynamic_shapes={name: dimensions for name, (_, dimensions) in inputs.items()},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    for part in (*model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output):
        del part.metadata_props[:]  # torch notes there from which lines of which files it came
    return model


def halve(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with float16 weights, half as large: each is converted to float32 before it is used.

    Small tensors stay exact. The frequencies of the time embedding are among them, for an error of
    theirs would be multiplied by t.
    """
    half = onnx.ModelProto()
    half.CopyFrom(model)
    casts = []
    for weight in half.graph.initializer:
        name, values = weight.name, onnx.numpy_helper.to_array(weight)
        if values.dtype == np.float32 and values.size >= LARGE:
            weight.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float16), f"{name}.float16"))
            casts.append(onnx.helper.make_node("Cast", [weight.name], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *half.graph.node]
    del half.graph.node[:]
    half.graph.node.extend(nodes)
    return half


def metadata(settings: dict[str, Any], generator: Generator) -> dict[str, str]:
    """Everything that sampling needs beside the network, by name, as JSON."""
    values = {name: settings[name] for name in SETTINGS}
    values |= {"sampler": generator.sampler, "steps": generator.steps}
    values["alpha_bar"] = generator.diffusion.alpha_bar.tolist()
    return {name: json.dumps(value) for name, value in values.items()}


class OnnxNetwork(torch.nn.Module):
    """An exported network, run by ONNX Runtime on the CPU, in the place of a `UNet`."""

    def __init__(self, model: onnx.ModelProto, unet: UNet) -> None:
        super().__init__()
        self.session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        self.no_class = unet.no_class
        self.has_classes = unet.label is not None

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        inputs = {"x_t": x_t.numpy(), "t": t.numpy()}
        if self.has_classes:
            inputs["y"] = (torch.full((len(x_t),), self.no_class) if y is None else y).numpy()
        return torch.from_numpy(self.session.run(None, inputs)[0])  # (B, C, H, W)


def largest_difference(model: onnx.ModelProto, unet: UNet, diffusion: Diffusion, how: dict[str, Any]) -> int:
    """The largest difference of a pixel between images by PyTorch and by ONNX Runtime, from 0 to 255."""
    generator = Generator(unet, diffusion, **how)
    ours = generator.images(0, range(COMPARED)).int()
    generator.unet = OnnxNetwork(model, unet)  # type: ignore[assignment]
    return int((generator.images(0, range(COMPARED)).int() - ours).abs().max())


def main(args: argparse.Namespace) -> int:
    for chatty in ("onnxscript", "onnx_ir"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    path = Path(args.checkpoint)
    state = checkpoint.load(path, "ema")
    with checkpoint.explained(path):
        unet, diffusion = restore(state)
    sampler = flags.pick_sampler("dpmpp_2m_sde", (), state["settings"])  # the two that the page has
    how = {"sampler": sampler, "class_counts": state["settings"]["class_counts"]}
    if os.path.isdir(args.output) or args.output.endswith(os.sep):
        raise errors.SettingError(f"--output {args.output} is a directory: name a file in it")
    if os.path.exists(args.output) and not os.path.isfile(args.output):  # a device, which would be replaced
        raise errors.SettingError(f"--output {args.output} is no ordinary file: name another")
    with directories.output_directories({"output": str(Path(args.output).parent)}):
        exact = to_onnx(unet)
        for model, weights in (halve(exact), "float16"), (exact, "float32"):
            difference = largest_difference(model, unet, diffusion, how)
            log.info("%s weights: %d images differ from PyTorch's by %d of 255 at most", weights, COMPARED, difference)
            if difference <= 1:
                break
        else:
            raise errors.UserError(
                f"an exported pixel differs by {difference}: pip install -U -r docs/requirements.txt"
            )
        onnx.helper.set_model_props(model, metadata(state["settings"], Generator(unet, diffusion, **how)))
        checkpoint.write(Path(args.output), content := model.SerializeToString())
    log.info("wrote %s, %.1f MB, with %s weights", args.output, len(content) / 1e6, weights)
    return 0


if __name__ == "__main__":
    errors.run(lambda: main(ARGS), "export.py", ARGS.quiet)
