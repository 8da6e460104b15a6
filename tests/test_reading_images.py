"""What every reader of images owes its user: photographs upright, broken files named once, one line where it ends."""

import dataclasses
import fcntl
import io
import json
import multiprocessing
import os
import pickle
import runpy
import signal
import struct
import sys
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import TINY, image_bytes, photo, write_tar
from PIL import Image
from test_training import run_config, stop_after

from hf_vqgan import VQGANConfig
from hf_vqgan.app import playground
from hf_vqgan.data.datasets import (
    ImageTransform,
    TrainingImages,
    UnreadableImage,
    ValidationImages,
    available_cores,
    decode_image,
    default_num_workers,
    load_batches,
    map_style_images,
)
from hf_vqgan.data.images import ImageOptions, TrainingOptions, load_image_datasets, open_images
from hf_vqgan.data.streams import StreamedImages, load_image_stream
from hf_vqgan.evaluation.latent_options import LatentAnalysisConfig
from hf_vqgan.evaluation.latent_subject import load_images
from hf_vqgan.files.documents import write_text
from hf_vqgan.generation.encoded_dataset import EncodingConfig, encode_dataset
from hf_vqgan.generation.samples import LatentSamples
from hf_vqgan.training.run_folder import write_manifest
from hf_vqgan.training.setup import share_cpu_threads
from hf_vqgan.training.tokenizer import train

SCRIPTS = Path(__file__).parent.parent / "scripts"
WHOLE = ImageTransform(16, center_crop=True, random_flip=False)


def portrait_bytes() -> bytes:
    """A photograph of 16x24 pixels, red above and blue below, as a camera held upright stores it: lying down."""
    upright = Image.new("RGB", (16, 24), (250, 0, 0))
    upright.paste((0, 0, 250), (0, 12, 16, 24))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    buffer = io.BytesIO()
    upright.transpose(Image.Transpose.ROTATE_90).save(buffer, "JPEG", quality=100, subsampling=0, exif=exif)
    return buffer.getvalue()


@pytest.fixture
def portraits(tmp_path) -> Path:
    """Twelve of them: `images`, a folder, and `tars/0.tar`."""
    for split in ("train", "validation"):
        (tmp_path / "images" / split).mkdir(parents=True)
        for number in range(12):
            (tmp_path / "images" / split / f"{number:02d}.jpg").write_bytes(portrait_bytes())
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "0.tar", [portrait_bytes()] * 12)
    return tmp_path


def is_upright(pixels: torch.Tensor) -> bool:
    """Whether the first row of `(3, 16, 16)` in [-1, 1] is red, and the last blue."""
    red, _, blue = pixels
    return bool(((red[0] > 0.8) & (blue[0] < -0.8) & (red[-1] < -0.8) & (blue[-1] > 0.8)).all())


def test_every_reader_shows_photographs_upright(portraits, tmp_path, trained_model):
    folder = str(portraits / "images")
    train_images, validation_images = load_image_datasets(TrainingOptions(folder))
    rows = datasets.load_dataset(folder, split="train")
    stream, _ = load_image_stream(TrainingOptions(str(portraits / "tars"), validation_size=2))
    shown = {
        "training": TrainingImages(train_images, WHOLE)[0]["pixel_values"],
        "stream of tars": next(load_batches(StreamedImages([stream], WHOLE), 1))["pixel_values"][0],
        "validation": ValidationImages(validation_images, WHOLE, whole=False, size_divisor=1)[0],
        "latent diffusion": LatentSamples(rows, WHOLE, "d")[0]["pixel_values"],
        "evaluation": open_images(ImageOptions(folder, resolution=16)).squares()[0].pixels / 127.5 - 1,
        "latent analysis": load_images(folder, LatentAnalysisConfig(), 16).pixels[0],
        "playground": playground.fit_image(trained_model, Image.open(io.BytesIO(portrait_bytes())), 64)[0, :, 4:20],
    }
    assert {name for name, pixels in shown.items() if not is_upright(pixels)} == set()
    trained_model.save_pretrained(tmp_path / "model")
    encode_dataset(str(tmp_path / "model"), folder, tmp_path / "out", EncodingConfig(resolution=16, cpu_threads=1))
    (indices,) = datasets.load_dataset(str(tmp_path / "out"), split="train[:1]").with_format("torch")["indices"]
    assert torch.equal(indices.long(), trained_model.encode_indices(shown["validation"][None])[0])


# ---------------------------------------------------------------------------------------------------------------------
# What counts as unreadable


def with_png_size(data: bytes, width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def nan_tiff() -> bytes:
    values = np.zeros((8, 8), dtype=np.float32)
    values[2, 2] = np.nan
    return image_bytes(Image.fromarray(values), "TIFF")


UNREADABLE = {
    "nothing": (b"", "not an image"),
    "text": (b"Gone.", "not an image"),
    "cut off": (image_bytes(photo(0), "JPEG")[:-60], "truncated"),
    "line": (image_bytes(Image.new("1", (1, 60_000))), "1x60000 pixels: one side is more than 100 times the other"),
    "bomb": (with_png_size(image_bytes(photo(0)), 2**31 - 1, 2**31 - 1), "exceeds limit of 178956970 pixels"),
    "no pixels": (with_png_size(image_bytes(photo(0)), 0, 8), "0x8|not an image"),
    "NaN": (nan_tiff(), "the value nan is neither in"),
}


@pytest.mark.parametrize("data, reason", UNREADABLE.values(), ids=UNREADABLE)
def test_unreadable_images_say_which_and_why(data, reason):
    with pytest.raises(UnreadableImage, match=rf"^photo.png \(row 7\): .*({reason})") as caught:
        decode_image({"bytes": data, "path": "photo.png"}, "row 7")
    again = pickle.loads(pickle.dumps(caught.value))  # as a worker sends it
    assert (str(again), again.name) == (str(caught.value), "photo.png (row 7)")


def test_entries_without_an_image_have_a_place_at_least():
    for entry in (None, {"bytes": None, "path": None}):
        with pytest.raises(UnreadableImage, match="^row 7: "):
            decode_image(entry, "row 7")


def test_large_images_are_read_without_a_word():
    """PIL warns from 89 million pixels on: once for each image and worker, about something that is no mistake."""
    large = Image.new("1", (9_500, 9_500))
    assert decode_image({"bytes": image_bytes(large), "path": None}).size == (9_500, 9_500)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_frames_the_first_is_shown(format):
    frames = [photo(number).quantize(32).convert("RGB") for number in range(3)]
    buffer = io.BytesIO()
    lossless = {"lossless": True} if format == "WEBP" else {}
    frames[0].save(buffer, format, save_all=True, append_images=frames[1:], **lossless)
    image = decode_image({"bytes": buffer.getvalue(), "path": None})
    assert np.array_equal(np.asarray(image), np.asarray(frames[0]))


# ---------------------------------------------------------------------------------------------------------------------
# Counting and naming them


def broken_rows(count: int, broken: tuple[int, ...], path: str | None = None) -> datasets.Dataset:
    rows = [{"bytes": b"?" if n in broken else image_bytes(photo(n)), "path": path} for n in range(count)]
    return datasets.Dataset.from_dict(
        {"image": rows}, features=datasets.Features({"image": datasets.Image(decode=False)})
    )


def test_each_unreadable_image_has_one_name_of_its_own():
    """Whatever it is called, whichever epoch, process or worker meets it, and after others were held out."""
    images = broken_rows(12, (3, 4, 9), path="same.jpg")
    shuffled = images.train_test_split(test_size=1, seed=1)
    assert shuffled["test"][0]["image"]["bytes"] != b"?"
    names = {f"same.jpg (row {n})" for n in (3, 4, 9)}
    for workers, world_size in ((0, 1), (2, 1), (0, 2)):
        training = TrainingImages(shuffled["train"], ImageTransform(16))
        batches = [load_batches(training, 4, 0, 11, rank, world_size, workers) for rank in range(world_size)]
        assert {name for mine in batches for batch in mine for name in batch["skipped"]} == names
    mixed = map_style_images([images, images], ImageTransform(16), weights=[1, 1])
    assert len({name for batch in load_batches(mixed, 8, stop=6) for name in batch["skipped"]}) == 6


@pytest.mark.parametrize("groups", [1, 2])
def test_each_unreadable_image_of_a_stream_has_one_name(tmp_path, groups):
    """The tars' images have the same names in every tar."""
    good, bad = image_bytes(photo(0), "JPEG"), b"?"
    write_tar(tmp_path / "a.tar", [bad, good, good, bad, good, good])
    write_tar(tmp_path / "b.tar", [good, good, good, bad, good, good])
    shards, validation = load_image_stream(TrainingOptions(str(tmp_path), validation_size=1))
    assert len(validation) == 1  # the first, a broken one
    stream = StreamedImages([shards], ImageTransform(16), buffer_size=3, shard_groups=groups)
    batches = load_batches(stream, 4, stop=12, num_workers=1)
    names = {name for batch in batches for name in batch["skipped"]}
    assert names == {"003.jpg (shard 0, row 3)", "003.jpg (shard 1, row 3)"}


@pytest.mark.parametrize("streaming", [False, True])
def test_one_broken_file_counts_once(image_folder, random_trunk, tmp_path, caplog, capsys, streaming):
    """Over seven epochs, one interruption and the rest: one warning, one in metrics.json, one name at the end."""
    (image_folder / "train" / "05.png").write_bytes(b"not an image")
    settings = dict(streaming=streaming, max_train_steps=21, checkpointing_steps=9, validation_steps=21,
                    perceptual_weight=0.0, adversarial_weight=0.0, latent_statistics_images=0)  # fmt: skip
    config = run_config(image_folder, random_trunk, tmp_path / "run", **settings)
    with pytest.MonkeyPatch.context() as patch:
        count = sys.modules["hf_vqgan.training.loop"].count_bad_images
        interrupt = stop_after(11)
        patch.setattr("hf_vqgan.training.loop.count_bad_images", lambda *a: (count(*a), interrupt(*a)))
        with pytest.raises(KeyboardInterrupt):
            train(config, VQGANConfig(**TINY))
    metrics = train(config, VQGANConfig(**TINY))
    assert metrics["unreadable_images"] == 1
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["unreadable_images"] == 1
    assert caplog.text.count("05.png") == 1
    out = capsys.readouterr().out
    assert "1 unreadable image(s): " in out and "05.png" in out and "replaced in 7 training sample(s)" in out


def test_labels_follow_over_several_broken_neighbours(labelled_rows):
    samples = LatentSamples(labelled_rows, WHOLE, "d", "image", "label")
    assert [samples[n]["label"] for n in range(6)] == [0, 4, 4, 4, 4, 5]


@pytest.fixture
def labelled_rows() -> datasets.Dataset:
    images = broken_rows(6, (1, 2, 3))
    return images.add_column("label", list(range(6))).cast_column("image", datasets.Image())


# ---------------------------------------------------------------------------------------------------------------------
# How scripts end


@pytest.fixture
def all_broken(tmp_path) -> str:
    folder = tmp_path / "broken" / "train"
    folder.mkdir(parents=True)
    for number in range(20):
        (folder / f"{number:02d}.png").write_bytes(b"not an image")
    return str(tmp_path / "broken")


def run_script(monkeypatch, name: str, *arguments: str) -> str:
    """The script in this process; the line it ends with."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPTS / name), run_name="__main__")
    return str(ended.value.code)


@pytest.mark.parametrize(
    "script", ["evaluate_vqgan", "analyze_latent_space", "encode_dataset", "train_latent_diffusion"]
)
def test_scripts_end_with_one_line_and_leave_nothing(monkeypatch, tmp_path, trained_model, all_broken, script):
    trained_model.save_pretrained(tmp_path / "model")
    model, out = str(tmp_path / "model"), tmp_path / "out"
    arguments = {
        "evaluate_vqgan": [model, all_broken, "--output_dir", out, "--resolution", 16, "--inception", "false"],
        "analyze_latent_space": [model, all_broken, "--output_dir", out],
        "encode_dataset": [model, all_broken, out, "--resolution", 16],
        "train_latent_diffusion": ["--vqgan", model, "--dataset_name", all_broken, "--output_dir", out],
    }
    error = run_script(monkeypatch, f"{script}.py", *arguments[script])
    assert error.startswith(f"{script}.py: error: ") and "\n" not in error and "read" in error
    assert not list(out.rglob("*.parquet")) and not (out / "evaluation.json").exists()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("streaming", ["false", "true"])
def test_training_ends_with_one_line(image_folder, random_trunk, tmp_path, monkeypatch, workers, streaming):
    """From a worker as well, whose errors come with a traceback."""
    for file in (image_folder / "train").iterdir():
        file.write_bytes(b"not an image")
    config = run_config(image_folder, random_trunk, tmp_path / "run", dataloader_num_workers=workers)
    names = ("dataset_name", "output_dir", "resolution", "perceptual_net", "perceptual_weights_path", "max_train_steps",
             "dataloader_num_workers", "cpu_threads")  # fmt: skip
    flags = [part for name in names for part in (f"--{name}", getattr(config, name))]
    model = ["--block_out_channels", 8, 16, "--norm_num_groups", 4, "--latent_channels", 8]
    error = run_script(monkeypatch, "train_vqgan.py", "--config", "none", *flags, *model, "--streaming", streaming)
    assert error.startswith("train_vqgan.py: error: ") and "\n" not in error
    assert "training images" in error and ".png (" in error
    assert multiprocessing.active_children() == []


# ---------------------------------------------------------------------------------------------------------------------
# Other systems


def test_cores_are_counted_where_there_is_no_affinity(monkeypatch):
    assert available_cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS, Windows
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert (available_cores(), default_num_workers()) == (6, 2)
    threads = torch.get_num_threads()
    try:
        share_cpu_threads(dataclasses.make_dataclass("Config", ["cpu_threads"])(None), Accelerator())
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert available_cores() == 1


def test_workers_start_where_there_is_no_sigusr1(monkeypatch):
    monkeypatch.delattr(signal, "SIGUSR1")  # Windows
    training = TrainingImages(broken_rows(4, ()), ImageTransform(16))
    assert len(list(load_batches(training, 2, stop=2, num_workers=1))) == 2


def test_reports_are_utf8_where_that_is_not_the_default(tmp_path, monkeypatch):
    def write(path, text, encoding="cp1252"):  # Windows
        path.write_bytes(text.encode(encoding))

    monkeypatch.setattr(Path, "write_text", write)
    write_text(tmp_path / "report.md", "64² → 0.25 ± 0.01")
    assert (tmp_path / "report.md").read_bytes().decode() == "64² → 0.25 ± 0.01"


def test_files_are_synced_through_descriptors_that_may_write(tmp_path, monkeypatch):
    """Windows refuses to sync any other."""
    access = []
    monkeypatch.setattr(os, "fsync", lambda file: access.append(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE))
    (tmp_path / "weights").write_bytes(b"weights")
    write_manifest(tmp_path)
    assert os.O_RDONLY not in access and os.O_RDWR in access and (tmp_path / "weights").read_bytes() == b"weights"


def test_what_a_spawned_worker_needs_can_be_sent(tmp_path, monkeypatch):
    """How workers start on macOS and Windows."""
    write_tar(tmp_path / "0.tar", [image_bytes(photo(n), "JPEG") for n in range(6)])
    images, _ = load_image_datasets(TrainingOptions(str(tmp_path)))
    shards, _ = load_image_stream(TrainingOptions(str(tmp_path), validation_size=1))
    sent = []
    loader = lambda *data, **settings: sent.append((data, settings)) or []  # noqa: E731
    monkeypatch.setattr("hf_vqgan.data.datasets.DataLoader", loader)
    for training in (TrainingImages(images, ImageTransform(16)), StreamedImages([shards], ImageTransform(16))):
        load_batches(training, 2, num_workers=1)
        (batches,), settings = sent.pop()
        keys = next(settings["batch_sampler"])  # which stays here
        needed = batches, settings["collate_fn"], settings["worker_init_fn"], keys
        batches, collate, _, keys = pickle.loads(pickle.dumps(needed))
        assert collate(batches.__getitems__(keys))["pixel_values"].shape == (2, 3, 16, 16)
