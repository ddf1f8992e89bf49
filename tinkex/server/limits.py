"""All limits of a server: sizes, counts and times.

The defaults are for one machine and a handful of users. Tests use smaller ones.
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
            objects only.
        datums, proto_fields: datums of a batch in protobuf; fields of all its messages.
        decoding_bytes: memory for all bodies being received and decoded; further requests get a
            503, which clients retry.
        inline_bytes: bodies and results up to this size are encoded and decoded on the event loop.
        poll_seconds: a poll is answered with 408 after this time; clients time out at 45 s.
        metadata_bytes: for results larger than this, the size is sent first if the client requests
            it.
        model_queue, model_queue_bytes: waiting operations of one model, and their bodies.
        sample_queue: waiting and running sample requests of all clients.
        sample_queue_bytes: bodies of these requests.
        user_models, user_queue, user_disk_bytes: limits per user of live models, waiting operations
            and sample requests, and bytes of checkpoints and sampler weights. None is no limit.
        num_samples, max_tokens: of one sample request.
        session_seconds: a session without a request for this time is closed; its models are freed.
            Longer than the 600 s for which clients wait for a server; heartbeats come every 10 s.
        grace_seconds: how long a fetched result can be fetched again.
        fetched_bytes: bytes of fetched results that are kept; the oldest are dropped first.
        result_seconds: a result that is not fetched is kept for this time.
        result_bytes: bytes of all results that are kept; the oldest are dropped first.
        snapshot_seconds: compute time on a model that a restart may have to repeat.
        snapshot_bytes: request bodies that the journal keeps for one model.
        load_seconds: time limit for reading a base model.
        idle_model_seconds: models and samplers that are not used for this time are moved to disk,
            and loaded again when they are used.
        trim_seconds: freed memory is returned to the system after this time without computation.
        spool_bytes: larger requests wait on disk, not in memory.
        drain_seconds: a stopping server accepts nothing new, and finishes accepted operations for
            this time. With a journal, the others continue after a restart.
        reap_seconds: interval of the housekeeping that removes expired objects.
        connections: open connections; fewer if the process may not open that many files.
        head_seconds: the connection is closed if a request head takes longer.
        body_seconds, body_rate: a body may take body_seconds, plus a second per body_rate bytes.
        answer_seconds: the connection is closed if a client reads nothing of its response for this
            time.
        idle_seconds: an idle connection is closed after this time. Longer than clients' own limit,
            because a request can be lost if the server closes first.
        page_seconds: interval of updates to the web page.
        open_samplers: adapters kept in memory for sampling; beyond this number, idle ones are
            closed.
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
    sample_queue_bytes: int = 512 * MIB
    user_models: int | None = None
    user_queue: int | None = None
    user_disk_bytes: int | None = None
    num_samples: int = 1024
    max_tokens: int = 1_000_000
    session_seconds: float = 900.0
    grace_seconds: float = 600.0
    fetched_bytes: int = 256 * MIB
    result_seconds: float = 86_400.0
    result_bytes: int = 4096 * MIB
    snapshot_seconds: float = 30.0
    snapshot_bytes: int = 64 * MIB
    load_seconds: float = 3600.0
    idle_model_seconds: float = 600.0
    trim_seconds: float = 30.0
    spool_bytes: int = MIB
    drain_seconds: float = 0.0
    reap_seconds: float = 5.0
    connections: int = 10_000
    head_seconds: float = 30.0
    body_seconds: float = 60.0
    body_rate: int = 50_000
    answer_seconds: float = 60.0
    idle_seconds: int = 300
    page_seconds: float = 1.0
    open_samplers: int = 32
