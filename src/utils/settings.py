"""The rules of the settings: which scripts use them, which values are allowed, whether a resumed run may change them.

Settings have the names of the constants in config.py. That module is passed as an argument, never imported.
"""

import ast
import operator
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

SOURCE = Path(__file__).parent.parent


def read_table(file: str, name: str) -> dict[str, dict[str, Any]]:
    """Read the names in a table of another module, each with the constant keyword arguments of its value.

    The module is not imported but parsed, because --help and mistyped flags should not wait seconds for torch.

    Args:
        file: path of the module within src.
        name: of the table, a tuple of strings or a dictionary whose keys are strings.
    """
    for node in ast.parse((SOURCE / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            if isinstance(node.value, ast.Tuple):
                return {ast.literal_eval(item): {} for item in node.value.elts}
            assert isinstance(node.value, ast.Dict)
            return {
                ast.literal_eval(key): _constants(value)
                for key, value in zip(node.value.keys, node.value.values, strict=True)
                if key is not None
            }
    raise LookupError(f"{file} has no table {name}")


def _constants(value: ast.expr) -> dict[str, Any]:
    keywords = value.keywords if isinstance(value, ast.Call) else []
    return {str(k.arg): ast.literal_eval(k.value) for k in keywords if isinstance(k.value, ast.Constant)}


SAMPLERS = read_table("samplers.py", "SAMPLERS")
DATASETS = read_table("data/datasets.py", "DATASETS")
FOLDER = "folder"  # the data set of the user's own images


@dataclass(frozen=True)
class Setting:
    """The scripts that take a setting as a flag, the rule for its value, and whether a resumed run may change it.

    Attributes:
        scripts: names, separated by spaces.
        holds: whether a value of the right type is allowed.
        wording: completes the sentence "NAME is 0, but must be ...".
        choices: the allowed values, which --help lists; empty if there are many.
        resume: "fixed" if a change is refused, because the weights depend on the setting; "noted" if a change is
            allowed with a warning; "free" if it is allowed.
    """

    scripts: str = "train"
    holds: Callable[[Any], bool] = lambda _value: True
    wording: str = ""
    choices: tuple[str, ...] = ()
    resume: str = "fixed"


def _one_of(choices: Iterable[str], scripts: str = "train", resume: str = "fixed") -> Setting:
    names = tuple(choices)
    return Setting(scripts, lambda v: v in names, " or ".join((", ".join(names[:-1]), names[-1])), names, resume)


def _at_least(least: int, scripts: str = "train", resume: str = "fixed", meaning: str = "") -> Setting:
    return Setting(scripts, lambda v: v >= least, f"at least {least}{meaning}", (), resume)


def _directory(scripts: str = "train", wording: str = "a directory") -> Setting:
    return Setting(scripts, bool, wording, (), "free")


ALL = "train sample eval"
SETTINGS = {
    "DATASET": _one_of([*DATASETS, FOLDER]),
    "VAL_SIZE": _at_least(1),
    "IMAGE_SIZE": _at_least(1),
    "CHANNELS": Setting(holds=lambda v: v in (1, 3), wording="1 (grayscale) or 3 (colour)"),
    "BATCH_SIZE": _at_least(1, ALL),
    "LEARNING_RATE": Setting(
        holds=lambda v: 0 < v <= 1, wording="above 0 and at most 1, such as 1e-3", resume="noted"
    ),
    "LR_WARMUP": Setting(holds=lambda v: v >= 0, wording="0 or more steps", resume="noted"),
    "LR_DECAY": Setting(holds=lambda v: 0 <= v <= 1, wording="from 0 to 1", resume="noted"),
    "ACCUMULATE": _at_least(1, resume="free"),
    "EPOCHS": _at_least(1, resume="free"),
    "GRAD_CLIP": Setting(holds=lambda v: v > 0, wording="a positive number (inf = never clip)", resume="noted"),
    "EMA_DECAY": Setting(holds=lambda v: 0 <= v < 1, wording="at least 0 and below 1, such as 0.995"),
    "SEED": Setting(ALL, holds=lambda v: 0 <= v < 2**32, wording="from 0 to 2^32 - 1"),
    "PRECISION": _one_of(("auto", "float32", "bfloat16"), ALL),
    "DROPOUT": Setting(holds=lambda v: 0 <= v < 1, wording="at least 0 and below 1"),
    "COMPILE": Setting(resume="noted"),
    "UNET_DIM": Setting(
        holds=lambda v: v >= 8 and v % 8 == 0, wording="a positive multiple of 8, the groups of GroupNorm"
    ),
    "UNET_DIM_MULTS": Setting(
        holds=lambda v: len(v) > 0 and min(v) >= 1, wording="one or more whole numbers of at least 1"
    ),
    "ENCODER_ATTENTION": Setting(),
    "CLASS_CONDITIONAL": Setting(),
    "CLASS_DROPOUT": Setting(
        holds=lambda v: 0 < v <= 1, wording="above 0, for the network has to learn to do without, and at most 1"
    ),
    "GUIDANCE_SCALE": Setting("sample eval", lambda v: 0 <= v <= 100, "from 0 (ignores the class) to 100"),
    "TIME_STEPS": _at_least(2),
    "SCHEDULE_TYPE": _one_of(read_table("diffusion.py", "SCHEDULES")),
    "BETA_START": Setting(holds=lambda v: 0 < v < 1, wording="above 0 and below 1"),
    "BETA_END": Setting(holds=lambda v: 0 < v < 1, wording="above 0 and below 1"),
    "PREDICTION": _one_of(read_table("diffusion.py", "PREDICTIONS")),
    "OBJECTIVE": _one_of(read_table("diffusion.py", "OBJECTIVES")),
    "LOSS_WEIGHT": _one_of(read_table("diffusion.py", "LOSS_WEIGHTS")),
    "TIME_SAMPLING": _one_of(read_table("diffusion.py", "TIME_SAMPLINGS")),
    "NUM_SAMPLES": _at_least(1, ALL, "free"),
    "SAMPLER": _one_of(SAMPLERS, ALL, "free"),
    "STEPS": Setting(ALL, lambda v: v >= 0, "at least 1 (or 0 for the sampler's own default)", resume="free"),
    "ETA": Setting(ALL, lambda v: 0 <= v <= 1, "from 0 to 1", resume="free"),
    "INTERP_STEPS": _at_least(2, "sample", meaning=", the two ends"),
    "SAVE_EVERY": _at_least(1, resume="free"),
    "SAVE_MINUTES": Setting(holds=lambda v: v >= 0, wording="0 (after every step) or more", resume="free"),
    "SAMPLE_EVERY": _at_least(1, resume="free"),
    "LOG_EVERY": _at_least(1, resume="free"),
    "DEVICE": Setting(
        ALL,
        lambda v: re.fullmatch(r"auto|cpu|(?!auto|cpu)[a-z]+(:\d+)?", v) is not None,
        "auto, cpu, or a device of torch's, such as cuda, cuda:1, mps or xpu",
        resume="free",
    ),
    "DATA_PATH": _directory("train eval", "a directory: --data_path DIR"),
    "CHECKPOINT_PATH": _directory(),
    "OUTPUT_PATH": _directory(),
    "LOG_PATH": _directory(),
}

# Rules between settings, which apply where all of them are present.
RELATIONS: list[tuple[tuple[str, ...], Callable[..., bool], str]] = [
    (("BETA_START", "BETA_END"), lambda start, end: start < end, "BETA_START must be below BETA_END"),
    (
        ("IMAGE_SIZE", "UNET_DIM_MULTS"),
        lambda size, mults: size % 2 ** (len(mults) - 1) == 0 and size > 2 ** (len(mults) - 1),
        "IMAGE_SIZE must be divisible by 2^(levels - 1), for each level but the last halves the image, and above it",
    ),
    (("STEPS", "TIME_STEPS"), lambda steps, time_steps: steps <= time_steps, "STEPS must be at most TIME_STEPS"),
    (
        ("BATCH_SIZE", "ACCUMULATE"),
        lambda batch, parts: batch % parts == 0,
        "BATCH_SIZE must be a multiple of ACCUMULATE",
    ),
    (("DATA_PATH", "OUTPUT_PATH"), lambda *paths: _differ(*paths), "OUTPUT_PATH must not be DATA_PATH"),
    (("DATA_PATH", "OUTPUT_DIR"), lambda *paths: _differ(*paths), "OUTPUT_DIR must not be DATA_PATH"),
    (
        ("OBJECTIVE", "PREDICTION"),
        lambda objective, prediction: objective == "denoising" or prediction == "v",
        "OBJECTIVE consistency is for PREDICTION v",
    ),
    (
        ("OBJECTIVE", "IGNORE_MISMATCHED_SIZES"),
        lambda objective, ignore: objective == "denoising" or not ignore,
        "--ignore_mismatched_sizes is for fine-tuning: what OBJECTIVE consistency distils has to fit the data",
    ),
    (("SAMPLER", "ETA"), lambda sampler, eta: sampler == "ddim" or eta == 0, "ETA is for SAMPLER ddim only"),
]

# Flags that have an effect only if another setting has a certain value; else they are refused.
REQUIRES: dict[str, tuple[str, Callable[[Any], bool], str]] = {
    "BETA_START": (
        "SCHEDULE_TYPE",
        lambda schedule: schedule == "linear",
        "--beta_start is for --schedule_type linear",
    ),
    "BETA_END": ("SCHEDULE_TYPE", lambda schedule: schedule == "linear", "--beta_end is for --schedule_type linear"),
    "GUIDANCE_SCALE": (
        "CLASSES",
        lambda classes: classes != ["none"],
        "--guidance_scale guides towards a class: it does not go with --class none",
    ),
    "INTERP_STEPS": ("INTERPOLATE", bool, "--interp_steps goes with --interpolate"),
    "STRENGTH": ("START_FROM", bool, "--strength goes with --start_from"),
    "INPAINT": ("START_FROM", bool, "--inpaint goes with --start_from"),
    "RESIZE": ("CLASSIFIER_ONLY", operator.not_, "--resize is for Inception, not for --classifier_only"),
    "CROP_FRAME": ("CLASSIFIER_ONLY", operator.not_, "--crop_frame is for Inception, not for --classifier_only"),
    "INCEPTION_WEIGHTS": (
        "CLASSIFIER_ONLY",
        operator.not_,
        "--inception_weights is for Inception, not for --classifier_only",
    ),
    "CLASS_DROPOUT": ("CLASS_CONDITIONAL", bool, "--class_dropout does not go with --no-class_conditional"),
    "OVERWRITE": ("FRESH", bool, "--overwrite goes with --fresh"),
    "IGNORE_MISMATCHED_SIZES": ("INIT_FROM", bool, "--ignore_mismatched_sizes goes with --init_from"),
}


def of_script(script: str) -> list[str]:
    """The names of the settings that a script takes as flags."""
    return [name for name, setting in SETTINGS.items() if script in setting.scripts.split()]


def defaults_for(config: ModuleType, dataset: str) -> dict[str, Any]:
    """The defaults (lower-case names) that depend on the data set; constants that the user has edited are kept."""
    defaults: dict[str, Any] = {}
    if config.CHANNELS == 1:
        defaults["channels"] = 3 if dataset == FOLDER else DATASETS.get(dataset, {}).get("channels", 1)
    if config.DATA_PATH == "./data/fashion-mnist":
        defaults["data_path"] = "" if dataset == FOLDER else f"./data/{dataset}"
    return defaults


def problems(config: ModuleType, values: dict[str, Any], given: Collection[str]) -> list[str]:
    """Check the settings of a script; returns one sentence for each mistake.

    Args:
        config: the module with the constants, whose annotations are the types.
        values: all flags of the script, lower-case name → value.
        given: the lower-case names of those that were on the command line.
    """
    values = {name.upper(): value for name, value in values.items()}
    types = {name: kind for name, kind in get_type_hints(config).items() if name in values}
    wrong = {name: kind for name, kind in types.items() if not _has_type(values[name], kind)}
    sentences = [
        f"{name} is {values[name]!r}, but must be of type {getattr(kind, '__name__', kind)}"
        for name, kind in wrong.items()
    ]
    sentences += [
        f"{name} is {values[name]!r}, but must be {wording}"
        for name, setting in SETTINGS.items()
        if name in values.keys() - wrong.keys() and (wording := _fault(setting, values[name]))
    ]
    if sentences:
        return sentences  # relations between settings that are wrong on their own would confuse
    sentences += [
        wording
        for name, (other, holds, wording) in REQUIRES.items()
        if name.lower() in given and not holds(values[other])
    ]
    return sentences + [
        f"{wording} ({', '.join(f'{name} is {values[name]!r}' for name in names)})"
        for names, holds, wording in RELATIONS
        if values.keys() >= set(names) and not holds(*(values[name] for name in names))
    ]


def changes(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Compare the settings (lower-case names) of a checkpoint with those of the run that resumes from it.

    Returns:
        One sentence for each change that must be refused, and one for each that needs a warning.
    """
    refused: list[str] = []
    noted: list[str] = []
    for name in sorted(name for name in wanted if name.upper() in SETTINGS):
        policy = SETTINGS[name.upper()].resume
        before = repr(saved[name]) if name in saved else "not recorded"
        if policy != "free" and before != repr(wanted[name]):
            sentences = noted if policy == "noted" else refused
            sentences.append(f"{name.upper()} was {before} and is now {wanted[name]!r}")
    return refused, noted


def _fault(setting: Setting, value: Any) -> str:
    """What a value of the right type must be and is not; empty if there is no fault."""
    if not setting.holds(value):
        return setting.wording
    numbers = value if isinstance(value, list) else [value]
    return "below 2^32" if any(isinstance(number, int) and number >= 2**32 for number in numbers) else ""


def _differ(one: str, other: str) -> bool:
    """Whether two paths lead to different places: pictures that are written among the data would become data."""
    return os.path.realpath(one) != os.path.realpath(other)


def _has_type(value: Any, kind: Any) -> bool:
    """Whether a value has the type of its flag: argparse converts flags, but config.py may have been edited."""
    if kind == list[int]:
        return isinstance(value, list) and all(type(v) is int for v in value)
    return type(value) is kind or (kind is float and type(value) is int)
