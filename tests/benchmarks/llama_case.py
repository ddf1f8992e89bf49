"""Decoding by llama.cpp: `PYTHON llama_case.py FILE STREAMS LENGTH THREADS`, in an environment with
llama-cpp-python. Loads the GGUF file once; then for every line on standard input it decodes and
prints the seconds.

Uses the low-level interface, to decode several streams in one batch; decoding is greedy, which
costs next to nothing.
"""

from __future__ import annotations

import ctypes
import sys
import time

import llama_cpp as ll
import numpy as np

FILE, STREAMS, LENGTH, THREADS = sys.argv[1], *map(int, sys.argv[2:5])
PROMPT = 16


def load() -> tuple[object, int]:
    """A context for all streams, and the size of the vocabulary."""
    quiet = ll.llama_log_callback(lambda *_: None)
    ll.llama_log_set(quiet, ctypes.c_void_p(0))
    load.quiet = quiet  # type: ignore[attr-defined]  # must outlive the library's use of it
    ll.llama_backend_init()
    model = ll.llama_model_load_from_file(FILE.encode(), ll.llama_model_default_params())
    params = ll.llama_context_default_params()
    params.n_ctx = STREAMS * (PROMPT + LENGTH + 16)
    params.n_batch = params.n_ubatch = max(512, STREAMS * PROMPT)
    params.n_seq_max = STREAMS
    params.n_threads = params.n_threads_batch = THREADS
    context = ll.llama_init_from_model(model, params)
    return context, ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(model))


def decode(context: object, vocab: int) -> float:
    """Prompts of every stream, then LENGTH tokens of each."""
    ll.llama_memory_clear(ll.llama_get_memory(context), True)
    prompts = np.random.default_rng(0).integers(0, vocab, (STREAMS, PROMPT))
    started = time.perf_counter()
    rows = [
        (int(token), at, stream, at == PROMPT - 1)
        for stream, prompt in enumerate(prompts)
        for at, token in enumerate(prompt)
    ]
    chosen = step(context, rows, vocab)
    for at in range(PROMPT, PROMPT + LENGTH - 1):
        rows = [(token, at, stream, True) for stream, token in enumerate(chosen)]
        chosen = step(context, rows, vocab)
    return time.perf_counter() - started


def step(context: object, rows: list[tuple[int, int, int, bool]], vocab: int) -> list[int]:
    """One batch of (token, position, stream, wants logits); the likeliest token of those rows."""
    batch = ll.llama_batch_init(len(rows), 0, 1)
    batch.n_tokens = len(rows)
    for i, (token, at, stream, wants) in enumerate(rows):
        batch.token[i], batch.pos[i], batch.logits[i] = token, at, wants
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, stream
    status = ll.llama_decode(context, batch)
    if status:
        raise RuntimeError(f"llama_decode gave status {status}")
    chosen = []
    for i, row in enumerate(rows):
        if row[3]:
            logits = np.ctypeslib.as_array(ll.llama_get_logits_ith(context, i), (vocab,))
            chosen.append(int(logits.argmax()))
    ll.llama_batch_free(batch)
    return chosen


if __name__ == "__main__":
    loaded = load()
    print("ready", flush=True)
    for _ in sys.stdin:
        print(decode(*loaded), flush=True)
