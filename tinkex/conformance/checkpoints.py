"""Checks of what the server stores: checkpoints, names, separation of users, restarts."""

from __future__ import annotations

import subprocess
import time
from urllib.parse import quote

from tinkex import errors, types
from tinkex.conformance.client import (
    Broken,
    Client,
    NotOffered,
    as_object,
    is_missing,
    request_id_of,
    said,
)
from tinkex.conformance.context import RANK, Context, Model, logprobs_of
from tinkex.conformance.data import OTHERS, TOKENS, datum, distance
from tinkex.conformance.runner import Checks
from tinkex.runtime.responses import Answer

CHECKS = Checks()

_MOVED = {"learning_rate": 0.02}


@CHECKS.rule("a path is tinker://<model>/<kind>/<name>")
def paths(ctx: Context) -> None:
    """<kind> is weights or sampler_weights. SkyRL 0.3.0 omits the latter, and the official SDK
    cannot read such a path."""
    with ctx.model() as model:
        for kind, save in (("weights", model.save), ("sampler_weights", model.save_for_sampler)):
            name = ctx.name()
            path = save(name)
            if path != f"tinker://{model.model_id}/{kind}/{name}":
                raise Broken(f"{kind} with the name {name} have the path {path}")


@CHECKS.rule("a checkpoint brings the weights back")
def restored(ctx: Context) -> None:
    """A new model from a checkpoint gives the log-probabilities of the saved model."""
    with ctx.model() as model:
        model.train([datum()], **_MOVED)
        path = model.save(ctx.name())
        saved = model.logprobs([datum()])
        model.train([datum()], **_MOVED)
        with ctx.unloading(ctx.restored(path, optimizer=True)) as copy:
            off = distance(saved, copy.logprobs([datum()]))
            if off > 1e-3:
                raise Broken(f"the log-probabilities of the new model differ by {off:.4f}")


@CHECKS.rule("the optimizer is restored, or not, as asked")
def optimizer(ctx: Context) -> str:
    """load_weights with optimizer=true continues like the saved model; with false the optimizer
    starts fresh. SkyRL 0.3.0 and others restore it always, or never."""
    # Different data in the last step: a fresh Adam has no momentum from the steps before.
    both = [datum(), datum(OTHERS)]
    with ctx.model() as model:
        for _ in range(4):
            model.train([datum()], **_MOVED)
        path = model.save(ctx.name())
        start = model.logprobs(both)
        model.train([datum(OTHERS)], **_MOVED)
        end = model.logprobs(both)
    went, off = distance(start, end), {}
    for with_optimizer in (True, False):
        with ctx.unloading(ctx.restored(path, optimizer=with_optimizer)) as copy:
            copy.train([datum(OTHERS)], **_MOVED)
            off[with_optimizer] = distance(end, copy.logprobs(both))
    if off[True] > 0.05 * went:
        raise Broken(
            f"with the optimizer the next step ends {off[True]:.3f} away from the saved model; "
            f"the step itself is {went:.3f}"
        )
    if off[False] < 0.05 * went:
        raise Broken(
            f"without the optimizer the next step is the same (difference {off[False]:.4f})"
        )
    return f"difference with: {off[True]:.1e}, without: {off[False]:.2f}"


@CHECKS.rule("a model is made from a checkpoint by one request")
def create_from_state(ctx: Context) -> None:
    """load_weights accepts session_id and model_seq_id, the only form of the official SDK (0.38).
    Other servers require create_model first; tinkex then sends that."""
    with ctx.model() as model:
        path = model.save(ctx.name())
    number = ctx.model_number()
    answer = ctx.client.post(
        "load_weights",
        {
            "session_id": ctx.session_id,
            "model_seq_id": number,
            "path": path,
            "optimizer": False,
            "type": "load_weights",
        },
    )
    if answer.status >= 300:
        raise NotOffered(said(answer))
    made = ctx.client.end(answer).value(types.LoadWeightsResponse, "load_weights")
    model_id = f"{ctx.session_id}:train:{number}"
    with ctx.unloading(Model(ctx.client, model_id, ctx.session_id)) as model:
        if made.model_id not in (None, model_id):
            raise Broken(f"the model is {made.model_id}, not {model_id}")
        model.forward([datum()])


@CHECKS.rule("weights are loaded into a model at any time")
def load_later(ctx: Context) -> None:
    """load_weights resets a trained model to a checkpoint. Current SkyRL (not 0.3.0) accepts it
    only as the first request of a model."""
    with ctx.model() as model:
        path = model.save(ctx.name())
        saved = model.logprobs([datum()])
        model.train([datum()], **_MOVED)
        ended = ctx.client.end(model.post("load_weights", path=path, optimizer=False))
        if ended.failure is not None:
            raise Broken(f"after training it returned {ended.failure}")
        off = distance(saved, model.logprobs([datum()]))
        if off > 1e-3:
            raise Broken(f"afterwards the log-probabilities differ by {off:.4f}")


@CHECKS.rule("a name that is taken is refused, and the first stays")
def same_name(ctx: Context) -> str:
    """Saving under a used name fails as a user error and changes nothing. TuFT 0.2.2 overwrites
    silently; SkyRL returns 409, which the official SDK retries for five minutes."""
    with ctx.model() as model:
        name = ctx.name()
        path = model.save(name)
        saved = model.logprobs([datum()])
        model.train([datum()], **_MOVED)
        ended = ctx.client.end(model.post("save_weights", path=name, overwrite=False))
        if ended.failure is None:
            raise Broken(f"it was accepted: {ended.payload}")
        if ended.answer.status == 409 or ended.answer.status >= 500:
            raise Broken(f"it returned {ended.failure}, which clients retry for minutes")
        with ctx.unloading(ctx.restored(path, optimizer=False)) as copy:
            if distance(saved, copy.logprobs([datum()])) > 1e-3:
                raise Broken("it was refused, but the first checkpoint is lost")
        return ended.failure


@CHECKS.rule("a state and sampler weights may have one name")
def two_kinds(ctx: Context) -> None:
    """They are different objects. In TuFT 0.2.2 they share a directory."""
    with ctx.model() as model:
        name = ctx.name()
        model.train([datum()], **_MOVED)
        path = model.save(name)
        saved = model.logprobs([datum()])
        model.train([datum()], **_MOVED)
        sampler_path = model.save_for_sampler(name)
        if path == sampler_path:
            raise Broken(f"both are at {path}")
        late = model.logprobs([datum()])
        scored = ctx.open_sampler(sampler_path).score(TOKENS)
        if distance(scored, late) > 0.2:
            raise Broken("the sampler weights differ from the saved ones")
        with ctx.unloading(ctx.restored(path, optimizer=True)) as copy:
            off = distance(saved, copy.logprobs([datum()]))
        if off > 1e-3:
            raise Broken(f"the state differs by {off:.3f} after the sampler weights were saved")


@CHECKS.rule("names are not paths")
def bad_names(ctx: Context) -> None:
    """Names like ../x are refused. TuFT 0.2.2 writes outside of its folder."""
    with ctx.model() as model:
        for name in ("../../../conformance", "/tmp/conformance", "a/../../b", "..", ""):
            ended = ctx.client.end(model.post("save_weights", path=name))
            if ended.failure is None:
                raise Broken(f"{name!r} was accepted: {ended.payload}")
            if ended.answer.status >= 500:
                raise Broken(f"{name!r} returned {ended.failure}")


@CHECKS.rule("weights_info describes the checkpoint")
def weights_info(ctx: Context) -> None:
    """weights_info returns base model and rank, from which clients create the model to load
    into."""
    with ctx.model() as model:
        path = model.save(ctx.name())
    answer = ctx.client.endpoint("POST", "weights_info", {"tinker_path": path})
    info = as_object(answer)
    if info.get("base_model") != ctx.base_model or info.get("lora_rank") != RANK:
        raise Broken(f"it returned {info}")


@CHECKS.rule("a checkpoint can be downloaded")
def archive(ctx: Context) -> str:
    """GET .../archive returns the URL of a file (302, or JSON) that other machines can fetch. TuFT
    0.2.2 returns file:///."""
    with ctx.model() as model:
        path = model.save_for_sampler(ctx.name())
    run, _, checkpoint = path.removeprefix("tinker://").partition("/")
    where = f"training_runs/{quote(run, safe=':')}/checkpoints/{checkpoint}/archive"
    for _ in range(10):
        answer = ctx.client.get(where)
        if answer.status != 503:
            break
        time.sleep(1.0)
    if is_missing(answer):
        raise NotOffered(f"{answer.status} on GET {where}")
    url = answer.headers.get("Location") or as_object(answer).get("url")
    if not url:
        raise Broken(f"it returned {said(answer)}")
    if not str(url).startswith(("http://", "https://")):
        raise Broken(f"the URL is {str(url)[:60]}")
    return f"{answer.status} to an http URL"


@CHECKS.rule("checkpoints can be deleted")
def delete(ctx: Context) -> None:
    """DELETE removes a checkpoint; its path is then not found."""
    with ctx.model() as model:
        path = model.save(ctx.name())
    run, _, checkpoint = path.removeprefix("tinker://").partition("/")
    where = f"training_runs/{quote(run, safe=':')}/checkpoints/{checkpoint}"
    ctx.client.endpoint("DELETE", where)
    ctx.client.saved.remove(path)
    answer = ctx.client.post("weights_info", {"tinker_path": path})
    if answer.status == 200:
        raise Broken("it still exists")


@CHECKS.rule("checkpoints can be made to expire")
def ttl(ctx: Context) -> None:
    """PUT .../ttl sets when a checkpoint expires."""
    with ctx.model() as model:
        path = model.save(ctx.name())
    run, _, checkpoint = path.removeprefix("tinker://").partition("/")
    where = f"training_runs/{quote(run, safe=':')}/checkpoints/{checkpoint}/ttl"
    ctx.client.endpoint("PUT", where, {"ttl_seconds": 7200})


# Users.


@CHECKS.rule("another key sees none of it")
def other_key(ctx: Context) -> str:
    """The models, promises, samplers and checkpoints of one key are not visible to another. The
    OpenAI-style endpoint of TuFT 0.2.2 serves every user's checkpoints."""
    other = ctx.other
    if other is None:
        raise NotOffered("no second key was given (--other-api-key)")
    with ctx.model() as model:
        promise = model.batch([datum()], forward_only=True)
        model.output(promise)
        path = model.save(ctx.name())
        sampler_path = model.save_for_sampler(ctx.name())
        sampler_id = ctx.open_sampler(sampler_path).sampler_id
        seen = _visible_to(
            ctx, other, model, request_id_of(promise), path, sampler_path, sampler_id
        )
        model.forward([datum()])  # the model still works
        if seen:
            raise Broken("the other key has access to " + "; ".join(seen))
    return "promise, model, checkpoints, sampler"


def _visible_to(
    ctx: Context, other: Client, model: Model, request_id: str, path: str, sampler_path: str,
    sampler_id: str,
) -> list[str]:  # fmt: skip
    """Names of the objects and actions that another key has access to."""
    run, _, checkpoint = path.removeprefix("tinker://").partition("/")
    session_id = ctx.new_session(other)
    theirs = {"model_id": model.model_id, "seq_id": model.number + 1}
    sample = {
        "sampling_session_id": sampler_id,
        "seq_id": 77,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": TOKENS}]},
        "sampling_params": {"max_tokens": 1},
        "num_samples": 1,
    }
    load = {"session_id": session_id, "model_seq_id": 0, "path": path, "optimizer": False}
    answers: dict[str, Answer] = {
        "the result of an operation": other.poll(request_id, 5.0),
        "the model's info": other.post("get_info", {"model_id": model.model_id}),
        "a step of the model": other.post("optim_step", {**theirs, "adam_params": {}}),
        "a copy of the model": other.post("save_weights", {**theirs, "path": "stolen"}),
        "the model unloaded": other.post("unload_model", {"model_id": model.model_id}),
        "the session's end": other.post(f"sessions/{ctx.session_id}/finish", {"reason": {}}),
        "the checkpoint's info": other.post("weights_info", {"tinker_path": path}),
        "the checkpoint loaded": other.post("load_weights", load),
        "the checkpoint deleted": other.send(
            "DELETE", f"training_runs/{quote(run, safe=':')}/checkpoints/{checkpoint}"
        ),
        "a sampler of the weights": ctx.sampler_of(
            client=other, session_id=session_id, number=0, model_path=sampler_path
        ),
        "the sampler": other.get(f"samplers/{quote(sampler_id, safe=':')}"),
        "samples": other.post("asample", sample),
    }
    return [what for what, answer in answers.items() if answer.status < 300]


# Restarts.


@CHECKS.rule("a restart loses nothing that was acknowledged")
def restart(ctx: Context) -> str:
    """After a kill and a restart, the model has the same weights and its results can be fetched; or
    the server reports that it is gone. TuFT 0.2.2 silently continues from the last checkpoint, or
    from fresh weights."""
    if ctx.restart is None:
        raise NotOffered("no command to restart the server was given (--restart)")
    with ctx.model() as model:
        for _ in range(3):
            model.train([datum()], **_MOVED)
        before = model.logprobs([datum()])
        path = model.save(ctx.name())
        last = model.batch([datum()])
        step = model.step(learning_rate=0.02)
        _restart(ctx)
        notes = []
        for promise, what in ((last, "forward_backward"), (step, "optim_step")):
            answer = ctx.client.wait(request_id_of(promise))
            if answer.status == 410:
                notes.append(f"the result of {what} is reported as gone")
            elif answer.status != 200:
                raise Broken(f"a poll for the result of {what} returned {said(answer)}")
        ended = ctx.client.end(model.batch([datum()], forward_only=True))
        if ended.failure is not None:
            notes.append(f"the model is gone, and the server reports it ({ended.failure})")
            with ctx.unloading(ctx.restored(path, optimizer=True)) as copy:
                off = distance(before, copy.logprobs([datum()]))
            if off > 1e-3:
                raise Broken(f"the checkpoint differs by {off:.3f}")
            raise NotOffered("; ".join([*notes, "the checkpoint is kept"]))
        after = logprobs_of(ended.value(types.ForwardBackwardOutput, "forward"), [datum()])
        with ctx.unloading(ctx.restored(path, optimizer=True)) as copy:
            copy.train([datum()], **_MOVED)
            expected = copy.logprobs([datum()])
    off, went = distance(expected, after), distance(before, expected)
    if off > 0.05 * went:
        raise Broken(f"the model silently changed by {off:.3f} (the last step was {went:.3f})")
    return "; ".join(["weights, optimizer and results are kept", *notes])


def _restart(ctx: Context) -> None:
    """Run the restart command, and wait until the server answers."""
    command = str(ctx.restart)
    done = subprocess.run(command, shell=True, stdin=subprocess.DEVNULL, timeout=300)
    if done.returncode:
        raise Broken(f"{command!r} exited with status {done.returncode}")
    deadline = time.monotonic() + ctx.client.patience
    while time.monotonic() < deadline:
        try:
            if ctx.client.get("healthz", timeout=5.0).status < 500:
                return
        except errors.TinkexError:
            time.sleep(0.2)
    raise Broken(f"the server did not answer within {ctx.client.patience:.0f} s of its restart")
