"""A run with all kinds of operations in it, and what there is to compare at its end.

What it asks for depends on nothing but the number of steps, so two runs of as many steps must end
in the same weights, the same results and the same samples, to the bit.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import attrs
import numpy as np

from tinkex import types

#: Datums of a call, and of a request: each call goes in several.
DATUMS, IN_ONE_REQUEST = 5, 2
#: Steps of a full run: 311 numbered operations, and 40 samples.
FULL = 62


#: Seconds until a result that does not come fails the test.
PATIENCE = 180


@attrs.define
class Outcome:
    """
    Attributes:
        operations: numbered ones that the model was sent; samples: asked for.
        results: of every call, in the order of the calls, as digests; of samples the tokens, for
            their log-probabilities depend, in the last bits, on what is sampled beside them.
        weights: of the last checkpoint: file name -> digest.
    """

    operations: int
    samples: int
    results: list[str]
    weights: dict[str, str]
    checkpoints: list[str]


def batch(step: int, datums: int = DATUMS) -> list[types.Datum]:
    chance = np.random.default_rng(step)
    data = []
    for _ in range(datums):
        tokens = chance.integers(1, 200, size=chance.integers(6, 20))
        data.append(
            types.Datum(
                model_input=types.ModelInput.from_ints(tokens[:-1].tolist()),
                loss_fn_inputs={
                    "target_tokens": tokens[1:].astype(np.int64),
                    "weights": np.ones(len(tokens) - 1, dtype=np.float32),
                },
            )
        )
    return data


def own_loss(data, logprobs):
    """The squares of the log-probabilities, summed."""
    loss = sum((row**2).sum() for row in logprobs)
    return loss, {"own:sum": loss.item()}


def cut_small(service) -> None:
    """From now on a request holds few datums, so that every batch goes in several."""
    session = service._session
    session.features = attrs.evolve(session.features, fwdbwd_max_chunk_len=IN_ONE_REQUEST)


def run(service, home: Path, steps: int = FULL, on_step=lambda step: None) -> Outcome:
    """Train on *service*, whose server keeps its checkpoints in *home*."""
    cut_small(service)
    training = service.create_lora_training_client("tiny", rank=4, seed=7)
    calls, samplings, saved = [], [], []
    for step in range(steps):
        on_step(step)
        if step % 5 == 4:
            calls.append(training.forward_backward_custom(batch(step), own_loss))
        else:
            calls.append(training.forward_backward(batch(step), "cross_entropy"))
        calls.append(training.optim_step(types.AdamParams(learning_rate=1e-2)))
        if step % 7 == 3:
            calls.append(training.save_state(f"step-{step}"))
            saved.append(f"tinker://{training.model_id}/weights/step-{step}")
        if step % 11 == 8:
            calls.append(training.load_state_with_optimizer(saved[-1]))
        if step % 6 == 2:
            samplings.append(training.save_weights_and_get_sampling_client())
        if len(calls) > 12:
            calls[-12].result(PATIENCE)
    last = training.save_state("last").result(PATIENCE)
    samples = [sample for future in samplings for sample in _samples(future.result(PATIENCE))]
    results = [_digest(call.result(PATIENCE), training.model_id) for call in calls]
    results += [repr([s.tokens for s in sample.result(PATIENCE).sequences]) for sample in samples]
    operations = training._queue.seq_id
    training.close()
    return Outcome(operations, len(samples), results, weights(home, last.path), [*saved, last.path])


def _samples(sampler):
    return [
        sampler.sample([5, 6, 7 + i], 2, types.SamplingParams(max_tokens=6, seed=i))
        for i in range(4)
    ]


def weights(home: Path, tinker_path: str) -> dict[str, str]:
    """The files of a checkpoint, as digests."""
    run_id, _, checkpoint_id = tinker_path.removeprefix("tinker://").partition("/")
    folder = home / "checkpoints" / run_id.replace(":", "_") / checkpoint_id
    files = sorted(folder.iterdir())
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _digest(result: object, model_id: str) -> str:
    session_id = model_id.split(":")[0]
    return repr(_plain(result)).replace(session_id, "SESSION")


def _plain(value: object) -> object:
    """Arrays as the bytes they are, the rest as numbers and lists."""
    if isinstance(value, types.TensorData):
        value = value.to_numpy()
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.shape, hashlib.sha256(value.tobytes()).hexdigest())
    if attrs.has(type(value)):
        return _plain(attrs.asdict(value, recurse=False))
    if isinstance(value, dict):
        return sorted((key, _plain(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
