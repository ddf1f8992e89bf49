"""Checks of what is kept: checkpoints and names, one user's things and another's, restarts."""

from __future__ import annotations

import subprocess
import time
from urllib.parse import quote

from tinkex import errors, types
from tinkex.conformance.asking import (
    Asker,
    Broken,
    NotOffered,
    as_object,
    is_missing,
    request_id_of,
    said,
)
from tinkex.conformance.checking import Checks
from tinkex.conformance.data import OTHERS, TOKENS, datum, distance
from tinkex.conformance.lab import RANK, Lab, Model, logprobs_of
from tinkex.runtime.responses import Answer

CHECKS = Checks()

_MOVED = {"learning_rate": 0.02}


@CHECKS.rule("a path is tinker://<model>/<kind>/<name>")
def paths(lab: Lab) -> None:
    """weights/ for states, sampler_weights/ for samplers. SkyRL 0.3.0 leaves the latter out, and
    the official SDK cannot read such a path."""
    with lab.model() as model:
        for kind, save in (("weights", model.save), ("sampler_weights", model.save_for_sampler)):
            name = lab.name()
            path = save(name)
            if path != f"tinker://{model.model_id}/{kind}/{name}":
                raise Broken(f"{kind} named {name} are at {path}")


@CHECKS.rule("a checkpoint brings the weights back")
def restored(lab: Lab) -> None:
    """A new model from a checkpoint says what the model said when it was saved."""
    with lab.model() as model:
        model.train([datum()], **_MOVED)
        path = model.save(lab.name())
        saved = model.logprobs([datum()])
        model.train([datum()], **_MOVED)
        with lab.unloading(lab.restored(path, optimizer=True)) as copy:
            off = distance(saved, copy.logprobs([datum()]))
            if off > 1e-3:
                raise Broken(f"the new model's log-probabilities are off by {off:.4f}")


@CHECKS.rule("the optimizer is restored, or not, as asked")
def optimizer(lab: Lab) -> str:
    """load_weights with optimizer=true goes on as the saved model would; with false the optimizer
    begins anew. SkyRL 0.3.0 and others restore it always, or never."""
    # Other data in the last step: a fresh Adam forgets where the first ones were leading.
    both = [datum(), datum(OTHERS)]
    with lab.model() as model:
        for _ in range(4):
            model.train([datum()], **_MOVED)
        path = model.save(lab.name())
        start = model.logprobs(both)
        model.train([datum(OTHERS)], **_MOVED)
        end = model.logprobs(both)
    went, off = distance(start, end), {}
    for with_optimizer in (True, False):
        with lab.unloading(lab.restored(path, optimizer=with_optimizer)) as copy:
            copy.train([datum(OTHERS)], **_MOVED)
            off[with_optimizer] = distance(end, copy.logprobs(both))
    if off[True] > 0.05 * went:
        raise Broken(
            f"with the optimizer the next step ends {off[True]:.3f} from where the saved model "
            f"got to; that step was {went:.3f}"
        )
    if off[False] < 0.05 * went:
        raise Broken(f"without the optimizer the next step is the same (to {off[False]:.4f})")
    return f"with: off by {off[True]:.1e}; without: by {off[False]:.2f}"


@CHECKS.rule("a model is made from a checkpoint by one request")
def create_from_state(lab: Lab) -> None:
    """load_weights with session_id and model_seq_id, which is all that the official SDK (0.38)
    knows. Other servers want create_model first; tinkex then does that."""
    with lab.model() as model:
        path = model.save(lab.name())
    number = lab.model_number()
    answer = lab.asker.post(
        "load_weights",
        {
            "session_id": lab.session_id,
            "model_seq_id": number,
            "path": path,
            "optimizer": False,
            "type": "load_weights",
        },
    )
    if answer.status >= 300:
        raise NotOffered(said(answer))
    made = lab.asker.end(answer).value(types.LoadWeightsResponse, "load_weights")
    model_id = f"{lab.session_id}:train:{number}"
    with lab.unloading(Model(lab.asker, model_id, lab.session_id)) as model:
        if made.model_id not in (None, model_id):
            raise Broken(f"the model is {made.model_id}, not {model_id}")
        model.forward([datum()])


@CHECKS.rule("weights are loaded into a model at any time")
def load_later(lab: Lab) -> None:
    """load_weights sets a model that has been trained back to a checkpoint. SkyRL of today (not
    0.3.0) takes it only as the first request of a model."""
    with lab.model() as model:
        path = model.save(lab.name())
        saved = model.logprobs([datum()])
        model.train([datum()], **_MOVED)
        ended = lab.asker.end(model.post("load_weights", path=path, optimizer=False))
        if ended.failure is not None:
            raise Broken(f"after training it gave {ended.failure}")
        off = distance(saved, model.logprobs([datum()]))
        if off > 1e-3:
            raise Broken(f"afterwards the log-probabilities are off by {off:.4f}")


@CHECKS.rule("a name that is taken is refused, and the first stays")
def same_name(lab: Lab) -> str:
    """Saving under a used name fails as the user's doing and changes nothing. TuFT 0.2.2 overwrites
    without a word; SkyRL answers 409, which the official SDK repeats for five minutes."""
    with lab.model() as model:
        name = lab.name()
        path = model.save(name)
        saved = model.logprobs([datum()])
        model.train([datum()], **_MOVED)
        ended = lab.asker.end(model.post("save_weights", path=name, overwrite=False))
        if ended.failure is None:
            raise Broken(f"it was taken: {ended.payload}")
        if ended.answer.status == 409 or ended.answer.status >= 500:
            raise Broken(f"it gave {ended.failure}, which clients send again for minutes")
        with lab.unloading(lab.restored(path, optimizer=False)) as copy:
            if distance(saved, copy.logprobs([datum()])) > 1e-3:
                raise Broken("it was refused, and yet the first one is gone")
        return ended.failure


@CHECKS.rule("a state and sampler weights may have one name")
def two_kinds(lab: Lab) -> None:
    """They are different things. In TuFT 0.2.2 they share a directory."""
    with lab.model() as model:
        name = lab.name()
        model.train([datum()], **_MOVED)
        path = model.save(name)
        saved = model.logprobs([datum()])
        model.train([datum()], **_MOVED)
        sampler_path = model.save_for_sampler(name)
        if path == sampler_path:
            raise Broken(f"both are at {path}")
        late = model.logprobs([datum()])
        scored = lab.open_sampler(sampler_path).score(TOKENS)
        if distance(scored, late) > 0.2:
            raise Broken("the sampler weights are not those that were saved")
        with lab.unloading(lab.restored(path, optimizer=True)) as copy:
            off = distance(saved, copy.logprobs([datum()]))
        if off > 1e-3:
            raise Broken(f"the state is off by {off:.3f} since the sampler weights were saved")


@CHECKS.rule("names are not paths")
def bad_names(lab: Lab) -> None:
    """../ and the like are refused. TuFT 0.2.2 writes outside of its folder."""
    with lab.model() as model:
        for name in ("../../../conformance", "/tmp/conformance", "a/../../b", "..", ""):
            ended = lab.asker.end(model.post("save_weights", path=name))
            if ended.failure is None:
                raise Broken(f"{name!r} was taken: {ended.payload}")
            if ended.answer.status >= 500:
                raise Broken(f"{name!r} gave {ended.failure}")


@CHECKS.rule("weights_info tells what a checkpoint is of")
def weights_info(lab: Lab) -> None:
    """Base model and rank, by which clients make the model to load it into."""
    with lab.model() as model:
        path = model.save(lab.name())
    answer = lab.asker.endpoint("POST", "weights_info", {"tinker_path": path})
    info = as_object(answer)
    if info.get("base_model") != lab.base_model or info.get("lora_rank") != RANK:
        raise Broken(f"it says {info}")


@CHECKS.rule("a checkpoint can be downloaded")
def archive(lab: Lab) -> str:
    """GET .../archive leads (302, or a url in JSON) to a file that can be fetched from afar. TuFT
    0.2.2 leads to file:///."""
    with lab.model() as model:
        path = model.save_for_sampler(lab.name())
    run, _, checkpoint = path.removeprefix("tinker://").partition("/")
    where = f"training_runs/{quote(run, safe=':')}/checkpoints/{checkpoint}/archive"
    for _ in range(10):
        answer = lab.asker.get(where)
        if answer.status != 503:
            break
        time.sleep(1.0)
    if is_missing(answer):
        raise NotOffered(f"{answer.status} on GET {where}")
    url = answer.headers.get("Location") or as_object(answer).get("url")
    if not url:
        raise Broken(f"it gave {said(answer)}")
    if not str(url).startswith(("http://", "https://")):
        raise Broken(f"it leads to {str(url)[:60]}")
    return f"{answer.status} to an http URL"


@CHECKS.rule("checkpoints can be deleted")
def delete(lab: Lab) -> None:
    """DELETE takes a checkpoint away; what it named is then not found."""
    with lab.model() as model:
        path = model.save(lab.name())
    run, _, checkpoint = path.removeprefix("tinker://").partition("/")
    where = f"training_runs/{quote(run, safe=':')}/checkpoints/{checkpoint}"
    lab.asker.endpoint("DELETE", where)
    lab.asker.saved.remove(path)
    answer = lab.asker.post("weights_info", {"tinker_path": path})
    if answer.status == 200:
        raise Broken("it is still there")


@CHECKS.rule("checkpoints can be made to expire")
def ttl(lab: Lab) -> None:
    """PUT .../ttl sets when a checkpoint may be deleted."""
    with lab.model() as model:
        path = model.save(lab.name())
    run, _, checkpoint = path.removeprefix("tinker://").partition("/")
    where = f"training_runs/{quote(run, safe=':')}/checkpoints/{checkpoint}/ttl"
    lab.asker.endpoint("PUT", where, {"ttl_seconds": 7200})


# Users.


@CHECKS.rule("another key sees none of it")
def other_key(lab: Lab) -> str:
    """What one key made is not there for another: models, promises, samplers, checkpoints. On TuFT
    0.2.2 the OpenAI-style endpoint serves anybody's checkpoint."""
    other = lab.other
    if other is None:
        raise NotOffered("no second key was given (--other-api-key)")
    with lab.model() as model:
        promise = model.batch([datum()], forward_only=True)
        model.output(promise)
        path = model.save(lab.name())
        sampler_path = model.save_for_sampler(lab.name())
        sampler_id = lab.open_sampler(sampler_path).sampler_id
        seen = _what_is_seen(
            lab, other, model, request_id_of(promise), path, sampler_path, sampler_id
        )
        model.forward([datum()])  # and nothing was done to it
        if seen:
            raise Broken("the other key gets " + "; ".join(seen))
    return "promise, model, checkpoints, sampler"


def _what_is_seen(
    lab: Lab, other: Asker, model: Model, request_id: str, path: str, sampler_path: str,
    sampler_id: str,
) -> list[str]:  # fmt: skip
    """What another key gets of these, in words."""
    run, _, checkpoint = path.removeprefix("tinker://").partition("/")
    session_id = lab.new_session(other)
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
        "the session's end": other.post(f"sessions/{lab.session_id}/finish", {"reason": {}}),
        "the checkpoint's info": other.post("weights_info", {"tinker_path": path}),
        "the checkpoint loaded": other.post("load_weights", load),
        "the checkpoint deleted": other.send(
            "DELETE", f"training_runs/{quote(run, safe=':')}/checkpoints/{checkpoint}"
        ),
        "a sampler of the weights": lab.sampler_of(
            asker=other, session_id=session_id, number=0, model_path=sampler_path
        ),
        "the sampler": other.get(f"samplers/{quote(sampler_id, safe=':')}"),
        "samples": other.post("asample", sample),
    }
    return [what for what, answer in answers.items() if answer.status < 300]


# Restarts.


@CHECKS.rule("a restart loses nothing that was acknowledged")
def restart(lab: Lab) -> str:
    """After a kill and a restart, the model is where it was and its results can be fetched; or the
    server says that it is gone. TuFT 0.2.2 goes on silently from the last checkpoint, or from
    fresh weights."""
    if lab.restart is None:
        raise NotOffered("no command to restart the server was given (--restart)")
    with lab.model() as model:
        for _ in range(3):
            model.train([datum()], **_MOVED)
        before = model.logprobs([datum()])
        path = model.save(lab.name())
        last = model.batch([datum()])
        step = model.step(learning_rate=0.02)
        _restart(lab)
        notes = []
        for promise, what in ((last, "forward_backward"), (step, "optim_step")):
            answer = lab.asker.wait(request_id_of(promise))
            if answer.status == 410:
                notes.append(f"the result of {what} is told to be gone")
            elif answer.status != 200:
                raise Broken(f"the result of {what} is asked for, and gives {said(answer)}")
        ended = lab.asker.end(model.batch([datum()], forward_only=True))
        if ended.failure is not None:
            notes.append(f"the model is gone, and the server says so ({ended.failure})")
            with lab.unloading(lab.restored(path, optimizer=True)) as copy:
                off = distance(before, copy.logprobs([datum()]))
            if off > 1e-3:
                raise Broken(f"the checkpoint is off by {off:.3f}")
            raise NotOffered("; ".join([*notes, "the checkpoint is there"]))
        after = logprobs_of(ended.value(types.ForwardBackwardOutput, "forward"), [datum()])
        with lab.unloading(lab.restored(path, optimizer=True)) as copy:
            copy.train([datum()], **_MOVED)
            expected = copy.logprobs([datum()])
    off, went = distance(expected, after), distance(before, expected)
    if off > 0.05 * went:
        raise Broken(
            f"the model is {off:.3f} from where it was (the last step was {went:.3f}), and nothing "
            "says so"
        )
    return "; ".join(["weights, optimizer and results are there", *notes])


def _restart(lab: Lab) -> None:
    """Run the command, and wait until the server answers."""
    command = str(lab.restart)
    done = subprocess.run(command, shell=True, stdin=subprocess.DEVNULL, timeout=300)
    if done.returncode:
        raise Broken(f"{command!r} ended with {done.returncode}")
    deadline = time.monotonic() + lab.asker.patience
    while time.monotonic() < deadline:
        try:
            if lab.asker.get("healthz", timeout=5.0).status < 500:
                return
        except errors.TinkexError:
            time.sleep(0.2)
    raise Broken(f"the server did not answer within {lab.asker.patience:.0f} s of its restart")
