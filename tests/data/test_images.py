"""Pixels equal to the source libraries' own, every image mode, and what happens to files that cannot be used."""

import struct
import threading
import time
import zlib
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import skimage.data
import torch
from PIL import Image

from registerlens.config import Preprocess
from registerlens.data import images as images_module
from registerlens.data.images import (
    ImageStream,
    Skipped,
    SkippedImagesWarning,
    decode,
    load_images,
    preprocess_image,
    to_display,
)
from registerlens.errors import ImageError

TINY = Preprocess(resize=(8, 8))
TOLERANCE = 2.001  # levels of 255; the excess is float32's
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def _photos():
    """Real photographs, cut to odd sizes, upright and wide, larger and smaller than what models take."""
    cuts = {
        "astronaut": np.s_[3:, :401],
        "coffee": np.s_[:, 1:],
        "camera": np.s_[:257, :511],
        "chelsea": np.s_[:299, :],
        "rocket": np.s_[10:, 300:491],
    }
    photos = {name: Image.fromarray(getattr(skimage.data, name)()[cut]).convert("RGB") for name, cut in cuts.items()}
    small, strip = photos["chelsea"].crop((200, 60, 337, 173)), photos["astronaut"].crop((150, 20, 211, 421))
    return photos | {"small": small, "strip": strip}


PHOTOS = _photos()


# Parity with the source libraries: each case is (their pipeline as PIL -> [c, h, w], the same as Preprocess).


def _transformers(name, **settings):
    import transformers

    processor = getattr(transformers, name)(**settings)
    return processor, lambda image: processor(image, return_tensors="pt")["pixel_values"][0]


def _transformers_case(name, **settings):
    processor, run = _transformers(name, **settings)
    size, crop = processor.size, processor.crop_size if processor.do_center_crop else None
    cover = bool(size.shortest_edge)
    return run, Preprocess(
        resize=(size.shortest_edge,) * 2 if cover else (size.height, size.width),
        fit="cover" if cover else "exact",
        crop=(crop.height, crop.width) if crop else None,
        arithmetic="transformers",
        interpolation={0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}[int(processor.resample)],
        mean=processor.image_mean,
        std=processor.image_std,
    )


def _dinov2():
    return _transformers_case(
        "BitImageProcessor",
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )


def _timm_case(size, resize, *, crop_pct, crop_mode="center", interpolation="bicubic"):
    from timm.data import create_transform

    run = create_transform(
        (3, *size), crop_pct=crop_pct, crop_mode=crop_mode, interpolation=interpolation, mean=MEAN, std=STD
    )
    fit = "exact" if crop_mode == "squash" else "cover"
    return run, Preprocess(resize=resize, fit=fit, crop=size, interpolation=interpolation, mean=MEAN, std=STD)


def _open_clip_case(size, **settings):
    from open_clip.transform import image_transform

    fit = "exact" if settings.get("resize_mode") == "squash" else "cover"
    interpolation = settings.get("interpolation", "bicubic")
    run = image_transform(size, is_train=False, mean=MEAN, std=STD, **settings)
    return run, Preprocess(resize=size, fit=fit, crop=size, interpolation=interpolation, mean=MEAN, std=STD)


LIBRARIES = {
    "transformers ViT": lambda: _transformers_case("ViTImageProcessor"),
    "transformers ViT nearest": lambda: _transformers_case("ViTImageProcessor", resample=0),
    "transformers DeiT": lambda: _transformers_case("DeiTImageProcessor"),
    "transformers CLIP": lambda: _transformers_case("CLIPImageProcessor"),
    "transformers CLIP 336": lambda: _transformers_case(
        "CLIPImageProcessor", size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
    ),
    "transformers DINOv2": _dinov2,
    "transformers DINOv3": lambda: _transformers_case("DINOv3ViTImageProcessor"),
    "transformers SigLIP": lambda: _transformers_case("SiglipImageProcessor"),
    "transformers crop beyond the image": lambda: _transformers_case(
        "DeiTImageProcessor", size={"height": 201, "width": 230}
    ),
    "timm 0.9 bicubic": lambda: _timm_case((224, 224), (248, 248), crop_pct=0.9),
    "timm 0.95 bicubic 518": lambda: _timm_case((518, 518), (545, 545), crop_pct=0.95),
    "timm 1.0 bilinear": lambda: _timm_case((224, 224), (224, 224), crop_pct=1.0, interpolation="bilinear"),
    "timm squash": lambda: _timm_case((224, 224), (224, 224), crop_pct=1.0, crop_mode="squash"),
    "timm squash 0.9": lambda: _timm_case((224, 224), (248, 248), crop_pct=0.9, crop_mode="squash"),
    "timm not square": lambda: _timm_case((192, 256), (213, 284), crop_pct=0.9),
    "open_clip shortest": lambda: _open_clip_case((224, 224)),
    "open_clip bilinear": lambda: _open_clip_case((224, 224), interpolation="bilinear"),
    "open_clip squash": lambda: _open_clip_case((384, 384), resize_mode="squash"),
    "open_clip not square": lambda: _open_clip_case((240, 320)),
}


@pytest.mark.parametrize("case", LIBRARIES)
def test_pixels_equal_the_source_librarys_own(case, record_property):
    run, preprocess = LIBRARIES[case]()
    std = torch.tensor(preprocess.std)[:, None, None]
    differences = {}
    for name, photo in PHOTOS.items():
        mine, theirs = preprocess_image(photo, preprocess), run(photo)
        assert mine.shape == theirs.shape, name
        differences[name] = float(((mine - theirs) * std).abs().max()) * 255
    record_property("largest difference in levels of 255", max(differences.values()))
    assert max(differences.values()) <= TOLERANCE, differences


def test_pixels_equal_the_dinov2_processor_at_another_size():
    _, preprocess = _dinov2()
    _, run = _transformers(
        "BitImageProcessor",
        size={"shortest_edge": 518},
        crop_size={"height": 518, "width": 518},
        image_mean=preprocess.mean,
        image_std=preprocess.std,
    )
    photos = list(PHOTOS.values())[:2]
    theirs = torch.stack([run(photo) for photo in photos])
    mine = load_images(photos, preprocess, size=518)
    assert float((mine - theirs).abs().max()) * 0.229 * 255 <= TOLERANCE
    assert torch.equal(mine, load_images(photos, preprocess, size=(518, 518)))


@pytest.mark.parametrize(("height", "width"), [(5, 5), (6, 13), (13, 6)])
@pytest.mark.parametrize(("arithmetic", "half"), [("transformers", 0), ("torchvision", 1)])
def test_half_a_pixel_of_crop_offset(height, width, arithmetic, half):
    photo = np.zeros((height, width, 3), np.uint8)
    photo[..., 0], photo[..., 1] = np.mgrid[:height, :width] * 10
    target = (height - 3, width - 3)  # offset 1.5: floor gives 1, to even gives 2
    step = Preprocess(resize=(height, width), fit="exact", crop=target, arithmetic=arithmetic)
    shown = to_display(load_images(photo, step), step)[0]
    assert shown[0, 0, 0] == shown[0, 0, 1] == 10 * (1 + half)
    assert shown.shape == (*target, 3)


def test_an_image_without_a_crop_still_has_the_promised_size():
    assert preprocess_image(PHOTOS["coffee"], Preprocess(resize=(32, 32))).shape == (3, 32, 32)


def test_not_square_at_size_covers_both_sides():
    for photo in PHOTOS.values():
        pixels = preprocess_image(photo.point(lambda v: v // 2 + 100), Preprocess(resize=(9, 9)).at((50, 130)))
        assert pixels.shape == (3, 50, 130)
        assert pixels.min() > 0.35  # no black border


def test_to_display_undoes_the_normalisation():
    preprocess = Preprocess(resize=(64, 64), fit="exact", mean=MEAN, std=STD)
    shown = to_display(load_images(PHOTOS["coffee"], preprocess), preprocess)
    expected = np.asarray(PHOTOS["coffee"].resize((64, 64), Image.Resampling.BICUBIC))
    assert shown.dtype == np.uint8
    assert np.array_equal(shown[0], expected)


# Modes: known pixels in, known pixels out.


def _pixels(source):
    image = decode(source)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif", "jpg"])
def test_exif_orientation(tmp_path, orientation, suffix):
    upright = np.zeros((16, 32, 3), np.uint8)  # a red top left corner, green along the top right, blue below
    upright[:8, :16], upright[:8, 16:], upright[8:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    stored = {  # the EXIF standard: where row 0 and column 0 of the stored image lie in the upright one
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if suffix == "jpg" else {}
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / f"x.{suffix}", exif=exif, **options)
    assert np.abs(_pixels(tmp_path / f"x.{suffix}") - upright).max() <= 3
    with Image.open(tmp_path / f"x.{suffix}") as image:
        assert np.abs(_pixels(image) - upright).max() <= 3


def test_grey_becomes_three_equal_channels():
    assert _pixels(Image.fromarray(np.array([[0, 7, 255]], np.uint8))).tolist() == [[[0] * 3, [7] * 3, [255] * 3]]


def test_one_bit():
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    assert _pixels(image).tolist() == [[[0] * 3, [255] * 3]]


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("RGBA", (200, 100, 0, 255), (200, 100, 0)),
        ("RGBA", (200, 100, 0, 0), (255, 255, 255)),
        ("RGBA", (200, 100, 0, 51), (244, 224, 204)),  # a fifth of the colour, four fifths of white
        ("LA", (100, 255), (100, 100, 100)),
        ("LA", (100, 0), (255, 255, 255)),
        ("LA", (100, 51), (224, 224, 224)),
        ("La", (20, 51), (224, 224, 224)),  # the alpha is multiplied in already
        ("RGBa", (40, 20, 0, 51), (244, 224, 204)),
    ],
)
def test_alpha_lies_on_white(mode, value, expected):
    assert np.abs(_pixels(Image.new(mode, (1, 1), value))[0, 0] - expected).max() <= 1


def _palette():
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 200, 0, 0, 0, 0, 200])
    image.putdata([0, 1, 2])
    return image


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_palette_with_and_without_transparency(tmp_path, suffix):
    plain = [[10, 20, 30], [200, 0, 0], [0, 0, 200]]
    _palette().save(tmp_path / f"plain.{suffix}")
    assert _pixels(tmp_path / f"plain.{suffix}")[0].tolist() == plain
    _palette().save(tmp_path / f"clear.{suffix}", transparency=1)
    assert _pixels(tmp_path / f"clear.{suffix}")[0].tolist() == [plain[0], [255] * 3, plain[2]]


def test_palette_with_graded_transparency(tmp_path):
    _palette().save(tmp_path / "graded.png", transparency=bytes([255, 51, 0]))
    assert np.abs(_pixels(tmp_path / "graded.png")[0] - [[10, 20, 30], [244, 204, 204], [255] * 3]).max() <= 1


def test_colour_key_transparency(tmp_path):
    Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)).save(tmp_path / "key.png", transparency=(1, 2, 3))
    assert _pixels(tmp_path / "key.png")[0].tolist() == [[255] * 3, [4, 5, 6]]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, suffix):
    values = np.array([[0, 128, 129, 257, 32896, 65278, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / f"wide.{suffix}")
    assert _pixels(tmp_path / f"wide.{suffix}")[0, :, 0].tolist() == [0, 0, 1, 1, 128, 254, 255]
    assert _pixels(Image.fromarray(values.astype(np.int32)))[0, :, 0].tolist() == [0, 0, 1, 1, 128, 254, 255]


def test_sixteen_bits_big_endian_and_with_a_transparent_value(tmp_path):
    values = np.array([[0, 32896, 65535]], np.uint16)
    image = Image.frombytes("I;16B", (3, 1), values.astype(">u2").tobytes())
    assert _pixels(image)[0, :, 0].tolist() == [0, 128, 255]
    Image.fromarray(values).save(tmp_path / "key.png", transparency=32896)
    assert _pixels(tmp_path / "key.png")[0, :, 0].tolist() == [0, 255, 255]


def test_integers_that_fit_eight_bits_stay():
    assert _pixels(Image.fromarray(np.array([[0, 7, 255]], np.int32)))[0, :, 0].tolist() == [0, 7, 255]


def test_float_images():
    assert _pixels(Image.fromarray(np.array([[0, 0.5, 1]], np.float32)))[0, :, 0].tolist() == [0, 128, 255]
    assert _pixels(Image.fromarray(np.array([[0, 7.2, 255]], np.float32)))[0, :, 0].tolist() == [0, 7, 255]
    for bad in (-1, 300, np.nan):
        with pytest.raises(ImageError, match=r"has values from .* expected 0\.\.255"):
            decode(Image.fromarray(np.array([[0.5, bad]], np.float32)))


CMYK = [((0, 0, 0, 0), 255, 255, 255), ((255, 0, 0, 0), 0, 255, 255), ((0, 255, 0, 0), 255, 0, 255)]


@pytest.mark.parametrize(("ink", "red", "green", "blue"), [*CMYK, ((0, 0, 0, 255), 0, 0, 0)])
def test_cmyk(tmp_path, ink, red, green, blue):
    Image.new("CMYK", (8, 8), ink).save(tmp_path / "print.jpg", quality=100)
    assert b"Adobe" in (tmp_path / "print.jpg").read_bytes()[:64]  # the kind that stores inks inverted
    Image.new("CMYK", (8, 8), ink).save(tmp_path / "print.tif")
    for name in ("print.jpg", "print.tif"):
        assert np.abs(_pixels(tmp_path / name) - [red, green, blue]).max() <= 2


def test_animation_and_pages_give_the_first(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime")]
    for name in ("x.gif", "x.tif", "x.webp"):
        options = {"lossless": True} if name == "x.webp" else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        assert _pixels(tmp_path / name)[0, 0].tolist() == [255, 0, 0]


# Arrays and tensors are raw images.


def test_arrays_and_tensors_of_every_kind_are_the_same_image():
    photo = np.asarray(PHOTOS["small"])
    expected = load_images(PHOTOS["small"], TINY)
    wide = photo.astype(np.uint16) * 257
    opaque = np.concatenate([photo, np.full_like(photo[..., :1], 255)], axis=-1)
    channels_first = torch.tensor(photo).permute(2, 0, 1)
    for source in (photo, photo[None], wide, photo / 255, (photo / 255).astype(np.float32), opaque, photo[:, ::-1]):
        same = expected if source.strides[-2] > 0 else load_images(PHOTOS["small"].transpose(0), TINY)
        assert torch.equal(load_images(source, TINY), same)
    for source in (channels_first, channels_first[None], channels_first / 255, (channels_first / 255).requires_grad_()):
        assert torch.equal(load_images(source, TINY), expected)
    half = load_images((channels_first / 255).bfloat16(), TINY)
    assert (half - expected).abs().max() < 0.01


def test_grey_arrays():
    grey = np.arange(200, dtype=np.uint8).reshape(10, 20)
    expected = load_images(Image.fromarray(grey), TINY)
    for source in (grey, grey[..., None], grey[None, ..., None], torch.tensor(grey), torch.tensor(grey)[None]):
        assert torch.equal(load_images(source, TINY), expected)


def test_a_batch_is_its_images_in_order():
    photos = np.stack([np.full((9, 7, 3), value, np.uint8) for value in (0, 51, 255)])
    both = load_images(photos, TINY)
    assert both.shape == (3, 3, 8, 8)
    assert both[:, 0, 0, 0].tolist() == pytest.approx([0, 0.2, 1])
    assert torch.equal(both, torch.cat([load_images(photo, TINY) for photo in photos]))
    assert torch.equal(both, load_images(torch.tensor(photos).permute(0, 3, 1, 2), TINY))


@pytest.mark.parametrize("bad", [-0.1, 1.5, np.nan, np.inf])
def test_floats_beyond_the_unit_range_are_refused(bad):
    image = np.full((4, 4, 3), 0.5)
    image[0, 0, 0] = bad
    for source in (image, torch.tensor(image).permute(2, 0, 1)):
        with pytest.raises(ImageError, match=r"Raw float images are 0\.\.1.*already preprocessed.*call the model"):
            load_images(source, TINY)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (np.zeros((3, 20, 20), np.uint8), r"array of shape \(3, 20, 20\).*\[height, width, channel\].*1, 3 or 4"),
        (torch.zeros(20, 20, 3), r"tensor of shape \(20, 20, 3\).*\[channel, height, width\].*1, 3 or 4"),
        (np.zeros((2, 2, 20, 20, 3), np.uint8), r"array of shape \(2, 2, 20, 20, 3\)"),
        (np.zeros((20,), np.uint8), r"array of shape \(20,\)"),
        (np.zeros((20, 20), np.int64), r"array of int64\. Expected uint8"),
        (torch.zeros((3, 20, 20), dtype=torch.bool), r"tensor of torch.bool\. Expected uint8"),
        (np.zeros((0, 20, 20, 3), np.uint8), r"Got no image: the ndarray is empty\. Give an image file"),
        ([], r"Got no image: the list is empty\. Give an image file"),
        ([5], r"type int\. Give an image file"),
        ([b"bytes"], r"type bytes\. Give an image file"),
    ],
)
def test_what_is_no_image_is_refused_at_once(source, text):
    with pytest.raises(ImageError, match=text):
        ImageStream(source, TINY)


def test_decode_takes_a_single_image():
    assert decode(np.zeros((4, 5), np.uint8)).size == (5, 4)
    assert decode(torch.zeros(1, 3, 4, 5)).size == (5, 4)
    with pytest.raises(ImageError, match="single image, got a batch of 2"):
        decode(torch.zeros(2, 3, 4, 5))


# Where images come from.


@pytest.fixture
def folder(tmp_path):
    """10 grey images numbered 1 to 10, whose grey is their number, and things that are no images."""
    for number in range(1, 11):
        Image.new("L", (8, 8), number).save(tmp_path / f"img{number}.{'PNG' if number % 2 else 'bmp'}")
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / ".img0.png").write_text("a hidden file")
    (tmp_path / "below").mkdir()
    Image.new("L", (8, 8), 99).save(tmp_path / "below" / "img0.png")
    return tmp_path


def _numbers(batch):
    return (batch[:, 0, 0, 0] * 255).round().int().tolist()


def test_a_folder_in_natural_order(folder):
    assert _numbers(load_images(folder, TINY)) == list(range(1, 11))
    assert _numbers(load_images(str(folder), TINY)) == list(range(1, 11))


def test_globs(folder, monkeypatch):
    assert _numbers(load_images(f"{folder}/*.bmp", TINY)) == [2, 4, 6, 8, 10]
    assert _numbers(load_images(folder / "img[12].*", TINY)) == [1, 2]
    assert _numbers(load_images(f"{folder}/**/*.png", TINY)) == [99]
    monkeypatch.chdir(folder)
    assert _numbers(load_images("*/img?.png", TINY)) == [99]
    assert _numbers(load_images("img3.PNG", TINY)) == [3]


def test_a_file_name_that_looks_like_a_glob(tmp_path):
    Image.new("L", (8, 8), 5).save(tmp_path / "a[1].png")
    assert _numbers(load_images(tmp_path / "a[1].png", TINY)) == [5]


def test_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert _numbers(load_images("~/img7.PNG", TINY)) == [7]


def test_a_list_mixes_everything_in_order(folder):
    grey = np.full((8, 8), 50, np.uint8)
    source = [folder / "img3.PNG", grey, Image.new("L", (8, 8), 60), f"{folder}/img[12].*", (folder / "below", grey)]
    source.append(torch.full((2, 1, 8, 8), 70, dtype=torch.uint8))
    stream = ImageStream(source, TINY)
    assert _numbers(torch.cat(list(stream))) == [3, 50, 60, 1, 2, 99, 50, 70, 70]
    assert stream.names[:4] == [str(folder / "img3.PNG"), "image 1", "image 2", str(folder / "img1.PNG")]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("img33.PNG", r"There is no '.*img33\.PNG'\. Did you mean 'img3\.PNG'.* Give an image file, a folder"),
        ("nowhere/x.png", r"There is no '.*nowhere/x\.png'\. Give an image file"),
        ("*.jpeg", r"The glob '.*\*\.jpeg' matches no file"),
        (
            "empty",
            r"The folder '.*empty' has no image files directly in it\. To search .*: '.*empty/\*\*/\*\.jpg'",
        ),
    ],
)
def test_a_source_that_leads_nowhere(folder, name, text):
    (folder / "empty" / "deeper").mkdir(parents=True)
    with pytest.raises(ImageError, match=text):
        load_images(folder / name, TINY)


# Files that cannot be used.


def _bomb(path, width, height):
    """A PNG that claims to be huge."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0" * 100)
    chunks = [struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in (header, data)]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


@pytest.fixture
def bad_files(tmp_path):
    (tmp_path / "text.jpg").write_text("this is text")
    (tmp_path / "nothing.png").touch()
    PHOTOS["chelsea"].save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:9000])
    PHOTOS["small"].save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:9000])
    _bomb(tmp_path / "bomb.png", 100_000, 100_000)
    Image.new("L", (60_000, 2)).save(tmp_path / "ribbon.png")
    return {
        "text.jpg": "not an image that Pillow can read",
        "nothing.png": "not an image that Pillow can read",
        "cut.jpg": "truncated, damaged or unreadable (image file is truncated",
        "cut.png": "truncated, damaged or unreadable (",
        "bomb.png": "too large (Image size (10000000000 pixels)",
        "ribbon.png": "too elongated (60000 x 2 pixels would become",
        "gone.png": "no such file",
    }


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_files_are_skipped_and_named_with_their_reason(tmp_path, bad_files):
    good = [tmp_path / "whole.jpg", tmp_path / "whole.png"]
    source = [good[0], *(tmp_path / name for name in bad_files), good[1]]
    preprocess = Preprocess(resize=(100, 100))
    stream = ImageStream(source, preprocess, batch_size=2)
    with pytest.warns(SkippedImagesWarning) as caught:
        (batch,) = stream
    assert torch.equal(batch, load_images(good, preprocess))
    assert stream.loaded == [str(path) for path in good]
    assert [skipped.name for skipped in stream.skipped] == [str(tmp_path / name) for name in bad_files]
    for skipped, reason in zip(stream.skipped, bad_files.values(), strict=True):
        assert isinstance(skipped, Skipped)
        assert skipped.reason.startswith(reason)
    assert len(caught) == 1
    text = str(caught[0].message)
    assert text.startswith("Skipped 7 of 9 images. ")
    assert all(f"{tmp_path / name}: {reason}" in text for name, reason in bad_files.items())
    with pytest.warns(SkippedImagesWarning, match="Skipped 7 of 9"):
        assert torch.equal(load_images(source, preprocess), batch)


def test_an_error_if_nothing_is_left(tmp_path, bad_files):
    with pytest.raises(ImageError, match=r"None of the 2 images can be used\. .*text\.jpg: not an.*gone") as error:
        load_images([tmp_path / "text.jpg", tmp_path / "gone.png"], TINY)
    assert "Give an image file" in str(error.value)
    with pytest.raises(ImageError, match=r"None of the 1 images.*truncated"):
        load_images(tmp_path / "cut.jpg", TINY)


def test_the_size_limit_is_ours_even_if_pillows_is_lifted(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    _bomb(tmp_path / "bomb.png", 20_000, 10_001)
    with pytest.raises(ImageError, match="too large \\(20000 x 10001 pixels, the limit is 200000000"):
        decode(tmp_path / "bomb.png")
    assert Image.MAX_IMAGE_PIXELS is None


@pytest.mark.filterwarnings("error")
def test_pillows_own_warning_made_an_error_is_a_reason_too(tmp_path):
    _bomb(tmp_path / "large.png", 10_000, 10_000)
    with pytest.raises(ImageError, match="too large"):
        decode(tmp_path / "large.png")


def test_an_image_without_pixels_is_skipped():
    with pytest.warns(SkippedImagesWarning, match="image 0: has no pixels"):
        assert len(load_images([Image.new("RGB", (0, 5)), Image.new("RGB", (5, 5))], TINY)) == 1
    with pytest.raises(ImageError, match="image 0"):
        load_images(np.zeros((1, 0, 5, 3), np.uint8), TINY)


# The stream.


def _running():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("registerlens-images")]


@pytest.mark.parametrize("batch_size", [1, 3, 10, 64])
@pytest.mark.parametrize("prefetch", [1, 4])
def test_the_stream_equals_load_images(folder, batch_size, prefetch):
    stream = ImageStream(folder, TINY, batch_size=batch_size, prefetch=prefetch)
    everything = load_images(folder, TINY)
    for _ in range(2):  # it may be repeated
        batches = list(stream)
        assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
        assert torch.equal(torch.cat(batches), everything)
        assert stream.loaded == stream.names
    assert stream.n_images == 10 and len(stream) == len(list(stream))
    assert not _running()


def test_loaded_names_follow_the_batches(folder):
    stream = ImageStream(folder, TINY, batch_size=4)
    assert stream.loaded == []
    assert [len(stream.loaded) for _ in stream] == [4, 8, 10]
    assert stream.skipped == []


def test_full_batches_though_files_are_skipped(folder):
    source = [path for number in range(1, 11) for path in (folder / "notes.txt", *folder.glob(f"img{number}.*"))]
    with pytest.warns(SkippedImagesWarning, match="Skipped 10 of 20"):
        batches = list(ImageStream(source, TINY, batch_size=5))
    assert [_numbers(batch) for batch in batches] == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]


def test_the_thread_ends_when_the_consumer_stops(folder):
    stream = ImageStream([folder] * 20, TINY, batch_size=2)
    for _ in stream:
        assert len(_running()) == 1
        break
    assert not _running()
    with pytest.raises(KeyError):
        for _ in stream:
            raise KeyError
    iterator = iter(stream)
    next(iterator)
    iterator.close()
    assert not _running()
    assert len(torch.cat(list(stream))) == 200


def test_an_exception_in_the_thread_reaches_the_consumer(folder, monkeypatch):
    def fail_at_five(source):
        if "img5" in str(source):
            raise RuntimeError("out of luck")
        return Image.open(source).convert("RGB")

    monkeypatch.setattr(images_module, "decode", fail_at_five)
    seen = []
    with pytest.raises(RuntimeError, match="out of luck"):
        seen += [_numbers(batch) for batch in ImageStream(folder, TINY, batch_size=2)]
    assert not _running()


def test_decoding_runs_ahead_in_another_thread_and_only_so_far(monkeypatch):
    decoded, threads = [], set()

    def counted(source):
        decoded.append(source)
        threads.add(threading.current_thread().name)
        return decode(source)

    monkeypatch.setattr(images_module, "decode", counted)
    stream = ImageStream(np.zeros((100, 8, 8, 3), np.uint8), TINY, batch_size=3, prefetch=2)
    for seen, _ in enumerate(stream, start=1):
        ahead, deadline = 3 * (seen + 2), time.monotonic() + 10  # what was seen, and two batches
        while seen <= 3 and len(decoded) < ahead and time.monotonic() < deadline:
            time.sleep(0.001)
        if seen <= 3:
            time.sleep(0.02)
            assert len(decoded) == ahead
        assert len(decoded) <= ahead
    assert len(decoded) == 100
    assert len(threads) == 1
    assert threads != {threading.current_thread().name}


def test_memory_is_flat(tmp_path):
    PHOTOS["small"].save(tmp_path / "photo.png")
    stream = ImageStream([tmp_path / "photo.png"] * 480, Preprocess(resize=(224, 224)), batch_size=8)
    process, used = psutil.Process(), []
    for batch in stream:
        used.append(process.memory_info().rss)
        assert len(batch) == 8
    all_at_once = 480 * 3 * 224 * 224 * 4  # 289 MB
    assert max(used[10:]) - used[9] < all_at_once / 8


def test_a_model_is_whatever_has_a_preprocess(folder):
    assert torch.equal(load_images(folder, SimpleNamespace(preprocess=TINY)), load_images(folder, TINY))
    with pytest.raises(ImageError, match=r"SimpleNamespace has no preprocessing.*pass a Preprocess"):
        load_images(folder, SimpleNamespace(preprocess=None))


@pytest.mark.parametrize("size", [0, (8, 0)])
def test_impossible_settings(size):
    with pytest.raises(ImageError, match="size must be at least 1 x 1"):
        load_images(np.zeros((8, 8)), TINY, size=size)
    with pytest.raises(ImageError, match="at least 1, got 0 and 2"):
        ImageStream(np.zeros((8, 8)), TINY, batch_size=0)


def test_the_result_is_float32_on_the_cpu_and_is_a_plain_tensor(folder):
    with torch.inference_mode():
        images = load_images(folder, TINY)
    assert (images.dtype, images.device.type) == (torch.float32, "cpu")
    assert images.is_contiguous()
