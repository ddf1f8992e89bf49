"""Checks of when and how often operations run: order, resends, refusals, promises, sessions."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from tinkex import errors, types, wire
from tinkex.conformance.client import (
    Broken,
    Ended,
    NotOffered,
    as_object,
    is_missing,
    is_not_yet,
    request_id_of,
    said,
)
from tinkex.conformance.context import Context, Model
from tinkex.conformance.data import TOKENS, Slope, datum
from tinkex.conformance.runner import Checks
from tinkex.runtime.responses import Answer

CHECKS = Checks()

_SHORT = 8.0  # seconds in which a healthy model runs its next operation


@CHECKS.rule("a model's id is <session>:train:<number>")
def model_ids(ctx: Context) -> None:
    """The official SDK (0.38) computes the id itself when it creates a model from a checkpoint.
    SkyRL names models model_<hex>."""
    number = ctx.model_number()
    ended = ctx.client.end(ctx.create(number))
    made = ended.value(types.CreateModelResponse, "create_model")
    with ctx.unloading(Model(ctx.client, made.model_id, ctx.session_id)):
        if made.model_id != f"{ctx.session_id}:train:{number}":
            raise Broken(f"it is {made.model_id!r}")


@CHECKS.rule("requests that arrive 2, 3, 4, 1 all count")
def chunks_out_of_order(ctx: Context) -> None:
    """The official SDK sends the chunks of a large batch concurrently and the first one last; the
    server holds those that arrive early. TuFT 0.2.2 refuses these with 409."""
    with ctx.model() as model:

        def chunks() -> None:
            first = model.next(4)
            promises = []
            for number in (first + 1, first + 2, first + 3, first):
                promise = model.batch([datum(weight=0.25)], number)
                if promise.status >= 300:
                    raise Broken(f"number {number} before {first} returned {said(promise)}")
                promises.append(promise)
            for promise in promises:
                model.output(promise)

        Slope(model).check(1, chunks, "the chunks do not count once each")


@CHECKS.rule("a gap in the numbers is waited for")
def gap(ctx: Context) -> None:
    """An optimizer step that arrives before its gradients must wait for them. SkyRL 0.3.0 runs
    requests in the order of arrival; TuFT 0.2.2 refuses the step with 409."""
    with ctx.model() as model:
        slope = Slope(model)
        unit = slope.fall([datum()])
        before = slope.loss()
        missing = model.next()
        step = slope.step()
        if step.status >= 300:
            raise Broken(f"number {missing + 1} before {missing} returned {said(step)}")
        request_id = request_id_of(step)
        if not request_id or ctx.client.is_done(request_id):
            raise Broken(f"number {missing + 1} ran before {missing} had arrived")
        model.output(model.batch([datum()], missing))
        model.run(step, "optim_step")
        ratio = (before - slope.loss()) / unit
        if not 0.7 < ratio < 1.3:
            raise Broken(
                f"the step changed the loss {ratio:.2f} times as much as after its gradients"
            )


# Resends.


def _same_promise(first: Answer, again: Answer, what: str) -> None:
    for answer, which in ((first, what), (again, f"the resend of {what}")):
        if answer.status >= 300:
            raise Broken(f"{which} returned {said(answer)}")
    ids = request_id_of(first), request_id_of(again)
    if ids[0] != ids[1]:
        raise Broken(f"the resend of {what} is a new operation: {ids[1]} after {ids[0]}")


@CHECKS.rule("a resent create_model makes one model")
def resend_create_model(ctx: Context) -> None:
    """After a lost answer, the same session and number get the first model. TuFT 0.2.2 and SkyRL
    create a second one, which no client unloads."""
    number = ctx.model_number()
    first, again = ctx.create(number), ctx.create(number)
    made = [ctx.client.end(a).value(types.CreateModelResponse, "create_model").model_id
            for a in (first, again)]  # fmt: skip
    models = [Model(ctx.client, model_id, ctx.session_id) for model_id in dict.fromkeys(made)]
    with ctx.unloading(models[0]), ctx.unloading(models[-1]):
        if len(models) > 1:
            raise Broken(f"there are two: {made[0]} and {made[1]}")
        _same_promise(first, again, "create_model")


@CHECKS.rule("a resent forward_backward runs once")
def resend_forward_backward(ctx: Context) -> None:
    """The same model and number get the first promise, and the gradient counts once. SkyRL before
    August 2026 (also 0.3.0) adds it twice; TuFT 0.2.2 refuses the resend with 409."""
    with ctx.model() as model:
        slope = Slope(model)

        def twice() -> None:
            number = model.next()
            first, again = (model.batch([datum()], number) for _ in range(2))
            _same_promise(first, again, "forward_backward")
            model.output(first)
            model.output(again)

        slope.check(1, twice, "the resent batch counts twice")


def _resend(ctx: Context, what: str, send: Callable[[Model, int], Answer]) -> None:
    with ctx.model() as model:
        model.train([datum()])
        number = model.next()
        first, again = send(model, number), send(model, number)
        _same_promise(first, again, what)
        results = [model.run(answer, what) for answer in (first, again, send(model, number))]
        if results[0] != results[1] or results[0] != results[2]:
            raise Broken(f"the resends returned {results[1]} and {results[2]} after {results[0]}")
        if isinstance(results[0], dict) and "sampler_weights" in str(results[0].get("path")):
            ctx.client.saved.append(str(results[0]["path"]))
        model.forward([datum()])  # the model still works


@CHECKS.rule("a resent optim_step runs once")
def resend_optim_step(ctx: Context) -> None:
    """The same model and number get the first promise and its result. TuFT 0.2.2 refuses the resend
    with 409, and the result is lost."""
    _resend(ctx, "optim_step", lambda model, number: model.step(number, learning_rate=0.01))


@CHECKS.rule("a resent save_weights saves once")
def resend_save_weights(ctx: Context) -> None:
    """The same model and number get the first promise, not "this name exists"."""
    name = ctx.name()
    _resend(ctx, "save_weights", lambda m, number: m.post("save_weights", number, path=name))


@CHECKS.rule("a resent save_weights_for_sampler saves once")
def resend_save_for_sampler(ctx: Context) -> None:
    """The same model and number get the first promise, with a name and without one."""
    what, name, sampler = "save_weights_for_sampler", ctx.name(), ctx.sampler_number()
    _resend(ctx, what, lambda m, number: m.post(what, number, path=name))
    _resend(ctx, what, lambda m, number: m.post(what, number, sampling_session_seq_id=sampler))


@CHECKS.rule("a resent load_weights loads once")
def resend_load_weights(ctx: Context) -> None:
    """The same model and number get the first promise."""
    with ctx.model() as model:
        path = model.save(ctx.name())
        number = model.next()
        first, again = (
            model.post("load_weights", number, path=path, optimizer=True) for _ in range(2)
        )
        _same_promise(first, again, "load_weights")
        model.run(first, "load_weights")
        model.run(again, "load_weights")


@CHECKS.rule("a resent create_sampling_session makes one")
def resend_sampling_session(ctx: Context) -> None:
    """The same session and number get the first sampler."""
    number = ctx.sampler_number()
    answers = [ctx.sampler_of(number=number, base_model=ctx.base_model) for _ in range(2)]
    made = [as_object(answer).get("sampling_session_id") for answer in answers]
    if answers[0].status >= 300:
        raise NotOffered(f"samplers of a base model ({said(answers[0])})")
    if made[0] != made[1]:
        raise Broken(f"there are two: {made[0]} and {made[1]} ({said(answers[1])})")


@CHECKS.rule("a resent asample samples once")
def resend_asample(ctx: Context) -> None:
    """The same sampler and number get the first promise, and thus the same tokens, even without a
    seed. TuFT 0.2.2 samples (and would bill) again."""
    first, again = (ctx.sampler.post(TOKENS, 2, number=10_000) for _ in range(2))
    _same_promise(first, again, "asample")
    tokens = [
        [list(s.tokens) for s in ctx.client.end(a).value(types.SampleResponse, "asample").sequences]
        for a in (first, again)
    ]
    if tokens[0] != tokens[1]:
        raise Broken("the resend returned different tokens")


# Refusals.


def _next_works(ctx: Context, model: Model, bad: Ended, number: int, what: str) -> str:
    """Check that a good request works after a refused one; returns which number it needed."""
    if bad.failure is None:
        raise Broken(f"{what} was not refused")
    if not bad.refused:
        model.forward([datum()])
        return "accepted, then failed"
    # The official SDK counts a refused request, tinkex does not.
    following = model.batch([datum()], number + 1, forward_only=True)
    if following.status < 300:
        done = ctx.client.is_done(request_id_of(following), _SHORT)
        if done:
            model.number = number + 1
            model.output(following, f"number {number + 1} after {what} was refused as {number}")
            return f"refused with {bad.answer.status}, then continued with the next number"
        raise Broken(
            f"{what} was refused as number {number} with {bad.answer.status}, and number "
            f"{number + 1} waits for it forever"
        )
    again = model.batch([datum()], number, forward_only=True)
    works = again.status < 300 and ctx.client.end(again).failure is None
    raise Broken(
        f"{what} was refused as number {number} with {bad.answer.status}, and number {number + 1} "
        f"returns {said(following)}; number {number} {'works' if works else 'fails, too'}"
    )


@CHECKS.rule("after a refused request a good one works")
def no_wedge(ctx: Context) -> str:
    """One wrong argument must not end a run. Once TuFT 0.2.2 has refused a request of a model (an
    unknown loss), it answers all others with 409: client and server disagree on the numbers."""
    seen = []
    with ctx.model() as model:
        for what, send in (
            (
                "an unknown loss",
                lambda: model.batch([datum()], loss_fn="no_such_loss"),
            ),
            ("a name with ../ in it", lambda: model.post("save_weights", path="../conformance")),
            ("a checkpoint that does not exist", lambda: model.post(
                "load_weights", path=f"tinker://{model.model_id}/weights/none", optimizer=False
            )),
        ):  # fmt: skip
            bad = ctx.client.end(send())
            seen.append(f"{what} {_next_works(ctx, model, bad, model.number, what)}")
    return "; ".join(seen)


@CHECKS.rule("a failed operation is a 200 with error and category")
def failures(ctx: Context) -> str:
    """A failure is the result of an operation, not an HTTP error. SkyRL returns 400, which the
    official SDK takes for a proxy's error, retries four times and raises without the category;
    others return 500, which it retries forever."""
    with ctx.model() as model:
        for send in (
            lambda: model.post(
                "load_weights", path=f"tinker://{model.model_id}/weights/none", optimizer=False
            ),
            lambda: model.batch([datum()], loss_fn="no_such_loss"),
            lambda: model.batch([_out_of_vocabulary()]),
        ):
            ended = ctx.client.end(send())
            if ended.refused or ended.failure is None:
                continue
            payload = as_object(ended.answer)
            if ended.answer.status != 200:
                raise Broken(f"it was returned as {said(ended.answer)}")
            if not isinstance(payload.get("error"), str) or not payload["error"]:
                raise Broken(f"error is {payload.get('error')!r}")
            if payload.get("category") not in ("user", "server", "unknown"):
                raise Broken(f"category is {payload.get('category')!r}")
            return str(payload["category"])
    raise NotOffered("every wrong request is refused at once, so no operation fails")


def _out_of_vocabulary() -> types.Datum:
    return datum([*TOKENS[:-1], 2**31 - 2])


# Promises.


@CHECKS.rule("a result can be fetched twice")
def fetched_twice(ctx: Context) -> None:
    """The answer with the result may be lost on the way, so it must be available again."""
    with ctx.model() as model:
        ended = ctx.client.end(model.batch([datum()], forward_only=True))
        ended.value(types.ForwardBackwardOutput, "forward")
        if not ended.request_id:
            raise NotOffered("results are returned at once, without promises")
        again = ctx.client.poll(ended.request_id)
        if again.status != 200 or again.content != ended.answer.content:
            raise Broken(f"the second poll returned {said(again)}")


@CHECKS.rule("a poll is answered within 45 seconds", aside=True)
def long_poll(ctx: Context) -> str:
    """Clients time out a poll after 45 s, so "not yet" (408 or try_again) must arrive before. SkyRL
    holds polls for 300 s: each ends in a timeout of the client."""
    client, session_id = ctx.client, ctx.new_session()
    made = client.end(ctx.create(0, session_id)).value(types.CreateModelResponse, "create_model")
    with ctx.unloading(Model(client, made.model_id, session_id)) as model:
        early = model.step(2)
        request_id = request_id_of(early)
        if not request_id or ctx.client.is_done(request_id):
            raise NotOffered("the server does not order operations, so nothing waits")
        started = time.monotonic()
        try:
            answer = client.poll(request_id, 60.0)
        except errors.APITimeoutError:
            raise Broken("no answer within 60 s") from None
        took = time.monotonic() - started
        model.batch([datum()], 1)
        if took > 45:
            raise Broken(f"it took {took:.0f} s")
        if not is_not_yet(answer):
            raise NotOffered("the server does not order operations, so nothing waits")
        return f"{answer.status} after {took:.0f} s, {as_object(answer).get('queue_state')}"


@CHECKS.rule("one poll serves a sampling session")
def retrieve_futures(ctx: Context) -> None:
    """retrieve_futures lists the finished samples of a session, so thousands need one poll only."""
    sampler = ctx.sampler
    target = {
        "type": "sampling_session",
        "sampling_session_id": sampler.sampler_id,
        "cloned_sampler_id": 0,
    }
    request = {"target": target, "prev_cursor": 0, "timeout": 0, "retrieved_request_ids": []}
    ctx.client.endpoint("POST", wire.RETRIEVE_FUTURES.path, request)
    wanted = {request_id_of(sampler.post(TOKENS)) for _ in range(3)}
    cursor, missing, deadline = 0, set(wanted), time.monotonic() + ctx.client.patience
    while missing and time.monotonic() < deadline:
        request = {"target": target, "prev_cursor": cursor, "retrieved_request_ids": []}
        payload = as_object(ctx.client.endpoint("POST", wire.RETRIEVE_FUTURES.path, request))
        cursor = payload.get("cursor", cursor)
        missing -= {c.get("request_id") for c in payload.get("completions", [])}
    if missing:
        raise Broken(f"{len(missing)} of 3 samples were never listed")
    for request_id in wanted:
        ctx.client.wait(request_id)


@CHECKS.rule("a sample can be taken back")
def cancel(ctx: Context) -> None:
    """cancel_future returns 200, and a later poll returns a result, a failure or 410."""
    request_id = request_id_of(ctx.sampler.post(TOKENS, params={"max_tokens": 64}))
    ctx.client.endpoint("POST", "cancel_future", {"request_id": request_id})
    answer = ctx.client.wait(request_id)
    if answer.status not in (200, 410):
        raise Broken(f"the poll returned {said(answer)}")


# Sessions.


@CHECKS.rule("fields of a newer SDK are ignored")
def unknown_fields(ctx: Context) -> None:
    """A server ignores fields that it does not know. TuFT 0.2.2 answers every new field with 422,
    and thus works with one minor version of the official SDK only."""
    more: dict[str, Any] = {"field_of_the_future": {"a": [1]}}
    tagged = {"tags": [], "sdk_version": "9.9.9", "type": "create_session"}
    with ctx.model() as model:
        for what, answer in (
            ("client/config", ctx.client.post("client/config", {"sdk_version": "9.9.9", **more})),
            ("create_session", ctx.client.post("create_session", {**tagged, **more})),
            ("create_model", ctx.create(**more)),
            ("optim_step", model.post("optim_step", adam_params={**more}, **more)),
            ("save_weights_for_sampler", model.post(
                "save_weights_for_sampler",
                sampling_session_seq_id=ctx.sampler_number(),
                **more,
            )),
            ("asample", ctx.sampler.post(TOKENS, params=more, **more)),
        ):  # fmt: skip
            failure = ctx.client.end(answer).failure
            if failure is not None and not is_missing(answer):
                raise Broken(f"{what} is refused because of one: {failure}")


@CHECKS.rule("a heartbeat after a session's end is refused")
def finished_session(ctx: Context) -> None:
    """A heartbeat returns 200 while the session is active, and 410 after it was finished."""
    session_id = ctx.new_session()
    beat = {"session_id": session_id, "type": "session_heartbeat"}
    ctx.client.endpoint("POST", "session_heartbeat", beat)
    reason = {"reason": {"type": "success"}, "detail": None}
    ctx.client.endpoint("POST", f"sessions/{session_id}/finish", reason)
    answer = ctx.client.post("session_heartbeat", beat)
    if answer.status != 410:
        raise Broken(f"after finish it returned {said(answer)}")


@CHECKS.rule("telemetry of any shape is accepted")
def telemetry(ctx: Context) -> None:
    """The official SDK up to 0.25 resends refused telemetry every second. SkyRL refuses unknown
    events with 422."""
    event = {"event": "EVENT_OF_THE_FUTURE", "event_id": "1", "more": {"a": 1}}
    payload = {"events": [event], "platform": "Linux", "sdk_version": "9", "process_uuid": "1"}
    answer = ctx.client.endpoint("POST", "telemetry", payload)
    if as_object(answer).get("status") != "accepted":
        raise Broken(f"it returned {said(answer)}")
