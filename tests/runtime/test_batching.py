"""Cutting data into requests, and joining the answers: pure functions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.fake_server import datum
from tinkex import types
from tinkex.runtime.batching import join, join_metrics, size_of, size_of_input, split


def of_size(n):
    """A datum of *n* bytes in the estimate: 4 a token, 8 a target."""
    tokens = [1] * (n // 12)
    return types.Datum(types.ModelInput.from_ints(tokens), {"target_tokens": tokens})


# Sizes.


def test_a_token_is_4_bytes_and_an_input_is_what_its_arrays_are():
    """Not 10 bytes a number, which cuts a batch in three where one request would do."""
    one = types.Datum(
        types.ModelInput.from_ints([1, 2, 3]), {"target_tokens": [2, 3, 4], "weights": [1, 1, 1]}
    )

    assert 12 + 24 + 12 == size_of(one)


def test_images_count_as_they_are():
    """Else a batch of images would overflow its request."""
    image = types.ImageChunk(b"x" * 1000, "png")
    pointer = types.ImageAssetPointerChunk("asset://1", "png")

    assert 1000 + 9 + 4 == size_of_input(
        types.ModelInput((image, pointer, types.EncodedTextChunk([1])))
    )


def test_a_sparse_input_counts_its_indices():
    dense = np.zeros((10, 100), np.float32)
    dense[3, 5] = 1
    sparse = types.TensorData.from_dense(dense)

    assert 4 + 8 + 11 * 8 == sparse.nbytes


# Cutting.


def test_no_data_are_no_batches():
    assert [] == split([])


@pytest.mark.parametrize(
    "sizes, batches",
    [
        ([60, 60], [2]),
        ([60, 60, 12], [2, 1]),
        ([240], [1]),
        ([240, 12], [1, 1]),
        ([12, 240, 12], [1, 1, 1]),
        ([120, 120], [1, 1]),
        ([12] * 7, [5, 2]),
    ],
)
def test_a_batch_is_full_at_120_bytes_or_5_datums(sizes, batches):
    """Equal is allowed; one too large for any goes alone; none is ever empty."""
    cut = split([of_size(n) for n in sizes], max_datums=5, max_bytes=120)

    assert batches == [len(batch) for batch in cut]


SIZES = st.lists(st.integers(0, 30).map(lambda n: 12 * n), max_size=60)


@given(SIZES, st.integers(1, 10), st.integers(1, 400))
def test_cutting_keeps_every_datum_in_order_and_both_limits(sizes, max_datums, max_bytes):
    data = [of_size(n) for n in sizes]
    batches = split(data, max_datums, max_bytes)

    assert [id(d) for d in data] == [id(d) for batch in batches for d in batch]
    for batch in batches:
        assert 1 <= len(batch) <= max_datums
        assert len(batch) == 1 or sum(map(size_of, batch)) <= max_bytes


@given(SIZES, st.integers(1, 10), st.integers(1, 400))
def test_a_new_batch_is_begun_only_when_the_next_datum_does_not_fit(sizes, max_datums, max_bytes):
    batches = split([of_size(n) for n in sizes], max_datums, max_bytes)

    for batch, following in itertools.pairwise(batches):
        full = len(batch) == max_datums
        assert full or sum(map(size_of, batch)) + size_of(following[0]) > max_bytes


# Joining.


def output(metrics, *values, kind="ArrayRecord"):
    outputs = [{"logprobs": types.TensorData([float(v)])} for v in values]
    return types.ForwardBackwardOutput(outputs, metrics, kind)


def test_outputs_are_joined_in_order():
    joined = join([output({}, 1, 2), output({}, 3)])

    assert [1.0, 2.0, 3.0] == [one["logprobs"].tolist()[0] for one in joined.loss_fn_outputs]


def test_a_single_output_is_left_as_it_is():
    """A mean stays an int, a hash a hash: nothing was joined."""
    single = output({"a:mean": 3, "b:hash_unordered": 7, "c": 1})

    assert single is join([single])


def test_outputs_of_different_types_are_joined_with_a_warning(caplog):
    joined = join([output({}, 1, kind="A"), output({}, 2, kind="B"), output({}, 3, kind="A")])

    assert "A" == joined.loss_fn_output_type
    assert [
        "the parts of a batch have different loss_fn_output_type: ['A', 'B']; using A"
    ] == caplog.messages


@pytest.mark.parametrize(
    "name, joined",
    [
        ("x:sum", {"x:sum": 8.0}),
        ("x:min", {"x:min": 2.0}),
        ("x:max", {"x:max": 6.0}),
        ("x:mean", {"x:mean": 5.0}),
        ("x:slack", {"x:slack": 1.0}),
        ("x:unique", {"x:unique": 2.0, "x:unique_2": 6.0}),
        ("x:hash2", {"x:hash2": 8.0}),
        ("x:hash_unordered", {"x:hash_unordered": 8.0}),
        ("x", {"x": 5.0}),
        ("x:of:our:sum", {"x:of:our:sum": 8.0}),
        ("x:unheard_of", {"x:unheard_of": 5.0}),
        (":", {":": 5.0}),
        ("", {"": 5.0}),
    ],
)
def test_statement_18_the_word_after_the_last_colon_says_how(name, joined):
    """Values 2 and 6, of 1 and 3 outputs. A metric of an unknown kind is averaged, never fatal.
    (statement 18)"""
    assert joined == join([output({name: 2.0}, 1), output({name: 6.0}, 1, 1, 1)]).metrics


def test_a_metric_that_only_some_batches_have_is_kept():
    """Theirs lives or dies with the first batch."""
    joined = join([output({"a:sum": 1.0}, 1), output({"b:sum": 2.0}, 1), output({"b:sum": 3.0}, 1)])

    assert {"a:sum": 1.0, "b:sum": 5.0} == joined.metrics


def test_a_batch_without_outputs_does_not_divide_by_zero():
    first, second = {"a:mean": 3.0, "b:slack": 4.0, "c:sum": 2.0}, {"a:mean": 1.0, "c:sum": 4.0}
    joined = join([output(first), output(second)])

    assert {"a:mean": 0.0, "b:slack": 4.0, "c:sum": 6.0} == joined.metrics


def test_hashes_add_as_64_bit_integers():
    values = [2.0**63, 2.0**63 + 2.0**20]

    assert {"h:hash2": 2.0**20} == join_metrics([{"h:hash2": v} for v in values], [1, 1])


@pytest.mark.parametrize("rule", ["sum", "mean", "min", "max", "slack", "unique", "hash2", "odd"])
@pytest.mark.parametrize("values", [(math.inf, -math.inf), (math.nan, 1.0), (1e308, 1e308)])
def test_a_loss_that_has_gone_to_infinity_is_reported_not_raised(rule, values):
    """The batch is done, and its gradients count: an exception here would hide both."""
    name = f"loss:{rule}"

    assert name in join_metrics([{name: value} for value in values], [1, 1])


NAMES = st.sampled_from(["a:sum", "b:min", "c:max", "d:mean", "e", "f:slack"])
METRICS = st.dictionaries(NAMES, st.floats(-1e6, 1e6), max_size=6)


@given(st.lists(st.tuples(METRICS, st.integers(1, 50)), min_size=2, max_size=6))
def test_joined_metrics_lie_where_their_rule_puts_them(parts):
    """Sums add up; means lie between the smallest and the largest; min and max are reached."""
    joined = join_metrics([metrics for metrics, _ in parts], [n for _, n in parts])

    assert {name for metrics, _ in parts for name in metrics} == set(joined)
    for name, value in joined.items():
        values = [metrics[name] for metrics, _ in parts if name in metrics]
        slack = 1e-9 * max(1.0, *(abs(v) for v in values))
        if name == "a:sum":
            assert value == math.fsum(values)
        elif name == "b:min":
            assert value == min(values)
        elif name == "c:max":
            assert value == max(values)
        elif name == "f:slack":
            assert -slack <= value <= max(values) - min(values) + slack
        else:
            assert min(values) - slack <= value <= max(values) + slack


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8))
def test_joining_what_was_cut_gives_the_metrics_of_the_whole(counts):
    """Losses are sums: where the data are cut changes nothing."""
    whole = [float(i) for i in range(sum(counts))]
    parts, start = [], 0
    for n in counts:
        own = whole[start : start + n]
        metrics = {"loss:sum": math.fsum(own)} | ({"loss:mean": math.fsum(own) / n} if n else {})
        parts.append(output(metrics, *own))
        start += n
    metrics = join(parts).metrics

    assert math.fsum(whole) == metrics["loss:sum"]
    if whole:
        assert metrics["loss:mean"] == pytest.approx(math.fsum(whole) / len(whole))


def test_the_datums_of_the_fake_server_are_whole():
    """A helper that is wrong would prove nothing."""
    types.check_data([datum(1, 2, 3)], "cross_entropy")
