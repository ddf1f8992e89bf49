"""`make cookbook`: recipes of tinker-cookbook against our server, on both SDKs.

Prints a line per recipe and SDK as it goes, writes its part of docs/compatibility.md, and ends with
1 if anything fails. With arguments (`tinkex sl_loop`) it runs only these SDKs and the recipes whose
names hold these words, and writes nothing.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs

from tests.official_sdk import page, sdk
from tests.official_sdk.cookbook_recipe import MODEL
from tests.support import environments, small_models

VERSION = "0.6.1"
SDKS = ("tinker", "tinkex")
#: Seconds that a recipe may take.
RECIPE_TIMEOUT = 900.0

#: What the recipes import beside what the tests have; installed without what these depend on.
PACKAGES = """
aiohappyeyeballs==2.7.1 aiohttp==3.14.5 aiosignal==1.4.0 antlr4-python3-runtime==4.13.2
blobfile==3.3.0 chz==0.4.0 cloudpickle==3.1.3 distro==1.9.0 frozenlist==1.8.0 h2==4.4.1 hpack==4.2.0
httpcore==1.0.9
httpx==0.28.1 hyperframe==6.1.0 latex2sympy2-extended==1.11.0 lxml==6.1.3 math-verify==0.9.0
multidict==7.2.1 orjson==3.13.0 pillow==13.0.0 propcache==0.5.4 pycryptodomex==3.24.2
pylatexenc==2.11 pyqwest==0.12.0 pyrage==1.4.0 termcolor==3.3.0 tml-renderers==0.2.1 yarl==1.25.1
"""


@attrs.frozen
class Row:
    """A recipe with the arguments that make it small, and what should come of it.

    Attributes:
        says: what the last lines of a recipe hold that ends well, or is refused.
        model: what it trains: "tiny", or "smollm2" where it earns its own rewards.
        rises: a metric of each step that has to rise.
    """

    recipe: str
    arguments: str
    says: str = "Training completed"
    model: str = "tiny"
    rises: str | None = None


_SMALL_RL = "batch_size=4 group_size=4 max_tokens=16 max_steps=2"
ROWS = (
    Row("sl_loop", "batch_size=8"),
    Row("rl_loop", f"{_SMALL_RL} loss_fn=cispo"),
    Row("rl_loop", f"{_SMALL_RL} loss_fn=importance_sampling"),
    Row("rl_loop", f"{_SMALL_RL} loss_fn=stable_reinforce", "its formula is not published"),
    Row("rl_basic", _SMALL_RL),
    Row(
        "math_rl", "env=gsm8k groups_per_batch=4 group_size=4 max_tokens=16 max_steps=2 loss_fn=ppo"
    ),
    Row("sl_basic", "batch_size=8"),
    Row("chat_sl", "batch_size=8"),
    Row("prompt_distillation", "batch_size=8 num_epochs=1"),
    Row("preference.dpo", "batch_size=8 max_length=256", "DPO training completed"),
    Row("preference.shorter", "batch_size=2 group_size=4 max_tokens=16 max_steps=2"),
    Row(
        "multiplayer_rl.guess_number",
        "batch_size=2 group_size=4 max_tokens=8 max_steps=2 eval_every=0",
    ),
    Row(
        "distillation.on_policy_distillation",
        f"teacher_model={MODEL} groups_per_batch=4 max_tokens=16 max_steps=2",
    ),
    Row("weights_download", "", "adapter_model.safetensors"),
    Row(
        "math_rl",
        "env=arithmetic groups_per_batch=8 group_size=8 max_tokens=8 max_steps=8 lora_rank=16 "
        "learning_rate=3e-4 loss_fn=importance_sampling",
        model="smollm2",
        rises="env/all/reward/total",
    ),
)

HEAD = """
## Recipes of tinker-cookbook

tinker-cookbook {version} against `tinkex serve`, on the official SDK and with tinkex in its
place (`sys.modules["tinker"] = tinkex`). The recipes' own code runs offline, with stand-ins around
it: the model is the built-in one under a name that they know (`--base-model
{model}=DIR`), each data set is a few local examples, and the rewards of mathematics, which that
model would never earn, are replaced by one that half of all answers earn. So these rows show
that everything between recipe and engine works, not that anything useful is learned. In the last
row SmolLM2 earns the recipe's own rewards, for sums of numbers up to 6: the reward is the mean of
the first three steps, and of the last three. The arguments make a recipe small; all others have
their defaults. `make cookbook` writes this table.

"""


def python() -> Path:
    """The Python of an environment with the cookbook, which borrows what the tests have."""
    wanted = [f"tinker=={sdk.VERSIONS[-1]}", f"tinker-cookbook=={VERSION}", *PACKAGES.split()]
    return environments.borrowing(sdk.BUILD / f"cookbook-{VERSION}", wanted, "--no-deps")


@contextmanager
def server(model: str = "tiny") -> Iterator[tuple[str, Path]]:
    """The address of a server with *model* under the name that the recipes know, and the folder of
    the model."""
    with tempfile.TemporaryDirectory(prefix="tinkex-cookbook-") as scratch:
        folder = small_models.write(model, Path(scratch) / "model")
        with sdk.server("--base-model", f"{MODEL}={folder}", "--no-tiny") as url:
            yield url, folder


def run(name: str, row: Row, served: tuple[str, Path]) -> tuple[bool, str, float]:
    """Run a recipe on the SDK *name*: whether it went as it should, the end of it, and seconds."""
    url, model = served
    with tempfile.TemporaryDirectory(prefix="tinkex-recipe-") as scratch:
        log = Path(scratch) / "log"
        program = [python(), sdk.HERE / "cookbook_recipe.py", name, url, log, model]
        environment = {
            **sdk.environment(),
            "PYTHONPATH": str(sdk.ROOT),
            "TINKER_API_KEY": "tml-cookbook",
            "TINKER_BASE_URL": url,
            "COLUMNS": "200",
        }
        started = time.monotonic()
        done = subprocess.run(
            [str(part) for part in [*program, row.recipe, *row.arguments.split()]],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            timeout=RECIPE_TIMEOUT,
            env=environment,
            cwd=scratch,
        )
        rose = _rose(log / "metrics.jsonl", row.rises) if row.rises else None
    output = done.stdout.decode(errors="replace")
    seconds = time.monotonic() - started
    end = _end(output, row.says)
    if rose is None:
        return row.says in output, end, seconds
    return rose[0] + 0.1 < rose[1], f"reward {rose[0]:.2f} to {rose[1]:.2f}", seconds


def _rose(metrics: Path, key: str) -> tuple[float, float]:
    """The mean of a metric in the first three steps, and in the last three; 0 if it failed."""
    rows = (
        [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    )
    found = [row[key] for row in rows if key in row] or [0.0]
    return statistics.mean(found[:3]), statistics.mean(found[-3:])


def _end(output: str, says: str) -> str:
    """The line that says how it ended."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", output)
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if says in line), "\n".join(lines[-8:]))


def main(arguments: list[str]) -> int:
    chosen = [name for name in arguments if name in SDKS] or list(SDKS)
    words = [word for word in arguments if word not in SDKS]
    cells: dict[Row, list[str]] = {}
    failed = 0
    wanted = [row for row in ROWS if not words or any(word in row.recipe for word in words)]
    for model in dict.fromkeys(row.model for row in wanted):
        with server(model) as served:
            for row in (row for row in wanted if row.model == model):
                for name in chosen:
                    good, end, seconds = run(name, row, served)
                    failed += not good
                    state = "fails" if not good else "ok" if row.says in _ENDS else "refused"
                    text = f"{state}, {seconds:.0f} s" + (f", {end}" if row.rises else "")
                    cells.setdefault(row, []).append(text)
                    print(f"{name:7} {row.recipe} {row.arguments}: {text}: {end}", flush=True)
    if not arguments:
        page.write("cookbook", section(cells))
    return 0 if cells and not failed else 1


def _name(row: Row) -> str:
    return row.recipe if row.model == "tiny" else f"{row.recipe}, SmolLM2"


_ENDS = {"Training completed", "DPO training completed", "adapter_model.safetensors"}


def section(cells: dict[Row, list[str]]) -> str:
    """The part of docs/compatibility.md about the cookbook."""
    head = HEAD.format(version=VERSION, model=MODEL)
    rows = [[_name(row), row.arguments, *found] for row, found in cells.items()]
    header = ["Recipe", "Arguments", f"on tinker {sdk.VERSIONS[-1]}", "on tinkex"]
    return head + page.table(header, rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
