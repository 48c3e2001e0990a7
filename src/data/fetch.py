"""Find the files of a data set in a folder, or download them, and check their MD5.

Five sources are tried in this order:
1. the uncompressed files, anywhere under the data folder;
2. the same files as .gz, or in the archive in which they are published, anywhere under the data folder;
3. Debian's package, if it is installed;
4. torchvision's mirror;
5. Debian's package, downloaded by apt-get. It needs no privileges and works where only package mirrors are reachable.
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
from itertools import chain, islice
from pathlib import Path

from src.data.folder import SUFFIXES
from src.utils.errors import SettingError, UserError
from src.utils.progress import on_terminal, progress

log = logging.getLogger(__name__)

TIMEOUT = 10  # seconds without an answer after which a host counts as unreachable
DEBIAN = Path("/usr/share/datasets")  # Debian's packages install their .gz files in DEBIAN / name


@dataclass(frozen=True, kw_only=True)
class Source:
    """The files of a data set, and where to download them; with neither `torchvision` nor `debian`, nowhere.

    Attributes:
        name: of the data set, and of the folder for its files.
        md5: the MD5 of each file by its name. For a file "x" it is the MD5 of the uncompressed bytes, and the file may
            be there as x, as x.gz or in the archive. For "x.gz" only the MD5 of the compressed bytes is known, so the
            file must be there as x.gz.
        archive: name of the .tar.gz file that contains them all, if they are published as one.
        torchvision: name of the class in torchvision.datasets that has the URLs.
        debian: name of Debian's package.
    """

    name: str
    md5: dict[str, str]
    archive: str | None = None
    torchvision: str | None = None
    debian: str | None = None


def gather(source: Source, root: Path, foreign: Collection[str]) -> dict[str, bytearray]:
    """Return the contents of the source's files, checked by MD5; missing files are downloaded.

    Files are read where they are, compressed or not. Only what is downloaded is written, decompressed, to
    `root`/`source.name`, so that the next run reads it from there.

    Args:
        root: the data folder; created if something is downloaded.
        foreign: MD5s of the files of other data sets, which have the same names. Such files are ignored; any other
            file with an unexpected MD5 is an error.

    Returns:
        The uncompressed bytes of each file, by its name without .gz.

    Raises:
        UserError: `root` cannot be read, a file is damaged or unknown, or no source has it.
        SettingError: `root` is a file, or it has images of the user's own and not the source's files.
    """
    try:
        os.listdir(root)
    except FileNotFoundError:
        pass  # nothing is there yet
    except NotADirectoryError:
        raise SettingError(f"DATA_PATH is {root}, which is a file, or in one: name a folder") from None
    except OSError as error:
        raise UserError(f"cannot read DATA_PATH {root}: {error.strerror}") from None
    files = _read(source, root, source.md5, foreign)
    for folder in (root, DEBIAN / source.name):
        files |= _read(source, folder, [name for name in source.md5 if name not in files], foreign, packed=True)
        if not files and (image := _image(root)):
            raise SettingError(
                f"DATA_PATH {root} has images, such as {image.name}, but not the files of {source.name}: add "
                "--dataset folder to train on them, or name another folder"
            )
    if missing := [name for name in source.md5 if name not in files]:
        fetched = _fetch(source, root, missing, foreign)
        _keep(fetched, root / source.name)
        files |= fetched
    return {
        name.removesuffix(".gz"): bytearray(gzip.decompress(data)) if name.endswith(".gz") else data
        for name, data in files.items()
    }


def _image(root: Path) -> Path | None:
    """An image among the first files under `root`, if there is any."""
    return next((path for path in islice(root.rglob("*"), 1000) if path.suffix.lower() in SUFFIXES), None)


def _fetch(source: Source, root: Path, missing: list[str], foreign: Collection[str]) -> dict[str, bytearray]:
    """Download the missing files and return their contents.

    Raises:
        UserError: no source has them; the message lists every place that was tried.
    """
    tried = f"{source.name} is not whole in {root}" + (f", nor in {DEBIAN / source.name}" if source.debian else "")
    sources = ("torchvision", source.torchvision, _download), ("apt-get", source.debian, _apt_get)
    for label, has_it, fetch in sources:
        if not has_it:
            continue
        log.info("fetching %s through %s", source.name, label)
        try:
            with tempfile.TemporaryDirectory() as scratch:
                fetch(source, Path(scratch))
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
    """Download the .gz files, or the archive, from torchvision's first mirror into `scratch`."""
    from torchvision import datasets  # slow to import, and only the first run needs it

    assert source.torchvision  # else `_fetch` does not call this
    dataset = getattr(datasets, source.torchvision)
    urls = [dataset.url] if source.archive else [dataset.mirrors[0] + file for file, _ in dataset.resources]
    # A socket's timeout applies to each address of a host separately, and not to the name lookup. Behind a firewall
    # that drops packets, the waits add up to minutes. So a separate process opens the first URL: it can be killed.
    open_url = "import sys, urllib.request; urllib.request.urlopen(sys.argv[1])"
    _run([sys.executable, "-c", open_url, urls[0]], scratch, TIMEOUT)
    for url in progress(log, iterable=urls, desc=f"downloading {source.name}", unit=" files"):
        download(url, scratch / Path(url).name, TIMEOUT)


def download(url: str, file: Path, timeout: float, sha256_prefix: str | None = None) -> None:
    """Download a file, which has its name only when it is complete.

    Args:
        url, file: from where to where.
        timeout: seconds without an answer, after which the host counts as blocked.
        sha256_prefix: first digits of the file's SHA-256; None for any file.

    Raises:
        OSError or HTTPException: the host gives no such file. RuntimeError: its SHA-256 is another.
    """
    from torch import hub  # slow to import, and seldom needed

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(timeout)  # torch.hub sets no timeout
    try:
        hub.download_url_to_file(url, str(file), sha256_prefix, progress=on_terminal(log))
    finally:
        socket.setdefaulttimeout(before)


def _apt_get(source: Source, scratch: Path) -> None:
    """Download Debian's package into `scratch` and unpack it there; apt-get verifies its signature."""
    for folder in ("lists/partial", "cache/archives/partial"):
        (scratch / folder).mkdir(parents=True)
    # With its own lists and cache, apt-get needs no privileges and does not change the system.
    apt = ["apt-get", "-o", f"Dir::State::Lists={scratch}/lists", "-o", f"Dir::Cache={scratch}/cache"]
    apt += ["-o", f"Acquire::http::Timeout={TIMEOUT}"]
    unpack = ["sh", "-c", "dpkg-deb -x *.deb ."]
    commands = ([*apt, "update"], [*apt, "download", source.debian], unpack)
    for command in progress(log, iterable=commands, desc=f"apt-get download {source.debian}", unit=" commands"):
        _run(command, scratch)


def _run(command: list[str], folder: Path, timeout: float = 300) -> None:
    """Run a command in `folder`.

    Raises:
        OSError: the command does not exist, takes more than `timeout` seconds, or fails; the message is the last line
            of its stderr.
    """
    try:
        subprocess.run(command, cwd=folder, timeout=timeout, capture_output=True, text=True, check=True)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"no answer within {timeout} s") from None
    except subprocess.CalledProcessError as error:
        raise OSError((error.stderr.strip() or str(error)).splitlines()[-1]) from None


def _read(
    source: Source, folder: Path, names: Iterable[str], foreign: Collection[str], packed: bool = False
) -> dict[str, bytearray]:
    """Read those of the files `names` that are anywhere under `folder`, and check their MD5.

    Args:
        source, foreign: as for `gather`.
        packed: look for .gz files and archives instead of uncompressed files.

    Returns:
        The contents of each file by its name. Files that are not there are missing in it.

    Raises:
        UserError: a file has an unexpected MD5, and no other file of its name has the right one.
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
    """Extract the files `names` from all archives under `folder`: for each name, (path of the archive, contents)."""
    members: dict[str, list[tuple[Path, bytearray]]] = {}
    for path in filter(Path.is_file, sorted(folder.rglob(source.archive)) if source.archive else []):
        try:  # in memory: nothing from an archive is written before its MD5 is checked
            with tarfile.open(fileobj=io.BytesIO(_contents(path, packed=True)), mode="r:") as archive:
                for member in archive:
                    name = Path(member.name).name
                    if name in names and member.isfile() and (file := archive.extractfile(member)):
                        members.setdefault(name, []).append((path, bytearray(file.read())))
        except tarfile.TarError as error:
            raise UserError(f"{path} is no archive ({error}): delete it, and run again") from None
    return members


def _contents(path: Path, packed: bool) -> bytearray:
    """Return the bytes of a file, decompressed if `packed`. Raises UserError if it cannot be read."""
    try:
        data = path.read_bytes()
        return bytearray(gzip.decompress(data) if packed else data)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is cut short or no gzip file ({error}): delete it, and run again") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _keep(files: dict[str, bytearray], folder: Path) -> None:
    """Write files into `folder`, each under a temporary name first: an interrupted write leaves no incomplete file.

    If that fails, as in a read-only folder, a warning is logged.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:  # on the same disk, so that replace is atomic
                part = Path(scratch, "part")
                part.write_bytes(data)
                os.replace(part, folder / name)
    except OSError as error:
        log.warning("cannot write to %s (%s): the next run has to download the data again", folder, error.strerror)
