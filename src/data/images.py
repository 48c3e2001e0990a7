"""Image files with the interface of a tensor, decoded on demand by threads: Pillow decodes without Python's lock."""

import hashlib
import io
import logging
import os
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TypeVar, overload

import numpy as np
import torch
from einops import rearrange
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from src.utils.errors import UserError
from src.utils.progress import progress

log = logging.getLogger(__name__)

NAMED = 3  # so many of several damaged files are named in the error message; the log names all of them
LARGE = 50_000_000  # pixels of an image from which on only one is decoded at a time, for each takes 4 bytes a pixel
LARGEST = 500_000_000  # pixels of the largest image that is read
warnings.filterwarnings("ignore", module="PIL")  # of damaged metadata, which do not matter here
Image.MAX_IMAGE_PIXELS = None  # Pillow would take an image of 179 megapixels for an attack

Item = TypeVar("Item")
Result = TypeVar("Result")
Source = str | Path | io.BytesIO
_one_large = threading.Lock()


@dataclass(frozen=True)
class ImageFiles:
    """Image files with the interface of a tensor (N, C, H, W) uint8: len, shape, dtype, indexing and split.

    Indexing with a slice returns ImageFiles and decodes nothing; indexing with a list decodes those images.
    """

    paths: Sequence[str]  # of length N
    size: int  # H = W, in pixels
    channels: int  # C: 1 for grayscale, 3 for colour

    dtype = torch.uint8

    @property
    def shape(self) -> torch.Size:
        """(N, C, H, W)."""
        return torch.Size((len(self.paths), self.channels, self.size, self.size))

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, which: slice) -> "ImageFiles": ...

    @overload
    def __getitem__(self, which: Iterable[int]) -> Tensor: ...

    def __getitem__(self, which: slice | Iterable[int]) -> "ImageFiles | Tensor":
        if isinstance(which, slice):
            return replace(self, paths=self.paths[which])
        return torch.stack([self._decode(self.paths[i]) for i in which])  # (B, C, H, W)

    def _decode(self, path: str) -> Tensor:
        return decode(path, self.size, self.channels)  # (C, H, W)

    def batches(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the images (B, C, H, W) uint8 of each chunk of indices (B,), in order; threads decode one chunk ahead.

        The global random state is neither read nor changed.

        Raises:
            UserError: an image cannot be read.
        """
        indices = [chunk.tolist() for chunk in chunks]
        paths = (self.paths[i] for chunk in indices for i in chunk)
        images = in_threads(self._decode, paths, ahead=max(map(len, indices), default=0))
        for chunk in indices:
            yield torch.stack(list(islice(images, len(chunk))))

    def split(self, batch_size: int) -> Iterator[Tensor]:
        """Yield all images in order, (B, C, H, W) uint8 at a time, like `Tensor.split`."""
        return self.batches(torch.arange(len(self)).split(batch_size))

    def read(self) -> Tensor:
        """Decode all images into one tensor (N, C, H, W) uint8; raises as `check` does."""
        images = torch.empty(self.shape, dtype=torch.uint8)
        self.check(images)
        return images

    def check(self, images: Tensor | None = None) -> None:
        """Decode all images once: into `images` (N, C, H, W) uint8, or only to see whether it can be done.

        Raises:
            UserError: some images cannot be read. The message names the first; if there are several, the log names
                all of them.
        """

        def attempt(path: str) -> Tensor | UserError:
            try:
                return self._decode(path)
            except UserError as error:
                return error

        errors = []
        what = "checking images" if images is None else "reading images"
        with progress(log, total=len(self), desc=what, unit=" images") as bar:
            for i, image in enumerate(in_threads(attempt, self.paths)):
                if isinstance(image, UserError):
                    errors.append((self.paths[i], image))
                elif images is not None:
                    images[i] = image
                bar.update()
        if len(errors) == 1:
            raise errors[0][1]
        if errors:
            for _, error in errors:
                log.warning("%s", error)
            names = ", ".join(path for path, _ in errors[:NAMED]) + ", and others named above" * (len(errors) > NAMED)
            raise UserError(
                f"cannot read {len(errors)} of {len(self)} images ({names}): repair them, or move them away"
            )


Images = Tensor | ImageFiles  # (N, C, H, W) uint8


def in_threads(function: Callable[[Item], Result], items: Iterable[Item], ahead: int = 64) -> Iterator[Result]:
    """Yield `function(item)` for all items in order; as many threads as processors work on up to `ahead` more."""
    count = _processors()
    pool, waiting = ThreadPoolExecutor(count), deque[Future[Result]]()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead + count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:  # also if the caller wants no more
        pool.shutdown(cancel_futures=True)


def _processors() -> int:
    """Return the number of processors that this process may use; on macOS and Windows, of all in the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def digest(path: str) -> int:
    """Return the first 8 bytes of the SHA-256 of a file's content, as a signed integer.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return int.from_bytes(hashlib.sha256(Path(path).read_bytes()).digest()[:8], "big", signed=True)
    except OSError as error:
        raise _unreadable(path, error) from None


def decode(path: str | Path, size: int, channels: int, frame: int = 0) -> Tensor:
    """Decode an image file to (C, size, size) uint8 in [0, 255], cropped to the central square and resized.

    The EXIF orientation is applied. Transparent pixels are blended with white. 16-bit images are reduced to 8 bits.
    An image that has the right size keeps its exact pixels. Damaged metadata are ignored.

    Args:
        path: of the file.
        size: height and width of the result.
        channels: 1 for grayscale, 3 for colour.
        frame: black pixels on each side of an image that is resized; it is made that much smaller.

    Raises:
        UserError: the file cannot be read; the message names it.
    """
    try:
        image = _despite_metadata(lambda source: _open(source, size, channels, frame), path)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can raise almost anything
        raise _unreadable(path, error) from None
    return torch.from_numpy(rearrange(np.array(image).reshape(size, size, channels), "h w c -> c h w").copy())


def upright_size(path: str | Path) -> tuple[int, int]:
    """Width and height in pixels of an image file that `decode` can read, after its EXIF orientation was applied."""
    return _despite_metadata(_upright_size, path)


def _upright_size(source: Source) -> tuple[int, int]:
    with Image.open(source) as file:
        width, height = file.size
        try:
            turned = file.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)  # by 90°
        except Exception:  # damaged, as in `_upright`
            turned = False
    return (height, width) if turned else (width, height)


def _despite_metadata(read: Callable[[Source], Result], path: str | Path) -> Result:
    """Return `read(path)`, or if that fails and the file is a PNG, `read` of the same image without metadata."""
    try:
        return read(path)
    except (OSError, SyntaxError, ValueError):
        if not (content := _without_metadata(Path(path).read_bytes())):
            raise
        return read(io.BytesIO(content))


def _open(source: Source, size: int, channels: int, frame: int) -> Image.Image:
    with Image.open(source) as file:
        pixels = file.width * file.height
        if pixels > LARGEST:
            raise ValueError(f"{pixels:,} pixels, more than {LARGEST:,}: make it smaller")
        with _one_large if pixels > LARGE else nullcontext():
            image = _upright(file)
            if image.mode.startswith("I"):  # 16 bits: Pillow's conversion would clip instead of scale
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("L" if channels == 1 else "RGB")
            if image.size == (size, size):
                return image
            inner = size - 2 * frame
            return ImageOps.expand(ImageOps.fit(image, (inner, inner), Image.Resampling.LANCZOS), frame)


def _upright(file: Image.Image) -> Image.Image:
    """Decode an image and apply the orientation that its metadata tell, unless these are damaged."""
    file.load()
    try:
        return ImageOps.exif_transpose(file)
    except MemoryError:
        raise
    except Exception:
        return file


def _without_metadata(png: bytes) -> bytes:
    """Return a PNG file's content without the chunks that no pixel depends on; b"" if it is no PNG.

    Pillow refuses a file with a long comment or with one whose checksum is wrong.
    """
    if png[:8] != b"\x89PNG\r\n\x1a\n":
        return b""
    kept, start = [png[:8]], 8
    while start < len(png):  # a chunk: length of its content (4 bytes), name (4), content, checksum (4)
        end = start + 12 + int.from_bytes(png[start : start + 4], "big")
        name = png[start + 4 : start + 8]
        if name[:1].isupper() or name == b"tRNS":  # critical, as the PNG standard has it, or the transparency
            kept.append(png[start:end])
        start = end
    return b"".join(kept)


def _unreadable(path: str | Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"cannot read the image {path} ({reason}): repair it, or move it away")
