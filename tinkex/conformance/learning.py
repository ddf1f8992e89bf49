"""Checks of what training computes: sums, gradients, optimizers, and the two dialects."""

from __future__ import annotations

import numpy as np

from tinkex import types, wire
from tinkex.conformance.asking import Broken, NotOffered, said, zstd_bomb
from tinkex.conformance.checking import Checks
from tinkex.conformance.data import OTHERS, Slope, datum, distance
from tinkex.conformance.lab import Lab, logprobs_of

CHECKS = Checks()

#: Log-probabilities that should be the same differ by no more, in 16 bits too.
_SAME = 0.02


@CHECKS.rule("loss:sum is there, and is the sum")
def loss_sum(lab: Lab) -> str:
    """loss:sum is -sum(weight * logprob) over tokens and datums; forward_backward_custom of the
    official SDK needs it. SkyRL gives no metrics at all."""
    with lab.model() as model:
        data = [datum(weight=0.5), datum(OTHERS, weight=2.0)]
        output = model.forward(data)
        lp = logprobs_of(output, data).reshape(2, -1)
        expected = -(0.5 * lp[0].sum() + 2.0 * lp[1].sum())
        told = output.metrics.get("loss:sum")
        if told is None:
            raise Broken(f"the metrics are {sorted(output.metrics) or 'empty'}")
        if abs(told - expected) > 0.01 * abs(expected):
            raise Broken(f"it is {told:.4f}, and the sum is {expected:.4f}")
        return f"{told:.4f}"


@CHECKS.rule("metrics are named name:reduction")
def metric_names(lab: Lab) -> str:
    """The official SDK raises, and loses the whole result, when a metric of forward_backward has no
    colon in its name, or two."""
    with lab.model() as model:
        metrics = model.output(model.batch([datum()])).metrics
        model.run(model.step(), "optim_step")
        wrong = [name for name in metrics if name.count(":") != 1]
        if wrong:
            raise Broken(f"these are not: {', '.join(wrong[:5])}")
        return ", ".join(sorted(metrics)[:5])


@CHECKS.rule("a loss of twice the weights is twice the loss")
def loss_scales(lab: Lab) -> None:
    """Losses are plain sums: twice the weights or twice the data is twice the loss. SkyRL divides
    by the sum of the weights."""
    with lab.model() as model:
        batches = [[datum()], [datum(weight=2.0)], [datum(), datum()]]
        losses = [model.forward(batch).metrics.get("loss:sum") for batch in batches]
        if losses[0] is None:
            raise NotOffered("no loss:sum")
        for loss, what in ((losses[1], "of twice the weights"), (losses[2], "of twice the data")):
            if loss is None or abs(loss / losses[0] - 2) > 0.02:
                raise Broken(f"the loss {what} is {loss} where it was {losses[0]}")


@CHECKS.rule("a gradient of twice the weights is twice the gradient")
def gradient_scales(lab: Lab) -> str:
    """Gradients are sums, too: learning rates carry over from one server to the next. SkyRL divides
    by sequences and weights."""
    with lab.model() as model:
        slope = Slope(model)
        ratios = []
        for what, batch in (
            ("twice the weights", [datum(weight=2.0)]),
            ("twice the data", [datum(), datum()]),
        ):
            wrong = f"{what} is not twice the gradient"
            send = lambda b=batch: model.output(model.batch(b))  # noqa: E731
            ratios.append(slope.check(2, send, wrong))
        return ", ".join(f"{ratio:.2f}" for ratio in ratios)


@CHECKS.rule("gradients add up over requests until the step")
def accumulation(lab: Lab) -> str:
    """Each request adds its gradient. A server that keeps only the last one's trains on a part of
    a large batch (SkyRL, before it was mended)."""
    with lab.model() as model:
        slope = Slope(model)
        nothing = [datum(OTHERS, weight=0.0)]

        def add(*batches: list[types.Datum]) -> None:
            for batch in batches:
                model.output(model.batch(batch))

        lost = "beside a request of weight 0 the {} one does not count whole"
        first = slope.check(1, lambda: add([datum()], nothing), lost.format("first"))
        last = slope.check(1, lambda: add(nothing, [datum()]), lost.format("second"))
        both = slope.check(2, lambda: add([datum()], [datum()]), "two requests are not two")
        return f"{first:.2f}, {last:.2f}, {both:.2f}"


@CHECKS.rule("a step uses its gradients up")
def step_clears(lab: Lab) -> None:
    """What was applied is not applied again by the next step."""
    with lab.model() as model:
        slope = Slope(model)
        model.output(model.batch([datum()]))
        model.run(slope.step(), "optim_step")
        nothing = [datum(OTHERS, weight=0.0)]
        slope.check(0, lambda: model.output(model.batch(nothing)), "gradients were kept")


@CHECKS.rule("forward leaves gradients alone")
def forward_is_pure(lab: Lab) -> None:
    """forward (forward_only in protobuf) adds nothing to the gradients. A server that does not know
    the flag trains on what should only have been looked at."""
    with lab.model() as model:
        slope = Slope(model)

        def look() -> None:
            model.output(model.batch([datum()]))
            model.forward([datum()])
            model.forward([datum()])

        slope.check(1, look, "a forward pass counts")


@CHECKS.rule("a fresh adapter is the base model")
def fresh_adapter(lab: Lab) -> None:
    """LoRA begins at zero: two new models of whatever seed say the same."""
    with lab.model() as first, lab.model() as second:
        change = distance(first.logprobs([datum()]), second.logprobs([datum()]))
        if change > _SAME:
            raise Broken(f"the log-probabilities of two new models differ by {change:.4f}")


@CHECKS.rule("models do not touch each other")
def models_apart(lab: Lab) -> None:
    """Training one model leaves another of the same session as it was."""
    with lab.model() as first, lab.model() as second:
        before = second.logprobs([datum()])
        for _ in range(3):
            first.train([datum()])
        change = distance(before, second.logprobs([datum()]))
        if change > _SAME:
            raise Broken(f"training one moved the other by {change:.4f}")


@CHECKS.rule("the same in both dialects")
def dialects(lab: Lab) -> str:
    """A batch in JSON and in protobuf is the same batch. TuFT takes protobuf only, SkyRL 0.3.0 JSON
    only."""
    with lab.model() as model:
        found = {}
        for protobuf, name in ((False, "JSON"), (True, "protobuf")):
            answer = model.batch([datum()], model.number + 1, forward_only=True, protobuf=protobuf)
            if answer.status >= 300:
                refusal = f"{name}: {said(answer)}"
                continue
            model.next()
            found[name] = logprobs_of(model.output(answer, "forward"), [datum()])
        if len(found) < 2:
            raise NotOffered(refusal)
        change = distance(*found.values())
        if change > 1e-3:
            raise Broken(f"the log-probabilities differ by {change:.5f}")
        return "JSON, protobuf"


@CHECKS.rule("zstd bodies are read")
def zstd(lab: Lab) -> None:
    """Where client/config says proto_compress_fwdbwd, a batch may come compressed."""
    if not lab.asker.connection.features.proto_compress_fwdbwd:
        raise NotOffered("client/config does not say proto_compress_fwdbwd")
    with lab.model() as model:
        plain = model.logprobs([datum()])
        answer = model.batch([datum()], forward_only=True, protobuf=True, compress=True)
        packed = logprobs_of(model.output(answer, "a compressed forward"), [datum()])
        if distance(plain, packed) > 1e-3:
            raise Broken("the compressed batch gives other numbers")


@CHECKS.rule("a body that is far too large is refused")
def too_large(lab: Lab) -> str:
    """2 GiB in a few kilobytes of zstd (or 300 MiB of JSON, where zstd is not offered) get 413, or
    400 or 422, and the server lives."""
    if lab.asker.connection.features.proto_compress_fwdbwd:
        body = zstd_bomb(2048)
        headers = {"Content-Type": wire.PROTOBUF, "Content-Encoding": "zstd"}
    elif lab.asker.connection.config.is_official:
        raise NotOffered("zstd, and 300 MiB are not sent over the internet for a check")
    else:
        body, headers = b'{"model_id": "' + b"x" * (300 << 20) + b'"}', {}
    answer = lab.asker.send("POST", "forward_backward", body, headers, timeout=120.0)
    if answer.status not in (400, 413, 415, 422):
        raise Broken(f"it gave {said(answer)}")
    healthz = lab.asker.get("healthz")
    if healthz.status >= 500:
        raise Broken(f"afterwards healthz gave {said(healthz)}")
    return str(answer.status)


@CHECKS.rule("log-probabilities come for weight 0, too")
def masked(lab: Lab) -> None:
    """A custom loss computes its forward pass with weights of 0 and needs every log-probability."""
    with lab.model() as model:
        full, none = model.logprobs([datum()]), model.logprobs([datum(weight=0.0)])
        if not np.isfinite(none).all() or distance(full, none) > _SAME:
            raise Broken(f"they differ by {distance(full, none):.4f} from those of weight 1")
