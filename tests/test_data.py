import itertools
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch
from conftest import image_bytes, photo, write_tar
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

from hf_vqgan.data.datasets import (
    ImageTransform,
    Mixture,
    TrainingImages,
    UnreadableImage,
    ValidationImages,
    WaitClock,
    load_batches,
    load_image_datasets,
    map_style_images,
    shuffled_epochs,
    take_batches,
)


def as_dataset(images) -> Dataset:
    """What load_image_datasets returns, from PIL images or raw bytes."""
    rows = [{"bytes": i if isinstance(i, bytes) else image_bytes(i), "path": None} for i in images]
    return Dataset.from_dict({"image": rows}, features=Features({"image": Image(decode=False)}))


def test_image_folder_and_its_splits(image_folder):
    train, validation = load_image_datasets(str(image_folder))
    assert (len(train), len(validation)) == (12, 2)
    assert train.column_names == ["image"]


def test_parquet_with_other_columns_and_names(tmp_path):
    rows = as_dataset([photo(i) for i in range(10)]).rename_column("image", "picture")
    rows = rows.add_column("label", list(range(10)))
    rows.to_parquet(tmp_path / "train.parquet")
    train, validation = load_image_datasets(str(tmp_path))
    assert (len(train), len(validation)) == (9, 1)  # no validation split: a tenth is held out
    train, _ = load_image_datasets(str(tmp_path), image_column="picture", max_train_samples=4)
    assert len(train) == 4
    with pytest.raises(ValueError, match="'label' is not an image column; image columns: picture"):
        load_image_datasets(str(tmp_path), image_column="label")
    with pytest.raises(ValueError, match="no split 'validate'; it has train"):
        load_image_datasets(str(tmp_path), validation_split="validate")


def test_dataset_without_images(tmp_path):
    Dataset.from_dict({"text": ["a", "b"]}, features=Features({"text": Value("string")})).to_parquet(
        tmp_path / "t.parquet"
    )
    with pytest.raises(ValueError, match="no image columns; its columns are text"):
        load_image_datasets(str(tmp_path))


def test_empty_split(tmp_path):
    as_dataset([photo(0)]).to_parquet(tmp_path / "train.parquet")
    as_dataset([photo(0)]).select([]).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(ValueError, match="has an empty split.*test"):
        load_image_datasets(str(tmp_path), validation_split="test")


def test_images_inside_a_package():
    pytest.importorskip("skimage")
    train, validation = load_image_datasets(
        "package:skimage/data", train_files=["coffee.png", "rocket.jpg"], validation_files=["chelsea.png"]
    )
    assert (len(train), len(validation)) == (2, 1)
    with pytest.raises(FileNotFoundError, match="'no_such_package' is not installed"):
        load_image_datasets("package:no_such_package/data")


def test_everything_random_is_a_function_of_seed_and_number():
    images = as_dataset([photo(i) for i in range(4)])
    transform = ImageTransform(16, resize=24)
    first, second = TrainingImages(images, transform, seed=1), TrainingImages(images, transform, seed=1)
    other_seed = TrainingImages(images, transform, seed=2)
    forwards = [first[number]["pixel_values"] for number in range(8)]
    torch.rand(100)  # the global generator must not matter, nor the order of access
    backwards = [second[number]["pixel_values"] for number in reversed(range(8))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forwards, backwards, strict=True))
    assert not torch.equal(forwards[0], forwards[4])  # same image, next epoch: another crop
    assert not all(torch.equal(other_seed[number]["pixel_values"], forwards[number]) for number in range(4))


def test_pixels_are_the_images(tmp_path):
    image = PILImage.fromarray(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3))
    dataset = TrainingImages(as_dataset([image]), ImageTransform(16, random_flip=False))
    pixels = dataset[0]["pixel_values"]
    assert torch.equal(((pixels + 1) * 127.5).round().to(torch.uint8), torch.tensor(np.asarray(image)).permute(2, 0, 1))


def test_small_and_unreadable_images_are_counted():
    images = as_dataset([b"not an image", photo(1), photo(2, (10, 12))])
    dataset = TrainingImages(images, ImageTransform(16))
    assert (dataset[0]["unreadable"], dataset[0]["upscaled"]) == (1, 0)  # replaced by the next one
    assert (dataset[2]["unreadable"], dataset[2]["upscaled"]) == (0, 1)
    assert dataset[2]["pixel_values"].shape == (3, 16, 16)
    with pytest.raises(UnreadableImage, match="not one of the 2 training images"):
        TrainingImages(as_dataset([b"", b"x"]), ImageTransform(16))[0]


def test_transform_needs_room_to_crop():
    with pytest.raises(ValueError, match="resize=8 is smaller than resolution=16"):
        ImageTransform(16, resize=8)


def test_validation_images_are_whole_or_central():
    images = as_dataset([photo(0, (70, 50)), b"broken"])
    whole = ValidationImages(images, ImageTransform(16, resize=0), whole=True, size_divisor=8)
    assert [tuple(image.shape) for image in whole] == [(3, 48, 64)]  # the broken one is left out
    square = ValidationImages(images, ImageTransform(16, resize=32), whole=False, size_divisor=8)
    assert square[0].shape == (3, 16, 16)


@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_an_epoch_covers_every_image_once(batch_size):
    size, epochs = 12, 7  # 84 samples: whole batches of 1, 4 and 7
    batches = take_batches(shuffled_epochs(size, seed=3), batch_size, 0, size * epochs // batch_size)
    numbers = [n for batch in batches for n in batch]
    for epoch in range(epochs):
        assert sorted(numbers[epoch * size : (epoch + 1) * size]) == list(range(epoch * size, (epoch + 1) * size))
    assert [n % size for n in numbers[:size]] != [n % size for n in numbers[size : 2 * size]]


def test_batches_start_where_interrupted_ones_stopped():
    whole = list(take_batches(shuffled_epochs(10, seed=5), 3, 0, 20))
    assert list(take_batches(shuffled_epochs(10, seed=5, start=7 * 3), 3, 7, 20)) == whole[7:]


def test_webdataset_tars(tmp_path):
    """A folder of tars, and a pattern of them; labels beside the images are left alone."""
    for shard in range(2):
        write_tar(tmp_path / f"{shard}.tar", [image_bytes(photo(10 * shard + n), "JPEG") for n in range(10)])
    for name in (tmp_path, tmp_path / "*.tar"):
        train, validation = load_image_datasets(str(name), cache_dir=str(tmp_path / "cache"))
        assert (len(train), len(validation)) == (18, 2) and train.column_names == ["image"]
        assert next(iter(load_batches(TrainingImages(train, ImageTransform(16)), 18)))["unreadable"].sum() == 0
    assert (tmp_path / "cache").is_dir()
    with pytest.raises(ValueError, match="names files: it takes no train_files"):
        load_image_datasets(str(tmp_path / "*.tar"), train_files=["0.tar"])


def test_processes_share_the_batches_of_one():
    """Two processes with batches of 3, one with 6, and one that accumulates see the same samples in the same order."""
    images = as_dataset([photo(i) for i in range(10)])
    for dataset in (
        map_style_images([images], ImageTransform(16)),
        map_style_images([images, images.select(range(3))], ImageTransform(16), weights=[1, 3]),
    ):
        whole = [batch["pixel_values"] for batch in load_batches(dataset, 6, stop=6)]
        parts = [list(load_batches(dataset, 3, 4, 12, rank, 2)) for rank in range(2)]
        for number, both in enumerate(zip(*parts, strict=True), start=2):
            assert torch.equal(torch.cat([part["pixel_values"] for part in both]), whole[number])
        small = torch.cat([batch["pixel_values"] for batch in load_batches(dataset, 3, stop=12, num_workers=1)])
        assert torch.equal(small, torch.cat(whole))


def test_the_loader_leaves_the_global_generator_alone():
    """A resumed run opens its loader after the generator's state is restored."""
    dataset = TrainingImages(as_dataset([photo(0)]), ImageTransform(16))
    before = torch.get_rng_state()
    next(load_batches(dataset, 1))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("notice", [signal.SIGTERM, signal.SIGUSR1])
def test_workers_outlive_the_notice_that_a_job_will_end(notice):
    batches = load_batches(TrainingImages(as_dataset([photo(0)]), ImageTransform(16)), 1, stop=20, num_workers=1)
    next(batches)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, notice)
    assert len(list(batches)) == 19


def test_a_mixture_has_the_shares_it_is_told_and_starts_anywhere():
    mixture = Mixture([0.7, 0.2, 0.1], seed=3)
    whole = list(itertools.islice(mixture.draw(0, lambda source, start: itertools.count(start)), 3000))
    for source, share in enumerate((0.7, 0.2, 0.1)):
        for block in range(3):
            assert sum(drawn == source for drawn, _ in whole[1000 * block : 1000 * (block + 1)]) == 1000 * share
        assert [item for drawn, item in whole if drawn == source] == list(range(int(3000 * share)))
    assert [drawn for drawn, _ in whole[:1000]] != [drawn for drawn, _ in whole[1000:2000]]
    late = mixture.draw(1234, lambda source, start: itertools.count(start))
    assert list(itertools.islice(late, 1000)) == whole[1234:2234]


@pytest.mark.parametrize(
    "weights, message", [([1, -1], "must all be positive"), ([1, 1e-4], "none may be below 1/1000")]
)
def test_impossible_weights(weights, message):
    with pytest.raises(ValueError, match=message):
        Mixture(weights)


def test_without_weights_an_epoch_covers_every_image_of_every_dataset():
    flat = [PILImage.new("RGB", (16, 16), (value, 0, 0)) for value in range(9)]
    dataset = map_style_images([as_dataset(flat[:6]), as_dataset(flat[6:])], ImageTransform(16))
    batches = load_batches(dataset, 3, stop=3)
    values = torch.cat([batch["pixel_values"][:, 0, 0, 0] for batch in batches])
    assert sorted(((values + 1) * 127.5).round().int().tolist()) == list(range(9))


def test_unreadable_images_are_counted_exactly(broken_folder):
    """100 of 1,000, some of them neighbours: the same count for any number of processes."""
    images, _ = load_image_datasets(str(broken_folder / "images"))
    dataset = TrainingImages(images, ImageTransform(8))
    for world_size in (1, 2):
        batches = [load_batches(dataset, 50, 0, 20, rank, world_size) for rank in range(world_size)]
        assert sum(int(batch["unreadable"].sum()) for mine in batches for batch in mine) == 100


def test_wait_clock():
    def slow():
        for item in range(4):
            time.sleep(0.03)
            yield item

    clock = WaitClock(slow())
    assert next(clock) == 0
    time.sleep(0.09)
    assert 0.1 < clock.share() < 0.4
    assert list(clock) == [1, 2, 3] and clock.share() > 0.9
