"""One recipe of tinker-cookbook: `PYTHON cookbook_recipe.py SDK URL FOLDER RECIPE [ARGUMENT...]`.

Runs in an environment with the cookbook. SDK is "tinker", or "tinkex": then tinkex stands in for
`tinker` in sys.modules, before the cookbook is imported. The data sets and the tokenizer, which the
recipes fetch from the hub, are a few local examples and the tokenizer of the built-in model.
ARGUMENTs are the recipe's own (`batch_size=4`).
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOKENIZER = ROOT / "tinkex" / "engine" / "tiny"
MODEL = "Qwen/Qwen3-8B-Base"
EXAMPLES = 24  # of each data set

ADDRESS, FOLDER = "", Path()


def stand_in():
    """Let `import tinker` give tinkex."""
    import tinkex
    from tinkex import auth, futures, rest, types

    interfaces = futures  # where the cookbook takes the names of APIFuture and RestClient from
    interfaces.APIFuture = futures.OperationFuture
    sys.modules.update(
        {
            "tinker": tinkex,
            "tinker.auth": auth,
            "tinker.types": types,
            "tinker.types.tensor_data": types,
            "tinker.lib": tinkex,
            "tinker.lib.public_interfaces": interfaces,
            "tinker.lib.public_interfaces.rest_client": rest,
        }
    )


def local_data():
    """Data sets of the recipes, by the name that they load them by."""
    from datasets import Dataset

    numbers = range(EXAMPLES)
    gsm8k = Dataset.from_dict(
        {
            "question": [f"What is {n} plus 1?" for n in numbers],
            "answer": [f"It is {n + 1}.\n#### {n + 1}" for n in numbers],
        }
    )
    no_robots = Dataset.from_dict(
        {
            "messages": [
                [
                    {"role": "user", "content": f"Say {n}."},
                    {"role": "assistant", "content": f"{n}!"},
                ]
                for n in numbers
            ]
        }
    )
    return {"openai/gsm8k": gsm8k, "HuggingFaceH4/no_robots": no_robots}


def without_the_hub():
    """Let the recipes find their data and their tokenizer here."""
    import datasets
    from tinker_cookbook import tokenizer_utils
    from transformers import AutoTokenizer

    known = local_data()

    def load_dataset(path, name=None, split=None, **options):
        data = known[path]
        return data if split else datasets.DatasetDict({"train": data, "test": data})

    datasets.load_dataset = load_dataset
    with_rewards()
    tokenizer_utils.register_tokenizer(MODEL, lambda: AutoTokenizer.from_pretrained(TOKENIZER))


def with_rewards():
    """Reward half of all answers: the built-in model cannot calculate, and where all rewards are
    the same, the recipes train on nothing."""
    from tinker_cookbook.recipes import rl_loop
    from tinker_cookbook.recipes.math_rl import math_env

    def is_even(text):
        return sum(map(ord, text)) % 2 == 0

    rl_loop.get_reward = lambda response, answer: float(is_even(response))
    math_env.MathEnv.check_answer = lambda self, text: is_even(text)
    math_env.MathEnv.check_format = lambda self, text: True


def loop(name, arguments):
    """Recipes that are one loop, with a Config of their own."""
    import chz

    module = importlib.import_module(f"tinker_cookbook.recipes.{name}")
    common = [f"model_name={MODEL}", f"base_url={ADDRESS}", f"log_path={FOLDER}"]
    chz.nested_entrypoint(module.main, argv=[*common, *arguments])


def rl_basic(arguments):
    """Its data set is a part of its blueprint, so that its sizes are set there."""
    import chz
    from tinker_cookbook.recipes import rl_basic as module

    small, rest = {}, []
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name in ("batch_size", "group_size"):
            small[name] = int(value)
        else:
            rest.append(argument)
    blueprint = module.build_config_blueprint(MODEL)
    blueprint.make_from_argv([f"base_url={ADDRESS}", f"log_path={FOLDER}", *rest])
    config = blueprint.make()
    config = chz.replace(config, dataset_builder=chz.replace(config.dataset_builder, **small))
    module.main(config)


def math_rl(arguments):
    import asyncio

    import chz
    from tinker_cookbook.recipes.math_rl import train as module

    common = [f"model_name={MODEL}", f"base_url={ADDRESS}", f"log_path={FOLDER}", "env=gsm8k"]
    config = chz.entrypoint(module.CLIConfig, argv=[*common, *arguments])
    asyncio.run(module.cli_main(config))


def weights_download(arguments):
    """Not a recipe, but what follows one: a training checkpoint as files on this machine."""
    import tinker
    from tinker_cookbook import weights

    service = tinker.ServiceClient(base_url=ADDRESS)
    training = service.create_lora_training_client(MODEL, rank=4).result()
    path = training.save_state("final").result().path
    out = weights.download(tinker_path=path, output_dir=str(FOLDER), base_url=ADDRESS)
    print(sorted(file.name for file in Path(out).iterdir()))


RECIPES = {
    "weights_download": weights_download,
    "sl_loop": lambda arguments: loop("sl_loop", arguments),
    "rl_loop": lambda arguments: loop("rl_loop", arguments),
    "rl_basic": rl_basic,
    "math_rl": math_rl,
}


def main(sdk, recipe, arguments):
    if sdk == "tinkex":
        stand_in()
    without_the_hub()
    RECIPES[recipe](arguments)


if __name__ == "__main__":
    SDK, ADDRESS, FOLDER, RECIPE, *REST = sys.argv[1:]
    main(SDK, RECIPE, REST)
