"""Checks of what is executed when, and how often: numbers, repeats, refusals, promises."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from tinkex import errors, types, wire
from tinkex.conformance.asking import (
    Broken,
    Ended,
    NotOffered,
    as_object,
    is_missing,
    is_not_yet,
    request_id_of,
    said,
)
from tinkex.conformance.checking import Checks
from tinkex.conformance.data import TOKENS, Slope, datum
from tinkex.conformance.lab import Lab, Model
from tinkex.runtime.responses import Answer

CHECKS = Checks()

_SHORT = 8.0  # seconds in which a healthy model gets to its next operation


@CHECKS.rule("a model's id is <session>:train:<number>")
def model_ids(lab: Lab) -> None:
    """The official SDK (0.38) works the id out by itself when it creates a model from a checkpoint.
    SkyRL names models model_<hex>."""
    number = lab.model_number()
    ended = lab.asker.end(lab.create(number))
    made = ended.value(types.CreateModelResponse, "create_model")
    with lab.unloading(Model(lab.asker, made.model_id, lab.session_id)):
        if made.model_id != f"{lab.session_id}:train:{number}":
            raise Broken(f"it is {made.model_id!r}")


@CHECKS.rule("chunks that arrive 2, 3, 4, 1 all count")
def chunks_out_of_order(lab: Lab) -> None:
    """The official SDK sends the chunks of a large batch at once and the first one last; the server
    holds what comes early. TuFT 0.2.2 refuses the early ones with 409."""
    with lab.model() as model:

        def chunks() -> None:
            first = model.next(4)
            promises = []
            for number in (first + 1, first + 2, first + 3, first):
                promise = model.batch([datum(weight=0.25)], number)
                if promise.status >= 300:
                    raise Broken(f"number {number} before {first} gave {said(promise)}")
                promises.append(promise)
            for promise in promises:
                model.output(promise)

        Slope(model).check(1, chunks, "not every chunk counts once")


@CHECKS.rule("a gap in the numbers is waited for")
def gap(lab: Lab) -> None:
    """An optimizer step that arrives before its gradients must not run before them. SkyRL 0.3.0
    runs what comes as it comes; TuFT 0.2.2 refuses it with 409."""
    with lab.model() as model:
        slope = Slope(model)
        unit = slope.fall([datum()])
        before = slope.loss()
        missing = model.next()
        step = slope.step()
        if step.status >= 300:
            raise Broken(f"number {missing + 1} before {missing} gave {said(step)}")
        request_id = request_id_of(step)
        if not request_id or lab.asker.is_done(request_id):
            raise Broken(f"number {missing + 1} was executed before {missing} was there")
        model.output(model.batch([datum()], missing))
        model.run(step, "optim_step")
        ratio = (before - slope.loss()) / unit
        if not 0.7 < ratio < 1.3:
            raise Broken(f"the step went {ratio:.2f} times as far as with its gradients before it")


# Repeats.


def _same_promise(first: Answer, again: Answer, what: str) -> None:
    for answer, which in ((first, what), (again, f"the resend of {what}")):
        if answer.status >= 300:
            raise Broken(f"{which} gave {said(answer)}")
    ids = request_id_of(first), request_id_of(again)
    if ids[0] != ids[1]:
        raise Broken(f"the resend of {what} is an operation of its own: {ids[1]} after {ids[0]}")


@CHECKS.rule("a resent create_model makes one model")
def resend_create_model(lab: Lab) -> None:
    """The same session and number, whose first answer was lost, gets the first model. TuFT 0.2.2
    and SkyRL make a second one, which nobody unloads."""
    number = lab.model_number()
    first, again = lab.create(number), lab.create(number)
    made = [lab.asker.end(a).value(types.CreateModelResponse, "create_model").model_id
            for a in (first, again)]  # fmt: skip
    models = [Model(lab.asker, model_id, lab.session_id) for model_id in dict.fromkeys(made)]
    with lab.unloading(models[0]), lab.unloading(models[-1]):
        if len(models) > 1:
            raise Broken(f"there are two: {made[0]} and {made[1]}")
        _same_promise(first, again, "create_model")


@CHECKS.rule("a resent forward_backward runs once")
def resend_forward_backward(lab: Lab) -> None:
    """The same model and number get the first promise, and their gradient counts once. SkyRL before
    August 2026 (0.3.0 too) adds it twice; TuFT 0.2.2 refuses the resend with 409."""
    with lab.model() as model:
        slope = Slope(model)

        def twice() -> None:
            number = model.next()
            first, again = (model.batch([datum()], number) for _ in range(2))
            _same_promise(first, again, "forward_backward")
            model.output(first)
            model.output(again)

        slope.check(1, twice, "the resent batch counts again")


def _resend(lab: Lab, what: str, send: Callable[[Model, int], Answer]) -> None:
    with lab.model() as model:
        model.train([datum()])
        number = model.next()
        first, again = send(model, number), send(model, number)
        _same_promise(first, again, what)
        results = [model.run(answer, what) for answer in (first, again, send(model, number))]
        if results[0] != results[1] or results[0] != results[2]:
            raise Broken(f"the resends gave {results[1]} and {results[2]} after {results[0]}")
        if isinstance(results[0], dict) and "sampler_weights" in str(results[0].get("path")):
            lab.asker.saved.append(str(results[0]["path"]))
        model.forward([datum()])  # the model goes on


@CHECKS.rule("a resent optim_step runs once")
def resend_optim_step(lab: Lab) -> None:
    """The same model and number get the first promise and its result. TuFT 0.2.2 refuses the resend
    with 409, so that the result is lost."""
    _resend(lab, "optim_step", lambda model, number: model.step(number, learning_rate=0.01))


@CHECKS.rule("a resent save_weights saves once")
def resend_save_weights(lab: Lab) -> None:
    """The same model and number get the first promise, not "this name exists"."""
    name = lab.name()
    _resend(lab, "save_weights", lambda m, number: m.post("save_weights", number, path=name))


@CHECKS.rule("a resent save_weights_for_sampler saves once")
def resend_save_for_sampler(lab: Lab) -> None:
    """The same model and number get the first promise, with a name and without one."""
    what, name, sampler = "save_weights_for_sampler", lab.name(), lab.sampler_number()
    _resend(lab, what, lambda m, number: m.post(what, number, path=name))
    _resend(lab, what, lambda m, number: m.post(what, number, sampling_session_seq_id=sampler))


@CHECKS.rule("a resent load_weights loads once")
def resend_load_weights(lab: Lab) -> None:
    """The same model and number get the first promise."""
    with lab.model() as model:
        path = model.save(lab.name())
        number = model.next()
        first, again = (
            model.post("load_weights", number, path=path, optimizer=True) for _ in range(2)
        )
        _same_promise(first, again, "load_weights")
        model.run(first, "load_weights")
        model.run(again, "load_weights")


@CHECKS.rule("a resent create_sampling_session makes one")
def resend_sampling_session(lab: Lab) -> None:
    """The same session and number get the first sampler."""
    number = lab.sampler_number()
    answers = [lab.sampler_of(number=number, base_model=lab.base_model) for _ in range(2)]
    made = [as_object(answer).get("sampling_session_id") for answer in answers]
    if answers[0].status >= 300:
        raise NotOffered(f"samplers of a base model ({said(answers[0])})")
    if made[0] != made[1]:
        raise Broken(f"there are two: {made[0]} and {made[1]} ({said(answers[1])})")


@CHECKS.rule("a resent asample samples once")
def resend_asample(lab: Lab) -> None:
    """The same sampler and number get the first promise, and so the same tokens, though no seed is
    given. TuFT 0.2.2 samples (and would bill) again."""
    first, again = (lab.sampler.post(TOKENS, 2, number=10_000) for _ in range(2))
    _same_promise(first, again, "asample")
    tokens = [
        [list(s.tokens) for s in lab.asker.end(a).value(types.SampleResponse, "asample").sequences]
        for a in (first, again)
    ]
    if tokens[0] != tokens[1]:
        raise Broken("the resend gave other tokens")


# Refusals.


def _go_on(lab: Lab, model: Model, bad: Ended, number: int, what: str) -> str:
    """What was good must work after what was bad, whichever number the client goes on with."""
    if bad.failure is None:
        raise Broken(f"{what} was not refused")
    if not bad.refused:
        model.forward([datum()])
        return "accepted, then failed"
    # The official SDK counts a refused request, tinkex does not.
    following = model.batch([datum()], number + 1, forward_only=True)
    if following.status < 300:
        done = lab.asker.is_done(request_id_of(following), _SHORT)
        if done:
            model.number = number + 1
            model.output(following, f"number {number + 1} after {what} was refused as {number}")
            return f"refused with {bad.answer.status}; goes on with the next number"
        raise Broken(
            f"{what} was refused as number {number} with {bad.answer.status}, and number "
            f"{number + 1} waits for it for ever"
        )
    again = model.batch([datum()], number, forward_only=True)
    works = again.status < 300 and lab.asker.end(again).failure is None
    raise Broken(
        f"{what} was refused as number {number} with {bad.answer.status}, and number {number + 1} "
        f"gives {said(following)}; number {number} {'works' if works else 'fails, too'}"
    )


@CHECKS.rule("after a refused request a good one works")
def no_wedge(lab: Lab) -> str:
    """One wrong argument must not end a run. TuFT 0.2.2 answers every request of a model with 409
    once it has refused one (an unknown loss): client and server count differently from then on."""
    seen = []
    with lab.model() as model:
        for what, send in (
            (
                "an unknown loss",
                lambda: model.batch([datum()], loss_fn="no_such_loss"),
            ),
            ("a name with ../ in it", lambda: model.post("save_weights", path="../conformance")),
            ("a checkpoint that is not there", lambda: model.post(
                "load_weights", path=f"tinker://{model.model_id}/weights/none", optimizer=False
            )),
        ):  # fmt: skip
            bad = lab.asker.end(send())
            seen.append(f"{what} {_go_on(lab, model, bad, model.number, what)}")
    return "; ".join(seen)


@CHECKS.rule("a failed operation is told as 200 with error and category")
def failures(lab: Lab) -> str:
    """The result of an operation that failed is a result. SkyRL tells it by HTTP 400, which the
    official SDK takes for a proxy's, asks for four times and then raises without its category;
    others by 500, which it asks for for ever."""
    with lab.model() as model:
        for send in (
            lambda: model.post(
                "load_weights", path=f"tinker://{model.model_id}/weights/none", optimizer=False
            ),
            lambda: model.batch([datum()], loss_fn="no_such_loss"),
            lambda: model.batch([_out_of_vocabulary()]),
        ):
            ended = lab.asker.end(send())
            if ended.refused or ended.failure is None:
                continue
            payload = as_object(ended.answer)
            if ended.answer.status != 200:
                raise Broken(f"it came as {said(ended.answer)}")
            if not isinstance(payload.get("error"), str) or not payload["error"]:
                raise Broken(f"error is {payload.get('error')!r}")
            if payload.get("category") not in ("user", "server", "unknown"):
                raise Broken(f"category is {payload.get('category')!r}")
            return str(payload["category"])
    raise NotOffered("what is wrong is refused at once, so nothing fails later")


def _out_of_vocabulary() -> types.Datum:
    return datum([*TOKENS[:-1], 2**31 - 2])


# Promises.


@CHECKS.rule("a result can be fetched twice")
def fetched_twice(lab: Lab) -> None:
    """The answer that holds a result may be lost on the way, so it must be there again."""
    with lab.model() as model:
        ended = lab.asker.end(model.batch([datum()], forward_only=True))
        ended.value(types.ForwardBackwardOutput, "forward")
        if not ended.request_id:
            raise NotOffered("results come at once, without promises")
        again = lab.asker.poll(ended.request_id)
        if again.status != 200 or again.content != ended.answer.content:
            raise Broken(f"the second time it gave {said(again)}")


@CHECKS.rule("a poll is answered within 45 seconds", aside=True)
def long_poll(lab: Lab) -> str:
    """Clients give up a poll after 45 s, so "not yet" (408 or try_again) must come before. SkyRL
    holds polls for 300 s: each ends in a client's timeout."""
    asker, session_id = lab.asker, lab.new_session()
    made = asker.end(lab.create(0, session_id)).value(types.CreateModelResponse, "create_model")
    with lab.unloading(Model(asker, made.model_id, session_id)) as model:
        early = model.step(2)
        request_id = request_id_of(early)
        if not request_id or lab.asker.is_done(request_id):
            raise NotOffered("nothing waits here: there is no order of operations")
        started = time.monotonic()
        try:
            answer = asker.poll(request_id, 60.0)
        except errors.APITimeoutError:
            raise Broken("no answer came within 60 s") from None
        took = time.monotonic() - started
        model.batch([datum()], 1)
        if took > 45:
            raise Broken(f"it took {took:.0f} s")
        if not is_not_yet(answer):
            raise NotOffered("nothing waits here: there is no order of operations")
        return f"{answer.status} after {took:.0f} s, {as_object(answer).get('queue_state')}"


@CHECKS.rule("one poll serves a sampling session")
def retrieve_futures(lab: Lab) -> None:
    """retrieve_futures tells which samples of a session are done; thousands then cost one poll."""
    sampler = lab.sampler
    target = {
        "type": "sampling_session",
        "sampling_session_id": sampler.sampler_id,
        "cloned_sampler_id": 0,
    }
    request = {"target": target, "prev_cursor": 0, "timeout": 0, "retrieved_request_ids": []}
    lab.asker.endpoint("POST", wire.RETRIEVE_FUTURES.path, request)
    wanted = {request_id_of(sampler.post(TOKENS)) for _ in range(3)}
    cursor, missing, deadline = 0, set(wanted), time.monotonic() + lab.asker.patience
    while missing and time.monotonic() < deadline:
        request = {"target": target, "prev_cursor": cursor, "retrieved_request_ids": []}
        payload = as_object(lab.asker.endpoint("POST", wire.RETRIEVE_FUTURES.path, request))
        cursor = payload.get("cursor", cursor)
        missing -= {c.get("request_id") for c in payload.get("completions", [])}
    if missing:
        raise Broken(f"{len(missing)} of 3 samples were never told")
    for request_id in wanted:
        lab.asker.wait(request_id)


@CHECKS.rule("a sample can be taken back")
def cancel(lab: Lab) -> None:
    """cancel_future is answered with 200, and what is asked for afterwards with a result, a failure
    or 410."""
    request_id = request_id_of(lab.sampler.post(TOKENS, params={"max_tokens": 64}))
    lab.asker.endpoint("POST", "cancel_future", {"request_id": request_id})
    answer = lab.asker.wait(request_id)
    if answer.status not in (200, 410):
        raise Broken(f"the poll gave {said(answer)}")


# Sessions.


@CHECKS.rule("fields of a newer SDK are ignored")
def unknown_fields(lab: Lab) -> None:
    """What a server does not know it leaves alone. TuFT 0.2.2 answers every new field with 422, and
    so serves one minor version of the official SDK."""
    more: dict[str, Any] = {"field_of_the_future": {"a": [1]}}
    tagged = {"tags": [], "sdk_version": "9.9.9", "type": "create_session"}
    with lab.model() as model:
        for what, answer in (
            ("client/config", lab.asker.post("client/config", {"sdk_version": "9.9.9", **more})),
            ("create_session", lab.asker.post("create_session", {**tagged, **more})),
            ("create_model", lab.create(**more)),
            ("optim_step", model.post("optim_step", adam_params={**more}, **more)),
            ("save_weights_for_sampler", model.post(
                "save_weights_for_sampler",
                sampling_session_seq_id=lab.sampler_number(),
                **more,
            )),
            ("asample", lab.sampler.post(TOKENS, params=more, **more)),
        ):  # fmt: skip
            failure = lab.asker.end(answer).failure
            if failure is not None and not is_missing(answer):
                raise Broken(f"{what} is refused over one: {failure}")


@CHECKS.rule("a session's end is told to its heartbeat")
def finished_session(lab: Lab) -> None:
    """A heartbeat is 200 while the session lives, and 410 when it was finished."""
    session_id = lab.new_session()
    beat = {"session_id": session_id, "type": "session_heartbeat"}
    lab.asker.endpoint("POST", "session_heartbeat", beat)
    reason = {"reason": {"type": "success"}, "detail": None}
    lab.asker.endpoint("POST", f"sessions/{session_id}/finish", reason)
    answer = lab.asker.post("session_heartbeat", beat)
    if answer.status != 410:
        raise Broken(f"after finish it gave {said(answer)}")


@CHECKS.rule("telemetry of any shape is accepted")
def telemetry(lab: Lab) -> None:
    """The official SDK up to 0.25 sends refused telemetry again every second. SkyRL refuses every
    event that it does not know with 422."""
    event = {"event": "EVENT_OF_THE_FUTURE", "event_id": "1", "more": {"a": 1}}
    payload = {"events": [event], "platform": "Linux", "sdk_version": "9", "process_uuid": "1"}
    answer = lab.asker.endpoint("POST", "telemetry", payload)
    if as_object(answer).get("status") != "accepted":
        raise Broken(f"it gave {said(answer)}")
