"""Everything the official SDK can do with our server: `PYTHON scenario.py URL TOKENIZER [NAME...]`.

Runs in its own virtual environment with one version of `tinker` (and no tinkex), and prints
one JSON line per feature: {"feature", "state", "detail", "seconds"}; state is "works" (detail: what
the feature returned), "absent" (this SDK version has no such thing), "refused" (a
sentence, which is the detail) or "fails". What should come out is computed here with numpy, or is a
property: equal, different, larger. With NAMEs, only features whose name holds one of them run;
features whose name holds what follows a "-" do not.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request
import warnings
from functools import cached_property

warnings.simplefilter("ignore")

import numpy as np  # noqa: E402
import tinker  # noqa: E402
from tinker import types  # noqa: E402

SECONDS = 240  # a feature that takes longer hangs
BASE = "tiny"
RANK = 8

FEATURES = []  # (name, function), in the order of the table
REFUSED = []  # the same, for what the server does not offer


class Absent(Exception):
    """This version of the SDK has no such thing."""


def feature(name):
    return lambda function: FEATURES.append((name, function)) or function


def refused(name):
    return lambda function: REFUSED.append((name, function)) or function


def done(value):
    """Newer SDKs give futures where older ones give the thing itself."""
    return value.result() if hasattr(value, "result") else value


def method(thing, name):
    if not hasattr(thing, name):
        raise Absent(name)
    return getattr(thing, name)


def call(function, *args, **kwargs):
    """Calls with keywords that older versions may not have."""
    known = inspect.signature(function).parameters
    missing = [name for name in kwargs if name not in known]
    if missing and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        raise Absent(", ".join(missing))
    return function(*args, **kwargs)


def version():
    return tuple(int(part) for part in tinker.__version__.split(".")[:2])


def check(claim, text):
    if not claim:
        raise AssertionError(text)


def close(expected, actual, what, tolerance=1e-4):
    worst = float(np.max(np.abs(np.asarray(expected) - np.asarray(actual)), initial=0.0))
    scale = 1 + float(np.max(np.abs(np.asarray(expected)), initial=0.0))
    check(worst <= tolerance * scale, f"{what} differ by {worst}")


# --- data -----------------------------------------------------------------------------------------

rng = np.random.default_rng(0)
TOKENS = rng.integers(10, 200, 24).tolist()
PROMPT = types.ModelInput.from_ints(TOKENS)
TARGETS = np.array([*TOKENS[1:], 7])
WEIGHTS = np.linspace(0.0, 1.0, len(TOKENS)).astype(np.float32)
ADVANTAGES = rng.normal(size=len(TOKENS)).astype(np.float32)
ADAM = types.AdamParams(learning_rate=0.01)


def datum(**inputs):
    return types.Datum(model_input=PROMPT, loss_fn_inputs=inputs)


def example():
    return datum(target_tokens=TARGETS, weights=WEIGHTS)


def other():
    return datum(target_tokens=TARGETS[::-1].copy(), weights=WEIGHTS)


def logprobs(output, index=0):
    tensor = output.loss_fn_outputs[index]["logprobs"]
    return np.asarray(tensor.data, np.float32).reshape(tensor.shape or -1)


def score(training, data=None):
    """Log-probabilities of the example under the current weights."""
    return logprobs(done(training.forward([data or example()], "cross_entropy")))


def digest(array):
    """A few letters that are the same for the same numbers, to the bit."""
    return hashlib.sha256(np.ascontiguousarray(array, "<f4").tobytes()).hexdigest()[:16]


def step(training, data=None):
    done(training.forward_backward([data or example()], "cross_entropy"))
    done(training.optim_step(ADAM))


class World:
    """What features share; made when first asked for."""

    def __init__(self, url, tokenizer_file):
        self.url = url
        self.tokenizer_file = tokenizer_file

    @cached_property
    def service(self):
        return tinker.ServiceClient(
            base_url=self.url, api_key="tml-conformance", user_metadata={"from": "conformance"}
        )

    @cached_property
    def training(self):
        return self.create()

    @cached_property
    def rest(self):
        return self.service.create_rest_client()

    @cached_property
    def sampling(self):
        return done(self.service.create_sampling_client(base_model=BASE))

    @cached_property
    def state(self):
        """A trained model and the checkpoint of it."""
        training = self.create()
        step(training)
        return training, done(training.save_state("state")).path

    @cached_property
    def sampler_path(self):
        return done(self.state[0].save_weights_for_sampler("sampler")).path

    @cached_property
    def tokenizer(self):
        from tokenizers import Tokenizer

        return Tokenizer.from_file(self.tokenizer_file)

    def create(self, seed=7):
        return done(self.service.create_lora_training_client(BASE, rank=RANK, seed=seed))

    def sample(self, n=1, prompt=PROMPT, extra=None, client=None, **params):
        params = types.SamplingParams(**{"max_tokens": 12, **params})
        client = client or self.sampling
        return done(call(client.sample, prompt, n, params, **(extra or {})))

    def get(self, path):
        """A plain GET, for what the SDK does not show."""
        request = urllib.request.Request(
            f"{self.url}/api/v1/{path}", headers={"X-API-Key": "tml-conformance"}
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.load(response)

    def post(self, path, body):
        request = urllib.request.Request(
            f"{self.url}/api/v1/{path}",
            json.dumps(body).encode(),
            {"X-API-Key": "tml-conformance", "Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return response.status
        except urllib.error.HTTPError as exc:
            return exc.code


# --- training -------------------------------------------------------------------------------------


@feature("server capabilities")
def capabilities(world):
    names = [m.model_name for m in world.service.get_server_capabilities().supported_models]
    check(BASE in names, f"{BASE} is not among {names}")


@feature("create a LoRA model")
def create(world):
    info = world.training.get_info()
    check(":train:" in info.model_id, f"the model id {info.model_id} is not <session>:train:<n>")
    check(info.model_data.model_name == BASE, f"the base model is {info.model_data.model_name}")
    check(info.is_lora and info.lora_rank == RANK, f"{info!r} is not a LoRA of rank {RANK}")


@feature("get_tokenizer")
def get_tokenizer(world):
    text = "two words"
    ids = world.training.get_tokenizer().encode(text, add_special_tokens=False)
    check(ids == world.tokenizer.encode(text, add_special_tokens=False).ids, f"got {ids}")


@feature("forward")
def forward(world):
    """It leaves gradients untouched."""
    plain, looked = world.create(), world.create()
    step(plain)
    score(looked)
    done(looked.forward_backward([example()], "cross_entropy"))
    score(looked, other())
    done(looked.optim_step(ADAM))
    check((score(plain) == score(looked)).all(), "a forward pass changed what was learned")


@feature("forward_backward: one datum")
def forward_backward(world):
    output = done(world.training.forward_backward([example()], "cross_entropy"))
    close(-(WEIGHTS * logprobs(output)).sum(), output.metrics["loss:sum"], "the loss and its terms")


@feature("forward_backward: several chunks")
def chunks(world):
    """1,030 datums are more than one request takes; the answers come back in order."""
    data = [
        types.Datum(
            model_input=types.ModelInput.from_ints([10 + i % 150, 11, 12]),
            loss_fn_inputs={
                "target_tokens": np.array([11, 12, 13]),
                "weights": np.ones(3, np.float32),
            },
        )
        for i in range(1030)
    ]
    training = world.create()
    output = done(training.forward_backward(data, "cross_entropy"))
    check(len(output.loss_fn_outputs) == 1030, f"{len(output.loss_fn_outputs)} outputs")
    total = -sum(float(logprobs(output, i).sum()) for i in range(1030))
    close(total, output.metrics["loss:sum"], "the loss and its terms", 1e-3)
    close(logprobs(output, 3), logprobs(output, 153), "log-probabilities of equal datums")
    check(abs(logprobs(output, 3) - logprobs(output, 4)).max() > 1e-6, "all datums are alike")
    done(training.optim_step(ADAM))
    return digest(score(training))


def policy_loss(world, name, formula, **config):
    """A loss of the policy-gradient family against numpy."""
    training = world.create()
    lp = score(training).astype(np.float64)
    q = (lp + np.linspace(-0.5, 0.5, lp.size)).astype(np.float32)
    data = [datum(target_tokens=TARGETS, logprobs=q, advantages=ADVANTAGES)]
    output = done(training.forward_backward(data, name, loss_fn_config=config or None))
    expected = formula(lp, q.astype(np.float64), ADVANTAGES.astype(np.float64)).sum()
    close(expected, output.metrics["loss:sum"], f"{name}: numpy's loss and the server's")
    close(lp, logprobs(output), "log-probabilities")
    done(training.optim_step(ADAM))
    check(abs(score(training) - lp).max() > 1e-4, "nothing was learned")


@feature("loss cross_entropy, several targets per position")
def wide_targets(world):
    targets = np.stack([TARGETS, TARGETS[::-1]], axis=1)
    weights = np.stack([WEIGHTS, 1 - WEIGHTS], axis=1)
    wide = done(
        world.training.forward([datum(target_tokens=targets, weights=weights)], "cross_entropy")
    )
    close(score(world.training), logprobs(wide)[:, 0], "log-probabilities of the same targets")
    close(-(weights * logprobs(wide)).sum(), wide.metrics["loss:sum"], "the loss and its terms")


@feature("loss importance_sampling")
def importance_sampling(world):
    policy_loss(world, "importance_sampling", lambda lp, q, a: -np.exp(lp - q) * a)


@feature("loss ppo")
def ppo(world):
    def formula(lp, q, a):
        r = np.exp(lp - q)
        return -np.minimum(r * a, np.clip(r, 0.9, 1.1) * a)

    policy_loss(world, "ppo", formula, clip_low_threshold=0.9, clip_high_threshold=1.1)


@feature("loss cispo")
def cispo(world):
    def formula(lp, q, a):
        return -np.clip(np.exp(lp - q), 0.9, 1.1) * lp * a

    policy_loss(world, "cispo", formula, clip_low_threshold=0.9, clip_high_threshold=1.1)


@feature("loss dro")
def dro(world):
    policy_loss(world, "dro", lambda lp, q, a: -(lp * a - 0.5 * 0.05 * (lp - q) ** 2), beta=0.05)


@feature("loss gspo")
def gspo(world):
    if version() < (0, 34):
        raise Absent("gspo")
    training = world.create()
    lp = score(training).astype(np.float64)
    q = (lp + np.linspace(-0.5, 0.2, lp.size)).astype(np.float32)
    mask = (np.arange(lp.size) > 4).astype(np.float32)
    inputs = {"target_tokens": TARGETS, "logprobs": q, "advantages": ADVANTAGES}
    data = [datum(**inputs, sequence_ratio_mask=mask)]
    config = {"clip_low_threshold": 0.5, "clip_high_threshold": 2.0}
    output = done(training.forward_backward(data, "gspo", loss_fn_config=config))
    ratio = np.exp(((lp - q) * mask).sum() / mask.sum())
    terms = np.minimum(ratio * ADVANTAGES, np.clip(ratio, 0.5, 2.0) * ADVANTAGES)
    close(-terms.sum(), output.metrics["loss:sum"], "gspo: numpy's loss and the server's")


@feature("forward_backward_custom")
def custom_loss(world):
    """A loss written in the user's torch trains as the server's own does."""
    import torch

    def negative_likelihood(data, all_logprobs):
        loss = -sum((torch.tensor(WEIGHTS) * lp).sum() for lp in all_logprobs)
        return loss, {"mine": float(loss.detach())}

    ours, theirs = world.create(), world.create()
    output = done(ours.forward_backward_custom([example()], negative_likelihood))
    done(ours.optim_step(ADAM))
    step(theirs)
    check("mine" in output.metrics, f"the user's metric is missing: {output.metrics}")
    close(score(theirs), score(ours), "weights learned by the two ways", 1e-3)


@feature("create_custom_loss (traced, run by the client)")
def traced_loss(world):
    def negative_likelihood(logprobs, weights):
        loss = -(logprobs * weights).sum()
        return loss, {"custom/nll:sum": loss}

    create = method(world.service, "create_custom_loss")
    handle = done(create(negative_likelihood, input_ranks={"logprobs": 1, "weights": 1}))
    output = done(world.create().forward_backward_custom([example()], handle))
    check(output.metrics["custom/nll:sum"] > 0, f"{output.metrics}")


@feature("optim_step")
def optim_step(world):
    training = world.create()
    before = (WEIGHTS * score(training)).sum()
    for _ in range(3):
        step(training)
    after = (WEIGHTS * score(training)).sum()
    check(after > before + 0.1, f"the log-likelihood went from {before} to {after}")


@feature("optim_step with weight decay and gradient clipping")
def optim_options(world):
    def trained(**options):
        training = world.create()
        done(training.forward_backward([example()], "cross_entropy"))
        done(training.optim_step(types.AdamParams(learning_rate=0.01, **options)))
        step(training)
        return score(training)

    plain, clipped, decayed = trained(), trained(grad_clip_norm=0.01), trained(weight_decay=0.5)
    check((plain != clipped).any() and (plain != decayed).any(), "an option has no effect")


@feature("gradients add up until the step")
def accumulation(world):
    apart, together = world.create(), world.create()
    done(apart.forward_backward([example()], "cross_entropy"))
    done(apart.forward_backward([other()], "cross_entropy"))
    done(apart.optim_step(ADAM))
    done(together.forward_backward([example(), other()], "cross_entropy"))
    done(together.optim_step(ADAM))
    close(score(together), score(apart), "weights learned by the two ways", 1e-3)


@feature("pipelined steps")
def pipelined(world):
    """Many operations sent without waiting do what they do one by one, to the bit."""
    piped, patient = world.create(), world.create()
    futures = []
    for data in [example(), other()] * 4:
        futures.append(piped.forward_backward([data], "cross_entropy"))
        futures.append(piped.optim_step(ADAM))
    for future in futures:
        done(future)
    for data in [example(), other()] * 4:
        step(patient, data)
    check((score(piped) == score(patient)).all(), "the order of operations was lost")
    return digest(score(piped))


@feature("save_state, load_state")
def load_state(world):
    training, path = world.state
    check(path.startswith("tinker://") and path.endswith("/weights/state"), f"the path is {path}")
    loaded = world.create(seed=99)
    done(method(loaded, "load_state")(path))
    check((score(training) == score(loaded)).all(), "the weights did not come back")


@feature("create from state, without optimizer")
def create_from_state(world):
    training, path = world.state
    loaded = done(world.service.create_training_client_from_state(path))
    check(":train:" in loaded.get_info().model_id, f"the model id is {loaded.get_info().model_id}")
    check((score(training) == score(loaded)).all(), "the weights did not come back")


@feature("create from state, with optimizer")
def create_with_optimizer(world):
    original = world.create()
    step(original)
    step(original, other())
    path = done(original.save_state("with-optimizer")).path
    create = world.service.create_training_client_from_state_with_optimizer
    loaded, bare = done(create(path)), done(world.service.create_training_client_from_state(path))
    for training in (original, loaded, bare):
        step(training)
    check((score(original) == score(loaded)).all(), "the optimizer did not come back")
    check((score(original) != score(bare)).any(), "the optimizer came without being asked for")


@feature("an operation that fails does not cost the model")
def failure(world):
    training = world.create()
    bad = types.Datum(
        model_input=types.ModelInput.from_ints([10**8]),
        loss_fn_inputs={"target_tokens": np.array([1]), "weights": np.ones(1, np.float32)},
    )
    try:
        done(training.forward_backward([bad], "cross_entropy"))
    except Exception as exc:
        check("100000000" in str(exc), f"the sentence does not name the token: {exc}")
    else:
        raise AssertionError("a token beyond the vocabulary was taken")
    score(training)


# --- sampling -------------------------------------------------------------------------------------


@feature("sample: max_tokens, stop_reason, logprobs")
def sample(world):
    [sequence] = world.sample(stop=[]).sequences
    check(len(sequence.tokens) == 12, f"{len(sequence.tokens)} tokens")
    check(sequence.stop_reason == "length", f"the stop reason is {sequence.stop_reason}")
    check(len(sequence.logprobs) == 12, f"{len(sequence.logprobs)} log-probabilities")
    check(all(lp <= 0 for lp in sequence.logprobs), f"{sequence.logprobs}")


@feature("sample: logprobs are those of training")
def sampled_logprobs(world):
    """A policy-gradient loss sees a ratio of 1 on what was just sampled."""
    training, _ = world.state
    client = done(world.service.create_sampling_client(model_path=world.sampler_path))
    [sequence] = world.sample(client=client, stop=[]).sequences
    tokens = TOKENS + list(sequence.tokens)
    data = types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": np.array(tokens[1:]),
            "weights": np.ones(len(tokens) - 1, np.float32),
        },
    )
    trained = score(training, data)[len(TOKENS) - 1 :]
    close(trained, sequence.logprobs, "log-probabilities of sampling and training", 1e-3)


@feature("sample: seed")
def seed(world):
    def tokens(**params):
        return list(world.sample(stop=[], temperature=1.0, **params).sequences[0].tokens)

    check(tokens(seed=3) == tokens(seed=3), "the same seed gave other tokens")
    check(len({tuple(tokens(seed=n)) for n in range(4)}) > 1, "all seeds give the same tokens")


@feature("sample: temperature 0, top_k, top_p")
def filters(world):
    greedy = list(world.sample(stop=[], temperature=0.0).sequences[0].tokens)
    top_k = list(world.sample(stop=[], temperature=1.0, top_k=1).sequences[0].tokens)
    top_p = list(world.sample(stop=[], temperature=1.0, top_p=1e-6).sequences[0].tokens)
    check(greedy == top_k == top_p, f"{greedy}, {top_k}, {top_p}")


@feature("sample: num_samples")
def num_samples(world):
    sequences = world.sample(5, stop=[], temperature=1.0, seed=1).sequences
    check(len(sequences) == 5, f"{len(sequences)} sequences")
    check(len({tuple(s.tokens) for s in sequences}) > 1, "all samples are the same")


@feature("sample: stop tokens")
def stop_tokens(world):
    """The stop token is the last of the sequence."""
    greedy = list(world.sample(stop=[], temperature=0.0).sequences[0].tokens)
    [sequence] = world.sample(stop=[greedy[4], 10**6], temperature=0.0).sequences
    check(list(sequence.tokens) == greedy[: greedy.index(greedy[4]) + 1], f"{sequence.tokens}")
    check(sequence.stop_reason == "stop", f"the stop reason is {sequence.stop_reason}")


@feature("sample: stop string, several stop strings")
def stop_strings(world):
    """Ends with the token that completes the string."""
    greedy = list(world.sample(stop=[], temperature=0.0, max_tokens=30).sequences[0].tokens)
    whole = world.tokenizer.decode(greedy, skip_special_tokens=False)
    string = whole[4:6]
    ends = [
        n
        for n in range(1, len(greedy) + 1)
        if string in world.tokenizer.decode(greedy[:n], skip_special_tokens=False)
    ]
    for stop in (string, [string, "never \x00 ever"]):
        [sequence] = world.sample(stop=stop, temperature=0.0, max_tokens=30).sequences
        check(len(sequence.tokens) == ends[0], f"{sequence.tokens} does not end at {string!r}")
        check(sequence.stop_reason == "stop", f"the stop reason is {sequence.stop_reason}")


@feature("sample: stop=None ends at end-of-text, stop=[] does not")
def stop_default(world):
    """An adapter that was taught to say end-of-text shows the difference."""
    end = world.tokenizer.token_to_id("<|end|>")
    training = world.create()
    ends = [datum(target_tokens=np.full(len(TOKENS), end), weights=np.ones_like(WEIGHTS))]
    for _ in range(15):
        done(training.forward_backward(ends, "cross_entropy"))
        done(training.optim_step(types.AdamParams(learning_rate=0.05)))
    client = done(training.save_weights_and_get_sampling_client())
    [stopped] = world.sample(client=client, temperature=0.0).sequences
    [unstopped] = world.sample(client=client, temperature=0.0, stop=[]).sequences
    check(list(stopped.tokens) == [end], f"the tokens are {stopped.tokens}")
    check(stopped.stop_reason == "stop", f"the stop reason is {stopped.stop_reason}")
    check(len(unstopped.tokens) == 12, f"stop=[] ended after {len(unstopped.tokens)} tokens")


@feature("sample: prompt logprobs")
def prompt_logprobs(world):
    response = world.sample(extra={"include_prompt_logprobs": True})
    check(len(response.prompt_logprobs) == len(TOKENS), f"{len(response.prompt_logprobs)} of them")
    check(response.prompt_logprobs[0] is None, "the first token has a log-probability")
    close(score(world.create())[:-1], response.prompt_logprobs[1:], "the model's and these", 1e-3)


@feature("sample: top-k prompt logprobs")
def topk_prompt(world):
    extra = {"include_prompt_logprobs": True, "topk_prompt_logprobs": 3}
    response = world.sample(extra=extra)
    rows = response.topk_prompt_logprobs
    check(len(rows) == len(TOKENS) and rows[0] is None, f"{len(rows)} rows, first {rows[0]}")
    for position, row in list(enumerate(rows))[1:]:
        check(len(row) == 3, f"row {position} has {len(row)} cells")
        check(row[0][1] >= row[1][1] >= row[2][1], f"row {position} is not sorted")
        for token, logprob in row:
            if token == TOKENS[position]:
                close(response.prompt_logprobs[position], logprob, "the two log-probabilities")


@feature("compute_logprobs")
def compute_logprobs(world):
    training, _ = world.state
    client = done(training.save_weights_and_get_sampling_client())
    values = done(client.compute_logprobs(PROMPT))
    check(values[0] is None and len(values) == len(TOKENS), f"{values[:2]}, {len(values)}")
    close(score(training)[:-1], values[1:], "log-probabilities of sampling and training", 1e-3)


@feature("sample: top-k over sampled tokens")
def topk_sampled(world):
    response = world.sample(extra={"topk_sample_logprobs": 2}, temperature=0.0, stop=[])
    [sequence] = response.sequences
    rows = sequence.topk_logprobs
    check(len(rows) == 12, f"{len(rows)} rows")
    check([row[0][0] for row in rows] == list(sequence.tokens), "greedy is not the likeliest")
    close([row[0][1] for row in rows], sequence.logprobs, "the two log-probabilities")


@feature("sample: target_prompt_logprobs")
def target_prompt(world):
    ids = np.full((len(TOKENS) - 1, 2), -1)
    ids[:, 0] = TOKENS[1:]
    ids[5, 1] = 42
    target = types.TensorData(data=ids.reshape(-1).tolist(), dtype="int64", shape=list(ids.shape))
    extra = {"include_prompt_logprobs": True, "target_prompt_logprobs": target}
    response = world.sample(extra=extra)
    tensor = response.target_prompt_logprobs
    values = np.asarray(tensor.to_numpy() if hasattr(tensor, "to_numpy") else tensor.data)
    values = values.reshape(ids.shape)
    close(response.prompt_logprobs[1:], values[:, 0], "the two log-probabilities")
    check(np.isfinite(values[5, 1]) and values[5, 1] < 0, f"the cell asked for is {values[5, 1]}")


@feature("sample: prompt_logprobs_last_n")
def last_n(world):
    whole = world.sample(extra={"include_prompt_logprobs": True}).prompt_logprobs
    extra = {"include_prompt_logprobs": True, "prompt_logprobs_last_n": 4}
    tail = world.sample(extra=extra).prompt_logprobs
    check(tail[:-4] == [None] * (len(TOKENS) - 4), f"{tail}")
    close(whole[-4:], tail[-4:], "the two log-probabilities")


@feature("sample: prompt_alt_tokens_k")
def alt_tokens(world):
    found = world.sample(extra={"prompt_alt_tokens_k": 3}, temperature=0.0).prompt_alt_tokens
    tokens = np.asarray(found.tokens.data).reshape(found.tokens.shape)
    check(tokens.shape == (len(TOKENS) - 1, 3), f"the draws have the shape {tokens.shape}")
    check((tokens == tokens[:, :1]).all(), "at temperature 0 the draws of a position differ")


@feature("record_stability_info, and provenance of training data")
def provenance(world):
    method(types, "SampledProvenanceSpan")
    training = world.create()
    create = training.save_weights_and_get_sampling_client
    sampler = done(call(create, record_stability_info=True))
    sequence = world.sample(client=sampler, stop=[]).sequences[0]
    tokens = [*TOKENS, *sequence.tokens]
    q = np.r_[np.zeros(len(TOKENS) - 1), sequence.logprobs].astype(np.float32)
    inputs = {"target_tokens": np.array(tokens[1:]), "logprobs": q, "advantages": np.ones_like(q)}
    bare = types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)
    name = sequence.sequence_id
    named = bare.with_provenance(
        model_input=[
            types.PromptProvenanceSpan(sequence_id=name, length=len(TOKENS)),
            types.SampledProvenanceSpan(sequence_id=name, length=len(sequence.tokens) - 1),
        ],
        loss_fn_inputs=[
            types.PromptProvenanceSpan(sequence_id=name, offset=1, length=len(TOKENS) - 1),
            types.SampledProvenanceSpan(sequence_id=name, length=len(sequence.tokens)),
        ],
    )
    losses = [done(training.forward([data], "ppo")).metrics["loss:sum"] for data in (bare, named)]
    check(losses[0] == losses[1], f"with provenance the loss is {losses[1]}, not {losses[0]}")


@feature("sampler weights, inflight")
def inflight(world):
    training = world.create()
    create = training.save_weights_and_get_sampling_client
    first = done(call(create, kind="inflight"))
    before = done(first.compute_logprobs(PROMPT))
    step(training)
    done(call(create, kind="inflight"))
    check(done(first.compute_logprobs(PROMPT)) != before, "a save did not replace the weights")


@feature("sampler weights, named")
def named_sampler(world):
    training, _ = world.state
    path = world.sampler_path
    check("/sampler_weights/" in path, f"the path is {path}")
    client = done(world.service.create_sampling_client(model_path=path))
    close(score(training)[:-1], done(client.compute_logprobs(PROMPT))[1:], "log-probs", 1e-3)
    if hasattr(client, "get_base_model"):
        check(client.get_base_model() == BASE, f"its base model is {client.get_base_model()}")


@feature("sampler weights, unnamed, frozen while training continues")
def unnamed_sampler(world):
    training = world.create()
    client = done(training.save_weights_and_get_sampling_client())
    before = done(client.compute_logprobs(PROMPT))
    step(training)
    check(before == done(client.compute_logprobs(PROMPT)), "the sampler changed with the model")
    newer = done(training.save_weights_and_get_sampling_client())
    check(before != done(newer.compute_logprobs(PROMPT)), "the new sampler is the old one")


@feature("many samples at once")
def many_samples(world):
    params = types.SamplingParams(max_tokens=4, stop=[], temperature=1.0)
    futures = [world.sampling.sample(PROMPT, 1, params) for _ in range(100)]
    lengths = {len(done(future).sequences[0].tokens) for future in futures}
    check(lengths == {4}, f"lengths {lengths}")


@feature("pickled sampling client")
def pickled(world):
    import pickle

    try:
        client = pickle.loads(pickle.dumps(world.sampling))
    except (TypeError, AttributeError) as exc:
        raise Absent("pickling") from exc
    check(len(world.sample(client=client, stop=[]).sequences[0].tokens) == 12, "too few tokens")


# --- what is stored -------------------------------------------------------------------------------


@feature("REST: training runs")
def training_runs(world):
    _, path = world.state
    run_id = path.split("/")[2]
    listed = done(world.rest.list_training_runs(limit=100))
    check(run_id in [r.training_run_id for r in listed.training_runs], f"{run_id} is not listed")
    check(listed.cursor.total_count >= 1, f"{listed.cursor}")
    run = done(world.rest.get_training_run(run_id))
    check((run.base_model, run.is_lora, run.lora_rank) == (BASE, True, RANK), f"{run!r}")
    by_path = done(world.rest.get_training_run_by_tinker_path(path))
    check(by_path.training_run_id == run_id, f"{by_path!r}")


@feature("REST: checkpoints")
def checkpoints(world):
    _, path = world.state
    sampler_path, run_id = world.sampler_path, path.split("/")[2]
    listed = {c.tinker_path: c for c in done(world.rest.list_checkpoints(run_id)).checkpoints}
    check({path, sampler_path} <= set(listed), f"{sorted(listed)}")
    check(listed[path].checkpoint_type == "training", f"{listed[path]!r}")
    check(listed[path].checkpoint_id == "weights/state", f"{listed[path]!r}")
    check(listed[sampler_path].checkpoint_type == "sampler", f"{listed[sampler_path]!r}")
    mine = done(world.rest.list_user_checkpoints(limit=100)).checkpoints
    check(path in [c.tinker_path for c in mine], "not among the user's checkpoints")
    info = done(world.rest.get_weights_info_by_tinker_path(path))
    check((info.base_model, info.lora_rank) == (BASE, RANK), f"{info!r}")


@feature("REST: TTL, publish, unpublish, delete")
def checkpoint_changes(world):
    training, _ = world.state
    path = done(training.save_state("to-change")).path
    run_id = path.split("/")[2]

    def record():
        listed = done(world.rest.list_checkpoints(run_id)).checkpoints
        return next((c for c in listed if c.tinker_path == path), None)

    done(world.rest.publish_checkpoint_from_tinker_path(path))
    check(record().public, "published, but not public")
    done(world.rest.unpublish_checkpoint_from_tinker_path(path))
    check(not record().public, "unpublished, but public")
    set_ttl = world.rest.set_checkpoint_ttl_from_tinker_path
    done(set_ttl(path, 7200))
    check(record().expires_at is not None, "it has a TTL, but does not expire")
    done(set_ttl(path, None))
    check(record().expires_at is None, "it has no TTL, but expires")
    done(world.rest.delete_checkpoint_from_tinker_path(path))
    check(record() is None, "deleted, but listed")


@feature("copy_weights")
def copy_weights(world):
    training, path = world.state
    copy = done(method(world.rest, "copy_weights")(path, destination_project_id="a-project"))
    check(copy != path and copy.endswith("/weights/state"), f"the copy is {copy}")
    loaded = done(world.service.create_training_client_from_state(copy))
    check((score(training) == score(loaded)).all(), "the weights did not come along")


@feature("REST: checkpoint archive")
def archive(world):
    name = "get_checkpoint_archive_url_from_tinker_path"
    url = done(method(world.rest, name)(world.sampler_path)).url
    with urllib.request.urlopen(url, timeout=60) as response:
        check(len(response.read()) > 1000, "the archive is empty")


@feature("save_weights_external: files by URLs without a key")
def external_weights(world):
    saved = done(method(world.state[0], "save_weights_external")("external", ttl_seconds=3600))
    answer = done(method(world.rest, "get_external_weights_urls")(saved.path))
    with urllib.request.urlopen(answer.urls["adapter_config.json"], timeout=60) as response:
        check(json.loads(response.read())["r"] == RANK, "adapter_config.json has another rank")
    seconds = answer.expires.timestamp() - time.time()
    check(0 < seconds < 86_400, f"the URLs expire in {seconds} s")
    done(world.rest.delete_checkpoint_from_tinker_path(saved.path))


@feature("REST: sessions and samplers")
def sessions(world):
    _, path = world.state
    session_id, run_id = path.split("/")[2].split(":")[0], path.split("/")[2]
    listed = done(world.rest.list_sessions(limit=100))
    check(session_id in listed.sessions, f"{session_id} is not among {listed.sessions}")
    session = done(world.rest.get_session(session_id))
    check(run_id in session.training_run_ids, f"{session!r}")
    sampler = done(world.rest.get_sampler(session.sampler_ids[0]))
    check(sampler.base_model == BASE, f"{sampler!r}")


@feature("REST: search sessions, assign a project")
def search_sessions(world):
    session_id = world.state[1].split("/")[2].split(":")[0]
    done(method(world.rest, "assign_session_project")(session_id, "a-project"))
    search = method(world.rest, "search_sessions")
    wanted = {"project_ids": ["a-project"], "user_metadata": {"from": "conformance"}}
    found = done(search(types.SessionSearchRequest(**wanted))).sessions
    check([s.session_id for s in found] == [session_id], f"found {found!r}")
    check(found[0].checkpoints_count >= 1, f"{found[0]!r}")


@feature("session heartbeat and finish")
def finish(world):
    """After it the session takes no more heartbeats (410)."""
    service = tinker.ServiceClient(base_url=world.url, api_key="tml-conformance")
    close_service = method(service, "close")
    training = done(service.create_lora_training_client(BASE, rank=RANK))
    session_id = training.get_info().model_id.split(":")[0]
    beat = {"session_id": session_id, "type": "session_heartbeat"}
    check(world.post("session_heartbeat", beat) == 200, "the living session took no heartbeat")
    done(close_service("success"))
    status = world.post("session_heartbeat", beat)
    check(status == 410, f"the finished session answered a heartbeat with {status}")


# --- what is not offered --------------------------------------------------------------------------


@refused("optimizer dimuon")
def dimuon(world):
    config = method(types, "DimuonOptimizerConfig")
    create = world.service.create_lora_training_client
    return done(call(create, BASE, rank=RANK, optimizer=config()))


@refused("loss stable_reinforce")
def stable_reinforce(world):
    if version() < (0, 35):
        raise Absent("stable_reinforce")
    inputs = {"target_tokens": TARGETS, "logprobs": WEIGHTS, "advantages": ADVANTAGES}
    return done(world.create().forward_backward([datum(**inputs)], "stable_reinforce"))


@refused("images in prompts")
def images(world):
    image = types.ImageChunk(data=b"\x89PNG\r\n\x1a\n", format="png", expected_tokens=4)
    prompt = types.ModelInput(chunks=[image, types.EncodedTextChunk(tokens=TOKENS)])
    return world.sample(prompt=prompt)


@refused("billing: usage")
def billing(world):
    import datetime

    day = datetime.datetime(2026, 1, 1)
    usage = method(world.rest, "get_billing_usage")
    return done(usage(day, day + datetime.timedelta(days=1)))


@refused("billing: checkpoint storage")
def storage(world):
    return done(method(world.rest, "get_current_checkpoint_storage_usage")())


@refused("audit log")
def audit(world):
    return done(method(world.rest, "get_audit_log")())


@refused("export_session_trace")
def trace(world):
    session_id = world.state[1].split("/")[2].split(":")[0]
    return done(method(world.rest, "export_session_trace")(session_id))


# --- running --------------------------------------------------------------------------------------


def run(function, world, is_refusal):
    """(state, detail) of one feature, whatever it does."""
    try:
        value = function(world)
    except Absent as exc:
        return "absent", str(exc)
    except Exception as exc:
        if is_refusal:
            return refusal(exc)
        place = traceback.extract_tb(exc.__traceback__)[-1]
        where = f"{place.filename.rsplit('/', 1)[-1]}:{place.lineno}"
        return "fails", f"{type(exc).__name__} at {where}: {exc}"
    return ("fails", "it was not refused") if is_refusal else ("works", value or "")


def refusal(exc):
    """The server's own sentence; it must say that the caller can fix it."""
    body = getattr(exc, "body", None)
    sentence, category = str(exc), getattr(exc, "category", None)
    if isinstance(body, dict):
        sentence, category = body.get("error"), body.get("category")
    sentence = str(sentence).split(" for self.request_id=")[0].removeprefix("Request failed: ")
    if "user" not in str(category).lower():
        return "fails", f"refused with category {category}: {sentence}"
    return "refused", sentence


def timed(name, function, world, is_refusal):
    result = []
    start = time.monotonic()
    thread = threading.Thread(
        target=lambda: result.append(run(function, world, is_refusal)), daemon=True
    )
    thread.start()
    thread.join(SECONDS)
    state, detail = result[0] if result else ("fails", f"no end after {SECONDS} s")
    seconds = round(time.monotonic() - start, 2)
    line = {"feature": name, "state": state, "detail": detail, "seconds": seconds}
    print(json.dumps(line), flush=True)


def is_wanted(name, words):
    unwanted = [word[1:] for word in words if word.startswith("-")]
    wanted = [word for word in words if not word.startswith("-")] or [""]
    return any(w in name for w in wanted) and not any(w in name for w in unwanted)


def main(url, tokenizer_file, *words):
    world = World(url, tokenizer_file)
    for is_refusal, features in ((False, FEATURES), (True, REFUSED)):
        for name, function in features:
            if is_wanted(name, words):
                timed(name, function, world, is_refusal)
    if hasattr(world.service, "close"):
        done(world.service.close("success"))


if __name__ == "__main__":
    main(*sys.argv[1:])
