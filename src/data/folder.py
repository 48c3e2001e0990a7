"""A directory of the user's own images: find them, and tell the splits and classes from its folders."""

import hashlib
import os
import re
import stat
import unicodedata
from collections import Counter, defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from src.utils.errors import SettingError

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp")  # in lower or upper case
TEST_SHARE = 0.1  # of the images, where no folders say which are for testing
SPLITS = {  # names of folders, in lower or upper case; Training_Set and test-images are understood, too
    "train": r"train|training",
    "test": r"test|testing|eval|evaluation",
    "val": r"val|valid|validation|dev",  # serves as the test split if there is none
}
OF_SYSTEMS = {"__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found"}  # hold no data
# A folder with one of these files of this program holds no data.
RESULTS = re.compile(r"losses\.png|scalars\.jsonl|(latest|best)\.pth|samples_epoch_\d{4,}\.png|sample_\d{5}.*\.png")
SHOWN = 8  # so many classes, or other things, are listed by name


@dataclass(frozen=True)
class Folder:
    """What a directory holds.

    Attributes:
        root: the directory.
        splits: "train" and "test" → class and path below `root` of each image; the class is "" if there are none.
        classes: sorted names; () if there are none.
        how: how the splits were told apart, in words.
        notes: what was passed over, and what else the user may not expect, in words.
    """

    root: Path
    splits: dict[str, list[tuple[str, str]]]
    classes: tuple[str, ...]
    how: str
    notes: list[str]

    def describe(self) -> str:
        """Say in one line which splits and classes there are."""
        counts = Counter(name for images in self.splits.values() for name, _ in images)
        classes = "no classes"
        if self.classes:
            listed = [f"{name} {counts[name]:,}" for name in self.classes]
            classes = f"{len(listed)} class{'es' * (len(listed) > 1)}: {_shortened(listed)}"
        train, test = (len(self.splits[split]) for split in ("train", "test"))
        return f"{self.root}: {train:,} images for training and {test:,} for testing ({self.how}); {classes}"

    def files(self, split: str) -> tuple[list[str], Tensor]:
        """The paths of a split, a list of length N, and labels (N,) int64, indices of classes; all 0 without classes.

        The order is that of `number`, which mixes the classes: training holds out the last images, and sorted by path,
        these would all be of one class.

        Raises:
            SettingError: there are no images of the split.
        """
        if not (images := self.splits[split]):
            raise SettingError(f"{self.root} holds too few images for {split}ing ({', '.join(SUFFIXES)}): add some")
        label_of = {name: i for i, name in enumerate(self.classes)}
        labels = torch.tensor([label_of.get(name, 0) for name, _ in images])
        return [str(self.root / path) for _, path in images], labels


def survey(root: Path) -> Folder:
    """Find all images below `root`, and tell splits and classes from its folders.

    If `root` has a folder for training and one for testing (see SPLITS), classes are named by the folders in them.
    Otherwise each file's `number` tells whether it is for testing, and classes are named by the folders in `root`. If
    no image is in such a folder, there are no classes.

    Raises:
        SettingError: the directory does not exist, some place in it cannot be read, or its folders are inconsistent.
    """
    if not root.is_dir():
        raise SettingError(f"DATA_PATH is {root}, which is no directory: name the one with your images")
    paths, passed = scan(root)
    notes = [f"not used: {what}" for what in passed]
    if any(map(RESULTS.fullmatch, os.listdir(root))):
        notes.append("results of this program are here, too: its own pictures count as data")
    places = _split_folders(root, paths)
    if not places:
        images = [(_top(path), path) for path in sorted(paths, key=number)]
        classes = _classes(images, root)
        return Folder(root, _divide(images), classes, "by a hash of each path", notes + _one_class(root, paths))
    splits = {
        split: [(_top(path.partition("/")[2]), path) for path in sorted(paths, key=number) if _top(path) == place]
        for split, place in places.items()
    }
    train, test = (root / place for place in places.values())
    classes = _classes(splits["train"], train)
    if unknown := {name for name, _ in splits["test"]} - (set(classes) or {""}):
        what = f"a class {min(unknown)!r}" if any(unknown) else "images beside the class folders"
        raise SettingError(f"{test} has {what}, unlike {train}: give both the same folders")
    others = Counter(_top(path) for path in paths if _top(path) not in places.values())
    notes += [f"not used: {n:,} images {'in ' + name if name else 'beside the folders'}" for name, n in others.items()]
    notes += _one_class(train, [path.partition("/")[2] for _, path in splits["train"]])
    return Folder(root, splits, classes, f"the folders {train.name} and {test.name}", notes)


def number(path: str) -> int:
    """Return a number from 0 to 2^64 - 1 that depends on the path alone, which is relative and has slashes.

    Whether an image is for testing and where it stands in the order do not change when others are added, except in a
    class of one image, which is for training, and in data without any other test image.
    """
    name = unicodedata.normalize("NFC", path)  # macOS may store the same name in another form
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big")


def scan(root: Path) -> tuple[list[str], list[str]]:
    """List the image files below `root`, each real file and each real directory once; links are followed.

    Returns:
        Paths below `root`, with slashes; and what was passed over, in words. Hidden files and folders are not
        mentioned.

    Raises:
        SettingError: some directories or links cannot be read.
    """
    top = os.path.realpath(root)
    seen, images = {top}, list[str]()
    passed: dict[str, list[str]] = defaultdict(list)  # reason → paths
    unreadable: list[str] = []
    folders, links = deque([("", top)]), deque[tuple[str, str]]()  # (path below root, real path)

    def visit(path: str, real: str) -> None:
        try:
            mode = os.stat(real).st_mode
        except OSError as error:  # also a link to nowhere
            if path.lower().endswith(SUFFIXES) or not os.path.splitext(path)[1]:  # an image, or perhaps a folder
                unreadable.append(f"{root / path} ({error.strerror})")
            else:
                passed["unreadable"].append(path)
            return
        if real in seen or top.startswith(os.path.join(real, "")):
            passed["linked a second time"].append(path)
        elif stat.S_ISDIR(mode):
            folders.append((path, real))
        elif not path.lower().endswith(SUFFIXES):
            passed[os.path.splitext(path)[1].lower() or "without a suffix"].append(path)
        elif not stat.S_ISREG(mode):  # opening a pipe would wait for ever
            passed["that are no regular files"].append(path)
        else:
            images.append(path)
        seen.add(real)

    while folders or links:
        if not folders:  # links come last: what is below `root` itself keeps its own name
            visit(*links.popleft())
            continue
        folder, place = folders.popleft()
        try:
            with os.scandir(place) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            unreadable.append(f"{root / folder} ({error.strerror})")
            continue
        if folder and any(RESULTS.fullmatch(entry.name) for entry in entries):
            passed["with results of this program"].append(folder + "/")
            continue
        for entry in entries:
            if entry.name.startswith(".") or entry.name.lower() in OF_SYSTEMS:
                continue
            path = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_symlink():
                links.append((path, os.path.realpath(entry.path)))
            else:
                visit(path, entry.path)
    if unreadable:
        raise SettingError(f"cannot read {_shortened(unreadable)}: make it readable, or move it away")
    return images, [f"{len(paths):,} {reason} ({_shortened(paths, 2)})" for reason, paths in sorted(passed.items())]


def _split_folders(root: Path, paths: Iterable[str]) -> dict[str, str]:
    """Return "train" and "test" → the folder in `root` that is the split; {} if the folders are classes."""
    below: dict[str, set[str]] = defaultdict(set)  # folder in root, or "" for root itself → folders in it
    for path in paths:
        first, _, rest = path.partition("/")
        if rest:
            below[""].add(first)
            if "/" in rest:
                below[first].add(_top(rest))
    roles = _roles(below[""])
    places = {"train": roles["train"], "test": roles["test"] or roles["val"]}
    if all(places.values()):
        for names in places.values():
            if len(names) > 1:
                raise SettingError(f"{root} has the folders {' and '.join(names)}: keep one of them")
        return {split: names[0] for split, names in places.items()}
    if below[""] and sum(map(len, roles.values())) == len(below[""]):
        missing = "train" if not places["train"] else "test"
        there = min(below[""])
        raise SettingError(
            f"{root} has a folder {there}, but none called {missing} with images: add it, or name {root / there}"
        )
    for first in sorted(below):
        inner = _roles(below[first])
        if first and inner["train"] and (inner["test"] or inner["val"]):
            raise SettingError(
                f"{root / first} has folders {', '.join(sorted(below[first]))}, but splits are folders of DATA_PATH "
                f"itself: name {root / first}, or put the splits above the classes"
            )
    return {}


def _roles(folders: Iterable[str]) -> dict[str, list[str]]:
    """Return "train", "test" and "val" → those of the folders with such a name."""
    return {
        role: sorted(f for f in folders if re.fullmatch(rf"({names})([ _-]?(set|data|images|split))?", f.lower()))
        for role, names in SPLITS.items()
    }


def _divide(images: list[tuple[str, str]]) -> dict[str, list[tuple[str, str]]]:
    """Divide images, (class, path) each, in the order of `number`: about TEST_SHARE are for testing, at least one.

    The last image of each class is for training.
    """
    last = dict(images)  # class → path
    candidates = [(name, path) for name, path in images if path != last[name]]
    test = [image for image in candidates if number(image[1]) < TEST_SHARE * 2**64] or candidates[:1]
    chosen = set(test)
    return {"train": [image for image in images if image not in chosen], "test": test}


def _top(path: str) -> str:
    """The first folder in a path; "" if there is none."""
    return path.partition("/")[0] if "/" in path else ""


def _one_class(base: Path, paths: Iterable[str]) -> list[str]:
    """A note if all images are in one class folder and in folders below it, which the user may take for classes."""
    inner = {_top(path.partition("/")[2]) for path in paths}
    tops = {_top(path) for path in paths}
    if len(tops) > 1 or "" in inner or len(inner) < 2:
        return []
    return [f"all images are of one class, {min(tops)}; the folders in {base / min(tops)} are no classes"]


def _classes(images: Iterable[tuple[str, str]], root: Path) -> tuple[str, ...]:
    """Return the sorted names of the classes of `images`, (class, path) each; () if none is in a class folder."""
    names = sorted({name for name, _ in images})
    if names == [""]:
        return ()
    if "" in names:
        raise SettingError(f"{root} has images both in class folders and beside them: move those into a folder, too")
    return tuple(names)


def _shortened(words: list[str], most: int = SHOWN) -> str:
    return ", ".join(words[:most]) + (f" and {len(words) - most:,} more" if len(words) > most else "")
