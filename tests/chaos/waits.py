"""Every kind of wait there is: for each how to get there, and what then waits.

As a program it gets to one kind of wait and says how it came out of it:
python -m tests.chaos.waits KIND URL FOLDER
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from functools import partial

import tinkex
from tests.chaos.slow import NEVER
from tinkex import types

PARAMS = types.SamplingParams(max_tokens=4)


def datum(target):
    return types.Datum(
        model_input=types.ModelInput.from_ints([1, 2]),
        loss_fn_inputs={"target_tokens": [1, target], "weights": [1.0, 1.0]},
    )


def until(claim):
    deadline = time.monotonic() + 10
    while not claim():
        if time.monotonic() > deadline:
            raise TimeoutError("the server is not where it should be.")
        time.sleep(0.005)


# Each takes a service to where it is about to wait, and returns what then waits, and a pattern of
# how the line in the log says what for.


def create(service):
    wait = partial(service.create_lora_training_client, "tiny", rank=2)
    return wait, "the server to accept create_model of tiny"


def _training(service):
    return service.create_lora_training_client("tiny", rank=2)


def submit(service):
    training = _training(service)
    words = f"the server to accept forward_backward on {training.model_id}"
    return lambda: training.forward_backward([datum(5)], "cross_entropy").result(), words


def _never_done(service):
    training = _training(service)
    future = training.forward_backward([datum(NEVER)], "cross_entropy")
    until(lambda: service._session.poller.in_flight(training.model_id))
    return training, future


def result(service):
    training, future = _never_done(service)
    return future.result, f"forward_backward on {training.model_id}"


def save(service):
    """Behind a batch, which has waited longer: the save is named, or counted where both are due."""
    training, _ = _never_done(service)
    future = training.save_state("state")
    until(lambda: service._session.poller.in_flight(training.model_id) == 2)
    model = training.model_id
    return future.result, f"save_weights on {model}|forward_backward on {model}.* and 1 more"


def submit_sample(service):
    sampler = service.create_sampling_client(base_model="tiny")
    words = f"the server to take sample from {sampler.sampling_session_id}"
    return lambda: sampler.sample([5], 1, PARAMS).result(), words


def sample(service):
    sampler = service.create_sampling_client(base_model="tiny")
    future = sampler.sample([NEVER], 1, PARAMS)
    until(lambda: sampler._queue.watch._waiting)
    return future.result, f"sample from {sampler.sampling_session_id}"


def get_info(service):
    return _training(service).get_info, "/api/v1/get_info"


def download(service):
    path = _training(service).save_weights_for_sampler("final").result().path
    rest, folder = service.create_rest_client(), tempfile.mkdtemp()
    return partial(rest.download_checkpoint, path, folder, force=True), "/archive"


def close(service):
    """close() sends what is queued first."""
    training = _training(service)

    def wait():
        training.optim_step(types.AdamParams())
        training.close()

    return wait, f"the server to accept optim_step on {training.model_id}"


KINDS = [create, submit, result, save, submit_sample, sample, get_info, download, close]


def main():
    kind, url = sys.argv[1:]
    patience = tinkex.Patience(first_contact=20)
    try:
        with tinkex.ServiceClient(url, "tml-any", patience=patience) as service:
            wait, _ = globals()[kind](service)
            print("ready", flush=True)
            sys.stdin.readline()
            print("waiting", flush=True)
            wait()
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        sys.exit(130)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
