"""`tinkex sample`: continue a prompt with a run, a checkpoint or a base model.

Imports happen when the command runs, so that `tinkex --help` is fast.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from tinkex.cli import formatting
from tinkex.cli.model import fetched
from tinkex.cli.options import option, sampling_options, server_options
from tinkex.recipes import answers


@click.command()
@click.argument("model")
@click.option("--prompt", help="Text to continue. Default: --prompt-file, or standard input.")
@click.option(
    "--prompt-file",
    type=click.File("r", encoding="utf-8"),
    help="File with the prompt; - is standard input. A newline at its end is removed.",
)
@click.option("--chat", is_flag=True, help="Send the prompt as a user message of a conversation.")
@click.option("--system", help="The system prompt of the conversation. Implies --chat.")
@click.option(
    "--messages",
    "messages_file",
    type=click.File("r", encoding="utf-8"),
    help="File with a conversation to continue, a JSON list of messages; - is standard input. "
    "--prompt is added at its end. Implies --chat.",
)
@option("--num-samples", click.IntRange(1), 1, "Number of samples.")
@sampling_options(
    128,
    1.0,
    max_tokens_help="Maximum tokens per sample.",
    temperature_help="Sampling temperature; 0 always takes the likeliest token.",
    seed_help="The same seed gives the same samples.",
)
@option(
    "--top-p",
    click.FloatRange(0, 1, min_open=True),
    1.0,
    "Sample from the likeliest tokens with this total probability.",
)
@option("--top-k", click.IntRange(-1), -1, "Sample from this many likeliest tokens; -1 means all.")
@click.option("--stop", multiple=True, help="Text that ends a sample. May be repeated.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON per sample.")
@server_options
def sample(
    model: str,
    prompt: str | None,
    prompt_file: Any,
    chat: bool,
    system: str | None,
    messages_file: Any,
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
    from tinkex.text.renderer import Renderer

    messages = _read_messages(system, messages_file)
    is_asked = prompt is not None or prompt_file is not None or messages_file is None
    text = _read_prompt(prompt, prompt_file) if is_asked else ""
    with ServiceClient(base_url=base_url, api_key=api_key) as service:
        base_model, model_path = what_to_sample(model)
        fetched(base_model or "", base_url, api_key)
        sampler = service.create_sampling_client(model_path=model_path, base_model=base_model)
        tokenizer = sampler.get_tokenizer()
        renderer = Renderer(tokenizer)
        ends: Any = list(stop)
        if chat or messages:
            if renderer.template is None:
                say_without_template(model)
            said = [{"role": "user", "content": text}] if text else []
            rendered = renderer.prompt([*messages, *said])
            tokens, ends = rendered.tokens, ends or rendered.stop
        else:
            tokens = renderer.encode_prompt(text)
        params = types.SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stop=ends or None,
        )
        model_input = types.ModelInput.from_ints(tokens)
        if num_samples == 1 and not as_json:
            for piece in answers.pieces(sampler, model_input, params, tokenizer):
                click.echo(answers.shown(piece), nl=False)
            click.echo()
            return
        response = sampler.sample(
            model_input, num_samples=num_samples, sampling_params=params
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


def _read_messages(system: str | None, messages_file: Any) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if messages_file is not None:
        try:
            value = json.load(messages_file)
        except ValueError as exc:
            raise click.UsageError(f"--messages {messages_file.name} is not JSON: {exc}") from exc
        given = value.get("messages") if isinstance(value, dict) else value
        if not isinstance(given, list) or not all(isinstance(m, dict) for m in given):
            raise click.UsageError(
                f"--messages {messages_file.name} is not a JSON list of messages."
            )
        messages = _checked(given, messages_file.name)
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    return messages


def _checked(messages: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    from tinkex.text.messages import Conversation

    try:
        Conversation.of(messages, None, "assistant")
    except (TypeError, ValueError) as exc:
        raise click.UsageError(f"--messages {name}: {exc}") from exc
    return messages


def say_without_template(model: str) -> None:
    """Warn how a conversation is rendered for a model without a chat template."""
    click.echo(
        f"{model} has no chat template: the conversation is written as 'User: ...' and "
        "'Assistant: ...', which a base model may not follow.",
        err=True,
    )


def _read_prompt(prompt: str | None, prompt_file: Any) -> str:
    if prompt is not None and prompt_file is not None:
        raise click.UsageError("Give either --prompt or --prompt-file, not both.")
    if prompt is None:
        prompt = (prompt_file or sys.stdin).read()
        prompt = prompt.removesuffix("\n")
    if not prompt:
        raise click.UsageError("The prompt is empty; give --prompt 'some text'.")
    return prompt


def what_to_sample(model: str) -> tuple[str | None, str | None]:
    """(base model, None) or (None, path of saved weights), depending on what *model* is."""
    from tinkex.recipes import run_folder
    from tinkex.text import tokenizer

    if model.startswith("tinker://"):
        return None, model
    state = run_folder.load_state(Path(model))
    if state is None:
        return tokenizer.resolve_base_model(model), None
    if state.sampler_path is None:
        raise click.UsageError(
            f"The run in {model} is not finished ({state.progress}). Finish it first with: "
            f"tinkex train --resume --output {shlex.quote(model)}"
        )
    return None, state.sampler_path


COMMANDS = (sample,)
