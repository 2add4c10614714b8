"""Images as tensors, lists and streams: nothing lost, nothing read twice, no more held than asked for."""

import weakref

import pytest
import torch

from registerlens.data.batches import count, first_and_all, in_batches
from registerlens.errors import ImageError


def numbered(n):
    return torch.arange(n, dtype=torch.float32)[:, None, None, None].expand(n, 3, 8, 8)


def numbers(batches):
    return [int(image[0, 0, 0]) for batch in batches for image in batch]


class Stream:
    """Batches that know their number, and how often they were asked for."""

    def __init__(self, *sizes):
        self.sizes, self.started, self.given = sizes, 0, 0
        self.n_images = sum(sizes)

    def __iter__(self):
        self.started += 1
        start = 0
        for size in self.sizes:
            self.given += 1
            yield numbered(self.n_images)[start : start + size]
            start += size


def test_a_tensor_is_cut_and_an_iterable_is_left_alone():
    assert [len(batch) for batch in in_batches(numbered(7), 3)] == [3, 3, 1]
    assert numbers(in_batches(numbered(7), 3)) == list(range(7))
    assert [len(batch) for batch in in_batches(numbered(2), 16)] == [2]
    assert list(in_batches(numbered(0), 3)) == []
    stream = Stream(2, 2)
    assert in_batches(stream, 3) is stream
    assert in_batches(stream, 0) is stream  # which says nothing about batches that are batches already


@pytest.mark.parametrize("batch_size", [0, -4])
def test_a_batch_size_below_one_is_named(batch_size):
    with pytest.raises(ImageError, match=f"batch_size must be at least 1, got {batch_size}"):
        in_batches(numbered(3), batch_size)


def test_the_count_is_known_or_it_is_not():
    assert count(numbered(5)) == 5
    assert count(Stream(2, 3)) == 5
    assert count([numbered(2)]) is None
    assert count(iter([numbered(2)])) is None


@pytest.mark.parametrize("sizes", [(1,), (5,), (2, 2, 2), (1, 4, 2), (3, 1, 1, 1)])
@pytest.mark.parametrize("kind", ["tensor", "list", "generator", "stream"])
def test_first_and_all(sizes, kind):
    total = sum(sizes)
    for n in range(1, total + 3):
        stream = Stream(*sizes)
        images = {
            "tensor": numbered(total),
            "list": list(Stream(*sizes)),
            "generator": (batch for batch in stream),
            "stream": stream,
        }[kind]
        first, every = first_and_all(images, n, 2)
        assert numbers(first) == list(range(min(n, total)))
        assert numbers(every) == list(range(total))
        assert all(len(batch) for batch in first)
        if kind in ("generator", "stream"):
            assert (stream.started, stream.given) == (1, len(sizes))


def test_no_more_is_read_than_the_first_images_need():
    stream = Stream(3, 3, 3, 3)
    first, every = first_and_all(stream, 4, 1)
    assert stream.given == 2 and [len(batch) for batch in first] == [3, 1]
    assert [len(batch) for batch in every] == [3, 3, 3, 3]


def test_later_batches_are_not_held():
    alive = []

    def batches():
        for _ in range(8):
            batch = numbered(2).clone()
            alive.append(weakref.ref(batch))
            yield batch
            del batch

    _, every = first_and_all(batches(), 2, 1)
    for i, batch in enumerate(every):
        assert len(batch) == 2
        del batch
        assert sum(reference() is not None for reference in alive[1:]) <= 1, i


@pytest.mark.parametrize("images", [torch.zeros(0, 3, 8, 8), [], iter([])])
def test_no_image_is_an_error(images):
    with pytest.raises(ImageError, match="No image was given"):
        first_and_all(images, 4, 2)
