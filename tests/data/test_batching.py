"""Buckets against brute force, and the properties of an order of batches."""

import json
import pickle
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_cot_jax.data.batching import FILLER, BatchOrder, bucket_sizes, choose_buckets
from llava_cot_jax.data.place import Place
from llava_cot_jax.errors import UserError


def padded(lengths: np.ndarray, buckets: tuple[int, ...]) -> int:
    """Tokens when each row takes the smallest bucket that holds it."""
    return sum(min(size for size in buckets if size >= length) for length in lengths.tolist())


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=30),
    count=st.integers(1, 4),
    multiple=st.sampled_from([1, 7, 10]),
)
def test_no_other_buckets_pad_less(lengths, count, multiple):
    lengths = np.array(lengths)
    buckets = choose_buckets(lengths, count, multiple)
    assert len(buckets) <= count and buckets == tuple(sorted(set(buckets)))
    assert all(size % multiple == 0 for size in buckets)
    sizes = {-(-length // multiple) * multiple for length in lengths.tolist()}
    others = [pick for n in range(1, count + 1) for pick in combinations(sorted(sizes), n) if max(pick) == max(sizes)]
    assert padded(lengths, buckets) == min(padded(lengths, pick) for pick in others)


def draw_lengths(rows: int = 1000) -> np.ndarray:
    lengths = np.random.default_rng(0).lognormal(6, 0.5, rows).astype(np.int32).clip(1, 2048)
    lengths[::17] = 0  # left out
    return lengths


LENGTHS = draw_lengths()
BUCKETS = choose_buckets(LENGTHS[LENGTHS > 0], 4, 128)


def make(
    batch: int = 32, seed: int = 1, shuffle: bool = True, lengths: np.ndarray = LENGTHS, **more: object
) -> BatchOrder:
    images = np.minimum(lengths, 1)
    return BatchOrder(bucket_sizes(lengths, BUCKETS), images, batch, seed=seed, shuffle=shuffle, **more)


@pytest.mark.parametrize("batch", [1, 7, 32])
def test_an_epoch_visits_rows_once_and_leaves_out_less_than_a_batch(batch):
    order = make(batch)
    for epoch in range(3):
        batches = [order[epoch * order.batches_per_epoch + i] for i in range(order.batches_per_epoch)]
        rows = np.concatenate([b.rows for b in batches])
        assert len(set(rows.tolist())) == len(rows)
        assert LENGTHS[rows].all()
        assert 0 <= np.count_nonzero(LENGTHS) - len(rows) < batch
        for b in batches:
            assert b.length in BUCKETS
            assert LENGTHS[b.rows].max() <= b.length


def test_batches_are_of_one_bucket_but_where_two_meet():
    order = make()
    mixed = 0
    for i in range(order.batches_per_epoch):
        b = order[i]
        mixed += min(padded(LENGTHS[[row]], BUCKETS) for row in b.rows) < b.length
    assert mixed <= len(BUCKETS) - 1


def test_epochs_differ_in_order_and_in_what_they_leave_out():
    order = make()
    epochs = [[order[e * order.batches_per_epoch + i] for i in range(order.batches_per_epoch)] for e in range(2)]
    assert not np.array_equal(epochs[0][0].rows, epochs[1][0].rows)
    assert [b.length for b in epochs[0]] != [b.length for b in epochs[1]]
    assert [b.length for b in epochs[0]] != sorted(b.length for b in epochs[0])  # lengths come mixed
    seen = [set(np.concatenate([b.rows for b in epoch]).tolist()) for epoch in epochs]
    assert seen[0] != seen[1]


def test_equal_arguments_give_equal_plans():
    order, same, other = make(), pickle.loads(pickle.dumps(make())), make(seed=2)
    some = [0, 5, order.batches_per_epoch - 1, order.batches_per_epoch, 100]
    assert all(np.array_equal(order[i].rows, same[i].rows) and order[i].length == same[i].length for i in some)
    assert not any(np.array_equal(order[i].rows, other[i].rows) for i in some)


def test_unshuffled_every_row_comes_once_and_fillers_last():
    order = make(shuffle=False)
    for epoch in range(2):
        rows = np.concatenate([order[epoch * order.batches_per_epoch + i].rows for i in range(order.batches_per_epoch)])
        assert sorted(rows[rows != FILLER].tolist()) == np.flatnonzero(LENGTHS).tolist()
        assert len(rows) % 32 == 0 and len(rows) - np.count_nonzero(LENGTHS) < 32
        assert (np.diff(np.flatnonzero(rows == FILLER)) == 1).all() and rows[-1] == FILLER


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(20, 120),
    epochs=st.integers(1, 3),
    changes=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 20), st.integers(0, 3)), min_size=1, max_size=5),
)
def test_whatever_changes_on_the_way_each_row_is_seen_once_in_an_epoch(rows, epochs, changes):
    """Orders of other sizes and seeds take turns, each after some batches, through what a checkpoint stores."""
    lengths = draw_lengths(rows)
    seen = [np.zeros(rows, int) for _ in range(epochs + 1)]
    place, trained = Place(), lengths > 0
    for number, (batch, count, seed) in enumerate(changes):
        place = Place.from_json(json.loads(json.dumps(place.to_json())))
        order = make(batch, seed, lengths=lengths, start=place)
        last = order.batches_until(epochs)
        stop = last if number == len(changes) - 1 else min(place.batches + count, last)
        resumed = make(batch, seed, lengths=lengths, start=place)
        for index in range(place.batches, stop):
            found = order[index]
            assert len(found.rows) == batch and lengths[found.rows].max() <= found.length
            np.testing.assert_array_equal(resumed[index].rows, found.rows)
            seen[order.place(index).epoch][found.rows] += 1
            assert order.epochs_before(index) <= order.epochs_before(index + 1)
        place = order.place(stop)
        assert place.batches == stop
    assert (place.epoch, place.seen) == (epochs, None)  # nothing is left to do
    assert order.batches_until(epochs) == stop and not seen[epochs].any()
    largest = max(batch for batch, _, _ in changes)
    for of_epoch in seen[:epochs]:
        assert of_epoch.max() == 1 and not of_epoch[~trained].any()
        assert np.count_nonzero(trained) - of_epoch.sum() < largest  # the remainder, of less than a batch


SETS = ((300, 1.0), (500, 0.3), (200, 2.5))
"""Sizes and weights of data sets whose rows are ``LENGTHS``."""


def rows_of_an_epoch(order: BatchOrder, epoch: int) -> np.ndarray:
    first = epoch * order.batches_per_epoch
    return np.concatenate([order[first + i].rows for i in range(order.batches_per_epoch)])


def test_each_row_comes_as_often_as_its_set_weighs():
    """In an epoch as nearly as whole numbers go, and over ten epochs, which make every weight whole, exactly."""
    order = make(1, sets=SETS)
    total = np.zeros(len(LENGTHS), int)
    first = 0
    for epoch in range(10):
        times = np.bincount(rows_of_an_epoch(order, epoch), minlength=len(LENGTHS))
        total += times
        for (_, weight), part, usable in zip(
            SETS, np.split(times, [300, 800]), np.split(LENGTHS > 0, [300, 800]), strict=True
        ):
            assert not part[~usable].any() and set(part[usable]) <= {int(weight), int(np.ceil(weight))}
            assert abs(part.sum() - weight * usable.sum()) <= 0.5
    for count, weight in SETS:
        part = slice(first, first + count)
        usable = LENGTHS[part] > 0
        share = round((weight - int(weight)) * usable.sum())
        assert np.ptp(total[part][usable]) <= 1 and total[part].sum() == 10 * (int(weight) * usable.sum() + share)
        first += count


def test_one_set_of_weight_1_is_in_the_order_of_no_sets():
    order, weighted = make(), make(sets=[(len(LENGTHS), 1.0)])
    assert all(np.array_equal(order[i].rows, weighted[i].rows) for i in range(2 * order.batches_per_epoch))


def test_unshuffled_weights_do_not_count():
    order, weighted = make(shuffle=False), make(shuffle=False, sets=SETS)
    assert np.array_equal(rows_of_an_epoch(order, 0), rows_of_an_epoch(weighted, 0))


@pytest.mark.parametrize("stop", [1, 7, 23])
def test_an_epoch_of_weighted_sets_is_whole_whatever_batches_it_has(stop):
    """Batches of 32 rows, and after some of them batches of 8."""
    order = make(32, sets=SETS)
    before = np.concatenate([order[i].rows for i in range(stop)])
    place = Place.from_json(json.loads(json.dumps(order.place(stop).to_json())))
    rest = make(8, seed=5, sets=SETS, start=place)
    after = np.concatenate([rest[i].rows for i in range(stop, rest.batches_until(1))])
    whole = rows_of_an_epoch(make(1, sets=SETS), 0)
    left = np.bincount(whole, minlength=len(LENGTHS)) - np.bincount(np.append(before, after), minlength=len(LENGTHS))
    assert left.min() == 0 and left.sum() < 8
    assert rest.epochs_before(stop) == order.epochs_before(stop) == pytest.approx(len(before) / len(whole))


def test_too_few_rows():
    few = LENGTHS[:20]
    with pytest.raises(UserError, match="18 rows do not fill a batch of 32"):
        make(lengths=few)
    assert make(lengths=few, shuffle=False).batches_per_epoch == 1


@pytest.mark.parametrize("shuffle", [True, False])
def test_rows_with_similar_numbers_of_images_share_batches(shuffle):
    """Numbers 0, 1 and 3, of which no batch but two that span a border pads a row to more images than it has."""
    images = np.random.default_rng(1).choice([0, 1, 3], len(LENGTHS), p=[0.2, 0.5, 0.3])
    order = BatchOrder(bucket_sizes(LENGTHS, BUCKETS), images, 32, seed=1, shuffle=shuffle)
    batches = [order[i] for i in range(order.batches_per_epoch)]
    for b in batches:
        rows = b.rows[b.rows != FILLER]
        assert b.images == images[rows].max() and LENGTHS[rows].max() <= b.length
    assert sum(images[b.rows[b.rows != FILLER]].min() < b.images for b in batches) == 2
    assert {b.images for b in batches} == {0, 1, 3}


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (
            [(300, 1e-3), (700, 1.0)],
            r"data set 1 of 2 has 2\d\d rows, of which none comes in an epoch by its weight of 0.001",
        ),
        ([(300, 1.0), (700, 1e30)], r"an epoch has .*e\+32 rows: give smaller weights, more epochs"),
        ([(300, 1.0), (700, 1e9)], r"an epoch has .*e\+11 rows"),
    ],
)
def test_weights_that_cannot_be_used(sets, message):
    with pytest.raises(UserError, match=message):
        make(sets=sets)
