"""The command line: arguments in, clients called, text out.

Results go to stdout, everything else to stderr. Exit status: 0 done, 1 failed, 2 wrong usage,
130 interrupted. What a command needs is imported when it runs, so that `tinkex --help` is quick.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import click
from click.core import ParameterSource

from tinkex import errors
from tinkex._version import __version__
from tinkex.cli import checkpoints, doctor, formatting, runs
from tinkex.cli.options import format_option, key_option, server_options

if TYPE_CHECKING:  # for annotations alone: neither numpy nor requests is loaded for --help
    from tinkex.recipes import supervised

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit status."""
    traceback_wanted = "--traceback" in (sys.argv if argv is None else argv)
    try:
        status = cli.main(argv, prog_name="tinkex", standalone_mode=False)
    except click.ClickException as exc:
        exc.show()
        return exc.exit_code
    except click.Abort:
        click.echo("Interrupted.", err=True)
        return INTERRUPTED
    except (errors.TinkexError, ValueError, OSError) as exc:
        if traceback_wanted:
            raise
        click.echo(f"error: {exc}", err=True)
        return 1
    return status if isinstance(status, int) else 0


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--traceback", is_flag=True, help="Show where in the program an error arose.")
@click.version_option(__version__, prog_name="tinkex")
def cli(traceback: bool) -> None:
    """Fine-tune language models: on this machine, an open server or the official service.

    Without --base-url and without TINKER_API_KEY or TINKER_BASE_URL in the environment, commands
    run on the embedded engine (pip install 'tinkex[local]').
    """
    from tinkex import config

    if not config.wants_color():
        click.get_current_context().color = False


for _command in (runs.run, checkpoints.checkpoint, runs.session, doctor.doctor):
    cli.add_command(_command)


# train


@cli.command()
@click.argument("data", type=click.Path(path_type=Path), required=False)
@click.option("--base-model", help="tiny (built in), a model directory, or a hub id.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder for metrics, state and the adapter.",
)
@click.option("--resume", is_flag=True, help="Go on with the run in --output, as it was started.")
@click.option(
    "--rank", type=click.IntRange(1), default=32, show_default=True, help="Of the LoRA adapter."
)
@click.option(
    "--learning-rate",
    type=click.FloatRange(0, min_open=True),
    default=1e-4,
    show_default=True,
    help="Of AdamW, at its highest.",
)
@click.option(
    "--schedule",
    type=click.Choice(["constant", "linear", "cosine"]),
    default="constant",
    show_default=True,
    help="How the learning rate goes on: the same, or falling to 0 at the end.",
)
@click.option(
    "--warmup-steps",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Steps over which the learning rate first rises.",
)
@click.option(
    "--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Examples a step."
)
@click.option(
    "--epochs",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Times that each example is seen.",
)
@click.option("--max-steps", type=click.IntRange(1), help="Stop after so many steps.")
@click.option(
    "--max-length",
    type=click.IntRange(2),
    default=1024,
    show_default=True,
    help="Tokens of an example that are read; the rest is cut off.",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Of the adapter, the order of the data and the held-out part.",
)
@click.option(
    "--eval-fraction",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.05,
    show_default=True,
    help="Part of the examples that is held out.",
)
@click.option(
    "--eval-every",
    type=click.IntRange(1),
    help="Steps between evaluations. Default: a tenth of the run.",
)
@click.option(
    "--save-every",
    type=click.IntRange(1),
    help="Steps between checkpoints. Default: a tenth of the run.",
)
@click.option("--train-mlp/--no-train-mlp", default=True, show_default=True, help="Adapt the MLPs.")
@click.option(
    "--train-attn/--no-train-attn", default=True, show_default=True, help="Adapt the attention."
)
@click.option(
    "--train-unembed/--no-train-unembed",
    default=True,
    show_default=True,
    help="Adapt the unembedding (some inference servers cannot load that).",
)
@click.option("--skip-bad-lines", is_flag=True, help="Leave bad lines out instead of refusing.")
@server_options
@click.pass_context
def train(
    context: click.Context,
    data: Path | None,
    output: Path,
    resume: bool,
    base_url: str | None,
    api_key: str | None,
    **given: Any,
) -> int:
    """Fine-tune a model on DATA, a JSONL file.

    Each line of DATA is an object: {"messages": [{"role": ..., "content": ...}, ...]}, or
    {"prompt": ..., "completion": ...}, or {"text": ...}. The assistant's messages, completions
    and texts are learnt.

    Ctrl-C (or SIGTERM) saves a checkpoint; --resume --output FOLDER goes on from it and ends in the
    same weights as if nothing had happened. With --resume, what is left away is as it was.
    """
    from tinkex import ServiceClient
    from tinkex.cli import progress
    from tinkex.data import records
    from tinkex.recipes import supervised

    state = supervised.load_state(output)
    if state is not None and not state.has_begun and not resume:
        state = None  # it failed before there was a model
    _check_folder(output, state, resume)
    if state is not None:
        data = data or Path(state.data)
        given = {name: value for name, value in given.items() if _is_explicit(context, name)}
        settings = attrs.evolve(state.settings, **given)
    elif data is None or given["base_model"] is None:
        raise click.UsageError(f"Missing {'DATA' if data is None else '--base-model'}.")
    else:
        settings = supervised.Settings(**given)
    file = records.read(data, settings.skip_bad_lines)
    if state is not None:
        supervised.check_same(state, settings, file)
        if state.is_finished:
            click.echo(f"The run in {output} is finished: nothing is left to do.", err=True)
            return 0
    with progress.CtrlC() as ctrl_c:
        try:
            with ServiceClient(base_url=base_url, api_key=api_key) as service:
                outcome = supervised.run(
                    service, file, settings, output, progress.Progress(), state, ctrl_c.deferred
                )
        except (errors.TinkexError, KeyboardInterrupt):
            _say_how_to_go_on(output)
            raise
    if outcome.adapter is None:
        _say_how_to_go_on(output)
        return ctrl_c.status
    _print_outcome(outcome, output)
    return 0


def _is_explicit(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is ParameterSource.COMMANDLINE


def _check_folder(output: Path, state: supervised.State | None, resume: bool) -> None:
    if resume and state is None:
        raise click.UsageError(
            f"{output} holds no run to resume; leave --resume away to start one."
        )
    if state is not None and not resume:
        raise click.UsageError(
            f"{output} holds a run already ({_progress_of(state)}). Go on with it: --resume; "
            "or give another --output, or remove that folder."
        )


def _progress_of(state: supervised.State) -> str:
    if state.is_finished:
        return "finished"
    return f"saved after step {state.step} of {state.total_steps or '?'}"


def _say_how_to_go_on(output: Path) -> None:
    """On stderr: where the run in *output* stands, and the command that goes on with it."""
    from tinkex.recipes import supervised

    state = supervised.load_state(output)
    if state is not None and state.has_begun:
        command = f"tinkex train --resume --output {shlex.quote(str(output))}"
        click.echo(f"Stopped: {_progress_of(state)}. Go on with:\n  {command}", err=True)


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
    formatting.say(f"Ask it:  tinkex sample {shlex.quote(str(output))} --prompt '...'")


def _one_line(text: str, width: int = 300) -> str:
    line = json.dumps(text, ensure_ascii=False)
    return line if len(line) <= width else "..." + line[-width:]


# serve


@cli.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=0, show_default=True, help="0 is a free one."
)
@click.option(
    "--base-model",
    "base_models",
    multiple=True,
    help="Load this model at once. May be repeated; others are loaded when asked for.",
)
@click.option(
    "--home",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where runs and checkpoints are kept. Default: TINKEX_HOME, or ~/.tinkex.",
)
@click.option(
    "--api-key",
    "api_keys",
    multiple=True,
    envvar="TINKEX_SERVE_KEYS",
    show_envvar=True,
    help="Key of a user; each sees only what is theirs. May be repeated. Without one, who comes "
    "on loopback is let in, and for any other --host a key is made up and printed.",
)
@click.option(
    "--dialect",
    type=click.Choice(["both", "json"]),
    default="both",
    show_default=True,
    help="What is spoken: JSON and protobuf, or JSON alone.",
)
@click.option("--announce", type=click.Path(path_type=Path), hidden=True)
@click.option("--parent-pid", type=int, hidden=True)
def serve(**options: Any) -> int:
    """Run the training server.

    Serves the Tinker API until it is stopped: for other processes, machines (with --api-key) and
    the official SDK. Prints its address.
    """
    try:
        from tinkex.server import app
    except ImportError as exc:
        raise errors.MissingExtraError(
            f"the training server needs {exc.name}, which is not installed. "
            "Install it with: pip install 'tinkex[local]'"
        ) from exc
    status: int = app.main(**options)
    return status


# sample


@cli.command()
@click.argument("model")
@click.option("--prompt", help="What to continue. Default: --prompt-file, or else standard input.")
@click.option(
    "--prompt-file",
    type=click.File("r", encoding="utf-8"),
    help="A file to continue; - is standard input. A newline at its end is left out.",
)
@click.option("--chat", is_flag=True, help="The prompt is what a user says in a conversation.")
@click.option("--num-samples", type=click.IntRange(1), default=1, show_default=True)
@click.option("--max-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option(
    "--temperature",
    type=click.FloatRange(0),
    default=1.0,
    show_default=True,
    help="0 takes the likeliest token each time.",
)
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Among the likeliest tokens of this probability.",
)
@click.option(
    "--top-k",
    type=click.IntRange(-1),
    default=-1,
    show_default=True,
    help="Among so many tokens; -1 is all.",
)
@click.option("--seed", type=click.IntRange(0), help="Same seed, same samples.")
@click.option("--stop", multiple=True, help="Text that ends a sample. May be repeated.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a sample, on a line.")
@server_options
def sample(
    model: str,
    prompt: str | None,
    prompt_file: Any,
    chat: bool,
    num_samples: int,
    max_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int | None,
    stop: tuple[str, ...],
    as_json: bool,
    base_url: str | None,
    api_key: str | None,
) -> None:
    """Continue a prompt with MODEL.

    MODEL is the --output folder of a finished `tinkex train`, a tinker:// path of weights saved
    for sampling, or a base model as for `tinkex train`.
    """
    from tinkex import ServiceClient, types
    from tinkex.data import records

    params = types.SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=list(stop) or None,
    )
    text = _read_prompt(prompt, prompt_file)
    with ServiceClient(base_url=base_url, api_key=api_key) as service:
        base_model, model_path = _what_to_sample(model)
        sampler = service.create_sampling_client(model_path=model_path, base_model=base_model)
        tokenizer = sampler.get_tokenizer()
        if chat:
            text = records.chat_prompt([{"role": "user", "content": text}], tokenizer)
        tokens = records.encode_prompt(
            text, tokenizer, chat and tokenizer.chat_template is not None
        )
        response = sampler.sample(
            types.ModelInput.from_ints(tokens), num_samples=num_samples, sampling_params=params
        ).result()
    for sequence in response.sequences:
        answer = tokenizer.decode(sequence.tokens, skip_special_tokens=True)
        if as_json:
            value = {
                "text": answer,
                "tokens": sequence.tokens,
                "logprobs": sequence.logprobs,
                "stop_reason": sequence.stop_reason,
            }
            answer = json.dumps(value, ensure_ascii=False)
        formatting.say(answer)


def _read_prompt(prompt: str | None, prompt_file: Any) -> str:
    if prompt is not None and prompt_file is not None:
        raise click.UsageError("Give --prompt or --prompt-file, not both.")
    if prompt is None:
        prompt = (prompt_file or sys.stdin).read()
        prompt = prompt.removesuffix("\n")
    if not prompt:
        raise click.UsageError("The prompt is empty; give --prompt 'some text'.")
    return prompt


def _what_to_sample(model: str) -> tuple[str | None, str | None]:
    """The base model, or else the path of saved weights, that *model* stands for."""
    from tinkex.recipes import supervised

    if model.startswith("tinker://"):
        return None, model
    state = supervised.load_state(Path(model))
    if state is None:
        return model, None
    if state.sampler_path is None:
        raise click.UsageError(
            f"The run in {model} is not finished ({_progress_of(state)}); go on with it first: "
            f"tinkex train --resume --output {shlex.quote(model)}"
        )
    return None, state.sampler_path


# conformance

_OUTCOME_COLORS = {"pass": "green", "fail": "red", "not offered": None}


@cli.command()
@click.argument("url")
@click.option(
    "--write",
    is_flag=True,
    help="Also the checks that make a session, models and checkpoints on the server; these are "
    "removed again.",
)
@click.option("--base-model", help="To train. Default: the first that the server offers.")
@click.option("--other-api-key", help="Key of another user, who should see nothing of ours.")
@click.option(
    "--restart",
    metavar="COMMAND",
    help="A shell command that restarts the server, to see what it still knows then.",
)
@click.option(
    "--only",
    multiple=True,
    metavar="WORDS",
    help="Checks with WORDS in their name. May be repeated.",
)
@click.option(
    "--patience",
    type=click.FloatRange(1),
    default=120.0,
    show_default=True,
    help="Seconds to wait for the result of one operation.",
)
@format_option
@key_option
def conformance(url: str, api_key: str | None, as_json: bool, write: bool, **options: Any) -> int:
    """Check how the training server at URL keeps to the Tinker API.

    Each check is a rule that some server breaks today, and ends in pass, fail or not offered, with
    the reason. Without --write nothing is changed on the server. Exit status 1 if a check fails.
    """
    from tinkex import conformance as rules

    results = []
    for result in rules.check(url, api_key, write=write, **options):
        results.append(result)
        if not as_json:
            color = _OUTCOME_COLORS[result.outcome]
            text = rules.line(result)
            formatting.say(click.style(text[: rules.MARGIN], fg=color) + text[rules.MARGIN :])
    if as_json:
        formatting.say(rules.as_json(url, results))
    else:
        formatting.say(f"\n{rules.summary(results)}.")
    return 1 if any(result.outcome == "fail" for result in results) else 0


# version


@cli.command()
@format_option
def version(as_json: bool) -> None:
    """Print the version of tinkex."""
    if as_json:
        formatting.say_json({"version": __version__})
    else:
        formatting.say(f"tinkex {__version__}")
