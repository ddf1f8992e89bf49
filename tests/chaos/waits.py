"""Every kind of wait there is: for each how to get there, and what then waits.

As a program it gets to one kind of wait and says how it came out of it:
python -m tests.chaos.waits KIND URL FOLDER
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time

import tinkex
from tests.chaos.slow import NEVER
from tinkex import types


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


def create(service):
    return lambda: service.create_lora_training_client("tiny", rank=2)


def _training(service):
    return service.create_lora_training_client("tiny", rank=2)


def submit(service):
    training = _training(service)
    return lambda: training.forward_backward([datum(5)], "cross_entropy").result()


def _never_done(service):
    training = _training(service)
    future = training.forward_backward([datum(NEVER)], "cross_entropy")
    until(lambda: service._session.poller.in_flight(training.model_id))
    return training, future


def result(service):
    return _never_done(service)[1].result


def save(service):
    training, _ = _never_done(service)
    future = training.save_state("state")
    until(lambda: service._session.poller.in_flight(training.model_id) == 2)
    return future.result


def sample(service):
    sampler = service.create_sampling_client(base_model="tiny")
    future = sampler.sample([NEVER], 1, types.SamplingParams(max_tokens=4))
    until(lambda: sampler._completions._waiting)
    return future.result


def submit_sample(service):
    sampler = service.create_sampling_client(base_model="tiny")
    return lambda: sampler.sample([5], 1, types.SamplingParams(max_tokens=4)).result()


def get_info(service):
    return _training(service).get_info


def download(service):
    path = _training(service).save_weights_for_sampler("final").result().path
    folder = tempfile.mkdtemp()
    return lambda: service.create_rest_client().download_checkpoint(path, folder, force=True)


def close(service):
    """close() sends what is queued first."""
    training = _training(service)
    return lambda: (training.optim_step(types.AdamParams()), training.close())


#: kind -> what its line in the log says of it.
KINDS = {
    create: "create_model of tiny",
    submit: "the server to accept forward_backward",
    result: "forward_backward on",
    save: "on",  # the forward_backward ahead of it, which has waited longest, and 1 more
    submit_sample: "the server to take sample from",
    sample: "sample from",
    get_info: "/api/v1/get_info",
    download: "/archive",
}


def main():
    kind, url = sys.argv[1:]
    patience = tinkex.Patience(first_contact=20)
    try:
        with tinkex.ServiceClient(url, "tml-any", patience=patience) as service:
            wait = globals()[kind](service)
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
