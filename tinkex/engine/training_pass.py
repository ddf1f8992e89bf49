"""One forward_backward: divide the data into micro-batches and compute each of them.

Micro-batches hold a bounded number of tokens, in sequences of similar length. How a request is
divided depends on the request and the base model alone. Does not know model ids or other requests.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import partial

import attrs
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tinkex import types
from tinkex.engine import losses
from tinkex.engine.base_model import BaseModel
from tinkex.engine.cpu_parallel import Workers
from tinkex.engine.linears import Linears
from tinkex.engine.lm_head import Rows, target_logprobs
from tinkex.engine.lora import TrainedLinears
from tinkex.engine.memory import kind_of, total_memory

#: Least and greatest target size of a micro-batch in tokens, by kind of device. With fewer, matrix
#: products are slower and portions become too small; more are no faster. Other work may
#: run between micro-batches, so they should not be larger than needed. (Activations of 1,200 tokens
#: in a model of 30 layers and width 576 take 1 GiB, an eighth of 8 GiB.)
MIN_TOKENS = {"cpu": 1200, "cuda": 4096}
MAX_TOKENS = {"cpu": 2048, "cuda": 16384}

#: Bytes of activations up to which a micro-batch takes more than the least number of tokens.
COMFORTABLE_ACTIVATIONS = {"cpu": 128 * 2**20, "cuda": 4 * 2**30}

#: Fraction of memory that activations may take before layers save only their inputs and are
#: recomputed in the backward pass (which costs a third more arithmetic).
ACTIVATION_SHARE = 0.125


@attrs.frozen(eq=False)
class Prepared:
    """One datum as arrays.

    Attributes:
        tokens: (N,) int32.
        targets: (N, K) int64; K = 1 unless the datum has several targets per token.
        arrays: float inputs of the loss by name, (N, K) float32 each, defaults filled in.
        shape: of target_tokens in the request.
    """

    tokens: npt.NDArray[np.int32]
    targets: npt.NDArray[np.int64]
    arrays: Mapping[str, npt.NDArray[np.float32]]
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.tokens)


def prepare(
    data: Sequence[types.Datum], loss_fn: str, config: Mapping[str, float]
) -> list[Prepared]:
    """The inputs of *loss_fn* as arrays, from data that passed `types.check_data`.

    Raises:
        ValueError: If an input has another shape than the targets.
    """
    known = types.LOSS_FUNCTIONS[loss_fn]
    optional = [
        name for name in known.optional if any(name in datum.loss_fn_inputs for datum in data)
    ]
    defaults = {"weights": 1.0, **config}
    if loss_fn == "cross_entropy":
        optional = ["weights"]
    if loss_fn == "trinity_ppo":
        _check_trinity(data, config)
        optional += ["ref_logprobs"] * (config["kl_coef"] > 0 and "ref_logprobs" not in optional)
    names = [name for name in (*known.inputs, *optional) if name != "target_tokens"]
    return [_prepare_one(datum, i, names, defaults) for i, datum in enumerate(data)]


def _check_trinity(data: Sequence[types.Datum], config: Mapping[str, float]) -> None:
    if config["num_total_datums"] < len(data):
        raise ValueError(
            f"num_total_datums is {config['num_total_datums']:g}, but this request alone has "
            f"{len(data)} datums; it is how many the optimizer step has in all."
        )
    for i, datum in enumerate(data):
        mask = datum.loss_fn_inputs.get("mask")
        if mask is not None and not np.isin(mask.to_numpy(), (0, 1)).all():
            raise ValueError(f"data[{i}].loss_fn_inputs['mask'] must have only 0 and 1.")


def _prepare_one(
    datum: types.Datum, i: int, names: Sequence[str], defaults: Mapping[str, float]
) -> Prepared:
    inputs = datum.loss_fn_inputs
    shape = inputs["target_tokens"].shape
    rows = (shape[0], shape[1] if len(shape) == 2 else 1)
    arrays: dict[str, npt.NDArray[np.float32]] = {}
    for name in names:
        if name not in inputs:
            if name not in defaults:
                raise ValueError(
                    f"data[{i}] lacks the loss input {name!r}, which every datum must have if one "
                    "has it, and as settings of the loss need it."
                )
            arrays[name] = np.full(rows, defaults[name], np.float32)
            continue
        if inputs[name].shape != shape:
            raise ValueError(
                f"data[{i}].loss_fn_inputs[{name!r}] has shape {list(inputs[name].shape)}, but "
                f"target_tokens {list(shape)}; they must be the same."
            )
        arrays[name] = inputs[name].to_numpy().reshape(rows).astype(np.float32)
    targets = inputs["target_tokens"].to_numpy().reshape(rows)
    return Prepared(datum.model_input.tokens, targets, arrays, shape)


def tokens_per_batch(device: torch.device, activation_bytes: int) -> int:
    """Tokens of a micro-batch; depends only on the model and the kind of device.

    Args:
        activation_bytes: per token.
    """
    kind = kind_of(device)
    comfortable = COMFORTABLE_ACTIVATIONS[kind] // activation_bytes
    return max(MIN_TOKENS[kind], min(MAX_TOKENS[kind], comfortable))


def tokens_to_keep(base: BaseModel) -> int:
    """Tokens whose activations fit in memory. Layers of a larger micro-batch are recomputed."""
    budget = int(total_memory(base.device) * ACTIVATION_SHARE)
    return max(1, budget // base.activation_bytes)


def micro_batches(lengths: Sequence[int], widths: Sequence[int], most: int) -> list[list[int]]:
    """Indices of the sequences of each micro-batch: at most *most* tokens, or one sequence.

    Sorted by length, longest first, so that a batch holds similar lengths; all its sequences have
    the same width (targets per token).
    """
    order = sorted(range(len(lengths)), key=lambda i: (widths[i], -lengths[i], i))
    total = sum(lengths)
    even = -(-total // -(-total // most))  # as few batches as possible, of about equal size
    batches: list[list[int]] = []
    tokens = 0
    for i in order:
        full = not batches or widths[batches[-1][0]] != widths[i] or tokens >= even
        if full or tokens + lengths[i] > most:
            batches.append([])
            tokens = 0
        batches[-1].append(i)
        tokens += lengths[i]
    return batches


@attrs.frozen(eq=False)
class _Outcome:
    """Results of the datums *numbers*: loss, metrics, and arrays (N, K) of all rows by name."""

    numbers: Sequence[int]
    lengths: Sequence[int]
    loss: float
    metrics: Mapping[str, float]
    arrays: Mapping[str, npt.NDArray[np.float32]]


class Pass:
    """The computation of one request, micro-batch by micro-batch.

    Args:
        linears: the matrices; the gradient is complete once every batch has been computed and
            `output` has been called.
        workers: compute the portions of a micro-batch.
        forward_only: compute no gradients.

    Attributes:
        batches: arguments for `compute`, one after the other.
    """

    def __init__(
        self,
        base: BaseModel,
        linears: TrainedLinears,
        workers: Workers,
        data: Sequence[Prepared],
        loss_fn: str,
        config: Mapping[str, float],
        *,
        forward_only: bool = False,
    ) -> None:
        self._base = base
        self._workers = workers
        self._linears = [linears]
        self._data = data
        self._loss_fn = loss_fn
        self._config = config
        self._forward_only = forward_only
        self._most_kept = tokens_to_keep(base)
        widths = [datum.targets.shape[1] for datum in data]
        lengths = [len(datum) for datum in data]
        most = tokens_per_batch(base.device, base.activation_bytes)
        self.batches = micro_batches(lengths, widths, most)
        self._metrics = {"loss:sum": 0.0}
        self._outputs: list[dict[str, types.TensorData]] = [{} for _ in data]

    def compute(self, batch: Sequence[int]) -> None:
        """Forward and backward of the datums numbered in *batch*."""
        sizes = [len(self._data[i]) for i in batch]
        portions = [list(range(len(batch)))]
        if self._base.is_shared:
            portions = self._workers.divide(sizes)
        first = self._linears[0]
        if len(portions) > 1:
            first.prepare()
            self._linears += [first.twin() for _ in range(len(portions) - len(self._linears))]
        recompute = sum(sizes) > self._most_kept
        parts = [
            partial(self._compute_portion, [batch[i] for i in portion], linears, recompute)
            for portion, linears in zip(portions, self._linears)
        ]
        for outcome in self._workers.run(parts):
            self._keep(outcome)

    def _compute_portion(
        self, numbers: Sequence[int], linears: Linears, recompute: bool
    ) -> _Outcome:
        data, base = [self._data[i] for i in numbers], self._base
        lengths = [len(datum) for datum in data]
        tokens = self._pack([datum.tokens for datum in data])
        targets = self._pack([datum.targets for datum in data])
        arrays = {name: self._pack([d.arrays[name] for d in data]) for name in data[0].arrays}
        sequence = torch.repeat_interleave(torch.tensor(lengths)).to(base.device)
        inputs = losses.Inputs(arrays, self._config, sequence, len(data))
        training = base.training_batch(linears, lengths, recompute=recompute)
        hidden = training.forward(tokens, save=not self._forward_only)
        logprobs, values, dhidden = self._losses(linears, hidden, targets, inputs)
        if dhidden is not None:
            training.backward(dhidden)
        return _Outcome(
            numbers,
            lengths,
            float(values.sum(dtype=torch.float64)),
            losses.METRICS[self._loss_fn](logprobs, inputs)
            if self._loss_fn in losses.METRICS
            else {},
            {"logprobs": logprobs.cpu().numpy(), "elementwise_loss": values.cpu().numpy()},
        )

    def _pack(self, arrays: Sequence[npt.NDArray]) -> Tensor:
        return torch.from_numpy(np.concatenate(arrays)).to(self._base.device)

    def _losses(
        self, linears: Linears, hidden: Tensor, targets: Tensor, inputs: losses.Inputs
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probabilities and losses (N, K), and the gradient at *hidden* if it is wanted."""
        loss, base = losses.LOSSES[self._loss_fn], self._base
        score = partial(target_logprobs, linears, hidden, targets, base.vocab, cap=base.logit_cap)
        if self._forward_only or self._loss_fn in losses.WHOLE_SEQUENCE:
            logprobs, _ = score()
            values, slopes = loss(logprobs, inputs)
            if self._forward_only:
                return logprobs, values, None
            live = slopes.any(dim=1)
            _, dhidden = score(lambda rows, _: slopes[rows], live)
            return logprobs, values, dhidden
        values = torch.empty(targets.shape, device=hidden.device)

        def slopes_of(rows: Rows, logprobs: Tensor) -> Tensor:
            values[rows], slopes = loss(logprobs, inputs.rows(rows))
            return slopes

        live = inputs.live(self._loss_fn)
        logprobs, dhidden = score(slopes_of, live)
        return logprobs, values, dhidden

    def _keep(self, outcome: _Outcome) -> None:
        for name, value in {"loss:sum": outcome.loss, **outcome.metrics}.items():
            self._metrics[name] = self._metrics.get(name, 0.0) + value
        starts = itertools.accumulate(outcome.lengths, initial=0)
        for i, start, length in zip(outcome.numbers, starts, outcome.lengths):
            for name, array in outcome.arrays.items():
                own = array[start : start + length].reshape(self._data[i].shape)
                self._outputs[i][name] = types.TensorData.from_numpy(own)

    def output(self) -> types.ForwardBackwardOutput:
        """The result, once every batch has been computed."""
        first, *twins = self._linears
        first.add_gradients(twins)
        self._linears = [first]
        return types.ForwardBackwardOutput(
            loss_fn_outputs=self._outputs,
            metrics=self._metrics,
            loss_fn_output_type=losses.OUTPUT_TYPES[self._loss_fn],
        )


def check_tokens(data: Sequence[types.Datum], base: BaseModel) -> None:
    """Check that token ids are within the vocabulary, and lengths within the context.

    Raises:
        ValueError: Naming the datum and the fix.
    """
    for i, datum in enumerate(data):
        tokens = datum.model_input.tokens
        if len(tokens) > base.context:
            raise ValueError(
                f"data[{i}] has {len(tokens)} tokens, but the model's context is {base.context}; "
                "cut it."
            )
        targets = datum.loss_fn_inputs["target_tokens"].values
        for name, ids in (("model_input", tokens), ("target_tokens", targets)):
            if ids.size and int(ids.max()) >= base.vocab:
                raise ValueError(
                    f"data[{i}].{name} holds token id {int(ids.max())} at position "
                    f"{int(ids.argmax())}, but the model's vocabulary has {base.vocab} tokens; "
                    "encode with the model's own tokenizer."
                )
