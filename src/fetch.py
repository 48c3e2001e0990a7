"""Where files come from: find what a data set consists of under a folder, or fetch it, and check every byte.

Five sources are tried in turn: the raw files, anywhere under the data folder; the same packed, as .gz or in the
archive that they are published in; Debian's package, if installed; torchvision's mirror; Debian's package through
apt-get, which needs no privileges and works where only package mirrors can be reached. Every MD5 is checked each time.
"""

import gzip
import hashlib
import io
import logging
import os
import socket
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from http.client import HTTPException
from itertools import chain
from pathlib import Path

from src.errors import SettingError, UserError  # the one way in which every file tells the user what to mend
from src.utils import progress  # the one rule of when a bar is shown

log = logging.getLogger(__name__)

TIMEOUT = 10  # seconds of silence after which a host counts as blocked
DEBIAN = Path("/usr/share/datasets")  # where Debian's packages of data sets put their .gz files


@dataclass(frozen=True, kw_only=True)
class Source:
    """A set of files and where it may be had; without `torchvision` and `debian` it is fetched from nowhere.

    A file is named as it is checked. "x" may lie there raw, as x.gz or in the archive, and the MD5 is that of the
    extracted bytes. Of "x.gz" only the MD5 of the packed bytes is known, so it has to lie there as x.gz.
    """

    name: str
    md5: dict[str, str]  # file name → MD5 of its bytes
    archive: str | None = None  # the .tar.gz that holds them all, if they are published in one
    torchvision: str | None = None  # the class of torchvision.datasets that knows its mirror
    debian: str | None = None  # the package that puts it into DEBIAN / name


def gather(source: Source, root: Path, foreign: Collection[str]) -> dict[str, bytearray]:
    """The checked contents of the source's files, found under the folder `root` or fetched into it.

    A file whose MD5 is in `foreign` belongs to another known set and is passed over, since many share their file
    names; any other unexpected content is a mistake that the user should know of.

    Returns:
        File name without .gz → extracted bytes.

    Raises:
        UserError: a file is damaged or unknown, nothing can be written, or no source has it.
        SettingError: `root` is a file.
    """
    if root.exists() and not root.is_dir():
        raise SettingError(f"DATA_PATH is {root}, which is a file: name a folder")
    files = _read(source, root, source.md5, foreign)
    lying = set(files)
    for folder in (root, DEBIAN / source.name):
        files |= _read(source, folder, [name for name in source.md5 if name not in files], foreign, packed=True)
    if missing := [name for name in source.md5 if name not in files]:
        files |= _fetch(source, root, missing, foreign)
    _write({name: data for name, data in files.items() if name not in lying}, root / source.name)
    return {
        name.removesuffix(".gz"): bytearray(gzip.decompress(data)) if name.endswith(".gz") else data
        for name, data in files.items()
    }


def _fetch(source: Source, root: Path, missing: list[str], foreign: Collection[str]) -> dict[str, bytearray]:
    """The missing files from another machine; raises `UserError`, telling all that was tried."""
    tried = f"{source.name} is not whole in {root}" + (f", nor in {DEBIAN / source.name}" if source.debian else "")
    for label, known, get in (("torchvision", source.torchvision, _download), ("apt-get", source.debian, _apt_get)):
        if not known:
            continue
        log.info("fetching %s through %s", source.name, label)
        try:
            with tempfile.TemporaryDirectory() as scratch:  # removed whatever happens
                get(source, Path(scratch))
                files = _read(source, Path(scratch), missing, foreign)
                rest = [name for name in missing if name not in files]
                files |= _read(source, Path(scratch), rest, foreign, packed=True)
            if len(files) == len(missing):
                return files
            raise FileNotFoundError("some files are missing there")
        except (UserError, OSError, RuntimeError, HTTPException) as error:
            log.info("%s gave no data, going on without it: %s", label, error)
            tried += f", nor through {label} ({error})"
    names = source.archive or ", ".join(f"{name.removesuffix('.gz')}.gz" for name in missing)
    install = f", or run 'apt-get install {source.debian}'" if source.debian else ""
    raise UserError(f"{tried}: put {names} into {root}{install}")


def _download(source: Source, scratch: Path) -> None:
    """Fill `scratch` with what torchvision's first mirror holds, packed."""
    from torchvision import datasets  # here, because only a first run needs it and it is slow to import

    known = getattr(datasets, source.torchvision)
    if source.archive:
        urls = {known.url: known.tgz_md5}
    else:
        urls = {known.mirrors[0] + file: md5 for file, md5 in known.resources}
    # A socket's timeout holds for each address of a host, and not for looking up its name: behind a silent
    # firewall they add up to minutes. A process that only asks can be stopped in time.
    ask = "import sys, urllib.request; urllib.request.urlopen(sys.argv[1])"
    _run([sys.executable, "-c", ask, next(iter(urls))], scratch, TIMEOUT)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)  # torchvision itself would wait for ever
    try:
        for url, md5 in urls.items():
            datasets.utils.download_url(url, scratch, md5=md5)
    finally:
        socket.setdefaulttimeout(before)


def _apt_get(source: Source, scratch: Path) -> None:
    """Fetch Debian's package into `scratch` and unpack it there; apt verifies its signature."""
    for folder in ("lists/partial", "cache/archives/partial"):
        (scratch / folder).mkdir(parents=True)
    # With lists and cache of its own, apt-get needs no privileges and leaves the system as it was.
    apt = ["apt-get", "-o", f"Dir::State::Lists={scratch}/lists", "-o", f"Dir::Cache={scratch}/cache"]
    apt += ["-o", f"Acquire::http::Timeout={TIMEOUT}"]
    unpack = ["sh", "-c", "dpkg-deb -x *.deb ."]
    commands = ([*apt, "update"], [*apt, "download", source.debian], unpack)
    for command in progress(log, iterable=commands, desc=f"apt-get download {source.debian}", unit="command"):
        _run(command, scratch)


def _run(command: list[str], folder: Path, timeout: float = 300) -> None:
    """Run `command` in `folder`; raises `OSError`, with its last words, if it is missing, slow, or fails."""
    try:
        subprocess.run(command, cwd=folder, timeout=timeout, capture_output=True, text=True, check=True)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"no answer within {timeout} s") from None
    except subprocess.CalledProcessError as error:
        raise OSError((error.stderr.strip() or str(error)).splitlines()[-1]) from None


def _read(
    source: Source, folder: Path, names: Iterable[str], foreign: Collection[str], packed: bool = False
) -> dict[str, bytearray]:
    """The checked contents of those `names` that lie anywhere under `folder`, raw or packed.

    An unexpected content is refused, unless the right file lies elsewhere in `folder`.
    """
    files = {}
    names = list(names)
    archived = _unpack(source, folder, names) if packed and names else {}
    for name in names:
        paths = filter(Path.is_file, sorted(folder.rglob(name + ".gz" * packed)))
        wrong = ""
        for path, data in chain(((path, _contents(path, packed)) for path in paths), archived.get(name, [])):
            md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
            if md5 == source.md5[name]:
                files[name] = data
                break
            if md5 not in foreign:
                wrong = f"{path} is not {source.name}'s: MD5 {md5} instead of {source.md5[name]}"
        if wrong and name not in files:
            raise UserError(f"{wrong}. Delete it or move it out of {folder}, and run again")
    return files


def _unpack(source: Source, folder: Path, names: list[str]) -> dict[str, list[tuple[Path, bytearray]]]:
    """What the archives under `folder` hold of each of `names`, with the path of the archive."""
    found: dict[str, list[tuple[Path, bytearray]]] = {}
    for path in filter(Path.is_file, sorted(folder.rglob(source.archive)) if source.archive else []):
        try:  # in memory, by the last part of the name: whatever an archive holds, it is written nowhere
            with tarfile.open(fileobj=io.BytesIO(_contents(path, packed=True)), mode="r:") as archive:
                for member in archive:
                    if member.isfile() and (name := Path(member.name).name) in names:
                        found.setdefault(name, []).append((path, bytearray(archive.extractfile(member).read())))
        except tarfile.TarError as error:
            raise UserError(f"{path} is no archive ({error}): delete it, and run again") from None
    return found


def _contents(path: Path, packed: bool) -> bytearray:
    """The bytes of `path`, decompressed if `packed`; raises `UserError` if it cannot be read."""
    try:
        data = path.read_bytes()
        return bytearray(gzip.decompress(data) if packed else data)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is cut short or no gzip file ({error}): delete it, and run again") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _write(files: dict[str, bytearray], folder: Path) -> None:
    """Write each file under another name first, so that an interrupted one never looks whole."""
    for name, data in files.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:  # same disk, so that the move is atomic
                part = Path(scratch, "part")
                part.write_bytes(data)
                os.replace(part, folder / name)
        except OSError as error:
            raise UserError(f"cannot write to {folder} ({error.strerror}): choose another DATA_PATH") from None
