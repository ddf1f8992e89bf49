"""`tinkex train`: start or resume a supervised run, and print its result.

Imports happen when the command runs, so that `tinkex --help` is fast.
"""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import click
from click.core import ParameterSource

from tinkex.cli import formatting
from tinkex.cli.model import fetched
from tinkex.cli.options import data_options, is_quiet, server_options

if TYPE_CHECKING:  # only annotations need these: --help must not import numpy and requests
    from tinkex.data import files
    from tinkex.recipes import run_folder, settings, supervised

#: How often a run starts the embedded engine again after that has died.
RESTARTS = 3


@click.command()
@click.argument("data", nargs=-1)
@click.option(
    "--base-model",
    help="smollm2 (fetched once), tiny (built in), a model directory, a GGUF file, or a hub id.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder for metrics, checkpoint state and the adapter.",
)
@click.option("--resume", is_flag=True, help="Continue the run in --output with its settings.")
@click.option(
    "--rank",
    type=click.IntRange(1),
    default=32,
    show_default=True,
    help="Rank of the LoRA adapter.",
)
@click.option(
    "--learning-rate",
    type=click.FloatRange(0, min_open=True),
    default=1e-4,
    show_default=True,
    help="Highest learning rate of AdamW.",
)
@click.option(
    "--schedule",
    type=click.Choice(["constant", "linear", "cosine"]),
    default="constant",
    show_default=True,
    help="Learning rate after the warmup: constant, or falling to 0 at the end.",
)
@click.option(
    "--warmup-steps",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Steps in which the learning rate rises from 0.",
)
@click.option(
    "--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Examples per step."
)
@click.option(
    "--epochs",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Passes over the examples.",
)
@click.option("--max-steps", type=click.IntRange(1), help="Stop after this many steps.")
@click.option(
    "--max-length",
    type=click.IntRange(2),
    default=1024,
    show_default=True,
    help="Maximum tokens per example; longer ones are cut.",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Seed of the adapter, of the order of the data and of the held-out part.",
)
@click.option(
    "--eval-fraction",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.05,
    show_default=True,
    help="Fraction of the examples that is held out for evaluation.",
)
@click.option(
    "--eval-every",
    type=click.IntRange(1),
    help="Steps between two evaluations. Default: a tenth of the run.",
)
@click.option(
    "--save-every",
    type=click.IntRange(1),
    help="Steps between two checkpoints. Default: a tenth of the run.",
)
@click.option(
    "--train-mlp/--no-train-mlp",
    default=True,
    show_default=True,
    help="Train adapters in the MLPs.",
)
@click.option(
    "--train-attn/--no-train-attn",
    default=True,
    show_default=True,
    help="Train adapters in the attention layers.",
)
@click.option(
    "--train-unembed/--no-train-unembed",
    default=True,
    show_default=True,
    help="Train an adapter in the unembedding; some inference servers cannot load it.",
)
@click.option(
    "--from",
    "start_from",
    metavar="RUN|ADAPTER|tinker://...",
    help="Start with the weights of another run, of a PEFT adapter folder (local engine only), or "
    "of a checkpoint on the server.",
)
@click.option(
    "--eval-data",
    multiple=True,
    metavar="FILE",
    help="Evaluate on these examples instead of a part of DATA. May be repeated.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    envvar="TINKEX_DTYPE",
    show_envvar=True,
    help="Number type of base weights in the embedded engine; bfloat16 halves the memory on a CPU. "
    "Default: float32 on a CPU, bfloat16 on an accelerator.",
)
@data_options
@server_options
@click.pass_context
def train(
    context: click.Context,
    data: tuple[str, ...],
    eval_data: tuple[str, ...],
    output: Path,
    resume: bool,
    base_url: str | None,
    api_key: str | None,
    dtype: str | None,
    **given: Any,
) -> int:
    """Fine-tune a model on DATA.

    DATA is one or more files or folders (- is standard input, hf://org/name a Hugging Face data
    set) of JSON lines, a JSON array, CSV, TSV or Parquet. A row is {"messages": [{"role": ...,
    "content": ...}, ...]}, {"prompt": ..., "completion": ...}, {"text": ...}, or in the format of
    ShareGPT or Alpaca. The model learns the assistant's messages, the completions and the texts.

    Ctrl-C (or SIGTERM) saves a checkpoint. --resume --output FOLDER continues from it and ends with
    the same weights as an uninterrupted run. With --resume, omitted options keep their values.
    """
    from tinkex.recipes import run_folder

    if dtype is not None:
        if base_url is not None and _is_explicit(context, "dtype"):
            raise click.UsageError(
                "--dtype applies to the embedded engine only; start the server at --base-url with "
                "`tinkex serve --dtype` instead."
            )
        os.environ["TINKEX_DTYPE"] = dtype  # read by the embedded engine's `tinkex serve`
    if resume and not output.exists():
        _check_folder(output, None, resume)
    with run_folder.locked(output):
        return _train(context, data, eval_data, output, resume, base_url, api_key, given)


def _train(
    context: click.Context,
    data: tuple[str, ...],
    eval_data: tuple[str, ...],
    output: Path,
    resume: bool,
    base_url: str | None,
    api_key: str | None,
    given: dict[str, Any],
) -> int:
    """The command, when no other process uses the folder."""
    from tinkex import ServiceClient, errors
    from tinkex.cli import progress
    from tinkex.recipes import run_folder, settings, supervised
    from tinkex.text.tokenizer import resolve_base_model

    state = run_folder.load_state(output)
    if state is not None and not state.has_begun and not resume:
        state = None  # it failed before it created a model
    _check_folder(output, state, resume)
    given["base_model"] = given["base_model"] and resolve_base_model(given["base_model"])
    if state is not None:
        data = data or tuple(state.data.splitlines())
        eval_data = eval_data or tuple((state.eval_data or "").splitlines())
        given = {name: value for name, value in given.items() if _is_explicit(context, name)}
        wanted = attrs.evolve(state.settings, **given)
    else:
        _start_from(given, base_url, api_key)
        if not data or given["base_model"] is None:
            raise click.UsageError(f"Missing {'--base-model' if data else 'DATA'}.")
        wanted = settings.Settings(**given)
    file = _read(data, wanted)
    held_out = _read(eval_data, wanted) if eval_data else None
    if state is not None:
        run_folder.check_same(state, wanted, file, held_out)
        if state.is_finished:
            click.echo(f"The run in {output} is already finished.", err=True)
            return 0
    run_folder.check_space(output)
    tokenizer = _tokenizer(fetched(wanted.base_model, base_url, api_key))
    report = progress.Progress(quiet=is_quiet())
    restarts = 0
    with progress.CtrlC() as ctrl_c:
        while True:
            began = False
            try:
                with ServiceClient(base_url=base_url, api_key=api_key) as service:
                    began = True
                    outcome = supervised.run(
                        service,
                        file,
                        wanted,
                        output,
                        report,
                        state,
                        ctrl_c.deferred,
                        eval_data=held_out,
                        tokenizer=tokenizer,
                    )
                break
            except errors.EngineError as exc:
                if not began or restarts == RESTARTS:
                    _print_resume_command(output)
                    raise
                restarts += 1
                state = run_folder.load_state(output)
                step = 0 if state is None else state.step
                report.say(
                    f"{exc} Starting it again and resuming after step {step} "
                    f"({restarts} of {RESTARTS})."
                )
            except (errors.TinkexError, KeyboardInterrupt):
                _print_resume_command(output)
                raise
    if outcome.adapter is None:
        _print_resume_command(output)
        return ctrl_c.status
    _print_outcome(outcome, output)
    return 0


def _read(sources: tuple[str, ...], wanted: settings.Settings) -> files.DataFile:
    from tinkex.data import files

    return files.read(
        sources, wanted.skip_bad_lines, shape=wanted.data_format, renames=wanted.data_map
    )


def _tokenizer(base_model: str) -> Any:
    """The tokenizer, to check the data before the model is loaded; None if only the server has
    it."""
    from tinkex import errors
    from tinkex.text import registry, tokenizer

    if base_model in registry.KNOWN:  # a name of ours, and of nothing on the hub
        return None
    try:
        return tokenizer.load(tokenizer.tokenizer_id(base_model))
    except errors.TinkexError:
        return None


def _start_from(given: dict[str, Any], base_url: str | None, api_key: str | None) -> None:
    """Replace a run given as --from by its checkpoint, with its base model and rank."""
    from tinkex import ServiceClient
    from tinkex.recipes import peft_adapter, run_folder

    source = given["start_from"]
    if source is None:
        return
    if source.startswith("tinker://"):
        if given["base_model"] is None:
            with ServiceClient(base_url=base_url, api_key=api_key) as service:
                info = service.create_rest_client().get_weights_info_by_tinker_path(source)
            given |= {"base_model": info.base_model, "rank": info.lora_rank or given["rank"]}
        return
    folder = Path(source)
    state = run_folder.load_state(folder) or run_folder.load_state(folder.parent)
    if state is None and (folder / peft_adapter.CONFIG).is_file():
        _start_from_adapter(given, folder)
        return
    if state is None or state.checkpoint is None:
        raise click.UsageError(
            f"--from {source} is neither a run with a checkpoint, nor a PEFT adapter folder, nor "
            "a tinker:// path."
        )
    model = given["base_model"] or state.settings.base_model
    if model != state.settings.base_model:
        raise click.UsageError(
            f"--base-model is {model}, but the weights of --from {source} are for "
            f"{state.settings.base_model}."
        )
    given |= {"base_model": model, "start_from": state.checkpoint, "rank": state.settings.rank}


def _start_from_adapter(given: dict[str, Any], folder: Path) -> None:
    """Take over the rank and the layers of a PEFT adapter, and its base model if none is given."""
    from tinkex.recipes import peft_adapter
    from tinkex.text.tokenizer import resolve_base_model

    adapter = peft_adapter.read(folder)
    model = given["base_model"] or resolve_base_model(adapter.base_model)
    given |= {
        **attrs.asdict(adapter),
        "base_model": model or None,
        "start_from": str(folder.resolve()),
    }


def _is_explicit(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is ParameterSource.COMMANDLINE


def _check_folder(output: Path, state: run_folder.State | None, resume: bool) -> None:
    if resume and state is None:
        raise click.UsageError(
            f"there is no run to resume in {output}; omit --resume to start one."
        )
    if state is not None and not resume:
        raise click.UsageError(
            f"{output} already contains a run ({progress_of(state)}). Continue it with "
            "--resume, or "
            "start a new run with a different --output."
        )


def progress_of(state: run_folder.State) -> str:
    """Where a run stands, for a message: finished, or the step of its last checkpoint."""
    if state.is_finished:
        return "finished"
    return f"saved after step {state.step} of {state.total_steps or '?'}"


def _print_resume_command(output: Path) -> None:
    """Print on stderr where the run in *output* stands, and the command that resumes it."""
    from tinkex.recipes import run_folder

    state = run_folder.load_state(output)
    if state is not None and state.has_begun:
        command = f"tinkex train --resume --output {shlex.quote(str(output))}"
        click.echo(f"Stopped: {progress_of(state)}. Continue with:\n  {command}", err=True)


def _print_outcome(outcome: supervised.Outcome, output: Path) -> None:
    for shown in outcome.shown:
        formatting.say(f"prompt  {_one_line(shown.prompt)}")
        formatting.say(f"before  {_one_line(shown.before)}")
        formatting.say(f"after   {_one_line(shown.after)}\n")
    if outcome.losses is not None:
        before, after = outcome.losses
        formatting.say(
            f"Held-out loss per token: {before:.4f} before, {after:.4f} after "
            f"({(after - before) / before:+.1%})."
        )
    formatting.say(f"Adapter: {outcome.adapter}")
    formatting.say(f"Try it:  tinkex sample {shlex.quote(str(output))} --prompt '...'")


def _one_line(text: str, width: int = 300) -> str:
    line = json.dumps(text, ensure_ascii=False)
    return line if len(line) <= width else "..." + line[-width:]
