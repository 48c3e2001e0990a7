"""Constants of a module → flags: types from annotations, help from comments, and checks by the module's own rules.

The module is handed in as `config`. Beside its constants it has RULES, RELATIONS, GOES_WITH, FREE_ON_RESUME,
NOTED_ON_RESUME and `following`.
"""

import argparse
import difflib
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, get_type_hints


class Parser(argparse.ArgumentParser):
    """argparse with constants as flags and errors of one line."""

    def __init__(self, config: ModuleType, description: str, settings: Iterable[str], **defaults: Any) -> None:
        """Flags for the constants named in `settings`; `defaults` replaces a constant's value for one script."""
        # Without argparse's defaults, what it returns is what was given, even where that equals a default.
        super().__init__(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
        self.config = config
        self.defaults: dict[str, Any] = {}  # flag → value where it is not given
        self.add_argument("--quiet", action="store_true", help="no progress, only warnings, errors and results")
        comments, types = comments_of(config), get_type_hints(config)
        for name in settings:
            value = defaults.get(name, getattr(config, name))
            kind = types.get(name, type(value))
            options = {"type": kind, "metavar": getattr(kind, "__name__", None)}
            if kind is bool:
                options = {"action": argparse.BooleanOptionalAction}
            elif kind == list[int]:
                options = {"type": int, "metavar": "int", "nargs": "+"}
            shown = " ".join(map(str, value)) if isinstance(value, list) else value
            self.add_argument(f"--{name.lower()}", help=f"{comments.get(name, '')} (default: {shown})", **options)
            self.defaults[name.lower()] = value

    def add_argument(self, *names: str, default: Any = None, **options: Any) -> argparse.Action:
        """As argparse's, but `default` is filled in by `parse_args`; that of a switch is False."""
        if "help" in options:
            options["help"] = options["help"].replace("%(default)s", str(default))
        action = super().add_argument(*names, **options)
        if action.dest != "help":
            self.defaults[action.dest] = False if options.get("action") == "store_true" else default
        return action

    def add_checkpoint(self) -> None:
        """--checkpoint, which model to use."""
        self.add_argument(
            "--checkpoint",
            type=_not_empty,
            default=f"{self.config.CHECKPOINT_PATH}/best.pth",
            metavar="FILE",
            help="the trained model; it carries its own settings (default: %(default)s)",
        )

    def add_class(self) -> None:
        """--class, which its owner finds as `classes`: names, or numbers as text."""
        self.add_argument(
            "--class",
            dest="classes",
            nargs="+",
            default=[],
            metavar="CLASS",
            help="images of each of these in turn, by name or number, or of all; sample.py makes as many of each "
            "(default: of none in particular)",
        )

    def add_output_dir(self, folder: str) -> None:
        """--output_dir, where to write: OUTPUT_PATH/folder unless given."""
        self.add_argument(
            "--output_dir",
            type=_not_empty,
            default=f"{self.config.OUTPUT_PATH}/{folder}",
            metavar="DIR",
            help="where to write (default: %(default)s)",
        )

    def parse_args(self, *args: Any, **kwargs: Any) -> argparse.Namespace:
        """Parse and check; every setting out of range is reported, with status 2.

        Returns:
            All settings, and as `given` the list of those (lower-case names) that stood on the command line.
        """
        given = vars(super().parse_args(*args, **kwargs))
        values = self.defaults | given
        if "dataset" in values:  # which decides on other defaults
            values |= self.config.following(values["dataset"]) | given
        if found := problems(self.config, values, given.keys()):
            self.error("; ".join(found))
        return argparse.Namespace(**values, given=sorted(given))

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and one line, which says what an unknown flag may have been meant for."""
        unknown = re.findall(r"--[\w-]+", message) if message.startswith("unrecognized") else []
        meant = difflib.get_close_matches("".join(unknown[:1]), re.findall(r"--\w+", self.format_usage()), 1)
        message += "".join(f"; did you mean {flag}?" for flag in meant)
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def problems(config: ModuleType, values: dict[str, Any], given: Collection[str]) -> list[str]:
    """What is wrong with these settings (lower-case names), of which some were `given` as flags, a sentence each."""
    values = {name.upper(): value for name, value in values.items()}
    wrong = {
        name: kind
        for name, kind in get_type_hints(config).items()
        if name in values and not _has_type(values[name], kind)
    }
    found = [
        f"{name} is {values[name]!r}, but must be of type {getattr(kind, '__name__', kind)}"
        for name, kind in wrong.items()
    ]
    found += [
        f"{name} is {values[name]!r}, but must be {wording}"
        for name, (holds, wording) in config.RULES.items()
        if name in values.keys() - wrong.keys() and not holds(values[name])
    ]
    if found:
        return found  # a relation between settings that are themselves wrong would only confuse
    found += [
        wording
        for name, (other, holds, wording) in config.GOES_WITH.items()
        if name.lower() in given and not holds(values[other])
    ]
    return found + [
        f"{wording} ({', '.join(f'{name} is {values[name]!r}' for name in names)})"
        for names, holds, wording in config.RELATIONS
        if values.keys() >= set(names) and not holds(*(values[name] for name in names))
    ]


def changed_settings(config: ModuleType, saved: dict[str, Any], wanted: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What differs in the settings (lower-case names) of a resumed run, a sentence each: refused, and merely noted.

    A setting is any constant of config.py, whether or not it still has an annotation.
    """
    refused, noted = [], []
    for name in sorted(name for name in wanted if hasattr(config, name.upper())):
        if name.upper() in config.FREE_ON_RESUME:
            continue
        before = repr(saved[name]) if name in saved else "not recorded"
        if before != repr(wanted[name]):
            sentences = noted if name.upper() in config.NOTED_ON_RESUME else refused
            sentences.append(f"{name.upper()} was {before} and is now {wanted[name]!r}")
    return refused, noted


def _not_empty(path: str) -> str:
    if not path:
        raise argparse.ArgumentTypeError("is '', but must be a path")
    return path


def comments_of(config: ModuleType) -> dict[str, str]:
    """The comment beside each constant, read from the module's source."""
    text = Path(config.__file__).read_text(encoding="utf-8")
    lines = re.findall(r"^([A-Z0-9_]+)\b.+? +# (.+)$", text, re.MULTILINE)
    return {name: comment.replace("%", "%%") for name, comment in lines}


def _has_type(value: Any, kind: Any) -> bool:
    """Whether a constant has its type still: flags are converted by argparse, but the file may have been edited."""
    if kind == list[int]:
        return isinstance(value, list) and all(type(v) is int for v in value)
    return type(value) is kind or (kind is float and type(value) is int)
