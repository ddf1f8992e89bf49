"""How much one server takes, keeps and waits for, in one place.

Defaults are for one machine and a handful of users; tests make them small.
"""

from __future__ import annotations

import attrs

MIB = 1024 * 1024


@attrs.frozen
class Limits:
    """Bytes are bytes, times are seconds.

    Attributes:
        body_bytes, decoded_bytes: largest body of data (a batch, a sample request) as sent, and
            after decompression.
        small_body_bytes: largest body of any other request, as sent and after decompression.
        json_values, json_containers: numbers, strings, lists and objects of a JSON body; lists and
            objects alone.
        datums, proto_fields: datums of a batch in protobuf; fields of all its messages.
        decoding_bytes: memory for all bodies that are being received and decoded at one time;
            beyond, requests get a 503 and are sent again.
        inline_bytes: bodies and results up to this size are (de)coded on the event loop.
        poll_seconds: how long a poll waits before it answers "not yet"; clients give up at 45.
        metadata_bytes: results larger than this are announced by size first, where asked for.
        model_queue, model_queue_bytes: operations of one model that wait, and their bodies.
        sample_queue: samples of the whole server that wait or run.
        num_samples, max_tokens: of one sample request.
        session_seconds: a session that says nothing for so long is closed and its models freed.
        grace_seconds: a fetched result can be fetched again for so long.
        fetched_bytes: fetched results kept for their grace at most; beyond, the oldest go.
        result_seconds: a result that nobody fetches is kept for so long.
        result_bytes: results kept in all; beyond, the oldest go.
        snapshot_seconds: computing done on a model that a restart would have to repeat.
        snapshot_bytes: bodies that the journal keeps for one model.
        reap_seconds: how often expired things are looked for.
        connections: open at one time; fewer where the process may not open so many files.
        head_seconds: for a request's head to arrive; then the connection is closed.
        body_seconds, body_rate: for a body to arrive: so long, plus a second for so many bytes.
        idle_seconds: a connection without a request is closed after so long; longer than clients
            pause, because closing first loses requests.
        open_samplers: adapters kept in memory for sampling; beyond, the idle ones are closed.
    """

    body_bytes: int = 64 * MIB
    decoded_bytes: int = 64 * MIB
    small_body_bytes: int = MIB
    json_values: int = 2_000_000
    json_containers: int = 100_000
    datums: int = 16_384
    proto_fields: int = 400_000
    decoding_bytes: int = 512 * MIB
    inline_bytes: int = 64 * 1024
    poll_seconds: float = 30.0
    metadata_bytes: int = 4 * MIB
    model_queue: int = 10_000
    model_queue_bytes: int = 1024 * MIB
    sample_queue: int = 100_000
    num_samples: int = 1024
    max_tokens: int = 1_000_000
    session_seconds: float = 3600.0
    grace_seconds: float = 600.0
    fetched_bytes: int = 256 * MIB
    result_seconds: float = 86_400.0
    result_bytes: int = 4096 * MIB
    snapshot_seconds: float = 30.0
    snapshot_bytes: int = 64 * MIB
    reap_seconds: float = 5.0
    connections: int = 10_000
    head_seconds: float = 30.0
    body_seconds: float = 60.0
    body_rate: int = 50_000
    idle_seconds: int = 300
    open_samplers: int = 32
