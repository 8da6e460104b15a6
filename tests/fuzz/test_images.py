"""
Thousands of odd image files, whole and damaged: each is decoded right or refused with one clear error, in little time
and memory. A failure names its seed; `decode(*make_file(seed))` repeats it.
"""

import io
import random
import struct
import subprocess
import sys
import textwrap
import time
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, features

from hf_vqgan.data.datasets import ImageTransform, UnreadableImage, decode_image

MODES_OF = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "WEBP": ("RGB", "RGBA", "L", "LA"),
    "GIF": ("1", "L", "P", "RGB", "RGBA"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "RGBX", "CMYK", "LAB", "I", "I;16", "I;16B", "F"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
}
TURNABLE = ("PNG", "JPEG", "WEBP", "TIFF")  # formats that carry EXIF
ANIMATED = ("PNG", "GIF", "WEBP")
TRANSFORM = ImageTransform(16)
SECONDS = 5.0  # on the cores, for one small file


def random_image(rng: random.Random, mode: str) -> Image.Image:
    """Noise, or one colour, of 1 to 64 pixels a side, or one side up to 3,000."""
    size = [rng.randint(1, 64), rng.randint(1, 64)]
    if rng.random() < 0.1:
        size[rng.randrange(2)] = rng.randint(64, 3000)
    pixels = np.random.default_rng(rng.randrange(2**32))
    if mode == "F":
        return Image.fromarray(pixels.random(size[::-1], dtype=np.float32) * rng.choice([1, 255]))
    if mode == "I":
        return Image.fromarray(pixels.integers(0, 2**16, size[::-1], dtype=np.int32))
    noise = pixels.integers(0, 256, (*size[::-1], 4), dtype=np.uint8)
    if rng.random() < 0.2:
        noise[:] = noise[0, 0]
    if mode == "P":
        return Image.fromarray(noise[..., :3]).quantize(rng.randint(2, 256))
    if mode in ("LAB", "YCbCr"):
        return Image.merge(mode, [Image.fromarray(band) for band in np.moveaxis(noise[..., :3], -1, 0)])
    if mode.startswith("I;16"):
        return Image.frombytes(mode, size, pixels.integers(0, 256, (*size, 2), dtype=np.uint8).tobytes())
    return Image.fromarray(noise, "RGBA").convert(mode) if mode != "RGBA" else Image.fromarray(noise)


def random_file(rng: random.Random) -> bytes:
    format = rng.choice([name for name in MODES_OF if name != "WEBP" or features.check("webp")])
    image = random_image(rng, rng.choice(MODES_OF[format]))
    settings = {}
    if format in TURNABLE:
        exif = Image.Exif()
        exif[0x0112] = rng.randint(1, 8)
        settings["exif"] = exif
    if format == "TIFF" and image.mode in ("L", "RGB") and rng.random() < 0.5:
        settings["compression"] = rng.choice(["tiff_lzw", "tiff_deflate", "packbits"])
    if format == "JPEG":
        settings |= {"quality": rng.randint(1, 95), "progressive": rng.random() < 0.3}
    if format == "WEBP":
        settings["lossless"] = rng.random() < 0.5
    if image.mode == "P" and format in ("PNG", "GIF") and rng.random() < 0.5:
        settings["transparency"] = 0
    if format in ANIMATED and image.mode in ("RGB", "RGBA", "P") and rng.random() < 0.2:
        settings |= {"save_all": True, "append_images": [ImageOps.mirror(image)] * 2}
    buffer = io.BytesIO()
    image.save(buffer, format, **settings)
    return buffer.getvalue()


def random_damage(rng: random.Random, data: bytes) -> bytes:
    damaged = bytearray(data)
    match rng.choice(["cut", "flip", "head", "huge", "insert"]):
        case "cut":
            return data[: rng.randrange(len(data))]
        case "flip":
            for _ in range(rng.randint(1, 20)):
                damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case "head":  # where sizes, depths and offsets are
            for _ in range(rng.randint(1, 5)):
                damaged[rng.randrange(min(len(data), 100))] = rng.randrange(256)
        case "huge":
            damaged = bytearray(with_png_size(data, rng.choice([0, 1, 20_000, 2**31 - 1]), rng.choice([1, 20_000])))
        case "insert":
            place = rng.randrange(len(data))
            damaged[place:place] = rng.randbytes(rng.randint(1, 50))
    return bytes(damaged)


def with_png_size(data: bytes, width: int, height: int) -> bytes:
    """A PNG whose header says so, with a checksum that agrees; other files as they are."""
    if not data.startswith(b"\x89PNG"):
        return data
    header = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def make_file(seed: int) -> tuple[bytes, bool]:
    """A file, and whether it is whole."""
    rng = random.Random(seed)
    data, whole = random_file(rng), rng.random() < 0.4
    return (data, True) if whole else (random_damage(rng, data), False)


def expected_pixels(data: bytes) -> np.ndarray:
    """The first frame of a whole file `(H, W, 3)` in [0, 255], by PIL's own means and the definition of compositing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        if image.mode.startswith("I"):
            grey = np.asarray(image).astype(float)
            return np.repeat(grey[..., None] / (257 if image.mode != "I" or grey.max() > 255 else 1), 3, axis=2)
        if image.mode == "F":
            grey = np.asarray(image).astype(float)
            return np.repeat(grey[..., None] * (255 if grey.max() <= 2 else 1), 3, axis=2)
        rgb = np.asarray(image.convert("RGB")).astype(float)
        if not image.has_transparency_data:
            return rgb
        rgba = np.asarray(image.convert("RGBA")).astype(float)
        alpha = rgba[..., 3:] / 255
        return rgba[..., :3] * alpha + 255 * (1 - alpha)


def decode(data: bytes, whole: bool) -> str:
    """Check the rule for one file; what became of it."""
    started = time.process_time()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            image = decode_image({"bytes": data, "path": None})
        except UnreadableImage as error:
            assert len(str(error)) > len(error.name) + 2, "it says why"
            assert not whole or "one side is more than 100 times" in str(error), str(error)
            return "refused"
        finally:
            assert time.process_time() - started < SECONDS
    assert not caught, "training would print it for every such image"
    assert image.mode == "RGB" and not image.info
    if whole:
        np.testing.assert_allclose(np.asarray(image).astype(float), expected_pixels(data), atol=1)
    crop = TRANSFORM.crop(TRANSFORM.scale(image), random.Random(0))
    assert crop.shape == (3, 16, 16) and crop.abs().max() <= 1
    return "decoded"


def run(seeds: range) -> None:
    counts = {"refused": 0, "decoded": 0}
    for seed in seeds:
        data, whole = make_file(seed)
        try:
            counts[decode(data, whole)] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}: {data[:16]!r}..., {'whole' if whole else 'damaged'}") from error
    assert min(counts.values()) > len(seeds) / 10, counts  # neither half of the rule goes untested


def test_odd_images():
    run(range(200))


@pytest.mark.slow
def test_many_odd_images():
    run(range(200, 8000))


def test_worst_cases_take_little_memory(tmp_path):
    """Files of a few hundred bytes that would take gigabytes, in a process that may have one on top of its imports."""
    if sys.platform != "linux":
        pytest.skip("limits of memory are Linux's")
    line = io.BytesIO()
    Image.new("1", (1, 60_000)).save(line, "PNG")
    small = io.BytesIO()
    Image.new("RGB", (64, 64)).save(small, "PNG")
    files = {
        "line": line.getvalue(),
        "bomb": with_png_size(small.getvalue(), 2**31 - 1, 2**31 - 1),
        "claim": with_png_size(small.getvalue(), 13_000, 13_000),
        "wide": with_png_size(small.getvalue(), 178_000_000, 1),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    program = """
        import resource, sys
        from hf_vqgan.data.datasets import ImageTransform, UnreadableImage, decode_image
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
        for path in sys.argv[1:]:
            try:
                ImageTransform(256).scale(decode_image({"bytes": None, "path": path}))
                print("decoded")
            except UnreadableImage as error:
                print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), *(str(tmp_path / name) for name in files)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    lines = dict(zip(files, result.stdout.splitlines(), strict=True))
    assert "1x60000 pixels: one side is more than 100 times the other" in lines["line"]
    assert "exceeds limit of 178956970 pixels" in lines["bomb"]
    assert "178000000x1 pixels: one side" in lines["wide"]
    assert lines["claim"].endswith(("truncated", "broken PNG file", "MemoryError")) or "truncated" in lines["claim"]
