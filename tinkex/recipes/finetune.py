"""`tinkex.finetune`: supervised fine-tuning in one call; `tinkex train` is the same with flags.

Starts or resumes a run in its folder, restarts the embedded engine if it dies, and reports the end.
The training is in supervised.py.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import attrs

from tinkex import errors
from tinkex.data import files
from tinkex.recipes import (
    config_file,
    given_data,
    notebook,
    run_folder,
    start_from,
    supervised,
    trackers,
)
from tinkex.recipes import report as reports
from tinkex.recipes.callbacks import Callbacks, End
from tinkex.recipes.callbacks import check as check_callback
from tinkex.recipes.loop import Guard, Report
from tinkex.recipes.run import Run
from tinkex.recipes.run_folder import State
from tinkex.recipes.settings import Settings
from tinkex.service import ServiceClient
from tinkex.text import registry, tokenizer

logger = logging.getLogger("tinkex")

#: How many times a run restarts the embedded engine after it has died.
RESTARTS = 3


class UsageError(ValueError):
    """The arguments of a run contradict each other."""


@attrs.frozen
class Recipe:
    """What is trained, and how.

    Attributes:
        name: of the command.
        function: name of the Python function.
        settings: the class of its settings.
        run: trains; takes the arguments of `supervised.run`.
        unused: settings that do not apply to it, and are not options of the command.
    """

    name: str
    function: str
    settings: type[Settings]
    run: Callable[..., object]
    unused: frozenset[str] = frozenset()


SUPERVISED = Recipe("train", "finetune", Settings, supervised.run)


def finetune(
    data: Any = None,
    base_model: str | None = None,
    output: str | Path = "run",
    *,
    eval_data: Any = None,
    resume: bool = False,
    base_url: str | None = None,
    api_key: str | None = None,
    service: ServiceClient | None = None,
    callbacks: Sequence[Any] = (),
    progress: bool = True,
    **settings: Any,
) -> Run:
    """
    Fine-tune *base_model* on *data*, evaluate it on held-out examples, and write a PEFT adapter.

    The same as `tinkex train`: a run started by one can be resumed by the other. Ctrl-C saves a
    checkpoint and then raises KeyboardInterrupt; a second Ctrl-C raises it at once.

    Args:
        data: a path, or several; a list of dicts, a DataFrame or a `datasets.Dataset`, with rows as
            `tinkex train` reads them; or an iterable of `types.Datum`. Objects are stored as
            data.jsonl in *output*. None uses the data of the resumed run.
        base_model: "smollm2", "tiny", a model directory, a GGUF file, or a hub id.
        output: folder of the run; it is created.
        eval_data: held-out examples, given like *data*; None holds out a part of *data*.
        resume: continue the run in *output*, if there is one, with its settings where none are
            given.
        base_url, api_key: of the server; without them (and without TINKER_*) the embedded engine.
        service: a client to use instead; it stays open.
        callbacks: objects like `tinkex.Callback`, which receive the events of the run.
        progress: show a progress bar on stderr, or in a notebook together with a plot of the
            losses.
        settings: fields of `tinkex.recipes.settings.Settings`: rank, learning_rate, batch_size,
            epochs, report_to and others; see docs/finetune.md.

    Raises:
        ValueError: If a setting or the data is invalid; *output* is in use or already holds a run;
            or the run to resume has other settings or data.
        TypeError: If a callback or *data* has a wrong type.
        DivergedError: If the loss is not finite, or stays far above the first one.
        TinkexError: If a request to the server fails. The run can be resumed.
        KeyboardInterrupt: After Ctrl-C. The run can be resumed.
    """

    return call(
        SUPERVISED,
        data,
        {**settings, "base_model": base_model} if base_model is not None else settings,
        output,
        eval_data=eval_data,
        resume=resume,
        base_url=base_url,
        api_key=api_key,
        service=service,
        callbacks=callbacks,
        progress=progress,
    )


def call(
    recipe: Recipe,
    data: Any,
    settings: Mapping[str, Any],
    output: str | Path,
    *,
    eval_data: Any = None,
    resume: bool = False,
    base_url: str | None = None,
    api_key: str | None = None,
    service: ServiceClient | None = None,
    callbacks: Sequence[Any] = (),
    progress: bool = True,
) -> Run:
    """`finetune` for any recipe; same arguments and errors."""
    from tinkex.cli import progress as terminal  # tqdm is slow to import

    if service is not None and (base_url is not None or api_key is not None):
        raise ValueError("give either service, or base_url and api_key; not both.")

    def connect() -> AbstractContextManager[ServiceClient]:
        return nullcontext(service) if service else ServiceClient(base_url, api_key)

    for callback in callbacks:
        check_callback(callback)
    shown = [notebook.LossPlot()] if progress and terminal.is_notebook() else []
    folder = Path(output)
    try:
        with run_folder.locked(folder), terminal.CtrlC(is_last_resort=False) as ctrl_c:
            start(
                data,
                settings,
                folder,
                connect,
                terminal.Progress(quiet=not progress),
                recipe=recipe,
                eval_data=eval_data,
                resume=resume,
                callbacks=[*callbacks, *shown],
                guard=ctrl_c.deferred,
                base_url=base_url,
            )
    except ValueError as exc:
        raise _in_python(exc) from exc
    run = Run(folder, base_url or (service.base_url if service else None), api_key)
    if not run.is_finished:
        raise KeyboardInterrupt(
            f"{run.description}; call {recipe.function} again with resume=True to continue."
        )
    return run


def _in_python(exc: ValueError) -> ValueError:
    """The error with flags written as Python arguments: --eval-every as eval_every."""
    text = re.sub(r"--([a-z][a-z-]*)", lambda match: match[1].replace("-", "_"), str(exc)).replace(
        "with resume,", "with resume=True,"
    )
    if text == str(exc) or len(exc.args) != 1:
        return exc
    exc.args = (text,)
    return exc


def start(
    data: Any,
    given: Mapping[str, Any],
    folder: Path,
    connect: Callable[[], AbstractContextManager[ServiceClient]],
    report: Report,
    *,
    recipe: Recipe = SUPERVISED,
    eval_data: Any = None,
    resume: bool = False,
    callbacks: Sequence[Any] = (),
    guard: Guard = lambda: nullcontext(lambda: False),
    fetched: Callable[[str], str] = lambda base_model: base_model,
    base_url: str | None = None,
) -> Run:
    """
    Start or resume the run in *folder*, which the caller has locked, and train to its end.

    Args:
        data, eval_data: as for `finetune`.
        given: settings by name; missing ones get the resumed run's values, or the defaults.
        connect: opens a client, which is closed at the end; called again if the engine dies.
        guard: as for `supervised.run`.
        fetched: fetches the base model before its tokenizer is needed; returns its directory.
        base_url: of the server, for config.yaml.

    Returns:
        The run; it is not finished if it was stopped.

    Raises:
        UsageError: If there is a run already, or an argument is missing.
        ValueError, TinkexError: As for `finetune`.
    """
    known = [field.name for field in attrs.fields(recipe.settings)]
    config_file.check_keys(given, known, "settings")
    state = _state(folder, resume)
    wanted = _wanted(recipe, given, state, connect)
    if data is None and state is None:
        raise UsageError("Missing DATA.")
    receivers = Callbacks([*trackers.create(wanted.report_to or []), *callbacks])
    told, told_eval = (state.data, state.eval_data) if state else (None, None)
    file = given_data.read(data, told, wanted, folder / given_data.FILE)
    held_out = None
    if eval_data is not None or told_eval:
        path = folder / f"eval-{given_data.FILE}"
        held_out = given_data.read(eval_data, told_eval, wanted, path)
    if state is not None:
        run_folder.check_same(state, wanted, file, held_out)
        if state.is_finished and not state.goes_further(wanted):
            report.say(f"The run in {folder} is already finished.")
            return Run(folder)
    run_folder.check_space(folder)
    tokenizer_if_known = _known_tokenizer(fetched(wanted.base_model))
    if state is None:
        _write_config(folder, recipe, file, held_out, wanted, base_url)

    def train(service: ServiceClient, state: State | None) -> None:
        recipe.run(
            service,
            file,
            wanted,
            folder,
            report,
            state,
            guard,
            eval_data=held_out,
            tokenizer=tokenizer_if_known,
            callbacks=receivers,
        )

    return _reported(
        lambda: _restarting(train, state, folder, connect, report, receivers), folder, receivers
    )


def _state(folder: Path, resume: bool) -> State | None:
    """The state of the run to resume; None for a new run."""
    state = run_folder.load_state(folder)
    if state is not None and not state.has_begun and not resume:
        return None  # it failed before it created a model
    if state is not None and not resume:
        raise UsageError(
            f"{folder} already contains a run ({Run(folder).description}). Continue it with "
            "--resume, or start a new run with a different --output."
        )
    return state


def _wanted(
    recipe: Recipe,
    given: Mapping[str, Any],
    state: State | None,
    connect: Callable[[], AbstractContextManager[ServiceClient]],
) -> Settings:
    given = dict(given)
    given["base_model"] = given.get("base_model") and tokenizer.resolve_base_model(
        given["base_model"]
    )
    if isinstance(given.get("prompts"), (str, Path)):
        given["prompts"] = given_data.read_prompts(Path(given["prompts"]))
    if given.get("start_from") is not None and (
        state is None or not str(given["start_from"]).startswith("tinker://")
    ):
        given |= start_from.resolve(given, connect)
    if state is not None:
        if not isinstance(state.settings, recipe.settings):
            raise UsageError(
                f"the run to resume has method {state.settings.method}, which `tinkex "
                f"{recipe.name}` does not offer; start a new run with a different --output."
            )
        given = {key: value for key, value in given.items() if value is not None}
        return attrs.evolve(state.settings, **given)
    if given["base_model"] is None:
        raise UsageError("Missing --base-model.")
    return recipe.settings(**given)


def _known_tokenizer(base_model: str) -> Any:
    """The tokenizer, to check data before the model is loaded; None if only the server has it."""
    if base_model in registry.KNOWN:  # our own short names are not names on the hub
        return None
    try:
        return tokenizer.load(tokenizer.tokenizer_id(base_model))
    except errors.TinkexError:
        return None


def _write_config(
    folder: Path,
    recipe: Recipe,
    data: files.DataFile,
    eval_data: files.DataFile | None,
    wanted: Settings,
    base_url: str | None,
) -> None:
    values = {
        "data": list(data.sources),
        "eval_data": list(eval_data.sources) if eval_data else None,
        **attrs.asdict(wanted, filter=lambda field, _: field.name not in recipe.unused),
        "base_url": base_url,
    }
    folder.mkdir(parents=True, exist_ok=True)
    command = f"tinkex {recipe.name} --config config.yaml --output NEW_FOLDER"
    heading = f"# Starts the same run again: {command}\n"
    (folder / "config.yaml").write_text(heading + config_file.text(values), encoding="utf-8")


def _restarting(
    train: Callable[[ServiceClient, State | None], None],
    state: State | None,
    folder: Path,
    connect: Callable[[], AbstractContextManager[ServiceClient]],
    report: Report,
    callbacks: Callbacks,
) -> None:
    """Train; if the engine dies, resume from the last checkpoint with a new engine."""
    restarts = 0
    while True:
        began = False
        try:
            with connect() as service:
                began = True
                train(service, state)
            return
        except errors.EngineError as exc:
            if not began or restarts == RESTARTS:
                raise
            restarts += 1
            state = run_folder.load_state(folder)
            step = 0 if state is None else state.step
            report.say(
                f"{exc} Starting it again and resuming after step {step} "
                f"({restarts} of {RESTARTS})."
            )
            callbacks.restart(Run(folder), str(exc))


def _reported(train: Callable[[], None], folder: Path, callbacks: Callbacks) -> Run:
    """Train, and report how it ended."""
    run = Run(folder)
    try:
        train()
    except Exception as exc:
        callbacks.end(run, End("failed", str(exc)))
        raise
    except KeyboardInterrupt:
        callbacks.end(run, End("stopped"))
        raise
    try:
        reports.write(run)
    except OSError as exc:  # a failed report must not fail the run
        logger.warning("The report of the run could not be written: %s", exc)
    callbacks.end(run, End("finished" if run.is_finished else "stopped"))
    return run
