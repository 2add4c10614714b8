"""Images to pixels: decode whatever shows an image, preprocess it as the source model does, load or stream it."""

import io
import math
import os
import re
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Shaped, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from registerlens.config import Preprocess
from registerlens.errors import ImageError, close_matches

MAX_PIXELS = 200_000_000
"""An image of more pixels is refused before it is decoded; Pillow's own, lower limit holds until its user raises it."""

IMAGE_SUFFIXES = {".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
"""What counts as an image in a folder."""

ImageSource = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor | Sequence[Any]
"""A file, a folder, a glob, an image in memory, or a sequence of these."""

_EXPECTED = (
    "Give an image file, a folder, a glob such as 'photos/*.jpg', a PIL image, an array [height, width, channel], "
    "a tensor [channel, height, width], or a list of these."
)


@runtime_checkable
class HasPreprocess(Protocol):
    """Whatever knows the preprocessing of its images, as a HookedViT does."""

    @property
    def preprocess(self) -> Preprocess | None:
        """How a decoded image becomes the model's pixels."""


@dataclass(frozen=True)
class Skipped:
    """An image that could not be used."""

    name: str
    """The file, or "image 3" for the fourth source if it is no file."""
    reason: str
    """Why it was left out."""

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class SkippedImagesWarning(UserWarning):
    """Some images could not be used; the text names each with its reason."""


def load_images(
    source: ImageSource, model: Preprocess | HasPreprocess, *, size: int | tuple[int, int] | None = None
) -> Float[Tensor, "batch channel height width"]:
    """All images of `source`, preprocessed as `model` wants them: float32 on the CPU, in the order of the source.

    A folder gives the image files directly in it, in natural order (2.png before 10.png). Arrays [height, width],
    [height, width, channel] or [batch, height, width, channel] and tensors [channel, height, width] or
    [batch, channel, height, width] are raw images: 0..255 as uint8, 0..65535 as uint16, or 0..1 as floats.

    Args:
        source: a file, a folder, a glob, a PIL image, an array, a tensor, or a sequence mixing these.
        model: a HookedViT, or a `Preprocess`.
        size: height and width in pixels, if not the model's own; an int means a square.

    Raises:
        ImageError: there is no such file, or no image that can be used.

    Warns:
        SkippedImagesWarning: files that cannot be decoded, are truncated or absurdly large were skipped.

    Example:
        >>> photos = np.zeros((2, 40, 30, 3), dtype=np.uint8)
        >>> load_images(photos, Preprocess(resize=(16, 16))).shape
        torch.Size([2, 3, 16, 16])
    """
    return torch.cat(list(ImageStream(source, model, size=size)))


class ImageStream:
    """Batches of images, decoded ahead by one background thread; memory does not grow with the number of images.

    Iterating yields float32 tensors [batch, channel, height, width] of at most `batch_size` images, and may be
    repeated. Sources, skipped files and errors are those of `load_images`; the warning comes after the last batch.

    Args:
        source, model, size: as for `load_images`.
        batch_size: images per batch; only the last batch may have fewer.
        prefetch: how many batches are prepared ahead.

    Example:
        >>> stream = ImageStream(np.zeros((5, 40, 30, 3), dtype=np.uint8), Preprocess(resize=(16, 16)), batch_size=2)
        >>> len(stream), stream.n_images, [len(batch) for batch in stream], stream.loaded[-1]
        (3, 5, [2, 2, 1], 'image 4')
    """

    names: list[str]
    """The names of all sources: paths, or "image 3" for the fourth source if it is no file."""
    loaded: list[str]
    """The names of the images of the batches that the latest iteration has yielded."""
    skipped: list[Skipped]
    """What the latest iteration has left out so far."""

    def __init__(
        self,
        source: ImageSource,
        model: Preprocess | HasPreprocess,
        *,
        batch_size: int = 16,
        size: int | tuple[int, int] | None = None,
        prefetch: int = 2,
    ) -> None:
        if min(batch_size, prefetch) < 1:
            raise ImageError(f"batch_size and prefetch must be at least 1, got {batch_size} and {prefetch}.")
        self.preprocess = preprocess_of(model, size)
        self.batch_size, self.prefetch = batch_size, prefetch
        self._sources = expand(source)
        if not self._sources:
            raise ImageError(f"Got no image: the {type(source).__name__} is empty. {_EXPECTED}")
        self.names = [str(item) if isinstance(item, Path) else f"image {i}" for i, item in enumerate(self._sources)]
        self.loaded, self.skipped = [], []

    @property
    def n_images(self) -> int:
        """Source images, usable or not."""
        return len(self.names)

    def __len__(self) -> int:
        """Batches, if every image is usable."""
        return math.ceil(self.n_images / self.batch_size)

    def __iter__(self) -> Iterator[Float[Tensor, "batch channel height width"]]:
        self.loaded, self.skipped = loaded, skipped = [], []
        sources = zip(self.names, self._sources, strict=True)  # advanced by the one thread only
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="registerlens-images")
        try:
            ahead = deque(pool.submit(self._next_batch, sources) for _ in range(self.prefetch))
            while True:
                names, batch, bad = ahead.popleft().result()
                loaded += names
                skipped += bad
                if batch is None:
                    break
                ahead.append(pool.submit(self._next_batch, sources))
                yield batch
        finally:  # also when the consumer stops early: at most the batch in work is finished
            pool.shutdown(cancel_futures=True)
        reasons = "; ".join(map(str, skipped))
        if not loaded:
            raise ImageError(f"None of the {self.n_images} images can be used. {reasons}. {_EXPECTED}")
        if skipped:
            text = f"Skipped {len(skipped)} of {self.n_images} images. {reasons}."
            warnings.warn(text, SkippedImagesWarning, stacklevel=2)

    def _next_batch(self, sources: Iterator[tuple[str, Any]]) -> tuple[list[str], Tensor | None, list[Skipped]]:
        names, pixels, skipped = read_images(sources, self.preprocess, most=self.batch_size)
        return names, pixels if names else None, skipped


def read_images(
    named: Iterable[tuple[str, Any]], preprocess: Preprocess, *, most: int | None = None
) -> tuple[list[str], Float[Tensor, "image channel height width"], list[Skipped]]:
    """Decode and preprocess images one by one; those that cannot be used are left out, each with the reason.

    Args:
        named: a name and something that `decode` takes, for each image.
        preprocess: how a decoded image becomes the model's pixels.
        most: stop taking from an iterator after so many usable images; None takes them all.

    Returns:
        Names of the usable images, their pixels (float32, perhaps of no image), and what was left out.

    Example:
        >>> named = [("good", Image.new("RGB", (8, 8))), ("bad", "no_such_file.png")]
        >>> names, pixels, skipped = read_images(named, Preprocess(resize=(4, 4)))
        >>> names, pixels.shape, str(skipped[0])
        (['good'], torch.Size([1, 3, 4, 4]), 'bad: no such file')
    """
    names: list[str] = []
    pixels: list[Tensor] = []
    skipped: list[Skipped] = []
    for name, source in named:
        try:
            pixels.append(preprocess_image(decode(source), preprocess))
        except ImageError as error:
            skipped.append(Skipped(name, str(error)))
            continue
        names.append(name)
        if len(names) == most:
            break
    return names, torch.stack(pixels) if pixels else torch.zeros(0, 3, *preprocess.output_size), skipped


def decode(source: str | os.PathLike[str] | bytes | Image.Image | np.ndarray | Tensor) -> Image.Image:
    """One image as 8-bit RGB, upright; `bytes` are those of an image file.

    The EXIF orientation is applied. Transparency is laid on white. 16-bit values are scaled (divided by 257), integer
    and float images without a declared range are read as the narrowest of 8 and 16 bits, or of 0..1 and 0..255, that
    holds them. Of an animation or a multi-page file the first frame is taken.

    Raises:
        ImageError: the text is the reason: no such file, not an image, truncated, too large, values out of range.

    Example:
        >>> decode(Image.new("RGBA", (2, 1), (255, 0, 0, 0))).getpixel((0, 0))
        (255, 255, 255)
    """
    try:
        with _opened(source) as image:
            return _upright_rgb(image)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"too large ({error})") from error
    except UnidentifiedImageError as error:
        raise ImageError("not an image that Pillow can read") from error
    except Exception as error:  # on damaged bytes Pillow's readers raise nearly anything
        raise ImageError(f"truncated, damaged or unreadable ({error})") from error


def preprocess_image(image: Image.Image, preprocess: Preprocess) -> Float[Tensor, "channel height width"]:
    """The model's pixels of one image: resize, centre crop, scale to 0..1, subtract the mean, divide by the deviation.

    An image that is not RGB goes through `decode` first. One that is smaller than the crop is centred on black.

    Raises:
        ImageError: the image is so elongated that scaling its shorter side would exceed `MAX_PIXELS`.

    Example:
        >>> preprocess_image(Image.new("RGB", (64, 48), "white"), Preprocess(resize=(32, 32), crop=(28, 28))).shape
        torch.Size([3, 28, 28])
    """
    image = image if image.mode == "RGB" else decode(image)
    height, width = _resized(image.height, image.width, preprocess)
    if max(height, image.height) * width > MAX_PIXELS:
        raise ImageError(f"too elongated ({image.width} x {image.height} pixels would become {width} x {height})")
    resampling = Image.Resampling[preprocess.interpolation.upper()]
    if preprocess.arithmetic == "transformers":
        # transformers: torch always resamples along the width first, Pillow 13 along the height if that is cheaper;
        # where bicubic overshoot is clipped in between, that can change a pixel by 13 levels of 255.
        image = image.resize((width, image.height), resampling)
    image = image.resize((width, height), resampling)
    crop_height, crop_width = preprocess.output_size
    top, left = _crop_offset(height, crop_height, preprocess), _crop_offset(width, crop_width, preprocess)
    image = image.crop((left, top, left + crop_width, top + crop_height))  # black beyond the borders
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 255
    return (pixels - _channels(preprocess.mean)) / _channels(preprocess.std)


def to_display(
    pixels: Float[Tensor, "batch channel height width"], preprocess: Preprocess
) -> UInt8[np.ndarray, "batch height width channel"]:
    """Preprocessed pixels as images to look at: mean and deviation undone, 0..255, channels last.

    Example:
        >>> preprocess = Preprocess(resize=(8, 8), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        >>> to_display(load_images(Image.new("RGB", (9, 9), "red"), preprocess), preprocess)[0, 0, 0]
        array([255,   0,   0], dtype=uint8)
    """
    pixels = pixels.detach().cpu().float() * _channels(preprocess.std) + _channels(preprocess.mean)
    return (pixels.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()


def _channels(values: tuple[float, ...]) -> Float[Tensor, "channel 1 1"]:
    return torch.tensor(values, dtype=torch.float32)[:, None, None]


def preprocess_of(model: Preprocess | HasPreprocess, size: int | tuple[int, int] | None) -> Preprocess:
    """How a model's images are prepared; `size` as for `load_images`.

    Raises:
        ImageError: the model does not say, or the size is below one pixel.
    """
    preprocess = model if isinstance(model, Preprocess) else model.preprocess
    if preprocess is None:
        raise ImageError(
            f"The {type(model).__name__} has no preprocessing (its `preprocess` is None). "
            "Expected how its images are resized and normalised: pass a Preprocess in its place."
        )
    if size is None:
        return preprocess
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise ImageError(f"size must be at least 1 x 1 pixel, got {height} x {width}.")
    return preprocess.at((height, width))


def _resized(height: int, width: int, preprocess: Preprocess) -> tuple[int, int]:
    """Height and width after the resize, rounded as the source libraries round them."""
    target_height, target_width = preprocess.resize
    if preprocess.fit == "exact":
        return target_height, target_width
    if target_height == target_width:  # torchvision and transformers: the longer side is rounded down
        short, long = target_height, int(target_height * max(height, width) / min(height, width))
        return (short, long) if height <= width else (long, short)
    ratio = min(height / target_height, width / target_width)  # timm and open_clip: to the nearest
    return round(height / ratio), round(width / ratio)


def _crop_offset(length: int, crop: int, preprocess: Preprocess) -> int:
    """Where the crop begins along one axis; negative where black is added, of which the first side gets less."""
    if length < crop:
        return -((crop - length) // 2)
    return (length - crop) // 2 if preprocess.arithmetic == "transformers" else round((length - crop) / 2)


def expand(source: Any, *, may_miss: bool = False) -> list[Path | Image.Image | np.ndarray]:
    """Every single image of `source`, undecoded; in a list, missing files `may_miss`, to be reported with the rest.

    Raises:
        ImageError: there is no such file, no image, or no image in a value of this type.
    """
    if isinstance(source, str | os.PathLike):
        return [*_expand_path(Path(source).expanduser(), may_miss)]
    if isinstance(source, Image.Image):
        return [source]
    if isinstance(source, np.ndarray | Tensor):
        return [*_split(source)]
    if isinstance(source, Sequence) and not isinstance(source, bytes):
        return [image for entry in source for image in expand(entry, may_miss=True)]
    raise ImageError(f"Cannot take images from a value of type {type(source).__name__}. {_EXPECTED}")


def _expand_path(path: Path, may_miss: bool) -> list[Path]:
    if path.is_dir():
        files = [file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES]
        problem = f"The folder '{path}' has no image files directly in it. To search below it: '{path}/**/*.jpg'."
    elif not path.exists() and re.search(r"[*?\[]", str(path)):
        files = list(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
        problem = f"The glob '{path}' matches no file. Relative paths start at '{Path.cwd()}'."
    elif may_miss or path.exists():
        return [path]
    else:
        siblings = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ImageError(f"There is no '{path}'.{close_matches(path.name, siblings)} {_EXPECTED}")
    files = [file for file in files if file.is_file() and not file.name.startswith(".")]
    if not files:
        raise ImageError(problem)
    return sorted(files, key=_natural)


def _natural(path: Path) -> tuple[list[str | int], str]:
    """A sort key under which 2 comes before 10."""
    parts = re.split(r"([0-9]+)", str(path).lower())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], str(path)


def _split(images: np.ndarray | Tensor) -> list[Shaped[np.ndarray, "height width channel"]]:
    """The single images of an array or tensor, channels last, checked."""
    kind, axes = "array", "[height, width], [height, width, channel] or [batch, height, width, channel]"
    shape, array = tuple(images.shape), images
    if isinstance(array, Tensor):
        kind, axes = "tensor", "[height, width], [channel, height, width] or [batch, channel, height, width]"
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()  # NumPy has no bfloat16
        array = np.moveaxis(array, -3, -1) if array.ndim in (3, 4) else array
    array = array[..., None] if array.ndim == 2 else array
    array = array[None] if array.ndim == 3 else array
    if array.ndim != 4 or array.shape[-1] not in (1, 3, 4):
        raise ImageError(f"Got an image {kind} of shape {shape}. Expected {axes} with 1, 3 or 4 channels.")
    if array.dtype.kind == "f":
        if array.size and not (array.min() >= 0 and array.max() <= 1):  # so put, it finds NaN too
            raise ImageError(
                f"Got a float {kind} with values from {array.min():.4g} to {array.max():.4g}. Raw float images are "
                "0..1. Images that are already preprocessed need no loading: call the model on them directly."
            )
    elif array.dtype not in (np.uint8, np.uint16):
        raise ImageError(
            f"Got an image {kind} of {images.dtype}. Expected uint8 (0..255), uint16 (0..65535) or floats (0..1)."
        )
    return list(array)


def _opened(source: Any) -> Any:
    """A context that gives the undecoded PIL image and closes only what was opened here."""
    if isinstance(source, np.ndarray | Tensor):
        images = _split(source)
        if len(images) != 1:
            raise ImageError(f"Expected a single image, got a batch of {len(images)}. Decode them one by one.")
        pixels = _to_8_bits(images[0])
        return nullcontext(Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels))
    if isinstance(source, Image.Image):
        return nullcontext(source)
    if isinstance(source, bytes):
        return Image.open(io.BytesIO(source))
    if not (path := Path(source).expanduser()).exists():
        raise ImageError("no such file")
    return Image.open(path)


def _upright_rgb(image: Image.Image) -> Image.Image:
    if image.width * image.height == 0:
        raise ImageError(f"has no pixels ({image.width} x {image.height})")
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(f"too large ({image.width} x {image.height} pixels, the limit is {MAX_PIXELS} in all)")
    image = ImageOps.exif_transpose(image)  # decodes; an OSError tells a truncated file
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _from_wide(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def _from_wide(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, 32 bits or floats, as 8 bits; Pillow's own conversion would clip."""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    limit = 255 if image.mode == "F" else 65535
    if not (low >= 0 and high <= limit):
        raise ImageError(f"has values from {low:.6g} to {high:.6g}, expected 0..{limit}")
    if image.mode == "F":
        values = values / 255 if high > 1 else values
    elif image.mode == "I":
        values = values.astype(np.uint16 if high > 255 else np.uint8)
    grey = _to_8_bits(values)
    if (transparent := image.info.get("transparency")) is not None:
        grey = np.where(np.asarray(image) == transparent, np.uint8(255), grey)
    return Image.fromarray(grey)


def _to_8_bits(values: Shaped[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    if values.dtype == np.uint8:
        return np.ascontiguousarray(values)
    if values.dtype.kind == "f":
        return np.rint(values * 255).astype(np.uint8)
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
