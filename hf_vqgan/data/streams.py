"""Training images that are read as a stream: datasets too large to download or to index before training."""

import itertools
import logging
import random
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import datasets
import fsspec
import torch
from accelerate.utils import gather_object

from .datasets import ImageTransform, Mixture, UnreadableImage, decode_image
from .images import TrainingOptions, check_splits, find_validation_split, only_image_column
from .randomness import rng

logger = logging.getLogger(__name__)

# An unreadable image is replaced by one of so many that follow it.
SPARES = 8


@dataclass(frozen=True)
class Shard:
    """
    A part of a streamed dataset that can be read again and again, always in the same order.

    Args:
        dataset (`datasets.IterableDataset`): With one column `image` of undecoded files, not shuffled.
        index, count (`int`): This is shard `index` of `count`.
        skip (`int`): Pass over so many of its rows: they are held out.
        limit (`int`, *optional*): Then take only so many.
    """

    dataset: datasets.IterableDataset
    index: int = 0
    count: int = 1
    skip: int = 0
    limit: int | None = None

    def read(self, start: int = 0) -> Iterator[dict]:
        """Its rows from the `start`-th on, as `{"bytes", "path"}`."""
        # shard() also makes an iterable of our own: several loaders may be reading the dataset at a time.
        rows = iter(self.dataset.shard(num_shards=self.count, index=self.index))
        stop = None if self.limit is None else self.skip + self.limit
        return (_with_bytes(row["image"]) for row in itertools.islice(rows, self.skip + start, stop))


def _with_bytes(entry: dict) -> dict:
    """Remote files (`hf://...`) fetched; local ones are left to the process that decodes."""
    if entry and entry["bytes"] is None and "://" in (entry["path"] or ""):
        with fsspec.open(entry["path"]) as file:
            return entry | {"bytes": file.read()}
    return entry


def load_image_stream(
    options: TrainingOptions, hold_out: bool = True, max_shards: int = 1024
) -> tuple[list[Shard], datasets.Dataset | None]:
    """
    As `load_image_datasets`, without downloading or indexing: the training images as shards, the validation images in
    memory. Without a validation split, the first images of the train split are held out. Those of
    `max_train_samples` are one shard.

    Args:
        hold_out (`bool`): Whether validation images are wanted at all.
        max_shards (`int`): Join a dataset's own shards (files) to at most so many.
    """
    name, train_split, limit = options.dataset_name, options.train_split, options.max_train_samples
    splits = options.load_splits(options.data_files(), streaming=True)
    check_splits(splits, name, train_split)
    validation_split = find_validation_split(splits, options) if hold_out else None
    train = only_image_column(splits[train_split], name, options.image_column)
    count = min(train.num_shards, max_shards) if limit is None else 1
    shards = [Shard(train, index, count) for index in range(count)]
    if not hold_out:
        validation = None
    elif validation_split is not None:
        held_out = Shard(only_image_column(splits[validation_split], name, options.image_column))
        validation = _in_memory(itertools.islice(held_out.read(), options.max_validation_samples))
    else:
        shards, validation = _hold_out(shards, options.validation_size)
        most = options.max_validation_samples or options.validation_size
        validation = validation.select(range(min(len(validation), most)))
    if validation is not None and not len(validation):
        raise ValueError(f"dataset {name!r}: split {validation_split or train_split!r} is empty.")
    shards = [replace(shard, limit=limit) for shard in shards]
    if not any(True for shard in shards for _ in itertools.islice(shard.read(), 1)):
        all_held_out = hold_out and validation_split is None
        why = f", as the first {options.validation_size} are held out for validation" if all_held_out else ""
        raise ValueError(f"dataset {name!r}: split {train_split!r} has no image to train on{why}.")
    return shards, validation


def _in_memory(records: Iterable[dict]) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(decode=False)})
    return datasets.Dataset.from_dict({"image": list(records)}, features=features)


def _hold_out(shards: list[Shard], count: int) -> tuple[list[Shard], datasets.Dataset]:
    """The shards without their first `count` images, and those."""
    records: list[dict] = []
    rest = []
    for shard in shards:
        taken = list(itertools.islice(shard.read(), count - len(records)))
        records += taken
        rest.append(replace(shard, skip=len(taken)))
    return rest, _in_memory(records)


class _Ticket:
    """The place of one image in its pass over the shards; `record` is `None` until it is read."""

    __slots__ = ("shard", "row", "record")

    def __init__(self, shard: int, row: int, record: dict | None = None):
        self.shard, self.row, self.record = shard, row, record


class ShuffledShards:
    """
    Passes over shards, one after the other, each with every image once, in an order that is a function of
    (seed, pass): the shards shuffled, then the images in a buffer.

    Args:
        shards (`list[Shard]`): At least one; together not empty.
        buffer_size (`int`): Images among which the next is drawn. Undecoded, they stay in memory.
        lengths (`dict[int, int]`): Rows of shards, by their place in `shards`, filled in when a shard has been read to
            its end. What is known is not read again to find a later place.
    """

    def __init__(self, shards: list[Shard], seed: int, name: str, buffer_size: int, lengths: dict[int, int]):
        self.shards, self.seed, self.name, self.buffer_size, self.lengths = shards, seed, name, buffer_size, lengths

    def read(self, start: int = 0) -> Iterator[dict]:
        """The images from the `start`-th on, without end; exactly what follows if one reads from 0. See `tickets`."""
        return (ticket.record for ticket in self.tickets(start))

    def tickets(self, start: int = 0) -> Iterator[_Ticket]:
        """
        The same with their places: shard and row.

        Finding the place costs about a microsecond per image of the pass, and reading again, undecoded: what waits in
        the buffer, and shards whose lengths are not known. If these are all (the first pass, or `lengths` were lost),
        that is everything before `start`.
        """
        while True:
            number, offset = 0, start
            if len(self.lengths) == len(self.shards):
                number, offset = divmod(start, sum(self.lengths.values()))
            for ticket in self._one_pass(number, offset):
                yield ticket
                start += 1

    def _one_pass(self, number: int, offset: int) -> Iterator[_Ticket]:
        drawn = rng(self.seed, self.name, number)
        order = drawn.sample(range(len(self.shards)), len(self.shards))
        buffer: list[_Ticket] = []
        unread = offset + self.buffer_size if offset else 0  # tickets that come in while we only look for the place
        for place, ticket in enumerate(_shuffled(self._tickets(order, unread), buffer, self.buffer_size, drawn)):
            if place >= offset:
                if ticket.record is None:
                    self._fill([ticket, *buffer])
                yield ticket

    def _tickets(self, order: list[int], unread: int) -> Iterator[_Ticket]:
        """One per image in the shards' order; of the first `unread`, those in shards of known length are not read."""
        for shard in order:
            known = self.lengths.get(shard)
            length = 0 if known is None else min(known, unread)
            for row in range(length):
                yield _Ticket(shard, row)
            if length != known:
                for record in self.shards[shard].read(length):
                    yield _Ticket(shard, length, record)
                    length += 1
                self.lengths[shard] = length
            unread = max(0, unread - length)

    def _fill(self, tickets: list[_Ticket]) -> None:
        """Read what the tickets stand for."""
        missing = [ticket for ticket in tickets if ticket.record is None]
        for shard in {ticket.shard for ticket in missing}:
            rows = {ticket.row: ticket for ticket in missing if ticket.shard == shard}
            first, last = min(rows), max(rows)
            for row, record in enumerate(itertools.islice(self.shards[shard].read(first), last - first + 1), first):
                if row in rows:
                    rows[row].record = record


def _shuffled(items: Iterator, buffer: list, size: int, draws: random.Random) -> Iterator:
    """`items`, each drawn at random from `buffer`, the latest `size` that have not been drawn yet."""
    for item in items:
        if len(buffer) < size:
            buffer.append(item)
            continue
        slot = draws.randrange(size)
        item, buffer[slot] = buffer[slot], item
        yield item
    draws.shuffle(buffer)
    while buffer:
        yield buffer.pop()


class StreamedImages(torch.utils.data.Dataset):
    """
    A training set that is read as a stream. Like [`TrainingImages`], one sequence of samples, a function of the seed
    alone: neither the number of processes and workers nor an interruption changes it.

    Sample number n is the n-th image of the stream, cropped with random numbers from (seed, n). A pass ends in the
    middle of a batch if it must, and the next one goes on there: no image is dropped or repeated. Each training process
    reads the stream, undecoded, in a thread, and hands the images of its own batches to the workers, which decode. An
    unreadable image is replaced by the first readable of the `SPARES` that follow it, counted, and named by its shard
    and row.

    With `shard_groups` G > 1, the shards are dealt out to G groups (as `datasets.distributed.split_dataset_by_node`
    does), each a stream of its own, and batch number b comes from group b % G. If G is a multiple of the number of
    processes, each reads the shards of its own groups only, which saves bandwidth. The price: a pass is a group's, not
    the dataset's, so images in a smaller group come a little more often; and the batches are the same for other
    numbers of processes only if `train_batch_size` stays the same (with gradient accumulation instead of processes).

    Args:
        sources (`list[list[Shard]]`): The shards of each dataset.
        weights (`list[float]`, *optional*): The share of samples each gives. `None`: one pass is over all of them.
        buffer_size (`int`): See [`ShuffledShards`]; of each dataset.

    Raises:
        ValueError: if a dataset has fewer shards than there are groups.
    """

    def __init__(
        self,
        sources: list[list[Shard]],
        transform: ImageTransform,
        seed: int = 0,
        weights: list[float] | None = None,
        buffer_size: int = 1000,
        shard_groups: int = 1,
    ):
        if weights is None:
            sources = [[shard for shards in sources for shard in shards]]
        if any(len(shards) < shard_groups for shards in sources):
            raise ValueError(
                f"shard_groups={shard_groups} is more than the {min(map(len, sources))} shards (files) of a dataset."
            )
        self.sources, self.transform, self.seed, self.weights = sources, transform, seed, weights
        self.buffer_size, self.shard_groups = buffer_size, shard_groups
        self.lengths: list[list[dict[int, int]]] = [[{} for _ in range(shard_groups)] for _ in sources]

    def describe(self) -> str:
        shards = " + ".join(str(len(shards)) for shards in self.sources)
        mixed = "" if self.weights is None else f", mixed {' : '.join(f'{weight:g}' for weight in self.weights)}"
        return f"a stream of {shards} shard(s) of training images{mixed}"

    def state_dict(self) -> dict:
        """
        What has been learned about the shards, by all processes, which must call this together: it makes finding a
        place cheap, and changes nothing else.
        """
        known = gather_object([[[dict(lengths) for lengths in groups] for groups in self.lengths]])
        merged = [
            [max(of_group, key=len) for of_group in zip(*of_source, strict=True)]
            for of_source in zip(*known, strict=True)
        ]
        return {"lengths": merged}

    def load_state_dict(self, state: dict) -> None:
        self.lengths = state["lengths"]

    def batch_keys(
        self, batch_size: int, start: int = 0, stop: int | None = None, rank: int = 0, world_size: int = 1
    ) -> Iterator[list[tuple[int, str, dict]]]:
        """
        The batches that `load_batches` describes, as `batch_size` + `SPARES` triples (sample number, place in the
        stream, undecoded image).
        """
        return read_ahead(self._batch_keys(batch_size, start, stop, rank, world_size))

    def _batch_keys(self, batch_size: int, start: int, stop: int | None, rank: int, world_size: int):
        groups: dict[int, Iterator[list[tuple[str, dict]]]] = {}
        for number in itertools.count(start) if stop is None else range(start, stop):
            turn, group = divmod(number, self.shard_groups)
            mine = number % world_size == rank
            if group not in groups:
                if not mine:
                    continue  # perhaps none of the group's batches is
                groups[group] = _windows(self._records(group, turn * batch_size), batch_size)
            records = next(groups[group])
            if mine:
                first = number * batch_size
                yield [(sample, place, record) for sample, (place, record) in enumerate(records, first)]

    def _records(self, group: int, start: int) -> Iterator[tuple[str, dict]]:
        """The undecoded images of a group from the `start`-th on, each with its place."""

        def read(source: int, start: int) -> Iterator[tuple[str, dict]]:
            shards = self.sources[source][group :: self.shard_groups]
            name = f"shards {source} {group}"
            dataset = "" if self.weights is None else f"dataset {source + 1}, "
            lengths = self.lengths[source][group]
            for ticket in ShuffledShards(shards, self.seed, name, self.buffer_size, lengths).tickets(start):
                shard, row = group + ticket.shard * self.shard_groups, shards[ticket.shard].skip + ticket.row
                yield f"{dataset}shard {shard}, row {row}", ticket.record

        if self.weights is None:
            return read(0, start)
        mixture = Mixture(self.weights, self.seed, f"mixture {group}")
        return (record for _, record in mixture.draw(start, read))

    def __getitems__(self, keys: list[tuple[int, str, dict]]) -> list[dict[str, Any]]:
        """The samples of a batch from `batch_keys`."""
        return [self._sample(keys[place : place + SPARES + 1]) for place in range(len(keys) - SPARES)]

    def _sample(self, candidates: list[tuple[int, str, dict]]) -> dict[str, Any]:
        drawn = rng(self.seed, "crop", candidates[0][0])
        skipped: dict[str, str] = {}
        for _, place, record in candidates:
            try:
                image = decode_image(record, place)
            except UnreadableImage as error:
                skipped[error.name] = str(error)
                continue
            crop = self.transform.crop(self.transform.scale(image), drawn)
            counts = {"unreadable": int(bool(skipped)), "upscaled": int(min(image.size) < self.transform.resolution)}
            return {"pixel_values": crop, "skipped": skipped, **counts}
        first = next(iter(skipped.values()))
        raise UnreadableImage(f"{len(candidates)} training images in a row cannot be read, the first of them {first}")


def _windows(records: Iterator[tuple[str, dict]], batch_size: int) -> Iterator[list[tuple[str, dict]]]:
    """Batches, each with the `SPARES` records that follow it."""
    window = deque(itertools.islice(records, SPARES))
    while True:
        window.extend(itertools.islice(records, batch_size))
        yield list(window)
        for _ in range(batch_size):
            window.popleft()


def read_ahead(items: Iterator, count: int = 4) -> Iterator:
    """The same items, up to `count` of them fetched ahead by a thread. Its exceptions are raised here."""
    end = object()
    pool = ThreadPoolExecutor(1, thread_name_prefix="read_ahead")
    try:
        fetched = deque(pool.submit(next, items, end) for _ in range(count))
        while (item := fetched.popleft().result()) is not end:
            fetched.append(pool.submit(next, items, end))
            yield item
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
