"""Command-line flags made from the constants of config.py.

The annotation of a constant is the type of its flag, and the comment beside it is the help text. The rules for the
values are in settings.py. This module imports no heavy package, so that --help and mistakes are answered at once.
"""

import argparse
import difflib
import logging
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, get_type_hints

from src.utils import settings
from src.utils.errors import SettingError

log = logging.getLogger(__name__)


class Parser(argparse.ArgumentParser):
    """An argument parser whose flags are settings, and whose errors take one line.

    Args:
        config: the module with the constants.
        description: the first lines of the help text.
        settings_names: the constants that become flags.
        defaults: values that replace those of constants in one script.
    """

    def __init__(self, config: ModuleType, description: str, settings_names: Iterable[str], **defaults: Any) -> None:
        # With argparse's own defaults suppressed, it returns the given flags only, even those that equal a default.
        super().__init__(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
        self.config = config
        self.defaults: dict[str, Any] = {}  # flag → value if it is not given
        self.run_defaults = {"checkpoint_path": "checkpoints", "output_path": "outputs", "log_path": "logs"}  # in DIR
        self.add_argument("--quiet", action="store_true", help="no progress, only warnings, errors and results")
        comments, types = comments_of(config), get_type_hints(config)
        for name in settings_names:
            value = defaults.get(name, getattr(config, name))
            kind = types.get(name, type(value))
            options = {"type": kind, "metavar": getattr(kind, "__name__", None)}
            if kind is bool:
                options = {"action": argparse.BooleanOptionalAction}
            elif kind == list[int]:
                options = {"type": int, "metavar": "int", "nargs": "+"}
            shown = " ".join(map(str, value)) if isinstance(value, list) else value
            meaning = comments.get(name, "") + _choices(name)
            self.add_argument(f"--{name.lower()}", help=f"{meaning} (default: {shown})", **options)
            self.defaults[name.lower()] = value

    def add_argument(self, *names: str, default: Any = None, **options: Any) -> argparse.Action:
        """Add a flag as argparse does, but leave its default to `parse_args`; the default of a switch is False."""
        if "help" in options:
            options["help"] = options["help"].replace("%(default)s", str(default))
        action = super().add_argument(*names, **options)
        if action.dest != "help":
            self.defaults[action.dest] = False if options.get("action") == "store_true" else default
        return action

    def add_run(self) -> None:
        """Add --run, the directory that holds the checkpoints, outputs and logs of one training run."""
        self.add_argument(
            "--run",
            type=path,
            metavar="DIR",
            help="directory of one training run: the default paths become DIR/checkpoints, DIR/outputs and DIR/logs; "
            "paths that are given as flags take precedence",
        )

    def add_checkpoint(self) -> None:
        """Add --run and --checkpoint, of a script that uses a trained model."""
        self.add_run()
        self.add_argument(
            "--checkpoint",
            type=path,
            default=f"{self.config.CHECKPOINT_PATH}/best.pth",
            metavar="FILE",
            help="checkpoint of the trained model, which includes its settings (default: %(default)s)",
        )
        self.run_defaults["checkpoint"] = "checkpoints/best.pth"

    def add_model_flags(self, folder: str) -> None:
        """Add the flags of a script that generates images: --run, --checkpoint, --class and --output_dir.

        --class is stored as `classes`, a list of names, or of numbers as text. The results go to OUTPUT_PATH/`folder`
        by default.
        """
        self.add_checkpoint()
        self.add_argument(
            "--class",
            dest="classes",
            nargs="+",
            default=[],
            metavar="CLASS",
            help="classes to generate in turn, by name or number, or all; sample.py makes equally many images of "
            "each; none = images without a class, by the network's unconditional prediction (default: the class of "
            "each image is drawn with its frequency in the training images)",
        )
        self.add_argument(
            "--output_dir",
            type=path,
            default=f"{self.config.OUTPUT_PATH}/{folder}",
            metavar="DIR",
            help="directory of the results (default: %(default)s)",
        )
        self.run_defaults["output_dir"] = f"outputs/{folder}"

    def parse_args(self, *args: Any, **kwargs: Any) -> argparse.Namespace:  # type: ignore[override]  # one signature
        """Parse the command line and check all settings; wrong ones are reported together, with exit status 2.

        Returns:
            The value of every flag, and as `given` the sorted names of the flags that were on the command line.
        """
        given = vars(super().parse_args(*args, **kwargs))
        values = self.defaults | given
        if "dataset" in values:  # other defaults depend on it
            values |= settings.defaults_for(self.config, values["dataset"])
        if run := given.get("run"):
            values |= {name: f"{run}/{place}" for name, place in self.run_defaults.items() if name in values}
        values |= given
        # The shell leaves --run=~/runs as it is, and does not see config.py. No other text may begin with ~.
        values = {name: os.path.expanduser(v) if isinstance(v, str) else v for name, v in values.items()}
        if sentences := settings.problems(self.config, values, given.keys()):
            self.error("; ".join(sentences))
        return argparse.Namespace(**values, given=sorted(given))

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and one line, which suggests what was meant by an unknown flag or a word too many."""
        unknown = re.match(r"unrecognized arguments: (?:-+|(?=[\w-]+=))([\w-]+)", message)
        asked = f"--{unknown[1]}" if unknown else ""  # of --epoch, -epochs and epochs=3, but not of a word alone
        flags = re.findall(r"--\w+", self.format_usage())
        initials = [flag for flag in flags if "_" in flag and asked[2:] == "".join(w[0] for w in flag[2:].split("_"))]
        meant = difflib.get_close_matches(asked, flags, 1, 0.7) or initials[:1]
        if "--checkpoint" in flags and (file := re.match(r"unrecognized arguments: (\S+\.pth)$", message)):
            meant = [f"--checkpoint {file[1]}"]
        message += "".join(f"; did you mean {flag}?" for flag in meant)
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def path(text: str) -> str:
    """The type of a flag that is a path: any text but '', which would be the current directory."""
    if not text:
        raise argparse.ArgumentTypeError("is '', but must be a path")
    return text


def comments_of(config: ModuleType) -> dict[str, str]:
    """The comment beside each constant, read from the module's source, with % doubled for argparse."""
    text = Path(str(config.__file__)).read_text(encoding="utf-8")
    lines = re.findall(r"^([A-Z0-9_]+)\b.+? +# (.+)$", text, re.MULTILINE)
    return {name: comment.replace("%", "%%") for name, comment in lines}


def pick_sampler(sampler: str, given: Collection[str], settings: Mapping[str, Any]) -> str:
    """The sampler for a model with these `settings`: the one named on the command line, or for which it was trained.

    Args:
        sampler: the value of the flag.
        given: names of the flags that were on the command line.
        settings: with "objective".

    Raises:
        SettingError: --eta was given, but is not for that sampler.
    """
    consistent = settings["objective"] == "consistency"
    if consistent and "sampler" not in given:
        if "eta" in given:
            raise SettingError("--eta is for --sampler ddim; the model was trained for consistency")
        return "consistency"
    if consistent != (sampler == "consistency"):
        trained = "consistency" if consistent else "the other samplers"
        log.warning("expect bad images: --sampler is %s, and the model was trained for %s", sampler, trained)
    return sampler


def pick_guidance(scale: float, given: Collection[str], has_classes: bool) -> float:
    """The guidance scale of images with or without classes: without, it is 1, unless it was `given` as a flag."""
    return scale if has_classes or "guidance_scale" in given else 1.0


def pick_classes(asked: Sequence[str], model: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Convert the classes given as --class to `classes` and `class_counts` of a `generation.Generator`.

    Args:
        asked: names, or numbers as text, of classes to generate in turn; or one word alone: "all" stands for all
            classes in order, "none" for images without a class. Empty for classes that are drawn.
        model: the settings of its checkpoint.

    Returns:
        The labels to generate in turn, and the relative frequencies with which classes are drawn if there are none.

    Raises:
        SettingError: a class is unknown, or the model is unconditional.
    """
    if list(asked) == ["none"] and "none" not in model["classes"]:
        return [], []
    return _labels(asked, model["classes"]), model["class_counts"]


def _labels(asked: Sequence[str], known: Sequence[str]) -> list[int]:
    if asked and not known:
        raise SettingError("--class is for models that were trained with classes: this one was not")
    if list(asked) == ["all"]:
        return list(range(len(known)))
    labels = {str(label): label for label in range(len(known))} | {_plain(name): i for i, name in enumerate(known)}
    labels |= {name: label for label, name in enumerate(known)}  # the exact spelling comes before any other
    picked = []
    for name in asked:
        label = labels.get(name, labels.get(_plain(name)))
        if label is None:
            choice = f"choose from {', '.join(known)} or their numbers, or give all or none and nothing else"
            raise SettingError(f"--class {name or repr(name)} is unknown: {choice}")
        picked.append(label)
    return picked


def _plain(name: str) -> str:
    """A class name in lower case, with hyphens for spaces and underscores."""
    return name.lower().replace(" ", "-").replace("_", "-")


def _choices(name: str) -> str:
    """The allowed values of a setting as the end of its help text; empty if they are not listed in settings.py."""
    if name == "SAMPLER":
        samplers = (
            f"{sampler} ({about['steps']} steps, {'stochastic' if about['stochastic'] else 'deterministic'})"
            for sampler, about in settings.SAMPLERS.items()
        )
        return f": {', '.join(samplers)}"
    choices = settings.SETTINGS[name].choices if name in settings.SETTINGS else ()
    return f"; one of {', '.join(choices)}" if choices else ""
