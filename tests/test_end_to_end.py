"""
The whole way: the SDK, HTTP, the scheduler and the real engine, on the built-in model.

What each part does is held to account in its own tests; here they must fit together.
"""

import concurrent.futures
import multiprocessing
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import tinkex
from tinkex import errors, types

ROOT = Path(__file__).parent.parent
TEXT = "def add(a, b):\n    return a + b\n"
LEARN = types.AdamParams(learning_rate=1e-2)


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """One embedded engine for the module, in its own home folder."""
    patch = pytest.MonkeyPatch()
    patch.setenv("TINKEX_HOME", str(tmp_path_factory.mktemp("home")))
    for name in ("TINKER_API_KEY", "TINKER_BASE_URL"):
        patch.delenv(name, raising=False)
    with tinkex.ServiceClient() as client:
        yield client
    patch.undo()


@pytest.fixture
def training(service):
    with service.create_lora_training_client("tiny", rank=8, seed=7) as client:
        yield client


def datum(client, text=TEXT):
    tokens = client.encode(text)
    return types.Datum(
        types.ModelInput.from_ints(tokens[:-1]),
        {"target_tokens": tokens[1:], "weights": np.ones(len(tokens) - 1)},
    )


def train(client, steps=3):
    for _ in range(steps):
        client.forward_backward([datum(client)], "cross_entropy")
        step = client.optim_step(LEARN)
    return step.result()


def logprobs(client):
    output = client.forward([datum(client)], "cross_entropy").result()
    return output.loss_fn_outputs[0]["logprobs"].to_numpy()


def test_training_lowers_the_loss(training):
    before = training.forward([datum(training)], "cross_entropy").result().loss
    train(training, 10)
    after = training.forward([datum(training)], "cross_entropy").result().loss

    assert after < 0.7 * before


def test_two_runs_with_one_seed_are_bit_identical(service):
    runs = []
    for _ in range(2):
        with service.create_lora_training_client("tiny", rank=4, seed=3) as client:
            train(client)
            runs.append(logprobs(client))

    np.testing.assert_array_equal(*runs)


def test_a_saved_state_goes_on_bit_identically(service, training):
    """With the optimizer: the next steps are those of the undisturbed run."""
    train(training)
    path = training.save_state("half-way").result().path
    train(training)
    with service.create_training_client_from_state_with_optimizer(path) as again:
        train(again)

        np.testing.assert_array_equal(logprobs(training), logprobs(again))


def test_sampled_log_probabilities_are_those_of_forward(training):
    train(training)
    sampler = training.save_weights_and_get_sampling_client_sync()
    prompt = training.encode(TEXT)
    params = types.SamplingParams(max_tokens=8, seed=1, stop=[])
    [sampled] = sampler.sample(prompt, sampling_params=params).result().sequences
    whole = prompt + sampled.tokens
    scored = types.Datum(types.ModelInput.from_ints(whole[:-1]), {"target_tokens": whole[1:]})
    output = training.forward([scored], "cross_entropy").result()
    forward = output.loss_fn_outputs[0]["logprobs"].to_numpy()

    np.testing.assert_allclose(sampled.logprobs_np, forward[len(prompt) - 1 :], atol=1e-4)


def test_a_sampling_client_does_not_move_with_the_training(training):
    sampler = training.save_weights_and_get_sampling_client_sync()
    tokens = training.encode(TEXT)
    before = sampler.compute_logprobs(tokens).result()
    train(training)

    assert before == sampler.compute_logprobs(tokens).result()


def test_a_custom_loss_trains_like_the_loss_it_is(service):
    """-sum(logprobs) is cross_entropy with weights of one."""
    results = []
    for custom in (False, True):
        with service.create_lora_training_client("tiny", rank=4, seed=5) as client:
            if custom:
                client.forward_backward_custom(
                    [datum(client)], lambda data, lp: (-sum(x.sum() for x in lp), {"n": len(data)})
                )
            else:
                client.forward_backward([datum(client)], "cross_entropy")
            client.optim_step(LEARN)
            results.append(logprobs(client))

    np.testing.assert_allclose(*results, atol=1e-5)


def test_a_stream_is_the_sample(training):
    sampler = training.save_weights_and_get_sampling_client_sync()
    params = types.SamplingParams(max_tokens=6, seed=2, stop=[])
    [whole] = sampler.sample(TEXT, sampling_params=params).result().sequences
    chunks = list(sampler.sample_stream(TEXT, sampling_params=params))

    assert whole.tokens == [c.token for c in chunks if c.token is not None]
    assert "length" == chunks[-1].stop_reason


def test_many_prompts_come_back_with_their_index(training):
    sampler = training.save_weights_and_get_sampling_client_sync()
    params = types.SamplingParams(max_tokens=2, temperature=0.0, stop=[])
    prompts = [[65 + i % 20, 66] for i in range(60)]
    many = dict(sampler.sample_many(prompts, sampling_params=params, in_flight=25))
    alone = sampler.sample(prompts[41], sampling_params=params).result()

    assert set(range(60)) == set(many)
    assert alone.sequences[0].tokens == many[41].sequences[0].tokens


def _sample_elsewhere(pickled):
    client = pickle.loads(pickled)
    with client:
        params = types.SamplingParams(max_tokens=3, temperature=0.0, stop=[])
        return client.sample([65, 66], sampling_params=params).result().sequences[0].tokens


def test_a_pickled_sampling_client_works_in_another_process(service, training):
    """It holds no key, and finds it there."""
    sampler = training.save_weights_and_get_sampling_client_sync()
    pickled = pickle.dumps(sampler)
    params = types.SamplingParams(max_tokens=3, temperature=0.0, stop=[])
    here = sampler.sample([65, 66], sampling_params=params).result().sequences[0].tokens
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        there = pool.submit(_sample_elsewhere, pickled).result(60)

    assert here == there
    assert service._session.config.api_key.encode() not in pickled


def test_a_downloaded_adapter_is_one_that_peft_loads(service, training, tmp_path):
    """And a new model can start from it."""
    from safetensors.numpy import load_file

    train(training)
    path = training.save_weights_for_sampler("out").result().path
    folder = service.create_rest_client().download_checkpoint(path, tmp_path / "adapter")
    with service.create_lora_training_client("tiny", rank=8, adapter=str(folder)) as again:
        np.testing.assert_array_equal(logprobs(training), logprobs(again))

    names = {file.name for file in folder.iterdir()}
    tensors = load_file(folder / "adapter_model.safetensors")

    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert all(name.startswith("base_model.model.") for name in tensors)


def test_what_the_server_refuses_leaves_the_client_working(training):
    """A token outside the vocabulary: the error names it, and the next call is served."""
    bad = types.Datum(types.ModelInput.from_ints([100_000]), {"target_tokens": [1]})
    with pytest.raises(errors.TinkexError, match="100000"):
        training.forward_backward([bad], "cross_entropy").result()
    with pytest.raises(errors.TinkexError):
        training.optim_step(LEARN).result()  # its gradients never came
    train(training, 1)


def test_an_unknown_model_is_told_and_the_next_one_created(service):
    with pytest.raises(errors.RequestFailedError, match="no such directory"):
        service.create_lora_training_client("/no/such/model")
    with service.create_lora_training_client("tiny", rank=4) as client:
        assert client.get_info().base_model == "tiny"


def test_a_failed_restore_leaves_nothing(service, training):
    before = len(list(service.create_rest_client().iter_training_runs()))
    missing = f"tinker://{training.model_id}/weights/missing"
    with pytest.raises(errors.TinkexError, match="missing"):
        service.create_training_client_from_state(missing)

    assert before == len(list(service.create_rest_client().iter_training_runs()))


def test_after_unloading_calls_say_so(service):
    client = service.create_lora_training_client("tiny", rank=4)
    client.unload_model().result()
    with pytest.raises(errors.ClientClosedError, match="unloaded"):
        client.optim_step(LEARN)


def test_the_clients_of_one_process_share_an_engine(service):
    with tinkex.ServiceClient() as second:
        assert service.base_url == second.base_url
    assert "ok" == service.health().status


@pytest.mark.parametrize(
    "how, status", [("with", 0), ("without close", 0), ("in flight, by an exception", 1)]
)
def test_a_script_ends_at_once_and_leaves_no_engine(how, status, tmp_path):
    """Whatever the script was doing. (A normal end waits for what is in flight.)"""
    lines = {
        "with": "with tinkex.ServiceClient() as service: pass",
        "without close": "service = tinkex.ServiceClient()",
        "in flight, by an exception": "service = tinkex.ServiceClient()\n"
        "client = service.create_lora_training_client('tiny')\n"
        "sampler = service.create_sampling_client(base_model='tiny')\n"
        "f = [sampler.sample([65] * 50) for _ in range(50)]",
    }
    script = f"import tinkex, time\n{lines[how]}\nprint(service._session.engine._process.pid)"
    script += f"\nprint(time.time()); assert {status} == 0"
    environment = {**os.environ, "TINKEX_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script + "\n"], env=environment, capture_output=True, text=True
    )
    ended = time.time()
    pid, last_line = done.stdout.split()

    assert status == done.returncode, done.stderr
    assert ended - float(last_line) < 2
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)
