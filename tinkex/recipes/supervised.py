"""Fine-tuning on a data file: data and settings in, a PEFT adapter out.

The objective is `CrossEntropy`, or `Preferences` for pairs of answers (preference_pairs.py);
loop.py runs it. Does not know about the command line, the terminal or signals: it takes a Report
and a guard.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from datetime import date as Date
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from tinkex import types
from tinkex.data import datums, files, records
from tinkex.data.split import split
from tinkex.recipes import loop, preference_losses, preference_pairs
from tinkex.recipes.callbacks import Callbacks
from tinkex.recipes.loop import Guard, Loop, Objective, Prompt, Report, Work
from tinkex.recipes.run import Run
from tinkex.recipes.run_folder import State, check_same, load_state, save_state
from tinkex.recipes.settings import Settings
from tinkex.service import ServiceClient
from tinkex.text.renderer import Renderer
from tinkex.text.tokenizer import resolve_base_model
from tinkex.training import TrainingClient

#: Held-out examples per evaluation request.
EVALUATED_AT_ONCE = 64
#: Held-out examples whose completions are shown before and after training.
SHOWN_EXAMPLES = 3


@attrs.frozen
class Shown:
    """A held-out prompt and the model's completions of it, at most `loop.SHOWN_TOKENS` tokens."""

    prompt: str
    before: str
    after: str


@attrs.frozen
class Outcome:
    """How a run ended: with an adapter, or stopped before its end (adapter is None)."""

    state: State
    adapter: Path | None = None
    shown: Sequence[Shown] = ()
    losses: tuple[float, float] | None = None  # held out, per token: before, after


def outcome(run: Run) -> Outcome:
    """How the run in a folder ended, from its files."""
    state = load_state(run.folder)
    if state is None:
        raise ValueError(f"there is no run in {run.folder}.")
    shown = [Shown(*words) for words in zip(state.prompts, state.before or [], state.after)]
    evaluated = [row["eval_loss"] for row in run.metrics if "eval_loss" in row]
    last = state.best["eval_loss"] if state.settings.tracks_best and state.best else None
    losses = (evaluated[0], last or evaluated[-1]) if evaluated else None
    return Outcome(state, run.adapter, shown, losses)


# The run


def run(
    service: ServiceClient,
    data: files.DataFile,
    settings: Settings,
    folder: Path,
    report: Report,
    state: State | None = None,
    guard: Guard = lambda: nullcontext(lambda: False),
    *,
    eval_data: files.DataFile | None = None,
    tokenizer: Any = None,
    callbacks: Callbacks | None = None,
) -> Outcome:
    """
    Train, and write the adapter to *folder*.

    Args:
        state: of the run to resume, from `load_state`; None starts one.
        guard: entered around the training loop; returns a function that returns True when the run
            should stop. A checkpoint is then saved within `loop.STOP_SECONDS`, and the outcome is
            not finished.
        eval_data: held out instead of a part of *data*.
        tokenizer: the base model's, if known before the model is loaded, so that invalid data is
            refused earlier. None requests it from the server.
        callbacks: receive the events of the run, except its end.

    Raises:
        ValueError: If the settings or the data differ from those of *state*, or the data is
            invalid.
        DivergedError: If the loss is not finite, or stays far above the first one.
        TinkexError: If a request to the server fails.
    """
    before = state
    state = begun(settings, state, data, eval_data)
    settings = state.settings
    data = _of_method(data, settings.method)
    eval_data = eval_data and _of_method(eval_data, settings.method)
    folder.mkdir(parents=True, exist_ok=True)
    prepared = None
    if tokenizer is not None:
        prepared = _prepare(data, eval_data, settings, tokenizer, folder, report)
    save_state(folder, state)
    training = open_training(service, state)
    try:
        theirs = training.get_tokenizer()
        if prepared is None or not _is_same(tokenizer, theirs):
            prepared = _prepare(data, eval_data, settings, theirs, folder, report)
        report.say(prepared.description)
        say_reach(training, settings, report)
        objective = _objective(service, training, prepared, theirs, state, folder)
        trainer = Loop(
            service,
            training,
            theirs,
            objective,
            attrs.evolve(state, counts=prepared.counts),
            Run(folder),
            report,
            callbacks or Callbacks(),
        )
        if before is not None and before.goes_further(settings):
            report.say(further(before, settings, trainer.total))
        with guard() as is_stopped:
            is_complete = trainer.run(is_stopped)
        if is_complete:
            trainer.finish()
        return outcome(Run(folder))
    finally:
        training.close()


def further(before: State, settings: Settings, total: int) -> str:
    """A message: the run of *before* now ends at step *total*, and what this means."""
    if total == before.total_steps:
        return f"The run ends at step {total} as before: see --epochs and --max-steps."
    text = f"The run continues to step {total} instead of {before.total_steps}."
    step = before.step + 1
    if settings.schedule == "constant" or before.step <= settings.warmup_steps:
        return f"{text} It ends as a run to step {total} from the start would."
    was = settings.learning_rate_at(before.step, before.total_steps)
    return (
        f"{text} The {settings.schedule} schedule now falls to 0 there: the learning rate goes "
        f"from {was:.3g} at step {before.step} to {settings.learning_rate_at(step, total):.3g} at "
        f"step {step}. A run to step {total} from the start would have had higher rates so far, "
        "and ends in other weights."
    )


def begun(
    settings: Settings,
    state: State | None,
    data: files.DataFile,
    eval_data: files.DataFile | None,
) -> State:
    """
    The state of a new run, or *state* of one that is resumed, with complete settings.

    The settings then have the model's absolute path, and a date, so that the run is reproducible.

    Raises:
        ValueError: If the settings or the data differ from those of *state*.
    """
    today = state.settings.date if state is not None else Date.today().isoformat()
    settings = attrs.evolve(
        settings,
        base_model=resolve_base_model(settings.base_model),
        date=settings.date or today,
    )
    if state is None:
        state = State(
            settings,
            "\n".join(data.sources),
            data.sha256,
            eval_data="\n".join(eval_data.sources) if eval_data else None,
            eval_sha256=eval_data.sha256 if eval_data else None,
        )
    check_same(state, settings, data, eval_data)
    if state.goes_further(settings):
        state = attrs.evolve(state, sampler_path=None)
    return attrs.evolve(state, settings=settings)


def _is_same(ours: Any, theirs: Any) -> bool:
    fingerprint = getattr(ours, "fingerprint", None)
    return ours is theirs or (
        fingerprint is not None and fingerprint == getattr(theirs, "fingerprint", None)
    )


def open_training(service: ServiceClient, state: State) -> TrainingClient:
    """A client of a new model, of given weights, or of the last checkpoint with its optimizer."""
    if state.checkpoint is not None:
        return service.create_training_client_from_state_with_optimizer(state.checkpoint)
    settings = state.settings
    start = settings.start_from
    if start is not None and start.startswith("tinker://"):
        return service.create_training_client_from_state(start)
    return service.create_lora_training_client(
        settings.base_model,
        rank=settings.rank,
        seed=settings.seed,
        train_mlp=settings.train_mlp,
        train_attn=settings.train_attn,
        train_unembed=settings.train_unembed,
        adapter=start,
    )


def say_reach(training: TrainingClient, settings: Settings, report: Report) -> None:
    """Report if the server has chosen not to adapt the head."""
    if settings.train_unembed is None and training.get_info().train_unembed is False:
        report.say(
            "The head is tied to the embedding, so it gets no adapter (--train-unembed adds one)."
        )


# The data


def _of_method(data: files.DataFile, method: str) -> files.DataFile:
    return data if method == "sft" else preference_pairs.as_conversations(data, method)


@attrs.frozen
class _Prepared:
    """The examples to train on and to evaluate on.

    Attributes:
        is_chat: True if the data is conversations.
        pairs, held_out_pairs: the same examples as pairs, for preference methods.
        counts: of the data, and of what was omitted.
        notes: messages about what was omitted.
        conversations: of the shown held-out examples; () for examples without one.
    """

    examples: list[datums.Example]
    held_out: list[datums.Example]
    is_chat: bool
    counts: dict[str, int]
    notes: str
    pairs: list[preference_pairs.Pair]
    held_out_pairs: list[preference_pairs.Pair]
    conversations: list[Sequence[Mapping[str, Any]]]

    @property
    def description(self) -> str:
        what = "pairs" if self.pairs else "examples"
        return (
            f"{self.counts['examples']} {what} to train on, {self.counts['held_out']} held out"
            f"{self.notes}."
        )


def _prepare(
    data: files.DataFile,
    eval_data: files.DataFile | None,
    settings: Settings,
    tokenizer: Any,
    folder: Path,
    report: Report,
) -> _Prepared:
    """Render the data, or load what an earlier start of this run has rendered."""
    of_pair = 1 if settings.method == "sft" else 2  # examples that must stay together
    if of_pair == 2:
        settings = attrs.evolve(settings, train_on="assistant", split_turns=False)
    rendered = _rendered(data, settings, tokenizer, folder, report)
    if eval_data is not None:
        examples = rendered.examples
        held_out = _rendered(eval_data, settings, tokenizer, folder / "eval", report).examples
    else:
        # Conversations are held out as a whole, because their examples share most tokens.
        owners = sorted({example.record // of_pair for example in rendered.examples})
        held = {owners[i] for i in split(len(owners), settings.eval_fraction, settings.seed)[1]}
        examples = [e for e in rendered.examples if e.record // of_pair not in held]
        held_out = [e for e in rendered.examples if e.record // of_pair in held]
    pairs, held_out_pairs = [
        preference_pairs.paired(part) if of_pair == 2 else [] for part in (examples, held_out)
    ]
    if of_pair == 2 and not pairs:
        raise ValueError(
            "no pair is left to train on: in each, --max-length cuts one answer off; raise it."
        )
    counts = [
        (len(data.bad) + len(rendered.bad), "bad lines omitted"),
        (rendered.truncated, f"cut to --max-length {settings.max_length} tokens"),
        (rendered.dropped, "omitted, because none of their tokens counts"),
        (rendered.split, "conversations became several examples (see docs/train.md)"),
    ]
    notes = "".join(f"; {count} {what}" for count, what in counts if count)
    told = {
        "examples": len(pairs or examples),
        "held_out": len(held_out_pairs or held_out),
        "tokens": sum(len(example.tokens) for example in examples),
        "counted_tokens": int(datums.counted_tokens(examples)),
        "bad": counts[0][0],
        "truncated": rendered.truncated,
        "dropped": rendered.dropped,
        "split": rendered.split,
    }
    is_chat = isinstance(data.records[0], records.Chat)
    shown = [(eval_data or data).records[e.record] for e in held_out[:SHOWN_EXAMPLES]]
    conversations: list[Sequence[Mapping[str, Any]]] = [
        one.messages if isinstance(one, records.Chat) else () for one in shown
    ]
    return _Prepared(examples, held_out, is_chat, told, notes, pairs, held_out_pairs, conversations)


def _rendered(
    data: files.DataFile, settings: Settings, tokenizer: Any, folder: Path, report: Report
) -> datums.Rendered:
    folder.mkdir(parents=True, exist_ok=True)
    total = len(data.records)
    rendered = datums.cached(
        folder, data, tokenizer, settings.rendering, lambda done: report.rendered(done, total)
    )
    if rendered.bad and not settings.skip_bad_lines:
        raise files.refuse(data.name, rendered.bad)
    datums.check_some_are_left(rendered, total, settings.max_length)
    return rendered


# What is trained


def _objective(
    service: ServiceClient,
    training: TrainingClient,
    prepared: _Prepared,
    tokenizer: Any,
    state: State,
    folder: Path,
) -> Objective:
    settings = state.settings
    if settings.method == "sft":
        return CrossEntropy(prepared, tokenizer, settings)
    references = None
    if preference_pairs.needs_reference(settings.method):
        references = _references(service, training, prepared, state, folder)
    return preference_pairs.Preferences(
        prepared.pairs,
        prepared.held_out_pairs,
        settings.method,
        preference_losses.Options(settings.beta, settings.label_smoothing, settings.margin),
        references,
        tokenizer,
        prompts(settings.prompts or [], tokenizer, prepared.is_chat),
    )


def _references(
    service: ServiceClient,
    training: TrainingClient,
    prepared: _Prepared,
    state: State,
    folder: Path,
) -> tuple[preference_pairs.Reference, preference_pairs.Reference]:
    """The reference log-probabilities of the training pairs and of the held-out pairs."""
    with ExitStack() as stack:

        def untrained() -> TrainingClient:
            if state.checkpoint is None:
                return training
            # Resumed without the file of the first start: recreate the initial model.
            other = open_training(service, attrs.evolve(state, checkpoint=None))
            stack.callback(other.close)
            return other

        return (
            preference_pairs.reference(prepared.pairs, folder, "train", untrained),
            preference_pairs.reference(prepared.held_out_pairs, folder, "eval", untrained),
        )


class CrossEntropy:
    """The negative log-likelihood of the weighted tokens. An `Objective`."""

    falls = True

    def __init__(self, prepared: _Prepared, tokenizer: Any, settings: Settings) -> None:
        self._examples, self._held_out = prepared.examples, prepared.held_out
        self.examples = len(prepared.examples)
        self.is_evaluated = bool(prepared.held_out)
        self.shown: Sequence[Prompt] = [
            Prompt(e.prompt, _asked(messages, loop.decode(tokenizer, e.prompt.to_ints())))
            for e, messages in zip(prepared.held_out, prepared.conversations)
        ]
        self.prompts: Sequence[Prompt] = prompts(
            settings.prompts or [], tokenizer, prepared.is_chat
        )

    def train(self, training: TrainingClient, batches: Sequence[Sequence[int]]) -> Work:
        parts = [[self._examples[i] for i in batch] for batch in batches]
        everything = [example for part in parts for example in part]
        # The mean over the step's weighted tokens, so that the learning rate does not depend on
        # batch size and lengths.
        counted = datums.counted_tokens(everything)
        futures = [
            training.forward_backward([e.datum(1 / counted) for e in part], "cross_entropy")
            for part in parts
        ]

        def read(results: list[Any]) -> dict[str, float]:
            return {"train_loss": sum(map(_loss_sum, results, parts)) / counted}

        return Work(futures, read, sum(len(e.tokens) - 1 for e in everything))

    def evaluate(self, training: TrainingClient) -> Iterator[Work]:
        counted = datums.counted_tokens(self._held_out)
        parts = list(datums.slices(self._held_out, EVALUATED_AT_ONCE))
        losses: list[float] = []
        for part in parts:
            future = training.forward([e.datum() for e in part], "cross_entropy")

            def read(results: list[Any], part: Any = part) -> dict[str, float]:
                losses.append(_loss_sum(results[0], part))
                return {"eval_loss": sum(losses) / counted} if len(losses) == len(parts) else {}

            yield Work([future], read)


def prompts(texts: Sequence[str], tokenizer: Any, is_chat: bool) -> list[Prompt]:
    """*texts* as prompts: user messages if *is_chat*, otherwise text to continue."""
    render = Renderer(tokenizer)
    found = []
    for text in texts:
        if is_chat:
            rendered = render.prompt([{"role": "user", "content": text}])
            found.append(Prompt(rendered.model_input, text, rendered.stop or None))
        else:
            tokens = types.ModelInput.from_ints(render.encode_prompt(text))
            found.append(Prompt(tokens, text))
    return found


def _asked(messages: Sequence[Mapping[str, Any]], prompt: str) -> str:
    """The user's question in a prompt: the last user message in it, else the whole prompt.

    The rest was added by the chat template.
    """
    said = [message.get("content") for message in messages if message["role"] == "user"]
    words = [text for text in said if isinstance(text, str) and text.strip()]
    return next((text for text in reversed(words) if text.strip() in prompt), prompt)


def _loss_sum(output: types.ForwardBackwardOutput, batch: Sequence[datums.Example]) -> float:
    """
    Negative log-likelihood of the weighted tokens, summed, in nats.

    Computed from the log-probabilities instead of `loss:sum`, which is weighted, and which some
    servers omit in the response of forward.
    """
    return -sum(
        float(np.dot(out["logprobs"].to_numpy().astype(np.float64), example.counted[1:]))
        for out, example in zip(output.loss_fn_outputs, batch)
    )
