"""Creating, training, saving and loading models. Each request becomes an operation."""

from __future__ import annotations

import os
from typing import Any

import attrs
from starlette.responses import Response

from tinkex import types, wire
from tinkex.engine import tiny
from tinkex.server.checkpoint_store import check_path
from tinkex.server.http_errors import Refusal, shown
from tinkex.server.ledger import Entry
from tinkex.server.live import LiveModel
from tinkex.server.request_context import Call, Handler, reply
from tinkex.server.sampling_source import checked_base_model


async def create_model(call: Call) -> Response:
    request, body = await call.read(types.CreateModelRequest)
    _check_optimizer(request.optimizer_config)
    base_model = checked_base_model(call, request.base_model)
    _check_adapter(call, request.adapter)
    live = LiveModel(
        model_id=f"{request.session_id}:train:{request.model_seq_id}",
        session_id=request.session_id,
        owner=call.owner,
        base_model=base_model,
        lora=request.lora_config,
        user_metadata=request.user_metadata,
    )
    entry = await call.site.ledger.models.create(
        "CreateModel", request.model_seq_id, live, request, body
    )
    return promise(entry)


def _check_optimizer(config: dict[str, Any] | None) -> None:
    kind = (config or {"type": "adamw"}).get("type")
    if kind != "adamw":
        raise Refusal(
            400, f"this server does not support the optimizer {shown(kind)}; use 'adamw'."
        )


def _check_adapter(call: Call, adapter: str | None) -> None:
    if adapter is None:
        return
    if call.site.keys.several_users:
        raise Refusal(
            400,
            "adapter is a directory on the server's machine, which a server with several keys does "
            "not read; save the adapter as a checkpoint there and load that.",
        )
    if "\0" in adapter or not os.path.isdir(adapter):
        raise Refusal(
            400,
            f"adapter {shown(adapter, 300)} is not a directory on the server's machine; give "
            "the absolute path of a PEFT adapter.",
        )


async def forward(call: Call) -> Response:
    return await _batch(call, forward_only=True)


async def forward_backward(call: Call) -> Response:
    return await _batch(call, forward_only=None)


async def _batch(call: Call, forward_only: bool | None) -> Response:
    """Submit a batch of training data. If *forward_only* is None, the body decides."""
    content_type = call.content_type
    if content_type not in (wire.JSON, wire.PROTOBUF):
        raise Refusal(
            415,
            f"training data needs Content-Type {wire.PROTOBUF} or {wire.JSON}, not "
            f"{shown(content_type)}.",
        )
    if content_type == wire.PROTOBUF and not call.site.takes_protobuf:
        raise Refusal(415, f"this server accepts {wire.JSON} only (it runs with --dialect json).")
    body = await call.body(data=True)
    await call.check_size(body)
    request = await call.decoded(lambda: wire.decode_request(content_type, body), body)
    if forward_only and not request.forward_only:
        raise Refusal(
            400, "the endpoint forward needs forward_input; send this batch to forward_backward."
        )
    if any(datum.model_input_spans for datum in request.data):
        live = call.site.ledger.models.of_owner(request.model_id, call.owner).live
        await call.site.in_pool(
            call.site.store.recorded.check, call.owner, live.session_id, request.data
        )
    name = "Forward" if request.forward_only else "ForwardBackward"
    return await submit(call, name, request, body, content_type)


async def optim_step(call: Call) -> Response:
    body = await call.json_body()
    payload = wire.loads(body)
    if isinstance(payload, dict) and payload.get("optimizer_params") is not None:
        kind = payload["optimizer_params"]
        kind = kind.get("type") if isinstance(kind, dict) else kind
        raise Refusal(
            400, f"this server does not support the optimizer {shown(kind)}; send adam_params."
        )
    request = wire.from_json(types.OptimStepRequest, payload)
    return await submit(call, "OptimStep", request, body)


async def save_weights(call: Call) -> Response:
    request, body = await call.read(types.SaveWeightsRequest)
    check_name(request.path)
    check_ttl(request.ttl_seconds)
    return await submit(call, "SaveWeights", request, body)


async def save_weights_for_sampler(call: Call) -> Response:
    request, body = await call.read(types.SaveWeightsForSamplerRequest)
    if request.path is not None:
        check_name(request.path)
    elif request.sampling_session_seq_id is None:
        raise Refusal(400, "give either path (a name) or sampling_session_seq_id.")
    check_ttl(request.ttl_seconds)
    if request.kind not in ("snapshot", "inflight"):
        raise Refusal(
            400,
            f"kind must be 'snapshot' (weights that stay) or 'inflight' (weights that the next "
            f"save replaces), got {shown(request.kind)}.",
        )
    return await submit(call, "SaveWeightsForSampler", request, body)


def check_name(name: str) -> None:
    """Raises Refusal (400)."""
    try:
        types.check_name(name)
    except ValueError as exc:
        raise Refusal(400, f"path: {exc}") from exc


def check_ttl(ttl_seconds: int | None) -> None:
    """Raises Refusal (400)."""
    try:
        types.check_ttl(ttl_seconds)
    except (ValueError, TypeError) as exc:
        raise Refusal(400, str(exc)) from exc


async def load_weights(call: Call) -> Response:
    request, body = await call.read(types.LoadWeightsRequest)
    if request.weights_access_token is not None:
        # The journal gets the name of the owner that the key stands for, never the key.
        reader = call.site.keys.reader(request.weights_access_token)
        request = attrs.evolve(request, weights_access_token=reader)
        body = wire.dumps(wire.to_json(request, wire.LOAD_WEIGHTS.tag))
    _check_optimizer(request.optimizer_config)
    check_path(request.path)
    if request.model_id is not None and request.seq_id is not None:
        return await submit(call, "LoadWeights", request, body)
    if request.session_id is None or request.model_seq_id is None:
        raise Refusal(
            400,
            "load_weights needs model_id and seq_id (into that model), or session_id and "
            "model_seq_id (as a new model).",
        )
    return await _create_from_checkpoint(call, request, body)


async def _create_from_checkpoint(
    call: Call, request: types.LoadWeightsRequest, body: bytes
) -> Response:
    model_id = f"{request.session_id}:train:{request.model_seq_id}"
    known = call.site.ledger.models.get(model_id)
    if known is not None and known.live.owner == call.owner:
        live = known.live  # a repeat; the checkpoint may have been deleted
    else:
        row = await call.site.in_pool(
            call.site.store.checkpoints.find_model,
            request.path,
            call.owner,
            request.weights_access_token,
        )
        wanted = request.base_model and checked_base_model(call, request.base_model)
        if wanted not in (None, row.base_model):
            raise Refusal(
                400,
                f"the checkpoint is of base model {row.base_model!r}, not "
                f"{shown(request.base_model)}; omit base_model or give the right one.",
            )
        live = LiveModel(
            model_id=model_id,
            session_id=str(request.session_id),
            owner=call.owner,
            base_model=row.base_model,
            lora=types.LoraConfig(
                rank=row.rank,
                train_mlp=row.train_mlp,
                train_attn=row.train_attn,
                train_unembed=row.train_unembed,
            ),
            user_metadata=request.user_metadata,
        )
    entry = await call.site.ledger.models.create(
        "LoadWeights", request.model_seq_id or 0, live, request, body
    )
    return promise(entry)


async def unload_model(call: Call) -> Response:
    request, _ = await call.read(types.UnloadModelRequest)
    return promise(call.site.ledger.models.unload(call.owner, request.model_id))


async def get_info(call: Call) -> Response:
    """Describe a model. Waits until it is created."""
    request, _ = await call.read(types.GetInfoRequest)
    ledger = call.site.ledger
    live = ledger.models.of_owner(request.model_id, call.owner).live
    creation = ledger.entries.get(f"{live.model_id}:0")
    if creation is not None:
        await ledger.entries.wait(creation, call.site.limits.poll_seconds)
    if live.broken is not None:
        raise Refusal(404, f"there is no model {live.model_id}: {live.broken}.")
    info = await ledger.base_info(live.base_model)
    return reply(
        types.GetInfoResponse(
            model_id=live.model_id,
            model_data=types.ModelData(
                model_name=live.base_model,
                arch=None if info is None else info.architecture,
                tokenizer_id=None if info is None else _findable(info.tokenizer_id),
            ),
            is_lora=True,
            lora_rank=live.lora.rank,
            model_name=live.base_model,
            optimizer_config={"type": "adamw"},
            train_unembed=live.lora.train_unembed,
        )
    )


def _findable(tokenizer_id: str) -> str:
    """A tokenizer that other SDKs can load: for the built-in one, the folder of its files."""
    return str(tiny.DIRECTORY) if tokenizer_id == tiny.TOKENIZER_ID else tokenizer_id


async def submit(
    call: Call, name: str, request: Any, body: bytes, content_type: str = wire.JSON
) -> Response:
    """Accept an operation on a model; the answer is its promise."""
    entry = await call.site.ledger.models.submit(call.owner, name, request, body, content_type)
    return promise(entry)


def promise(entry: Entry) -> Response:
    return reply(entry.promise)


def numbered(name: str, handler: Handler) -> Handler:
    """Wrap *handler* so that refusals are noted under the request's number."""

    async def endpoint(call: Call) -> Response:
        try:
            return await handler(call)
        except (Refusal, wire.DecodeError) as exc:
            if not isinstance(exc, Refusal) or exc.status in (400, 403):
                await _note_refusal(call, name, str(exc))
            raise

    return endpoint


async def _note_refusal(call: Call, name: str, sentence: str) -> None:
    body = call.unpacked
    if body is None:
        return
    place = await call.decoded(lambda: wire.place_of(call.content_type, body), body)
    if place is not None:
        model_id, seq_id, forward_only = place
        name = "Forward" if forward_only else name
        await call.site.ledger.models.refuse(call.owner, name, model_id, seq_id, sentence)


ENDPOINTS: list[tuple[str, str, Any]] = [
    ("POST", "forward_backward", numbered("ForwardBackward", forward_backward)),
    ("POST", "optim_step", numbered("OptimStep", optim_step)),
    ("POST", "forward", numbered("Forward", forward)),
    ("POST", "create_model", create_model),
    ("POST", "get_info", get_info),
    ("POST", "save_weights", numbered("SaveWeights", save_weights)),
    (
        "POST",
        "save_weights_for_sampler",
        numbered("SaveWeightsForSampler", save_weights_for_sampler),
    ),
    ("POST", "load_weights", numbered("LoadWeights", load_weights)),
    ("POST", "unload_model", unload_model),
]
