"""`tinkex sample`: continue a prompt with a run, a checkpoint or a base model.

What the command needs is imported when it runs, so that `tinkex --help` is quick.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from tinkex.cli import formatting
from tinkex.cli.options import server_options
from tinkex.cli.train import progress_of


@click.command()
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
            f"The run in {model} is not finished ({progress_of(state)}); go on with it first: "
            f"tinkex train --resume --output {shlex.quote(model)}"
        )
    return None, state.sampler_path
