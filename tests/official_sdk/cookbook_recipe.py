"""A recipe of tinker-cookbook: PYTHON cookbook_recipe.py SDK URL FOLDER MODEL RECIPE [ARGUMENT...]

Runs in an environment with the cookbook. SDK is "tinker", or "tinkex": then tinkex stands in for
`tinker` in sys.modules, before the cookbook is imported. The data sets and the tokenizer, which the
recipes fetch from the hub, are a few local examples and the tokenizer in the directory MODEL.
ARGUMENTs are the recipe's own (`batch_size=4`).
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODEL = "Qwen/Qwen3-8B-Base"
EXAMPLES = 24  # of each data set

ADDRESS, FOLDER, DIRECTORY = "", Path(), Path()


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
    hh = Dataset.from_dict(
        {
            "chosen": [f"\n\nHuman: Say {n}.\n\nAssistant: {n}." for n in numbers],
            "rejected": [f"\n\nHuman: Say {n}.\n\nAssistant: No." for n in numbers],
        }
    )
    questions = Dataset.from_dict({"question": [f"What is {n} plus 1?" for n in numbers]})
    return {
        "openai/gsm8k": gsm8k,
        "HuggingFaceH4/no_robots": no_robots,
        "Anthropic/hh-rlhf": hh,
        "zwhe99/DeepMath-103K": questions,
    }


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
    tokenizer_utils.register_tokenizer(MODEL, lambda: AutoTokenizer.from_pretrained(DIRECTORY))


def with_rewards():
    """Reward half of all answers: the built-in model cannot calculate, and where all rewards are
    the same, the recipes train on nothing."""
    from tinker_cookbook.recipes import rl_loop
    from tinker_cookbook.recipes.math_rl import arithmetic_env, math_env

    def is_even(text):
        return sum(map(ord, text)) % 2 == 0

    rl_loop.get_reward = lambda response, answer: float(is_even(response))
    math_env.MathEnv.check_answer = lambda self, text: is_even(text)
    math_env.MathEnv.check_format = lambda self, text: True

    # Sums have the recipe's own rewards, and numbers that a small model can add.
    made = arithmetic_env.ArithmeticDataset._make_env_group_builder

    class Small:
        def __init__(self, rng):
            self.rng = rng

        def randint(self, low, high):
            return self.rng.randint(1, 7)

    arithmetic_env.ArithmeticDataset._make_env_group_builder = lambda self, rng: made(
        self, Small(rng)
    )


def loop(name, arguments):
    """Recipes that are one loop, with a Config of their own."""
    import chz

    module = importlib.import_module(f"tinker_cookbook.recipes.{name}")
    common = [f"model_name={MODEL}", f"base_url={ADDRESS}", f"log_path={FOLDER}"]
    chz.nested_entrypoint(module.main, argv=[*common, *arguments])


def basic(name, arguments):
    """Recipes whose data set is a part of their blueprint, so that its sizes are set there."""
    import chz

    module = importlib.import_module(f"tinker_cookbook.recipes.{name}")
    blueprint = module.build_config_blueprint(MODEL)
    sizes = [a for a in arguments if a.startswith(("batch_size=", "group_size="))]
    others = [a for a in arguments if a not in sizes]
    blueprint.make_from_argv([f"base_url={ADDRESS}", f"log_path={FOLDER}", *others])
    config = blueprint.make()
    builder = config.dataset_builder
    small = {key: int(value) for key, value in (size.split("=") for size in sizes)}
    if name == "sl_basic":
        builder = chz.replace(builder, common_config=chz.replace(builder.common_config, **small))
    else:
        builder = chz.replace(builder, **small)
    module.main(chz.replace(config, dataset_builder=builder))


def command(name, arguments):
    """Recipes that are a command line: a CLIConfig, and a function that takes one."""
    import asyncio

    import chz

    module = importlib.import_module(f"tinker_cookbook.recipes.{name}")
    common = {
        "model_name": MODEL,
        "base_url": ADDRESS,
        "log_path": FOLDER,
        "renderer_name": "role_colon",
        "file_path": conversations(),
    }
    known = [f"{key}={value}" for key, value in common.items() if key in fields_of(module)]
    config = chz.entrypoint(module.CLIConfig, argv=[*known, *arguments])
    if hasattr(module, "cli_main"):
        done = module.cli_main(config)
    else:
        done = module.train.main(module.build_config(config))
    if asyncio.iscoroutine(done):
        asyncio.run(done)


def fields_of(module):
    return set(module.CLIConfig.__annotations__)


def conversations():
    """A file of conversations, for the recipe that does not load a data set."""
    import json

    path = FOLDER.parent / "conversations.jsonl"
    rows = local_data()["HuggingFaceH4/no_robots"]
    path.write_text("".join(json.dumps({"messages": row["messages"]}) + "\n" for row in rows))
    return path


def weights_download(arguments):
    """Not a recipe, but what follows one: a training checkpoint as files on this machine."""
    import tinker
    from tinker_cookbook import weights

    service = tinker.ServiceClient(base_url=ADDRESS)
    training = service.create_lora_training_client(MODEL, rank=4).result()
    path = training.save_state("final").result().path
    out = weights.download(tinker_path=path, output_dir=str(FOLDER), base_url=ADDRESS)
    print(sorted(file.name for file in Path(out).iterdir()))


def run(recipe, arguments):
    if recipe == "weights_download":
        weights_download(arguments)
    elif recipe in ("sl_loop", "rl_loop"):
        loop(recipe, arguments)
    elif recipe in ("sl_basic", "rl_basic"):
        basic(recipe, arguments)
    else:
        is_package = recipe != "distillation.on_policy_distillation"
        command(f"{recipe}.train" if is_package else recipe, arguments)


def main(sdk, recipe, arguments):
    if sdk == "tinkex":
        stand_in()
    without_the_hub()
    run(recipe, arguments)


if __name__ == "__main__":
    SDK, ADDRESS, FOLDER, DIRECTORY, RECIPE, *REST = sys.argv[1:]
    FOLDER = Path(FOLDER)
    main(SDK, RECIPE, REST)
