"""What travels: data that is checked when it is made, and never after."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys

import attrs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.fake_service import ByteTokenizer
from tinkex import types

torch = pytest.importorskip("torch")

TOKEN = st.integers(0, 2**31 - 1)
TOKENS = st.lists(TOKEN, max_size=30)


# Tokens.


@given(TOKENS)
def test_token_ids_are_the_same_from_a_list_an_array_or_a_tensor(tokens):
    expected = types.ModelInput.from_ints(tokens)

    assert tokens == expected.to_ints()
    assert expected == types.ModelInput.from_ints(tuple(tokens))
    assert expected == types.ModelInput.from_ints(np.array(tokens, np.int64))
    assert expected == types.ModelInput.from_ints(np.array(tokens, np.uint32))
    assert expected == types.ModelInput.from_ints(torch.tensor(tokens, dtype=torch.int64))


@given(st.lists(TOKENS, max_size=5))
def test_chunks_are_one_sequence(parts):
    built = types.ModelInput(tuple(types.EncodedTextChunk(part) for part in parts))
    flat = [token for part in parts for token in part]

    assert flat == built.to_ints()
    assert len(flat) == built.length
    assert np.int32 == built.tokens.dtype


@given(TOKENS, TOKENS)
def test_appending_makes_a_new_input_and_leaves_the_old_one(start, more):
    grown = base = types.ModelInput.from_ints(start)
    for token in more:
        grown = grown.append_int(token)

    assert start + more == grown.to_ints()
    assert start == base.to_ints()
    assert 1 == len(grown.chunks)


def test_an_empty_input_grows():
    assert [5] == types.ModelInput.empty().append_int(5).to_ints()
    assert 0 == types.ModelInput.empty().length
    image = types.ImageChunk(b"x", "png", expected_tokens=7)
    grown = types.ModelInput.from_ints([1]).append(image).append_int(2)

    assert 9 == grown.length
    assert 3 == len(grown.chunks)
    with pytest.raises(ValueError, match="chunk 1 is an ImageChunk, which has no token ids"):
        grown.to_ints()


ANY_NUMBERS = st.lists(st.integers(-5, 2**32), max_size=10)


@given(ANY_NUMBERS, st.integers(-5, -1) | st.integers(2**31, 2**32), ANY_NUMBERS)
def test_a_token_id_outside_its_range_is_named_with_its_place(before, wrong, after):
    tokens = [*before, wrong, *after]
    bad = [i for i, token in enumerate(tokens) if not 0 <= token < 2**31]

    with pytest.raises(ValueError) as caught:
        types.ModelInput.from_ints(tokens)
    assert any(
        f"token id {tokens[i]} at position {tokens.index(tokens[i])} " in str(caught.value)
        for i in bad
    )


def test_tokens_of_a_bfloat16_tensor_are_no_tokens():
    with pytest.raises(TypeError, match="whole numbers"):
        types.ModelInput.from_ints(torch.ones(3, dtype=torch.bfloat16))


# Data of a loss function.

LOSSES = st.sampled_from(["cross_entropy", "importance_sampling", "ppo", "cispo", "dro"])


@st.composite
def batches(draw):
    """A loss function, and data that it takes."""
    loss_fn = draw(LOSSES)
    data = []
    for _ in range(draw(st.integers(1, 4))):
        n = draw(st.integers(1, 6))
        values = st.lists(st.floats(-5, 5), min_size=n, max_size=n)
        inputs = {"target_tokens": draw(st.lists(TOKEN, min_size=n, max_size=n))}
        for name in types.LOSS_FUNCTIONS[loss_fn].inputs[1:]:
            inputs[name] = draw(values)
        if loss_fn == "cross_entropy" and draw(st.booleans()):
            inputs["weights"] = draw(values)
        data.append(types.Datum(types.ModelInput.from_ints([1] * n), inputs))
    return loss_fn, data


@given(batches())
def test_good_data_are_taken(batch):
    loss_fn, data = batch

    types.check_data(data, loss_fn)


@given(batches(), st.data())
def test_whatever_is_wrong_with_one_datum_its_index_and_input_are_named(batch, draw):
    loss_fn, data = batch
    i = draw.draw(st.integers(0, len(data) - 1))
    name = draw.draw(st.sampled_from(sorted(data[i].loss_fn_inputs)))
    inputs = {k: v.to_numpy() for k, v in data[i].loss_fn_inputs.items()}
    value = inputs[name]
    ways = ["longer", "shorter"]
    ways += ["missing"] if name in types.LOSS_FUNCTIONS[loss_fn].inputs else []
    ways += ["not finite"] if value.dtype == np.float32 else []
    how = draw.draw(st.sampled_from(ways))
    if how == "missing":
        del inputs[name]
    elif how == "longer":
        inputs[name] = np.append(value, value[:1])
    elif how == "shorter":
        inputs[name] = value[:-1]
    else:
        inputs[name] = np.append(value[:-1], np.float32("inf"))
    broken = [*data[:i], types.Datum(data[i].model_input, inputs), *data[i + 1 :]]

    with pytest.raises(ValueError, match=rf"data\[{i}\].*{name}"):
        types.check_data(broken, loss_fn)


def test_every_loss_function_of_the_protocol_is_known():
    """Wire reference, section 7.2; and one of TuFT, which is no official one."""
    known = ["cispo", "cross_entropy", "dro", "gspo", "importance_sampling", "ppo"]

    assert [*known, "stable_reinforce", "trinity_ppo"] == sorted(types.LOSS_FUNCTIONS)


@pytest.mark.parametrize(
    "given_config, sent",
    [
        (None, None),
        ({}, {}),
        ({"clip": 1}, {"clip": 1.0}),
        ({"x": " 0.5 "}, {"x": 0.5}),
        ({"x": np.float32(2)}, {"x": 2.0}),
        ({"x": "1e-3"}, {"x": 1e-3}),
    ],
)
def test_statement_6_settings_become_numbers(given_config, sent):
    """Numbers, and numbers written as text, travel as floats. (statement 6)"""
    assert sent == types.check_config("ppo", given_config)


def test_one_value_for_each_of_several_targets_is_for_cross_entropy_only():
    two = np.array([[1, 2], [3, 4]])
    tokens = types.ModelInput.from_ints([1, 2])
    types.check_data(
        [types.Datum(tokens, {"target_tokens": two, "weights": two / 2})], "cross_entropy"
    )
    policy = {"target_tokens": [1, 2], "logprobs": [-1.0, -1.0], "advantages": two / 2}

    with pytest.raises(ValueError, match=r"'advantages'\] has shape \[2, 2\], but ppo takes one"):
        types.check_data([types.Datum(tokens, policy)], "ppo")


# Parameters.


def test_defaults_are_the_protocol_s():
    """But for train_unembed, which is left to the server."""
    assert (1e-4, 0.9, 0.95, 1e-12, 0.0, 0.0) == attrs.astuple(types.AdamParams())
    assert (32, None, None, True, True) == attrs.astuple(types.LoraConfig())
    assert (None, None, None, 1.0, -1, 1.0) == attrs.astuple(types.SamplingParams())


@given(
    st.floats(0, 1),
    st.floats(0, 1, exclude_max=True),
    st.floats(0, 1, exclude_max=True),
    st.floats(1e-20, 1),
)
def test_good_parameters_are_taken(learning_rate, beta1, beta2, eps):
    params = types.AdamParams(learning_rate, beta1, beta2, eps)

    assert (learning_rate, beta1, beta2, eps) == attrs.astuple(params)[:4]


def test_parameters_are_values_that_do_not_change():
    params = types.AdamParams()

    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        params.learning_rate = 1
    assert params == types.AdamParams()
    assert hash(params) == hash(types.AdamParams())


@pytest.mark.parametrize(
    "stop, kept",
    [
        (None, None),
        ("\n", "\n"),
        (["a", "b"], ["a", "b"]),
        (("a",), ["a"]),
        ([1, 2], [1, 2]),
        (np.array([1, 2]), [1, 2]),
        (5, [5]),
        ([], []),
    ],
)
def test_stop_takes_strings_or_token_ids(stop, kept):
    """None: the end-of-text token ends a sequence; []: nothing does."""
    assert kept == types.SamplingParams(stop=stop).stop


# Results.


def test_a_sample_s_lists_are_made_once_when_asked_for():
    """A list made at every access is quadratic in a loop."""
    sequence = types.SampledSequence([1, 2], [-0.5, -1.0], "stop")

    assert [1, 2] == sequence.tokens
    assert sequence.tokens is sequence.tokens
    assert [-0.5, -1.0] == sequence.logprobs
    assert 2 == len(sequence)
    assert types.SampledSequence([1]).logprobs is None


def test_prompt_logprobs_that_were_not_computed_are_none():
    response = types.SampleResponse([], [None, -1.0, np.nan])

    assert [None, -1.0, None] == response.prompt_logprobs
    assert np.isnan(response.prompt_logprobs_np[0])


def test_top_k_rows_leave_out_what_is_not_there():
    topk = types.TopkLogprobs(
        np.array([[1, 2], [3, 0], [0, 0]], np.int32),
        np.array([[-1, -2], [-3, -99999], [-99999, -99999]], np.float32),
    )

    assert [[(1, -1.0), (2, -2.0)], [(3, -3.0)], None] == topk.tolist()


class Letters:
    def decode(self, ids):
        return "".join(chr(97 + i) for i in ids)


def test_text_is_made_by_anything_that_decodes():
    response = types.SampleResponse([types.SampledSequence([0, 1]), types.SampledSequence([2])])

    assert "ab" == response.text(Letters())
    assert "c" == response.sequences[1].text(Letters())


def test_text_can_omit_special_tokens():
    """The token that ended a sequence is its last one."""
    ended = types.SampledSequence([104, 105, 257], stop_reason="stop")

    assert "hi" == ended.text(ByteTokenizer(), skip_special_tokens=True)


def test_the_loss_is_the_sum_that_the_server_gives():
    """Theirs looks for "loss", which no server sends."""
    assert 3.0 == types.ForwardBackwardOutput([], {"loss:sum": 3.0}).loss
    with pytest.raises(ValueError, match=r"gave no 'loss:sum'; its metrics are \['a'\]"):
        _ = types.ForwardBackwardOutput([], {"a": 1.0}).loss


def test_a_model_that_is_no_lora_is_told_from_one_of_which_nobody_says():
    assert types.GetInfoResponse("m", is_lora=False).is_lora is False
    assert types.GetInfoResponse("m").is_lora is None


# Paths and names.


@given(
    st.from_regex(r"[A-Za-z0-9-]{1,20}(:train:[0-9]{1,3})?", fullmatch=True),
    st.sampled_from(["weights", "sampler_weights"]),
    st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}", fullmatch=True),
)
def test_a_path_is_taken_apart_and_together(run, segment, name):
    path = f"tinker://{run}/{segment}/{name}"
    parsed = types.ParsedCheckpointTinkerPath.from_tinker_path(path)

    assert (run, f"{segment}/{name}", name) == (
        parsed.training_run_id,
        parsed.checkpoint_id,
        parsed.name,
    )
    assert {"weights": "training", "sampler_weights": "sampler"}[segment] == parsed.checkpoint_type
    assert path == parsed.tinker_path


@given(st.text(max_size=250))
def test_a_name_that_is_taken_can_be_a_file_s_name_anywhere(name):
    """Names are names, not paths: no separators, no dots alone, nothing hidden, no spaces."""
    try:
        assert name == types.check_name(name)
    except ValueError:
        return
    assert name.isascii()
    assert not set(name) & set('/\\:*?"<>| \n\t\0')
    assert 1 <= len(name) <= 200
    assert not name.startswith((".", "-"))


@pytest.mark.parametrize("name", ["step-0001", "final", "_", "a.b", "0", "x" * 200])
def test_ordinary_names_are_taken(name):
    assert name == types.check_name(name)


@pytest.mark.parametrize(
    "metadata", [None, {}, {"a": 1}, {"a": {"b": [1, 2.5, None, True, "x"]}}, {"ü": "世"}]
)
def test_metadata_are_what_json_can_say(metadata):
    assert metadata == types.check_metadata(metadata)


def test_metadata_are_kept_as_they_are_now():
    metadata = {"a": [1]}
    kept = types.check_metadata(metadata)
    metadata["a"].append(2)

    assert {"a": [1]} == kept


def test_a_token_of_another_person_is_in_no_repr():
    assert "secret" not in repr(types.AuthTokenResponse("secret"))
    assert "secret" not in repr(types.LoadWeightsRequest("p", weights_access_token="secret"))


def test_importing_the_types_needs_numpy_and_attrs_alone():
    code = (
        "import sys, tinkex.types; "
        "print({'torch', 'requests', 'google', 'cattrs', 'tenacity'} & set(sys.modules))"
    )

    assert "set()\n" == subprocess.check_output([sys.executable, "-c", code], text=True)


def test_every_public_class_of_a_module_is_a_name_of_the_package():
    """`tinkex/types/__init__.py` collects the `__all__` of its modules; a later one would hide
    an earlier one of the same name."""
    modules = [
        importlib.import_module(f"tinkex.types.{found.name}")
        for found in pkgutil.iter_modules(types.__path__)
    ]
    collected = [name for module in modules for name in getattr(module, "__all__", ())]
    classes = {
        name: value
        for module in modules
        for name, value in vars(module).items()
        if inspect.isclass(value) and value.__module__ == module.__name__ and name[0] != "_"
    }

    assert len(set(collected)) == len(collected)
    assert classes == {name: getattr(types, name, None) for name in classes}
