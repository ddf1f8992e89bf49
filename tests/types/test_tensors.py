"""Arrays that travel: what may be given, what is kept, and what is refused."""

from __future__ import annotations

import copy
import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tinkex import types

torch = pytest.importorskip("torch")

FLOATS = arrays.arrays(
    np.float32,
    arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=6),
    elements=st.floats(width=32, allow_nan=False),
)
INTS = arrays.arrays(np.int64, arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=6))


@given(FLOATS | INTS)
def test_a_tensor_gives_back_the_array_it_was_made_of(array):
    tensor = types.TensorData.from_numpy(array)
    expected = np.atleast_1d(array)

    np.testing.assert_array_equal(expected, tensor.to_numpy())
    np.testing.assert_array_equal(expected, np.asarray(tensor))
    np.testing.assert_array_equal(expected, tensor.to_torch().numpy())
    assert expected.tolist() == tensor.tolist()
    assert (expected.shape, expected.dtype) == (tensor.shape, tensor.to_numpy().dtype)
    assert tensor == types.TensorData.from_torch(torch.from_numpy(expected.copy()))
    assert tensor == types.TensorData(tensor.values, None, tensor.shape)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.int32])
def test_what_is_made_of_an_array_does_not_change_with_it(dtype):
    """A buffer that is refilled for every step: the one before may still wait to be sent."""
    buffer = np.ones(3, dtype)
    tensor = types.TensorData(buffer)
    tokens = np.ones(3, np.int32)
    inputs = types.ModelInput.from_ints(tokens)
    lent = torch.ones(3)
    of_torch = types.TensorData(lent)
    buffer[:] = 2
    tokens[:] = -5
    lent.fill_(2)

    assert [1, 1, 1] == tensor.tolist() == of_torch.tolist() == inputs.to_ints()


def test_what_nobody_can_change_is_not_copied():
    """As what came from the server: megabytes of log-probabilities, read where they arrived."""
    received = np.frombuffer(b"\0\0\x80\xbf" * 4, np.float32)

    assert np.shares_memory(received, types.TensorData(received).values)
    assert np.shares_memory(received, types.TensorData(received).to_numpy())


@given(
    arrays.arrays(
        np.int64,
        st.tuples(st.integers(0, 8), st.integers(0, 40)),
        elements=st.integers(-3, 3),
        fill=st.just(0),
    )
)
def test_a_sparse_tensor_is_the_same_array_in_fewer_bytes(array):
    """Whichever form from_dense chooses, it is never larger, and equal to the dense one."""
    tensor = types.TensorData.from_dense(array)

    np.testing.assert_array_equal(array, tensor.to_numpy())
    assert tensor == types.TensorData(array)
    assert tensor.nbytes <= array.nbytes
    assert (tensor.values.size < array.size) == tensor.is_sparse


@given(FLOATS | INTS)
def test_tensors_are_copied_and_pickled_whole(array):
    tensor = types.TensorData(array)

    assert tensor == copy.deepcopy(tensor) == pickle.loads(pickle.dumps(tensor))


@pytest.mark.parametrize(
    "value, dtype",
    [
        ([1, 2], "int64"),
        ([1.0, 2.0], "float32"),
        (np.array([1], np.int8), "int64"),
        (np.array([1], np.uint16), "int64"),
        (np.array([1], np.float64), "float32"),
        (np.array([1], np.float16), "float32"),
        (torch.ones(1, dtype=torch.bfloat16), "float32"),
        (torch.ones(1, requires_grad=True), "float32"),
        ([], "float32"),
    ],
)
def test_there_are_two_dtypes(value, dtype):
    assert dtype == types.TensorData(value).dtype


def test_a_named_input_has_the_dtype_of_its_name():
    """Weights of 1 are floats; an empty list of targets is of ints."""
    inputs = types.Datum(
        types.ModelInput.from_ints([1]), {"weights": [1], "target_tokens": [], "advantages": [2]}
    ).loss_fn_inputs

    assert ["float32", "int64", "float32"] == [
        inputs[name].dtype for name in ("weights", "target_tokens", "advantages")
    ]


def test_tensors_that_differ_are_not_equal():
    tensor = types.TensorData([1, 2])

    assert tensor != types.TensorData([1, 3])
    assert tensor != types.TensorData([[1, 2]])
    assert tensor != types.TensorData([1.0, 2.0])
    assert tensor != [1, 2]
    assert types.TensorData([np.nan]) == types.TensorData([np.nan])


def test_its_repr_is_short_however_many_numbers_it_holds():
    assert "TensorData(float32, shape=[1000])" == repr(types.TensorData(np.zeros(1000)))
    assert 100 > len(repr(types.TensorData(np.zeros((1000, 1000)))))


def test_its_data_is_a_list_of_numbers_as_scripts_for_the_official_sdk_expect():
    """They test it for truth, add it to lists, and write it as JSON."""
    tensor = types.TensorData(np.array([[0.5, 1], [2, 3]], np.float32))

    assert [0.5, 1.0, 2.0, 3.0] == tensor.data
    assert "[0.5, 1.0, 2.0, 3.0]" == json.dumps(tensor.data)
    assert [0.5, 1.0, 2.0, 3.0, 7] == [*tensor.data, 7]
    assert not types.TensorData([], "int64").data
