"""
A wrong argument raises ValueError or TypeError at once, in the caller's thread.

Its message names the value, the reason and the fix; nothing is sent for it, and no number is used.
Each row: what is called, the class of the error, and words that its message must have: the value
(or its type, where the value may be long or secret), and what is wanted instead.
"""

from __future__ import annotations

import math
from contextlib import closing

import numpy as np
import pytest

import tinkex
from tests.support.fake_server import FakeServer, datum, plugged_in, session, settings, transport
from tinkex import config, types
from tinkex.rest import RestClient
from tinkex.runtime.connection import Connection
from tinkex.runtime.restore import restore
from tinkex.sampling import SamplingClient
from tinkex.training import TrainingClient

NAN, INF = math.nan, math.inf
PATH = "tinker://s0:train:0/sampler_weights/a"
TOKENS = types.ModelInput.from_ints([1, 2, 3])
GOOD = {"target_tokens": [2, 3, 4], "weights": [1.0, 1.0, 1.0]}
POLICY = {"target_tokens": [2, 3, 4], "logprobs": [-1.0] * 3, "advantages": [1.0] * 3}


def one(inputs, tokens=TOKENS):
    return types.Datum(tokens, inputs)


def array(*shape):
    return np.zeros(shape, np.float32)


# --- making data --------------------------------------------------------------------------------

DATA = [
    # ModelInput
    (lambda: types.ModelInput.from_ints("hello"), TypeError, "'hello'", "tokenizer"),
    (lambda: types.ModelInput.from_ints(b"hello"), TypeError, "b'hello'", "tokenizer"),
    (lambda: types.ModelInput.from_ints(None), TypeError, "None", "token ids"),
    (lambda: types.ModelInput.from_ints(5), ValueError, "5", "one-dimensional"),
    (lambda: types.ModelInput.from_ints([[1, 2]]), ValueError, "(1, 2)", "one sequence at a time"),
    (lambda: types.ModelInput.from_ints([1, -1]), ValueError, "-1", "position 1", "never negative"),
    (lambda: types.ModelInput.from_ints([2**31]), ValueError, "2147483648", "position 0"),
    (
        lambda: types.ModelInput.from_ints([2**70]),
        (ValueError, TypeError),
        "1180591620717411303424",
    ),
    (lambda: types.ModelInput.from_ints([1.5]), TypeError, "1.5", "whole numbers"),
    (lambda: types.ModelInput.from_ints([True]), TypeError, "True", "whole numbers"),
    (lambda: types.ModelInput.from_ints(["a"]), TypeError, "'a'", "tokenizer"),
    (lambda: types.ModelInput.from_ints([1, [2]]), ValueError, "[1, [2]]", "one array"),
    (lambda: types.ModelInput.from_ints([None]), TypeError, "None", "whole numbers"),
    (lambda: types.ModelInput.from_ints({1: 2}), TypeError, "{1: 2}", "token ids"),
    (lambda: types.ModelInput.from_ints({1, 2}), TypeError, "{1, 2}", "token ids"),
    (lambda: types.ModelInput([1, 2, 3]), TypeError, "chunk 0", "int", "ModelInput.from_ints"),
    (lambda: types.ModelInput(5), TypeError, "5", "chunks"),
    (lambda: types.ModelInput("ab"), TypeError, "chunk 0", "str", "ModelInput.from_ints"),
    (lambda: TOKENS.append_int("x"), TypeError, "'x'"),
    (lambda: TOKENS.append_int(-5), ValueError, "-5", "never negative"),
    (lambda: TOKENS.append([1]), TypeError, "list", "ModelInput.from_ints"),
    (lambda: types.ModelInput.from_text(5, tokenizer=None), TypeError, "text must be a str", "int"),
    (lambda: types.ModelInput.from_text("a", 5), TypeError, "int", "encode"),
    (lambda: types.EncodedTextChunk("hello"), TypeError, "'hello'", "tokenizer"),
    # Images
    (lambda: types.ImageChunk("x.png", "png"), TypeError, "str", "bytes"),
    (lambda: types.ImageChunk(b"x", "gif"), ValueError, "'gif'", "png", "jpeg"),
    (
        lambda: types.ImageChunk(b"x", "png", expected_tokens=-1),
        ValueError,
        "-1",
        "expected_tokens",
    ),
    (lambda: types.ImageChunk(b"x", "png", expected_tokens="9"), TypeError, "'9'", "expected_tok"),
    (lambda: types.ImageChunk(b"x", "png").length, ValueError, "expected_tokens is required"),
    (lambda: types.ImageAssetPointerChunk("", "png"), ValueError, "location must not be empty"),
    (lambda: types.ImageAssetPointerChunk(5, "png"), TypeError, "5", "location must be a str"),
    # TensorData
    (lambda: types.TensorData("abc"), TypeError, "'abc'", "numbers"),
    (lambda: types.TensorData(None), TypeError, "None", "numbers"),
    (lambda: types.TensorData([True]), TypeError, "bool", "int64 or float32"),
    (lambda: types.TensorData([1j]), TypeError, "complex", "int64 or float32"),
    (lambda: types.TensorData([1.5], "int64"), TypeError, "whole numbers", "float64"),
    (lambda: types.TensorData([1], "float16"), ValueError, "'float16'", "int64", "float32"),
    (lambda: types.TensorData([1, 2, 3], shape=[2]), ValueError, "3 values", "[2]"),
    (lambda: types.TensorData([1], shape=[-1]), ValueError, "1 values", "[-1]"),
    (lambda: types.TensorData([1], shape=5), TypeError, "5", "shape"),
    (lambda: types.TensorData([1], shape="1"), TypeError, "'1'", "shape"),
    (lambda: types.TensorData([1], shape=[1.5]), TypeError, "1.5", "shape"),
    (lambda: types.TensorData([], shape=[2**32, 2**32]), ValueError, "0 values", "4294967296"),
    (lambda: types.TensorData([1, [2]]), ValueError, "[1, [2]]", "one array"),
    (lambda: types.TensorData([2**63]), (ValueError, TypeError), "9223372036854775808"),
    (lambda: types.TensorData([1], sparse_crow_indices=[0, 1]), ValueError, "needs sparse_crow_i"),
    (
        lambda: types.TensorData([1.0], None, [1, 3], [0, 2], [0]),
        ValueError,
        "2 row indices",
        "1 values",
    ),
    (lambda: types.TensorData([1.0], None, [1, 3], [0, 1], [3]), ValueError, "outside 0..2"),
    (lambda: types.TensorData.from_dense([1, 2]), ValueError, "(2,)", "(N, K)"),
    # Datum
    (lambda: types.Datum([1, 2, 3], GOOD), TypeError, "list", "ModelInput.from_ints"),
    (lambda: types.Datum("hello", GOOD), TypeError, "str", "ModelInput.from_ints"),
    (lambda: types.Datum(TOKENS, [1, 2]), TypeError, "list", "mapping"),
    (lambda: types.Datum(TOKENS, None), TypeError, "NoneType", "mapping"),
    (lambda: one({"rewards": [1.0]}), ValueError, "'rewards'", "TensorData or a numpy array"),
    (lambda: one({"target_tokens": [1.5, 2, 3]}), TypeError, "target_tokens", "whole numbers"),
    (lambda: one({"target_tokens": ["a"]}), TypeError, "target_tokens", "int or float numbers"),
    (lambda: one({"weights": "abc"}), TypeError, "weights", "'abc'"),
    (lambda: one({"weights": None}), TypeError, "weights", "None"),
    (lambda: one({"weights": [True]}), TypeError, "weights", "bool"),
    (lambda: one({5: [1.0]}), TypeError, "5", "names must be str"),
]

# --- parameters ---------------------------------------------------------------------------------

PARAMETERS = [
    *[
        (lambda n=n, v=v: types.AdamParams(**{n: v}), kind, n, repr(v))
        for n, v, kind in [
            ("learning_rate", -1e-3, ValueError),
            ("learning_rate", NAN, TypeError),
            ("learning_rate", INF, TypeError),
            ("learning_rate", "1e-3", TypeError),
            ("learning_rate", None, TypeError),
            ("learning_rate", True, TypeError),
            ("learning_rate", [1e-3], TypeError),
            ("beta1", 1.0, ValueError),
            ("beta1", -0.1, ValueError),
            ("beta2", 1.5, ValueError),
            ("eps", 0.0, ValueError),
            ("eps", -1e-8, ValueError),
            ("weight_decay", -0.1, ValueError),
            ("grad_clip_norm", -1.0, ValueError),
            ("grad_clip_norm", None, TypeError),
        ]
    ],
    *[
        (lambda n=n, v=v: types.LoraConfig(**{n: v}), kind, n, repr(v))
        for n, v, kind in [
            ("rank", 0, ValueError),
            ("rank", -8, ValueError),
            ("rank", 5000, ValueError),
            ("rank", 8.0, TypeError),
            ("rank", "8", TypeError),
            ("rank", None, TypeError),
            ("rank", True, TypeError),
            ("seed", -1, ValueError),
            ("seed", 2**63, ValueError),
            ("seed", 1.5, TypeError),
            ("train_mlp", 1, TypeError),
            ("train_attn", "yes", TypeError),
            ("train_attn", None, TypeError),
            ("train_unembed", 1, TypeError),
        ]
    ],
    (
        lambda: types.LoraConfig(32, None, False, False, False),
        ValueError,
        "At least one of train_m",
    ),
    *[
        (lambda n=n, v=v: types.SamplingParams(**{n: v}), kind, n, repr(v))
        for n, v, kind in [
            ("temperature", -1, ValueError),
            ("temperature", NAN, TypeError),
            ("temperature", "hot", TypeError),
            ("top_p", 0, ValueError),
            ("top_p", 1.1, ValueError),
            ("top_k", 0, ValueError),
            ("top_k", -2, ValueError),
            ("top_k", 1.5, TypeError),
            ("max_tokens", 0, ValueError),
            ("max_tokens", -5, ValueError),
            ("max_tokens", 10.0, TypeError),
            ("seed", -1, ValueError),
            ("seed", "7", TypeError),
            ("stop", [""], ValueError),
            ("stop", "", ValueError),
            ("stop", ["a", 1], TypeError),
            ("stop", [1.5], TypeError),
            ("stop", 1.5, TypeError),
            ("stop", {"a"}, TypeError),
        ]
    ],
    (lambda: types.SamplingParams(stop=[-1]), ValueError, "stop", "-1"),
    (lambda: types.SamplingParams(max_token=5), TypeError, "max_token"),
    (lambda: types.AdamParams(lr=5), TypeError, "lr"),
    *[
        (lambda n=n, v=v: config.Patience(**{n: v}), kind, n, repr(v))
        for n, v, kind in [
            ("connect", 0, ValueError),
            ("request", -1, ValueError),
            ("poll", "45", TypeError),
            ("first_contact", NAN, ValueError),
            ("no_answer", INF, ValueError),
            ("close", True, TypeError),
            ("heartbeat", None, TypeError),
        ]
    ],
    *[
        (lambda n=n, v=v: config.SamplingLimits(**{n: v}), kind, n, repr(v))
        for n, v, kind in [
            ("requests_in_dispatch", 0, ValueError),
            ("requests_in_dispatch", 1.5, TypeError),
            ("bytes_in_dispatch", -1, ValueError),
            ("connections", "many", TypeError),
        ]
    ],
    (lambda: tinkex.Retry(budget=-1), ValueError, "budget", "-1"),
    (lambda: tinkex.Retry(pass_on={1}), TypeError, "pass_on", "{1}"),
    (lambda: config.load(5, "k"), TypeError, "base_url", "5"),
    (
        lambda: config.load("localhost:8000", "k"),
        ValueError,
        "'localhost:8000'",
        "http://127.0.0.1",
    ),
    (lambda: config.load("ftp://x", "k"), ValueError, "'ftp://x'", "http://127.0.0.1"),
    (lambda: config.load("http://", "k"), ValueError, "'http://'", "http://127.0.0.1"),
    (lambda: config.load("http://x:99999", "k"), ValueError, "'http://x:99999'", "port"),
    (lambda: config.load("http://x:80a", "k"), ValueError, "'http://x:80a'", "port"),
    (lambda: config.load("http://x/?key=1", "k"), ValueError, "query", "base_url"),
    (lambda: config.load("http://a:b@x", "k"), ValueError, "user name or password", "api_key"),
    (lambda: config.load("http://x", 5), TypeError, "api_key", "int"),
    (lambda: config.load("http://x", "a b"), ValueError, "api_key", "spaces"),
    (lambda: config.load("http://x", "a\n"), ValueError, "api_key", "line breaks"),
    (lambda: config.load("http://x", "schlüssel"), ValueError, "api_key", "characters"),
    (lambda: config.load("http://x", "k", project_id=5), TypeError, "project_id", "5"),
    (
        lambda: config.load("http://x", "k", patience=5),
        TypeError,
        "patience",
        "tinkex.Patience",
        "5",
    ),
    (
        lambda: config.load("http://x", "k", sampling=5),
        TypeError,
        "sampling",
        "tinkex.Sampling",
        "5",
    ),
    (lambda: tinkex.Config(base_url="nowhere"), ValueError, "'nowhere'", "http://127.0.0.1"),
]

# --- training -----------------------------------------------------------------------------------

TRAINING = [
    # data
    (lambda c: c.forward_backward([], "cross_entropy"), ValueError, "empty", "at least one Datum"),
    (lambda c: c.forward_backward(datum(), "cross_entropy"), TypeError, "one Datum", "[datum]"),
    (lambda c: c.forward_backward(None, "cross_entropy"), TypeError, "NoneType", "list of Datum"),
    (lambda c: c.forward_backward("abc", "cross_entropy"), TypeError, "str", "list of Datum"),
    (lambda c: c.forward_backward(iter([datum()]), "cross_entropy"), TypeError, "list_iterator"),
    (lambda c: c.forward_backward([datum(), 5], "cross_entropy"), TypeError, "data[1]", "int"),
    (lambda c: c.forward_backward([{"a": 1}], "cross_entropy"), TypeError, "data[0]", "dict"),
    (lambda c: c.forward([one({})], "cross_entropy"), ValueError, "data[0]", "'target_tokens'"),
    (
        lambda c: c.forward(
            [datum(), one({"target_tokens": [2, 3, 4]}, types.ModelInput.empty())], "cross_entropy"
        ),
        ValueError,
        "data[1]",
        "empty",
    ),
    (
        lambda c: c.forward([one({"target_tokens": [2, 3]})], "cross_entropy"),
        ValueError,
        "data[0]",
        "[2]",
        "3 tokens",
        "one value per input token",
    ),
    (
        lambda c: c.forward([one(GOOD | {"weights": [1.0, 1.0]})], "cross_entropy"),
        ValueError,
        "'weights'",
        "[2]",
    ),
    (
        lambda c: c.forward([one(GOOD | {"weights": [1.0, NAN, 1.0]})], "cross_entropy"),
        ValueError,
        "'weights'",
        "nan",
        "position 1",
        "weight or advantage 0",
    ),
    (
        lambda c: c.forward([one(GOOD | {"weights": [1.0, 1e300, 1.0]})], "cross_entropy"),
        ValueError,
        "'weights'",
        "inf",
        "position 1",
    ),
    (
        lambda c: c.forward([one(GOOD | {"target_tokens": [2, -100, 4]})], "cross_entropy"),
        ValueError,
        "-100",
        "Mask a position out with weight 0",
    ),
    (
        lambda c: c.forward([one(GOOD | {"target_tokens": [2, 2**31, 4]})], "cross_entropy"),
        ValueError,
        "2147483648",
    ),
    (
        lambda c: c.forward(
            [one({"target_tokens": types.TensorData([2.0, 3.0, 4.0])})], "cross_entropy"
        ),
        ValueError,
        "target_tokens",
        "float32",
        "int64",
    ),
    (
        lambda c: c.forward([one(GOOD | {"weights": array(3, 2)})], "cross_entropy"),
        ValueError,
        "[3, 2]",
        "must be the same",
    ),
    (
        lambda c: c.forward([one({"target_tokens": np.zeros((3, 2, 2), int)})], "cross_entropy"),
        ValueError,
        "[3, 2, 2]",
    ),
    (
        lambda c: c.forward([one({"target_tokens": np.array(5)})], "cross_entropy"),
        ValueError,
        "target_tokens",
        "[1]",
    ),
    *[
        (
            lambda c, loss=loss, name=name: c.forward_backward(
                [one({k: v for k, v in POLICY.items() if k != name})], loss
            ),
            ValueError,
            "data[0]",
            repr(name),
            f"{loss} needs",
        )
        for loss in ("importance_sampling", "ppo", "cispo", "dro")
        for name in ("logprobs", "advantages")
    ],
    (lambda c: c.forward([one(POLICY)], "gspo"), ValueError, "'sequence_ratio_mask'"),
    (
        lambda c: c.forward([one(POLICY | {"advantages": array(3, 2)})], "ppo"),
        ValueError,
        "'advantages'",
        "[3, 2]",
        "[3]",
    ),
    # loss functions
    (lambda c: c.forward([datum()], "crossentropy"), ValueError, "'crossentropy'", "cross_entropy"),
    (lambda c: c.forward([datum()], None), ValueError, "None", "cross_entropy"),
    (lambda c: c.forward([datum()], 5), ValueError, "5", "cross_entropy"),
    (lambda c: c.forward([datum()], ["ppo"]), ValueError, "['ppo']", "cross_entropy"),
    (lambda c: c.forward([datum()], lambda *a: a), ValueError, "loss_fn", "cross_entropy"),
    (lambda c: c.forward([one(POLICY)], "ppo", [1]), TypeError, "[1]", "mapping"),
    (lambda c: c.forward([one(POLICY)], "ppo", "clip=1"), TypeError, "'clip=1'", "mapping"),
    (lambda c: c.forward([one(POLICY)], "ppo", {5: 1}), TypeError, "5", "must be a str"),
    *[
        (
            lambda c, v=v: c.forward([one(POLICY)], "ppo", {"clip_low_threshold": v}),
            ValueError,
            "'clip_low_threshold'",
            repr(v),
            "finite number",
        )
        for v in (True, None, "high", [1.0], {}, NAN, INF, "inf")
    ],
    # waiting
    *[
        (lambda c, v=v: c.forward([datum()], "cross_entropy", poll_timeout=v), kind, repr(v), "sec")
        for v, kind in [
            (0, ValueError),
            (-1, ValueError),
            (NAN, ValueError),
            (INF, ValueError),
            ("10", TypeError),
            (True, TypeError),
            ([1], TypeError),
        ]
    ],
    (lambda c: c.optim_step(types.AdamParams(), poll_timeout=0), ValueError, "poll_timeout", "0"),
    (lambda c: c.save_state("a", poll_timeout="x"), TypeError, "poll_timeout", "'x'"),
    (
        lambda c: c.forward_backward_custom([datum()], max, poll_timeout=-1),
        ValueError,
        "poll_timeout",
        "-1",
    ),
    (
        lambda c: c.save_weights_and_get_sampling_client(poll_timeout=-1),
        ValueError,
        "poll_timeout",
        "-1",
    ),
    # a loss of one's own
    (lambda c: c.forward_backward_custom([datum()], "mse"), TypeError, "'mse'", "function"),
    (lambda c: c.forward_backward_custom([datum()], None), TypeError, "None", "function"),
    (lambda c: c.forward_backward_custom([], max), ValueError, "empty", "at least one Datum"),
    (lambda c: c.forward_backward_custom(datum(), max), TypeError, "one Datum", "[datum]"),
    (lambda c: c.forward_backward_custom([5], max), TypeError, "data[0]", "int"),
    (
        lambda c: c.forward_backward_custom([one({"weights": [1.0] * 3})], max),
        ValueError,
        "data[0]",
        "'target_tokens'",
    ),
    (
        lambda c: c.forward_backward_custom([datum()], max, framework="keras"),
        ValueError,
        "'keras'",
        "torch, autograd, jax",
    ),
    (lambda c: c.forward_backward_custom([datum()], max, framework=5), ValueError, "5", "torch"),
    # steps
    (lambda c: c.optim_step(types.AdamParams(), adam_params={}), TypeError, "only one"),
    (lambda c: c.optim_step(1e-3), TypeError, "float", "types.AdamParams"),
    (lambda c: c.optim_step({"lr": 1e-3}), TypeError, "'lr'", "learning_rate, beta1"),
    (lambda c: c.optim_step({"learning_rate": "x"}), TypeError, "'x'", "learning_rate"),
    (lambda c: c.optim_step(learning_rate=-1.0), ValueError, "-1.0", "learning_rate"),
    # names and paths
    *[
        (lambda c, v=v, f=f: getattr(c, f)(v), kind, shown, "name")
        for f in ("save_state", "save_weights_for_sampler", "save_weights_and_get_sampling_client")
        for v, kind, shown in [
            ("", ValueError, "''"),
            ("a/b", ValueError, "'a/b'"),
            ("../a", ValueError, "'../a'"),
            (".hidden", ValueError, "'.hidden'"),
            ("a b", ValueError, "'a b'"),
            ("a\n", ValueError, r"'a\n'"),
            ("ü", ValueError, "'ü'"),
            ("x" * 300, ValueError, "1 to 200"),
            (5, TypeError, "5"),
        ]
    ],
    (lambda c: c.save_state(None), TypeError, "None", "name"),
    *[
        (lambda c, v=v: c.save_state("a", ttl_seconds=v), kind, "ttl_seconds", repr(v))
        for v, kind in [
            (0, ValueError),
            (-1, ValueError),
            (10**12, ValueError),
            (1.5, TypeError),
            ("1d", TypeError),
            (True, TypeError),
        ]
    ],
    (lambda c: c.save_weights_for_sampler("a", ttl_seconds=0), ValueError, "ttl_seconds", "0"),
    (lambda c: c.save_weights_and_get_sampling_client(ttl_seconds=0), ValueError, "ttl_seconds"),
    (lambda c: c.save_state("a", overwrite="yes"), TypeError, "overwrite", "'yes'"),
    (lambda c: c.save_state("a", user_metadata=[1]), TypeError, "user_metadata", "[1]", "dict"),
    (lambda c: c.save_state("a", user_metadata={1: 2}), TypeError, "user_metadata", "str keys"),
    (lambda c: c.save_state("a", user_metadata={"a": {1}}), ValueError, "user_metadata", "JSON"),
    (lambda c: c.save_state("a", user_metadata={"a": NAN}), ValueError, "user_metadata", "finite"),
    (
        lambda c: c.save_weights_for_sampler("a", user_metadata={"a": object()}),
        ValueError,
        "user_metadata",
        "JSON",
    ),
    *[
        (lambda c, v=v, f=f: getattr(c, f)(v), ValueError, repr(v), "tinker://<training run>/")
        for f in ("load_state", "load_state_with_optimizer", "create_sampling_client")
        for v in ("", "weights/a", "tinker://a", "tinker://a/b/c", "tinker://a/weights/..", None, 5)
    ],
    (lambda c: c.create_sampling_client_async("x"), ValueError, "'x'", "tinker://"),
    (
        lambda c: c.create_sampling_client_async(PATH, retry_config=5),
        TypeError,
        "5",
        "tinkex.Retry",
    ),
    (lambda c: c.create_sampling_client(PATH, retry_config=5), TypeError, "5", "tinkex.Retry"),
    (
        lambda c: c.save_weights_and_get_sampling_client(retry_config={"max": 1}),
        TypeError,
        "{'max': 1}",
        "tinkex.Retry",
    ),
    # text
    (lambda c: c.encode(5), TypeError, "text must be a str", "int"),
    (lambda c: c.encode(None), TypeError, "text must be a str", "NoneType"),
    (lambda c: c.decode("abc"), TypeError, "ids must be a list"),
    (lambda c: c.decode(5), TypeError, "ids must be a list"),
    (lambda c: c.decode(None), TypeError, "ids must be a list"),
    (lambda c: c.get_tokenizer(load_fn="gpt2"), TypeError, "'gpt2'", "load_fn must be a function"),
    (lambda c: c.get_tokenizer(info_fn=5), TypeError, "5", "info_fn must be a function"),
    (lambda c: c.close(timeout="soon"), TypeError, "'soon'", "timeout must be seconds"),
    (lambda c: c.close(timeout=-1), ValueError, "-1", "timeout must be"),
]

# --- sampling -----------------------------------------------------------------------------------

SAMPLING = [
    (lambda c: c.sample([]), ValueError, "prompt is empty", "at least one token"),
    (lambda c: c.sample(types.ModelInput.empty()), ValueError, "prompt is empty"),
    (lambda c: c.sample(None), TypeError, "None", "token ids"),
    (lambda c: c.sample(5), ValueError, "5", "one-dimensional"),
    (lambda c: c.sample([[1], [2]]), ValueError, "(2, 1)", "one sequence at a time"),
    (lambda c: c.sample([-1]), ValueError, "-1", "never negative"),
    (lambda c: c.sample([1], stop=[-1]), ValueError, "-1", "not a token id"),
    (lambda c: c.sample([1.5]), TypeError, "1.5", "whole numbers"),
    (lambda c: c.sample([1], 0), ValueError, "num_samples", "0"),
    (lambda c: c.sample([1], -1), ValueError, "num_samples", "-1"),
    (lambda c: c.sample([1], 1.5), TypeError, "num_samples", "1.5"),
    (lambda c: c.sample([1], "2"), TypeError, "num_samples", "'2'"),
    (lambda c: c.sample([1], 1, 5), TypeError, "int", "types.SamplingParams"),
    (lambda c: c.sample([1], include_prompt_logprobs="yes"), TypeError, "prompt_logprobs", "'yes'"),
    (lambda c: c.sample([1], topk_prompt_logprobs=-1), ValueError, "topk_prompt_logprobs", "-1"),
    (lambda c: c.sample([1], topk_prompt_logprobs=True), TypeError, "topk_prompt_logprobs", "True"),
    (lambda c: c.sample([1], topk_sample_logprobs=1.5), TypeError, "topk_sample_logprobs", "1.5"),
    (
        lambda c: c.sample([1], prompt_logprobs_last_n=-1),
        ValueError,
        "prompt_logprobs_last_n",
        "-1",
    ),
    (
        lambda c: c.sample([1, 2], target_prompt_logprobs=[[1]]),
        TypeError,
        "target_prompt_logprobs",
        "list",
        "TensorData(array)",
    ),
    (
        lambda c: c.sample([1, 2], target_prompt_logprobs=types.TensorData([[1.5]])),
        ValueError,
        "target_prompt_logprobs",
        "float32",
        "int64",
    ),
    (lambda c: c.sample([1], poll_timeout=0), ValueError, "poll_timeout", "0"),
    (lambda c: c.sample([1], max_tokens=0), ValueError, "max_tokens", "0"),
    (lambda c: c.sample([1], 1, {"max_token": 3}), TypeError, "'max_token'", "max_tokens"),
    (lambda c: c.sample_stream([1], temperature=-1), ValueError, "temperature", "-1"),
    (lambda c: c.sample_stream([1], tokens=1), TypeError, "tokens"),
    (lambda c: c.compute_logprobs([]), ValueError, "prompt is empty"),
    (lambda c: c.compute_logprobs([1], prompt_logprobs_last_n="x"), TypeError, "last_n", "'x'"),
    (lambda c: c.sample_many("abc"), TypeError, "'abc'", "prompts must be a list"),
    (lambda c: c.sample_many(5), TypeError, "5", "prompts must be a list"),
    (lambda c: c.sample_many([[1]], in_flight=0), ValueError, "in_flight", "0"),
    (lambda c: c.sample_many([[1]], in_flight=True), (ValueError, TypeError), "in_flight", "True"),
    (lambda c: list(c.sample_many([[1.5]])), TypeError, "1.5", "whole numbers"),
    (lambda c: c.sample_stream([]), ValueError, "prompt is empty"),
    (lambda c: c.sample_stream([1], sampling_params=5), TypeError, "int", "types.SamplingParams"),
]

# --- creating clients ---------------------------------------------------------------------------

SERVICE = [
    *[
        (lambda s, v=v, f=f: getattr(s, f)(v), kind, words)
        for f in ("create_lora_training_client", "create_lora_training_client_async")
        for v, kind, words in [
            (None, ValueError, "base_model is required"),
            ("", ValueError, "base_model must not be empty"),
            (5, TypeError, "invalid base_model: 5"),
        ]
    ],
    *[
        (lambda s, n=n, v=v, f=f: getattr(s, f)("tiny", **{n: v}), kind, n, repr(v))
        for f in ("create_lora_training_client", "create_lora_training_client_async")
        for n, v, kind in [
            ("rank", 0, ValueError),
            ("rank", "8", TypeError),
            ("seed", -1, ValueError),
            ("train_mlp", "no", TypeError),
            ("user_metadata", 5, TypeError),
            ("adapter", 5, TypeError),
            ("queue_state_observer", 5, TypeError),
        ]
    ],
    (
        lambda s: s.create_lora_training_client_async("tiny", 8, None, False, False, False),
        ValueError,
        "At least one of train_mlp",
    ),
    (lambda s: s.create_lora_training_client_async("tiny", ranks=8), TypeError, "ranks"),
    *[
        (lambda s, f=f, v=v: getattr(s, f)(v), ValueError, repr(v), "tinker://<training run>/")
        for f in (
            "create_training_client_from_state",
            "create_training_client_from_state_async",
            "create_training_client_from_state_with_optimizer",
            "create_training_client_from_state_with_optimizer_async",
        )
        for v in ("best", None)
    ],
    (
        lambda s: s.create_training_client_from_state_async(PATH, user_metadata=5),
        TypeError,
        "user_metadata",
        "5",
    ),
    *[
        (lambda s, f=f, o=o: getattr(s, f)(**o), kind, words)
        for f in ("create_sampling_client", "create_sampling_client_async")
        for o, kind, words in [
            ({}, ValueError, "Either model_path or base_model must be provided"),
            ({"model_path": "best"}, ValueError, "tinker://<training run>/"),
            ({"base_model": 5}, TypeError, "base_model must be the name of a model, got 5"),
            ({"base_model": ""}, TypeError, "base_model must be the name of a model, got ''"),
            ({"base_model": "m", "retry_config": 5}, TypeError, "tinkex.Retry or None, got 5"),
        ]
    ],
]

START = [
    (lambda: TrainingClient.start(), ValueError, "base_model is required"),
    (lambda: TrainingClient.start(5), TypeError, "invalid base_model: 5"),
    (lambda: TrainingClient.start("  "), ValueError, "base_model must not be empty"),
    (lambda: TrainingClient.start(model_id=5), TypeError, "model_id", "5"),
    (lambda: TrainingClient.start(model_id=""), TypeError, "model_id", "''"),
    (lambda: TrainingClient.start(model_id="m", seq_id=-1), ValueError, "seq_id", "-1"),
    (lambda: TrainingClient.start(model_id="m", seq_id="7"), ValueError, "seq_id", "'7'"),
    (lambda: TrainingClient.start("tiny", model_seq_id=-1), ValueError, "model_seq_id", "-1"),
    (
        lambda: TrainingClient.start("tiny", lora_config={"r": 8}),
        TypeError,
        "'r'",
        "LoraConfig takes rank",
    ),
    (lambda: TrainingClient.start("tiny", user_metadata=5), TypeError, "user_metadata", "5"),
    (lambda: TrainingClient.start("tiny", queue_state_observer=5), TypeError, "observer", "5"),
    (lambda: TrainingClient.start("tiny", patience=5), TypeError, "tinkex.Patience", "5"),
    (lambda: TrainingClient.start("tiny", base_url="x"), ValueError, "'x'", "http://127.0.0.1"),
    (lambda: TrainingClient.spec(), ValueError, "base_model is required"),
    (lambda: TrainingClient.spec("m", api_key="k"), ValueError, "api_key", "TINKER_API_KEY"),
    (lambda: TrainingClient.spec("m", rank=8), TypeError, "rank is not an option"),
    (lambda: tinkex.ServiceClient("nowhere"), ValueError, "'nowhere'", "http://127.0.0.1"),
    (lambda: tinkex.ServiceClient(user_metadata=5), TypeError, "user_metadata", "5"),
    (lambda: tinkex.ServiceClient(user_metadata={"a": {1}}), ValueError, "user_metadata", "JSON"),
    (lambda: tinkex.ServiceClient(patience=5), TypeError, "tinkex.Patience", "5"),
    (lambda: tinkex.ServiceClient(config={"base_url": "x"}), TypeError, "base_url", "Config"),
    (lambda: tinkex.ServiceClient(session="s"), TypeError, "'s'", "requests.Session"),
    (lambda: tinkex.ServiceClient(default_headers=["a"]), TypeError, "list", "default_headers"),
    (lambda: tinkex.ServiceClient(default_headers={"a": 1}), TypeError, "default_headers", "str"),
    (lambda: tinkex.ServiceClient(proxies="http://p"), TypeError, "proxies", "dict"),
    (lambda: tinkex.ServiceClient(verify=5), TypeError, "5", "CA bundle"),
    (lambda: tinkex.ServiceClient(hooks=print), TypeError, "print", "{'response': function}"),
    (lambda: tinkex.ServiceClient(hooks={"request": print}), ValueError, "'request'", "event"),
    (lambda: tinkex.ServiceClient(hooks={"response": [5]}), TypeError, "5", "not a function"),
    (lambda: tinkex.Config(tags="abc"), TypeError, "'abc'", "list of str"),
    (lambda: tinkex.ServiceClient(sampling=5), TypeError, "tinkex.SamplingLimits", "5"),
    (lambda: tinkex.ServiceClient(project_id=5), TypeError, "project_id", "5"),
    (lambda: tinkex.RestClient("nowhere"), ValueError, "'nowhere'", "http://127.0.0.1"),
]

# --- stored things ------------------------------------------------------------------------------

CHECKPOINT_CALLS = (
    "delete_checkpoint_from_tinker_path",
    "publish_checkpoint_from_tinker_path",
    "unpublish_checkpoint_from_tinker_path",
    "get_weights_info_by_tinker_path",
    "get_training_run_by_tinker_path",
    "get_checkpoint_archive_url",
)

REST = [
    *[
        (lambda r, f=f, v=v: getattr(r, f)(v), ValueError, repr(v), "tinker://<training run>/")
        for f in CHECKPOINT_CALLS
        for v in ("best", "tinker://a/b/c", 5)
    ],
    (lambda r: r.set_checkpoint_ttl_from_tinker_path("best", 5), ValueError, "'best'"),
    (lambda r: r.set_checkpoint_ttl_from_tinker_path(PATH, 0), ValueError, "ttl_seconds", "0"),
    (lambda r: r.set_checkpoint_ttl_from_tinker_path(PATH, "1d"), TypeError, "ttl_seconds", "'1d'"),
    (lambda r: r.delete_checkpoint("run", "0001"), ValueError, "'0001'", "weights/0001"),
    (lambda r: r.delete_checkpoint("run", 5), (ValueError, TypeError), "5", "weights/0001"),
    (
        lambda r: r.delete_checkpoint("run", "weights/.."),
        ValueError,
        "'weights/..'",
        "weights/0001",
    ),
    (lambda r: r.delete_checkpoint("run", "/weights"), ValueError, "'/weights'", "weights/0001"),
    (lambda r: r.delete_checkpoint("", "weights/a"), ValueError, "''", "an id"),
    (lambda r: r.delete_checkpoint("a/../b", "weights/a"), ValueError, "'a/../b'", "an id"),
    (lambda r: r.delete_checkpoint("..", "weights/a"), ValueError, "'..'", "an id"),
    (lambda r: r.get_training_run(""), ValueError, "''", "an id"),
    (lambda r: r.get_training_run(None), ValueError, "None", "an id"),
    (lambda r: r.get_session(5), ValueError, "5", "an id"),
    (lambda r: r.get_sampler("../sessions/x"), ValueError, "'../sessions/x'", "an id"),
    (lambda r: r.list_checkpoints(""), ValueError, "''", "an id"),
    (lambda r: r.list_training_runs(limit=0), ValueError, "limit", "0"),
    (lambda r: r.list_training_runs(limit="5"), ValueError, "limit", "'5'"),
    (lambda r: r.list_training_runs(offset=-1), ValueError, "offset", "-1"),
    (lambda r: r.list_training_runs(access_scope="mine"), ValueError, "'mine'", "accessible"),
    (lambda r: r.list_user_checkpoints(limit=True), ValueError, "limit", "True"),
    (lambda r: r.list_sessions(offset=1.5), ValueError, "offset", "1.5"),
    (lambda r: r.get_session("s", access_scope=None), ValueError, "None", "accessible"),
    (lambda r: next(r.iter_training_runs(page=0)), ValueError, "limit", "0"),
    (lambda r: r.get_run_metrics("run", after=-1), ValueError, "after", "-1"),
    (lambda r: r.report_run_metrics("run", [3]), TypeError, "points[0]", "3"),
    (lambda r: r.report_run_metrics("run", [], [3]), TypeError, "samples[0]", "3"),
    (lambda r: r.report_run_metrics("run", [{"loss": math.nan}]), ValueError, "'loss'", "nan"),
    (lambda r: r.report_run_metrics("run", [{"loss": "2"}]), ValueError, "'loss'", "'2'"),
    (lambda r: r.download_checkpoint("best", "out"), ValueError, "'best'", "tinker://"),
    (lambda r: r.download_checkpoint(PATH, 5), TypeError, "5", "output_dir"),
]

ALL = [
    *[("data", *row) for row in DATA],
    *[("parameters", *row) for row in PARAMETERS],
    *[("training", *row) for row in TRAINING],
    *[("sampling", *row) for row in SAMPLING],
    *[("service", *row) for row in SERVICE],
    *[("start", *row) for row in START],
    *[("rest", *row) for row in REST],
]


@pytest.fixture(scope="module")
def world():
    """One server and its clients for all rows: none of them changes anything."""
    server = FakeServer()
    with session(server) as s, closing(Connection(settings(), transport=transport(server))) as c:
        training = TrainingClient(s, "s0:train:0", base_model="tinkex/tiny")
        sampling = SamplingClient(s, "sampler-0", base_model="tinkex/tiny")
        service = tinkex.ServiceClient.__new__(tinkex.ServiceClient)
        service._session = s
        training.get_info()
        training.get_tokenizer()
        yield (
            server,
            {
                "training": [training],
                "sampling": [sampling],
                "service": [service],
                "rest": [RestClient(connection=c)],
            },
        )


@pytest.mark.parametrize("row", ALL, ids=lambda row: f"{row[0]} {' '.join(row[3:])}"[:60])
def test_a_bad_call_is_raised_at_once_with_the_value_the_reason_and_the_fix(
    world, row, monkeypatch, tmp_path
):
    where, call, kind, *words = row
    server, clients = world
    plugged_in(monkeypatch, server)
    monkeypatch.chdir(tmp_path)
    server.requests.clear()

    with pytest.raises(kind) as caught:
        call(*clients.get(where, []))
    message = str(caught.value)

    assert [] == [word for word in words if word not in message], message
    assert 500 >= len(message)
    assert [] == server.requests
    assert type(caught.value) in (ValueError, TypeError), type(caught.value)


def test_after_all_of_them_the_first_number_is_still_free(world):
    """Numbers are given when something is sent, and to nothing else."""
    server, clients = world
    server.requests.clear()
    clients["training"][0].optim_step(types.AdamParams()).result(10)
    clients["sampling"][0].sample([1]).result(10)

    assert [1] == server.seq_ids()
    assert [0] == [body["seq_id"] for body in server.bodies("asample")]


def test_a_secret_is_never_repeated_in_a_message():
    for key in ("tml secret", "tml-secret\n", "tml-sécret"):
        with pytest.raises(ValueError) as caught:
            config.load("http://x", key)
        assert "secret" not in str(caught.value) and "cret" not in str(caught.value)


def test_there_are_at_least_150_of_them():
    assert 150 <= len(ALL)


def test_a_restore_checks_its_path_too(world):
    server, clients = world
    server.requests.clear()

    with pytest.raises(ValueError, match="tinker://<training run>/"):
        restore(clients["service"][0]._session, "best", optimizer=False)
    assert [] == server.requests
