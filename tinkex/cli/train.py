"""`tinkex train`: start or resume a supervised run, and print its result.

Imports happen when the command runs, so that `tinkex --help` is fast.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
from click.core import ParameterSource

from tinkex.cli import formatting
from tinkex.cli.model import fetched
from tinkex.cli.options import (
    data_options,
    dtype_option,
    is_quiet,
    method_options,
    option,
    server_options,
    set_dtype,
)
from tinkex.recipes import trackers

if TYPE_CHECKING:  # only annotations need these: --help must not import numpy and requests
    from tinkex.recipes import finetune, supervised

#: Keys of a configuration file that are named after the flag -> the option's name.
_ALIASES = {"format": "data_format", "map": "data_map", "from": "start_from"}


class Prompts(click.ParamType):
    """A file of prompts, which is read; or the prompts, from a configuration file."""

    name = "file"

    def convert(self, value: Any, param: Any, ctx: click.Context | None) -> list[str]:
        from tinkex.recipes import given_data

        if isinstance(value, list):
            return value
        try:
            return given_data.read_prompts(Path(value))
        except (OSError, ValueError) as exc:
            self.fail(str(exc), param, ctx)


def _read_config(context: click.Context, option: click.Parameter, path: Path | None) -> None:
    """Use the values of the file as defaults of the other options."""
    from tinkex.recipes import config_file

    if path is None:
        return
    values = config_file.read(path)
    values = {_ALIASES.get(key, key): value for key, value in values.items()}
    known = [option.name for option in context.command.params if option.name]
    left_out = ("config", "dump_config", "resume", "help", "verbose", "quiet")
    config_file.check_keys(values, [name for name in known if name not in left_out], str(path))
    for key in ("data", "eval_data"):
        if isinstance(values.get(key), str):
            values[key] = [values[key]]
    if isinstance(values.get("report_to"), list):
        values["report_to"] = ",".join(values["report_to"])
    context.default_map = {key: value for key, value in values.items() if value is not None}


@click.command()
@click.argument("data", nargs=-1)
@click.option(
    "--base-model",
    help="smollm2 (fetched once), tiny (built in), a model directory, a GGUF file, or a hub id.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for metrics, checkpoint state and the adapter.",
)
@click.option("--resume", is_flag=True, help="Continue the run in --output with its settings.")
@option("--rank", click.IntRange(1), 32, "Rank of the LoRA adapter.")
@option(
    "--learning-rate", click.FloatRange(0, min_open=True), 1e-4, "Highest learning rate of AdamW."
)
@option(
    "--schedule",
    click.Choice(["constant", "linear", "cosine"]),
    "constant",
    "Learning rate after the warmup: constant, or falling to 0 at the end.",
)
@option("--warmup-steps", click.IntRange(0), 0, "Steps in which the learning rate rises from 0.")
@option("--batch-size", click.IntRange(1), 32, "Examples per step.")
@option("--epochs", click.IntRange(1), 1, "Passes over the examples.")
@click.option("--max-steps", type=click.IntRange(1), help="Stop after this many steps.")
@option("--max-length", click.IntRange(2), 1024, "Maximum tokens per example; longer ones are cut.")
@option(
    "--seed",
    click.IntRange(0),
    0,
    "Seed of the adapter, of the order of the data and of the held-out part.",
)
@option(
    "--eval-fraction",
    click.FloatRange(0, 1, max_open=True),
    0.05,
    "Fraction of the examples that is held out for evaluation.",
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
@option("--train-mlp/--no-train-mlp", None, True, "Train adapters in the MLPs.")
@option("--train-attn/--no-train-attn", None, True, "Train adapters in the attention layers.")
@click.option(
    "--train-unembed/--no-train-unembed",
    default=None,
    help="Train an adapter in the unembedding; some inference servers cannot load it. Default: "
    "yes, unless it is tied to the embedding.",
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
@option("--weight-decay", click.FloatRange(0), 0.0, "Weight decay of AdamW.")
@option(
    "--beta1", click.FloatRange(0, 1, max_open=True), 0.9, "Decay of AdamW's mean of the gradient."
)
@option(
    "--beta2",
    click.FloatRange(0, 1, max_open=True),
    0.95,
    "Decay of AdamW's mean of the squared gradient.",
)
@option(
    "--grad-clip-norm",
    click.FloatRange(0),
    0.0,
    "Largest L2 norm of a step's gradient; 0 does not clip.",
)
@option(
    "--gradient-accumulation",
    click.IntRange(1),
    1,
    "Batches per optimizer step, each of --batch-size examples.",
)
@click.option(
    "--patience",
    type=click.IntRange(1),
    help="Stop after this many evaluations without a lower held-out loss, with the weights of the "
    "best one.",
)
@click.option("--load-best", is_flag=True, help="End with the weights of the lowest held-out loss.")
@click.option(
    "--keep",
    type=click.IntRange(1),
    help="Newest checkpoints to keep on the server, besides the best. Default: all.",
)
@click.option(
    "--prompts",
    type=Prompts(),
    metavar="FILE",
    help="Sample from the model during training: one prompt per line, or JSON lines with prompt.",
)
@click.option(
    "--generate-every",
    type=click.IntRange(1),
    help="Steps between two samples of --prompts. Default: a tenth of the run.",
)
@click.option(
    "--report-to",
    metavar="TRACKER,...",
    help=f"Send settings, metrics and the adapter to trackers: {', '.join(trackers.names())}.",
)
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    is_eager=True,
    expose_value=False,
    callback=_read_config,
    help="Read options from a YAML, JSON or TOML file; options of the command line win.",
)
@click.option(
    "--dump-config", is_flag=True, help="Print the options as a configuration file, and exit."
)
@dtype_option(
    "Number type of base weights in the embedded engine; bfloat16 halves the memory on a CPU. "
    "Default: float32 on a CPU, bfloat16 on an accelerator."
)
@method_options
@data_options
@server_options
@click.pass_context
def train(context: click.Context, **options: Any) -> int:
    """Fine-tune a model on DATA.

    DATA is one or more files or folders (- is standard input, hf://org/name a Hugging Face data
    set) of JSON lines, a JSON array, CSV, TSV or Parquet. A row is {"messages": [{"role": ...,
    "content": ...}, ...]}, {"prompt": ..., "completion": ...}, {"text": ...}, or in the format of
    ShareGPT or Alpaca. The model learns the assistant's messages, the completions and the texts.
    With --method dpo and others, a row is {"prompt": ..., "chosen": ..., "rejected": ...}.

    Ctrl-C (or SIGTERM) saves a checkpoint. --resume --output FOLDER continues from it and ends with
    the same weights as an uninterrupted run. With --resume, omitted options keep their values.
    """
    from tinkex.recipes import finetune

    return launch(context, lambda: finetune.SUPERVISED, options)


class Common(NamedTuple):
    """Options of all training commands; all others are settings of the run."""

    data: tuple[str, ...]
    eval_data: tuple[str, ...]
    output: Path | None
    resume: bool
    dump_config: bool
    base_url: str | None
    api_key: str | None
    dtype: str | None


def launch(
    context: click.Context,
    recipe: Callable[[], finetune.Recipe],
    options: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
) -> int:
    """
    Run a training command: read the options that these commands share, and run *recipe*.

    Args:
        options: those of `Common`, and settings, which are used only if given explicitly.
        defaults: of settings, if they differ from the recipe's.
    """
    from tinkex.recipes import run_folder

    shared = {name: options[name] for name in Common.__annotations__}
    given = {name: value for name, value in options.items() if name not in shared}
    shared["data"] = shared["data"] or tuple((context.default_map or {}).get("data", ()))
    common, output = Common(**shared), options["output"]
    if common.dump_config:
        _dump_config(common.data, common.eval_data, given, common.base_url)
        return 0
    if output is None:
        raise click.UsageError("Missing option '--output'.")
    set_dtype(common.dtype, common.base_url, _is_explicit(context, "dtype"))
    if common.resume and not (output / "state.json").exists():
        raise click.UsageError(
            f"there is no run to resume in {output}; omit --resume to start one."
        )
    given = {name: value for name, value in given.items() if _is_explicit(context, name)}
    given = given if common.resume else {**(defaults or {}), **given}
    with run_folder.locked(output):
        return _train(recipe, common, output, given)


def _train(
    recipe: Callable[[], finetune.Recipe], common: Common, output: Path, given: dict[str, Any]
) -> int:
    """Run the command, with the folder locked."""
    from tinkex import ServiceClient, errors
    from tinkex.cli import progress
    from tinkex.recipes import finetune, run_folder, start_from, supervised

    try:
        chosen = recipe()
    except finetune.UsageError as exc:
        raise click.UsageError(str(exc)) from exc
    before = run_folder.load_state(output)
    with progress.CtrlC() as ctrl_c:
        try:
            run = finetune.start(
                common.data or None,
                given,
                output,
                lambda: ServiceClient(base_url=common.base_url, api_key=common.api_key),
                progress.Progress(quiet=is_quiet()),
                recipe=chosen,
                eval_data=common.eval_data or None,
                resume=common.resume,
                guard=ctrl_c.deferred,
                fetched=lambda name: fetched(name, common.base_url, common.api_key),
                base_url=common.base_url,
            )
        except (finetune.UsageError, start_from.StartError) as exc:
            raise click.UsageError(str(exc)) from exc
        except (errors.TinkexError, KeyboardInterrupt):
            _print_resume_command(chosen.name, output)
            raise
    if not run.is_finished:
        _print_resume_command(chosen.name, output)
        return ctrl_c.status
    if run_folder.load_state(output) != before:
        _print_outcome(supervised.outcome(run), output)
    return 0


def _dump_config(
    data: tuple[str, ...],
    eval_data: tuple[str, ...],
    given: dict[str, Any],
    base_url: str | None,
) -> None:
    from tinkex.recipes import config_file

    sources = {"data": list(data) or None, "eval_data": list(eval_data) or None}
    formatting.say(config_file.text({**sources, **given, "base_url": base_url}).rstrip("\n"))


def _is_explicit(context: click.Context, name: str) -> bool:
    """True if *name* was given: on the command line or in --config."""
    source = context.get_parameter_source(name)
    return source in (ParameterSource.COMMANDLINE, ParameterSource.DEFAULT_MAP)


def _print_resume_command(command: str, output: Path) -> None:
    """Print on stderr the progress of the run in *output*, and the command that resumes it."""
    from tinkex.recipes import run_folder

    state = run_folder.load_state(output)
    if state is not None and state.has_begun:
        resume = f"tinkex {command} --resume --output {shlex.quote(str(output))}"
        click.echo(f"Stopped: {state.progress}. Continue with:\n  {resume}", err=True)


def _print_outcome(outcome: supervised.Outcome, output: Path) -> None:
    for shown in outcome.shown:
        formatting.say(f"prompt  {_one_line(shown.prompt)}")
        formatting.say(f"before  {_one_line(shown.before)}")
        formatting.say(f"after   {_one_line(shown.after)}\n")
    if outcome.losses is not None:
        before, after = outcome.losses
        formatting.say(_comparison(outcome.state.settings.method, before, after))
    formatting.say(f"Adapter: {outcome.adapter}")
    formatting.say(f"Try it:  tinkex sample {shlex.quote(str(output))} --prompt '...'")


def _comparison(method: str, before: float, after: float) -> str:
    """The held-out measure before and after: a loss, or the reward."""
    if method == "rl":
        return f"Held-out reward: {-before:.4f} before, {-after:.4f} after."
    what = {
        "sft": "Held-out loss per token",
        "distill": "Held-out divergence from the teacher per token",
    }.get(method, "Held-out loss per pair")
    change = f" ({(after - before) / before:+.1%})" if before else ""
    return f"{what}: {before:.4f} before, {after:.4f} after{change}."


def _one_line(text: str, width: int = 300) -> str:
    line = json.dumps(text, ensure_ascii=False)
    return line if len(line) <= width else "..." + line[-width:]


COMMANDS = (train,)
