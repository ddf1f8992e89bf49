"""`tinkex chat`: a conversation with a run, a checkpoint or a base model.

Imports happen when the command runs, so that `tinkex --help` is fast.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from tinkex.cli.model import fetched
from tinkex.cli.options import (
    SAMPLING_DTYPES,
    dtype_option,
    sampling_options,
    server_options,
    set_dtype,
)
from tinkex.cli.sample import say_without_template, what_to_sample
from tinkex.recipes import answers

if TYPE_CHECKING:
    from tinkex.recipes.conversation import Conversation, Settings

HELP = """\
/reset             forget the conversation; the system prompt stays
/system [TEXT]     set the system prompt, and forget the conversation; without TEXT, show it
/temperature [X]   set the temperature; without X, show it
/compare [TEXT]    the answers of the base model and of this one to TEXT (default: your last
                   message), side by side; the conversation stays as it is
/save FILE         write the conversation to FILE, as `tinkex train` reads it
/help              show this
/quit              end, like Ctrl-D

Ctrl-C stops an answer, not the chat. Up and down recall what you have written."""

#: Lines of history kept for the next chat.
HISTORY_LINES = 1000


@click.command()
@click.argument("model", required=False)
@click.option("--system", help="The system prompt.")
@sampling_options(
    512,
    0.7,
    max_tokens_help="Of an answer.",
    temperature_help="0 takes the likeliest token each time.",
    seed_help="Same seed and messages, same answers.",
)
@dtype_option(
    "Number type of base weights in the embedded engine: on a CPU, bfloat16 halves the memory and "
    "the time for a token, int8 halves both again. Default: float32 on a CPU, bfloat16 on an "
    "accelerator.",
    choices=SAMPLING_DTYPES,
)
@server_options
def chat(
    model: str | None,
    system: str | None,
    max_tokens: int,
    temperature: float,
    seed: int | None,
    dtype: str | None,
    base_url: str | None,
    api_key: str | None,
) -> None:
    """Talk with MODEL: answers appear as they are generated.

    MODEL is the --output folder of a finished `tinkex train`, a tinker:// path of weights saved
    for sampling, or a base model as for `tinkex train`. Default: the folder `run`, if there is
    one, else the built-in model `tiny`. Input that is not a terminal is read line by line; the exit
    status is 1 if a line failed.

    A --base-url that ends in /v1 is a server in the style of OpenAI (vLLM, llama.cpp, Ollama ...);
    MODEL is then a name that it knows, and the key --api-key or OPENAI_API_KEY.
    """
    from tinkex.recipes.conversation import Conversation, Settings
    from tinkex.recipes.openai_server import OpenAIServer, is_openai_style

    settings = Settings(max_tokens, temperature, seed)
    source = click.get_current_context().get_parameter_source("dtype")
    set_dtype(dtype, base_url, source is ParameterSource.COMMANDLINE)
    with contextlib.ExitStack() as stack:
        if base_url is not None and is_openai_style(base_url):
            from tinkex import config

            model = model or "default"
            server = OpenAIServer(base_url, api_key or config.openai_key(), model)
            conversation = Conversation(server, settings)
        else:
            model = model or ("run" if Path("run", "state.json").is_file() else "tiny")
            conversation = _conversation(stack, model, settings, base_url, api_key)
        conversation.set_system(system or "")
        _greet(model, conversation)
        failed = _talk(conversation)
    if failed and not sys.stdin.isatty():
        raise click.exceptions.Exit(1)


def _conversation(
    stack: contextlib.ExitStack,
    model: str,
    settings: Settings,
    base_url: str | None,
    api_key: str | None,
) -> Conversation:
    """A conversation by sampling from a model; *stack* closes its client."""
    from tinkex import ServiceClient
    from tinkex.recipes.conversation import Conversation, Sampled

    base_model, model_path = what_to_sample(model)
    fetched(base_model or "", base_url, api_key)
    service = stack.enter_context(ServiceClient(base_url=base_url, api_key=api_key))
    sampler = service.create_sampling_client(model_path=model_path, base_model=base_model)
    tokenizer = sampler.get_tokenizer()

    def base() -> Sampled:
        base_sampler = service.create_sampling_client(base_model=sampler.get_base_model())
        return Sampled(base_sampler, tokenizer)

    return Conversation(Sampled(sampler, tokenizer), settings, base if model_path else None)


def _greet(model: str, conversation: Conversation) -> None:
    if not conversation.has_template:
        say_without_template(model)
    if sys.stdin.isatty():
        click.echo(f"Chat with {model}. /help lists the commands, Ctrl-D ends.", err=True)


# The terminal


def _talk(conversation: Conversation) -> bool:
    """Answer line by line; return True if a line failed."""
    from tinkex import errors

    failed = False
    with _history():
        for line in _lines():
            text = line.strip()
            if text == "/quit":
                break
            try:
                if text.startswith("/"):
                    _command(conversation, text)
                elif text:
                    _show(conversation.ask(text))
            except (errors.TinkexError, ValueError, OSError) as exc:
                click.echo(f"error: {exc}", err=True)
                failed = True
    return failed


def _lines() -> Iterator[str]:
    """The user's input, line by line, until Ctrl-D."""
    is_terminal = sys.stdin.isatty()
    while True:
        try:
            line = input("> ") if is_terminal else sys.stdin.readline()
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:  # during input: discard the line
            click.echo()
            continue
        if not line and not is_terminal:
            return
        yield line


def _show(pieces: Iterator[str]) -> None:
    """Print an answer as it arrives; Ctrl-C stops it."""
    try:
        for piece in pieces:
            click.echo(answers.shown(piece), nl=False)
        click.echo()
    except KeyboardInterrupt:
        click.echo(" [stopped]")
    finally:
        close = getattr(pieces, "close", None)
        if close is not None:
            close()


def _command(conversation: Conversation, text: str) -> None:
    """Run a /command. Raises ValueError with the reason if it is invalid."""
    name, _, rest = text.partition(" ")
    rest = rest.strip()
    if name == "/reset":
        conversation.reset()
        click.echo("The conversation is forgotten.", err=True)
    elif name == "/system":
        _system(conversation, rest)
    elif name == "/temperature":
        _temperature(conversation, rest)
    elif name == "/compare":
        _print_side_by_side(*conversation.compare(rest))
    elif name == "/save":
        _save(conversation, rest)
    elif name == "/help":
        click.echo(HELP, err=True)
    else:
        raise ValueError(f"there is no command {name}; /help lists them.")


def _system(conversation: Conversation, text: str) -> None:
    if text:
        conversation.set_system(text)
        click.echo("The system prompt is set, the conversation forgotten.", err=True)
    else:
        click.echo(conversation.system or "There is no system prompt.", err=True)


def _temperature(conversation: Conversation, text: str) -> None:
    if text:
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value < float("inf"):
            raise ValueError(f"the temperature must be a number of at least 0, got {text!r}.")
        conversation.settings.temperature = value
    click.echo(f"The temperature is {conversation.settings.temperature:g}.", err=True)


def _save(conversation: Conversation, file: str) -> None:
    if not file:
        raise ValueError("name a file: /save FILE")
    if not any(message["role"] == "assistant" for message in conversation.messages):
        raise ValueError("nothing was said yet; there is nothing to save.")
    row = json.dumps({"messages": conversation.messages}, ensure_ascii=False)
    with open(os.path.expanduser(file), "a", encoding="utf-8") as lines:
        print(row, file=lines)
    click.echo(f"Added to {file}.", err=True)


def _print_side_by_side(theirs: str, ours: str) -> None:
    width = max(20, (shutil.get_terminal_size((100, 24)).columns - 3) // 2)
    columns = [
        [title, "-" * width, *(_wrapped(text, width))]
        for title, text in (("base model", theirs), ("fine-tuned", ours))
    ]
    rows = max(map(len, columns))
    left, right = (column + [""] * (rows - len(column)) for column in columns)
    for one, other in zip(left, right):
        click.echo(answers.shown(f"{one:<{width}} | {other}".rstrip()))


def _wrapped(text: str, width: int) -> list[str]:
    lines = [textwrap.wrap(line, width) or [""] for line in text.strip().splitlines()]
    return [line for part in lines for line in part]


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Let arrow keys recall earlier lines, including those of earlier chats."""
    try:
        import readline
    except ImportError:  # Python without it
        yield
        return
    if not sys.stdin.isatty():
        yield
        return
    from tinkex import config

    file = config.home() / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    try:
        yield
    finally:
        readline.set_history_length(HISTORY_LINES)
        with contextlib.suppress(OSError):  # a missing history must not end the chat
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            readline.write_history_file(file)
            file.chmod(0o600)


COMMANDS = (chat,)
