"""JPEG and WebP at a given number of bits: the anchor that a tokenizer's rate is held against."""

import io
from dataclasses import dataclass

from PIL import Image

CODECS = {"jpeg": "JPEG", "webp": "WebP"}
MIN_SIDE = 8  # pixels; images are not shrunk below
CONTAINER_BYTES = {"webp": 20}  # RIFF header and the header of its only chunk


@dataclass
class CodedImage:
    """
    Args:
        image (`Image.Image`): What the decoder shows, at the original's size.
        bits (`int`): Length of the code, counted as `payload_bytes` says.
        quality (`int`): The codec's setting, 0 or 1 to 100.
        shrink (`int`): By how much the sides were divided before coding; 1 if they were not.
    """

    image: Image.Image
    bits: int
    quality: int
    shrink: int


def payload_bytes(data: bytes, codec: str) -> int:
    """
    Bytes that depend on the image. What a tokenizer's user would agree on beforehand is not counted: JPEG's header
    segments (its tables are the standard ones, which the quality names) and WebP's container.
    """
    if codec == "webp":
        return len(data) - CONTAINER_BYTES[codec]
    start_of_scan = data.index(b"\xff\xda")
    header = int.from_bytes(data[start_of_scan + 2 : start_of_scan + 4], "big")
    return len(data) - (start_of_scan + 2 + header) - 2  # 2: the marker at the end


def encode_near(image: Image.Image, codec: str, bits: float) -> CodedImage:
    """
    Code an RGB image with the quality whose size is closest to `bits`, found by bisection.

    If even the lowest quality takes more, the image is halved (Lanczos) until it fits or cannot be halved without sides
    below `MIN_SIDE`, and enlarged again after decoding (bicubic). A result that is over budget all the same has the
    lowest quality of the smallest size.
    """
    lowest, shrink = (1 if codec == "jpeg" else 0), 1
    while True:
        size = [max(1, side // shrink) for side in image.size]
        small = image if shrink == 1 else image.resize(size, Image.Resampling.LANCZOS)
        if payload_bits(small, codec, lowest) <= bits or min(size) // 2 < MIN_SIDE:
            break
        shrink *= 2
    low, high = lowest, 100
    while high - low > 1:  # the size of `low` is at most `bits`, or low is the lowest
        middle = (low + high) // 2
        low, high = (middle, high) if payload_bits(small, codec, middle) <= bits else (low, middle)
    quality = min((low, high), key=lambda quality: abs(payload_bits(small, codec, quality) - bits))
    data = _encode(small, codec, quality)
    with Image.open(io.BytesIO(data)) as decoded:
        shown = decoded.convert("RGB")
    if shrink > 1:
        shown = shown.resize(image.size, Image.Resampling.BICUBIC)
    return CodedImage(shown, 8 * payload_bytes(data, codec), quality, shrink)


def payload_bits(image: Image.Image, codec: str, quality: int) -> int:
    return 8 * payload_bytes(_encode(image, codec, quality), codec)


def _encode(image: Image.Image, codec: str, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, CODECS[codec], quality=quality)
    return buffer.getvalue()
