import numpy as np
import pytest
import torch
from conftest import photo
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

from hf_vqgan.data import (
    EpochBatchSampler,
    ImageTransform,
    TrainingImages,
    UnreadableImage,
    ValidationImages,
    load_image_datasets,
)


def as_dataset(images) -> Dataset:
    """What load_image_datasets returns, from PIL images or raw bytes."""
    import io

    rows = []
    for image in images:
        if not isinstance(image, bytes):
            buffer = io.BytesIO()
            image.save(buffer, format="PNG")
            image = buffer.getvalue()
        rows.append({"bytes": image, "path": None})
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
    numbers = [n for batch in EpochBatchSampler(size, batch_size, size * epochs // batch_size, seed=3) for n in batch]
    for epoch in range(epochs):
        assert sorted(numbers[epoch * size : (epoch + 1) * size]) == list(range(epoch * size, (epoch + 1) * size))
    assert [n % size for n in numbers[:size]] != [n % size for n in numbers[size : 2 * size]]


def test_sampler_starts_where_an_interrupted_one_stopped():
    whole = list(EpochBatchSampler(10, 3, 20, seed=5))
    assert list(EpochBatchSampler(10, 3, 13, seed=5, start=7)) == whole[7:]
