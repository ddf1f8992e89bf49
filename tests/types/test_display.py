"""In a REPL and in a notebook, values are a few short lines, whatever their size."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.fake_server import FakeServer, session
from tests.support.fake_service import ByteTokenizer
from tinkex import types
from tinkex.sampling import SamplingClient

MANY = np.arange(5000, dtype=np.int32)
FLOATS = np.zeros(5000, np.float32)
PATH = "tinker://run-1/weights/step-10"
CHECKPOINT = types.Checkpoint(
    "weights/step-10", "training", PATH, "2026-01-02T03:04:05Z", 2_500_000, user_metadata={"a": 1}
)
RUN = types.TrainingRun("run-1", "tinkex/tiny", lora_rank=8, last_checkpoint=CHECKPOINT)
SEQUENCE = types.SampledSequence(MANY, FLOATS, "stop", topk_logprobs=None)

LARGE = {
    "sequence": SEQUENCE,
    "response": types.SampleResponse([SEQUENCE] * 50, FLOATS),
    "topk": types.TopkLogprobs(MANY.reshape(-1, 5), FLOATS.reshape(-1, 5)),
    "input": types.ModelInput.from_ints(MANY),
    "chunk": types.EncodedTextChunk(MANY),
    "chunks": types.ModelInput([types.EncodedTextChunk(MANY)] * 20),
    "datum": types.Datum(types.ModelInput.from_ints(MANY), {"target_tokens": MANY}),
    "output": types.ForwardBackwardOutput(
        [{"logprobs": types.TensorData(FLOATS)}] * 300, {f"m{i}": 1.5 for i in range(90)}
    ),
    "checkpoints": types.CheckpointsListResponse([CHECKPOINT] * 100),
    "runs": types.TrainingRunsResponse([RUN] * 100),
}


@pytest.mark.parametrize("value", LARGE.values(), ids=LARGE)
def test_a_large_value_is_a_few_lines(value):
    shown = repr(value)

    assert 7 >= len(shown.splitlines())
    assert 120 >= max(map(len, shown.splitlines()))


def test_a_response_shows_first_tokens_and_how_each_sequence_ended():
    assert (
        "<SampleResponse of 50 sequences, prompt_logprobs of 5,000 tokens\n"
        "  stop, 5,000 tokens: 0 1 2 3 4 5 6 7 ..."
    ) == "\n".join(repr(LARGE["response"]).splitlines()[:2])
    assert "  ... and 45 more>" == repr(LARGE["response"]).splitlines()[-1]


def test_a_response_shows_text_where_a_tokenizer_is_known():
    """Cut to one line, in quotes; the value itself is as before."""
    sequence = types.SampledSequence(list(b"Once upon\na time " * 20), stop_reason="length")
    response = types.SampleResponse([sequence])
    types.show_with(response, ByteTokenizer())

    assert "length, 340 tokens: 'Once upon\\na time Once upon\\na time" in repr(response)
    assert "340 tokens: 'Once upon" in repr(sequence)
    assert [sequence] == response.sequences


def test_a_tokenizer_that_fails_does_not_break_the_repr():
    response = types.SampleResponse([types.SampledSequence([1, 2])])
    types.show_with(response, object())

    assert "length, 2 tokens: 1 2" in repr(response)


def test_a_sampling_client_that_has_its_tokenizer_lets_text_be_shown():
    with session(FakeServer()) as s, SamplingClient.create(s, base_model="tinkex/tiny") as client:
        unknown = client.sample([1, 2]).result(10)
        known = client.sample("hello").result(10)

    assert "tokens: 2 1" in repr(unknown)
    assert "tokens: '" in repr(known)


@pytest.mark.parametrize(
    "value, words",
    [
        (LARGE["response"], ["50 sequences", "stop", "5,000 tokens"]),
        (types.ForwardBackwardOutput([{}], {"loss:sum": 1.25}), ["loss:sum", "1.25", "1 datum"]),
        (types.OptimStepResponse({"norm": 2.5}), ["norm", "2.5"]),
        (CHECKPOINT, ["tinker_path", PATH, "2500000"]),
        (LARGE["checkpoints"], ["100 checkpoints", PATH, "2.5 MB"]),
        (RUN, ["training_run_id", "run-1", "tinkex/tiny"]),
        (LARGE["runs"], ["100 training runs", "LoRA rank 8", PATH]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_notebook_shows_a_table(value, words):
    shown = value._repr_html_()

    assert shown.startswith("<table>")
    assert shown.endswith("</table>")
    assert all(word in shown for word in words)


def test_text_is_escaped_in_html():
    """Metadata and texts come from a server or a model."""
    run = types.TrainingRun("r", "<script>alert(1)</script>")

    assert "<script>" not in run._repr_html_()
    assert "&lt;script&gt;" in run._repr_html_()


def test_checkpoints_and_runs_show_what_one_looks_for():
    assert f"<Checkpoint {PATH}, training, 2.5 MB, 2026-01-02T03:04:05Z>" == repr(CHECKPOINT)
    assert f"<TrainingRun run-1, tinkex/tiny, LoRA rank 8, {PATH}>" == repr(RUN)
