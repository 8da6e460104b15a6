import itertools
import threading

import pytest
import torch
from conftest import TINY, image_bytes, photo, write_tar
from PIL import Image
from test_data import as_dataset
from test_training import run_config, stop_after

from hf_vqgan import VQGANConfig, VQGANModel
from hf_vqgan.data.datasets import ImageTransform, UnreadableImage, load_batches
from hf_vqgan.data.images import TrainingOptions
from hf_vqgan.data.streams import ShuffledShards, StreamedImages, load_image_stream, read_ahead
from hf_vqgan.training.tokenizer import train

PLAIN = ImageTransform(16, random_flip=False)


class Numbers:
    """A shard whose rows are numbers, and which counts how many were read."""

    skip = 0

    def __init__(self, rows):
        self.rows, self.reads = rows, 0

    def read(self, start=0):
        for row in self.rows[start:]:
            self.reads += 1
            yield row


def numbered_shards(*sizes):
    ends = list(itertools.accumulate(sizes))
    return [Numbers(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]


def flat_images(count: int, first: int = 0) -> list[bytes]:
    """Images that are told apart by the value of their red pixels."""
    return [image_bytes(Image.new("RGB", (16, 16), (first + value, 0, 0))) for value in range(count)]


def values(batches) -> list[int]:
    """Which of the `flat_images` are in the batches."""
    pixels = torch.cat([batch["pixel_values"][:, 0, 0, 0] for batch in batches])
    return ((pixels + 1) * 127.5).round().int().tolist()


@pytest.fixture
def shards(tmp_path):
    """35 flat images in four parquet files of unequal sizes."""
    for number, (first, count) in enumerate(((0, 12), (12, 3), (15, 19), (34, 1))):
        as_dataset(flat_images(count, first)).to_parquet(tmp_path / f"train-{number}.parquet")
    as_dataset([photo(0)]).to_parquet(tmp_path / "test.parquet")
    return load_image_stream(TrainingOptions(str(tmp_path)))[0]


@pytest.mark.parametrize("buffer_size", [1, 7, 100])
def test_every_pass_has_every_image_once_in_an_order_of_its_own(buffer_size):
    lengths = {}
    shards = ShuffledShards(numbered_shards(9, 0, 30, 1), 0, "shards", buffer_size, lengths)
    passes = [list(itertools.islice(shards.read(40 * number), 40)) for number in range(3)]
    assert all(sorted(images) == list(range(40)) for images in passes)
    assert buffer_size == 1 or passes[0] != passes[1] != passes[2]  # 1: only the shards are shuffled
    assert lengths == {0: 9, 1: 0, 2: 30, 3: 1}


@pytest.mark.parametrize("buffer_size", [1, 7, 100])
def test_reading_starts_anywhere_whether_lengths_are_known_or_not(buffer_size):
    sizes = (9, 0, 30, 1)
    whole = list(itertools.islice(ShuffledShards(numbered_shards(*sizes), 0, "s", buffer_size, {}).read(), 150))
    known = dict(enumerate(sizes))
    for start in range(0, 130, 3):
        for lengths in ({}, dict(known), {2: 30}):
            late = ShuffledShards(numbered_shards(*sizes), 0, "s", buffer_size, lengths).read(start)
            assert list(itertools.islice(late, 20)) == whole[start : start + 20]


def test_finding_a_place_reads_little_when_lengths_are_known():
    parts = numbered_shards(*[100] * 50)
    next(ShuffledShards(parts, 0, "s", 10, dict.fromkeys(range(50), 100)).read(3 * 5000 + 4321))
    assert sum(part.reads for part in parts) <= 300  # of 4,321: one or two shards and what the buffer held


def test_a_pass_over_parquet_for_any_number_of_processes_and_workers(shards):
    stream = StreamedImages([shards], PLAIN, buffer_size=8)
    whole = values(load_batches(stream, 10, stop=7))
    assert sorted(whole[:35]) == sorted(whole[35:]) == list(range(35))
    parts = [list(load_batches(stream, 5, 6, 14, rank, 2, num_workers=rank)) for rank in range(2)]
    assert [value for pair in zip(*parts, strict=True) for value in values(pair)] == whole[30:]
    fresh = StreamedImages([shards], PLAIN, buffer_size=8)  # a resumed run
    fresh.load_state_dict(stream.state_dict())
    assert values(load_batches(fresh, 10, start=5, stop=7)) == whole[50:]


def test_crops_are_a_function_of_seed_and_sample_number():
    def crops(seed, start):
        pictures = [image_bytes(photo(n)) for n in range(4)]
        source = [Numbers([{"bytes": picture, "path": None} for picture in pictures])]
        stream = StreamedImages([source], ImageTransform(16, 24), seed, buffer_size=2)
        return torch.cat([batch["pixel_values"] for batch in load_batches(stream, 4, start, start + 2)])

    torch.rand(100)
    assert torch.equal(crops(1, 1)[:4], crops(1, 0)[4:])
    assert not torch.equal(crops(1, 0), crops(2, 0))


def test_groups_of_shards_are_read_by_their_own_processes():
    """Different images for each process, none left out, and the batches of one process that accumulates."""

    def stream():
        rows = [{"bytes": data, "path": None} for data in flat_images(40)]
        shards = [Numbers(rows[10 * n : 10 * (n + 1)]) for n in range(4)]
        return StreamedImages([shards], PLAIN, buffer_size=4, shard_groups=2), shards

    seen = []
    for rank in range(2):
        mine, shards = stream()
        seen.append(values(load_batches(mine, 5, 0, 8, rank, 2)))
        assert [shard.reads > 0 for shard in shards] == [rank == 0, rank == 1] * 2
    assert sorted(seen[0] + seen[1]) == list(range(40))
    alone = values(load_batches(stream()[0], 5, 0, 8))
    assert alone == [v for n in range(0, 20, 5) for mine in seen for v in mine[n : n + 5]]
    with pytest.raises(ValueError, match="shard_groups=5 is more than the 4 shards"):
        StreamedImages([shards], ImageTransform(16), shard_groups=5)


def test_streams_are_mixed_by_weight():
    sources = [
        [Numbers([{"bytes": b, "path": None} for b in flat_images(n, first)])] for first, n in ((0, 50), (100, 3))
    ]
    stream = StreamedImages(sources, PLAIN, weights=[3, 1], buffer_size=10)
    whole = values(load_batches(stream, 50, stop=20))
    assert sum(value >= 100 for value in whole) == 250
    assert values(load_batches(stream, 25, start=13, stop=16)) == whole[325:400]
    together = StreamedImages(sources, PLAIN)
    assert sorted(values(load_batches(together, 53, stop=1))) == [*range(50), 100, 101, 102]


@pytest.mark.parametrize("kind", ["images", "tars"])
def test_unreadable_images_of_a_stream_are_counted_exactly(broken_folder, kind):
    """100 of 1,000 in a pass, for one process and for two, which also see the same replacements."""
    shards, validation = load_image_stream(TrainingOptions(str(broken_folder / kind)))
    assert len(validation) == 1
    pixels = []
    for world_size in (1, 2):
        stream = StreamedImages([shards], ImageTransform(8), buffer_size=100)
        batches = [load_batches(stream, 40 // world_size, 0, 25 * world_size, r, world_size) for r in range(world_size)]
        steps = list(zip(*batches, strict=True))
        assert sum(int(batch["unreadable"].sum()) for step in steps for batch in step) == 100
        pixels.append(torch.cat([batch["pixel_values"] for step in steps for batch in step]))
    assert torch.equal(*pixels)


def test_too_many_unreadable_images_in_a_row():
    stream = StreamedImages([[Numbers([{"bytes": b"", "path": "x.jpg"}])]], ImageTransform(8))
    with pytest.raises(UnreadableImage, match="9 training images in a row cannot be read"):
        next(load_batches(stream, 2))


def test_held_out_and_limited_images(tmp_path):
    for shard in range(2):
        write_tar(tmp_path / f"{shard}.tar", flat_images(5, 5 * shard))
    shards, validation = load_image_stream(TrainingOptions(str(tmp_path), validation_size=7))
    assert len(validation) == 7
    assert sorted(values(load_batches(StreamedImages([shards], PLAIN), 3, stop=1))) == [7, 8, 9]
    limited, _ = load_image_stream(TrainingOptions(str(tmp_path / "*.tar"), validation_size=2, max_train_samples=4))
    assert sorted(values(load_batches(StreamedImages([limited], PLAIN), 4, stop=1))) == [2, 3, 4, 5]
    with pytest.raises(ValueError, match="no image to train on, as the first 64 are held out for validation"):
        load_image_stream(TrainingOptions(str(tmp_path)))
    with pytest.raises(ValueError, match="'cls' is not an image column; image columns: jpg"):
        load_image_stream(TrainingOptions(str(tmp_path), image_column="cls"))


def test_read_ahead_passes_errors_on_and_ends_with_its_reader():
    def broken():
        yield 1
        raise OSError("connection lost")

    items = read_ahead(broken())
    assert next(items) == 1
    with pytest.raises(OSError, match="connection lost"):
        next(items)
    endless = read_ahead(itertools.count())
    assert [next(endless) for _ in range(20)] == list(range(20))
    endless.close()
    for thread in threading.enumerate():
        if thread.name.startswith("read_ahead"):
            thread.join(timeout=5)
            assert not thread.is_alive()


def test_resumed_run_on_mixed_streams_ends_in_the_same_weights(image_folder, random_trunk, tmp_path, capsys):
    write_tar(tmp_path / "more.tar", [image_bytes(photo(200 + n)) for n in range(5)])
    settings = dict(streaming=True, shuffle_buffer_size=5, extra_datasets=[str(tmp_path / "more.tar")],
                    dataset_weights=[3, 1], max_train_steps=5, checkpointing_steps=2, quantize_start=0,
                    validation_steps=5, perceptual_weight=0.0, adversarial_weight=0.0)  # fmt: skip
    config = run_config(image_folder, random_trunk, tmp_path / "whole", **settings)
    train(config, VQGANConfig(**TINY))
    assert "a stream of 1 + 1 shard(s) of training images, mixed 3 : 1, 2 for validation" in capsys.readouterr().out
    config = run_config(image_folder, random_trunk, tmp_path / "stopped", **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_vqgan.training.loop.count_bad_images", stop_after(3))
        with pytest.raises(KeyboardInterrupt):
            train(config, VQGANConfig(**TINY))
    train(config, VQGANConfig(**TINY))
    assert "at step 2" in capsys.readouterr().out
    whole, resumed = (VQGANModel.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
