"""Each line of the table of lines runs, against our server."""

from __future__ import annotations

import ast
import asyncio

import numpy as np
import pytest

import tinkex
from tests.official_sdk import lines, page
from tinkex import types
from tinkex.server.app import LocalServer


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What the lines use."""
    key = "tml-lines"
    with (
        pytest.MonkeyPatch.context() as patched,
        LocalServer(tmp_path_factory.mktemp("home")) as server,
    ):
        patched.setenv("TINKER_API_KEY", key)
        with tinkex.ServiceClient(server.url) as service:
            training = service.create_lora_training_client("tiny", rank=4)
            data = [types.Datum(types.ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3]})]
            training.forward_backward(data, "cross_entropy").result()
            weights = training.save_weights_for_sampler("kept").result().path
            yield {
                "tinker": tinkex,
                "types": types,
                "asyncio": asyncio,
                "array": np.ones(2, np.float32),
                "url": server.url,
                "key": key,
                "service": service,
                "training": training,
                "rest": service.create_rest_client(),
                "sampler": service.create_sampling_client(model_path=weights),
                "state": training.save_state("kept").result().path,
                "weights": weights,
                "external": training.save_weights_external("kept", ttl_seconds=3600).result().path,
                "data": data,
                "prompt": types.ModelInput.from_ints([1, 2, 3]),
                "params": types.SamplingParams(max_tokens=2),
                "loss": lambda data, logprobs: (-sum(lp.sum() for lp in logprobs), {}),
            }


@pytest.mark.parametrize("line", lines.LINES)
def test_the_line_runs(names, line):
    code = compile(line, "line", "eval", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)

    async def run():
        value = eval(code, dict(names))
        return await value if asyncio.iscoroutine(value) else value

    assert asyncio.run(run()) is not NotImplemented


def test_the_page_has_the_table():
    """`python -m tests.official_sdk.lines` writes it."""
    assert lines.section() == page.part("lines")
