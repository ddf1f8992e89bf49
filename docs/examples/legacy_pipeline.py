"""A step of a nightly pipeline (Airflow, Prefect, cron): plain functions, and safe to run again.

The step trains if it must, resumes if it was killed, and refuses a model that is no better.
"""

import logging
import sqlite3
from pathlib import Path

import tinkex

logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
log = logging.getLogger("nightly")


class ToLog(tinkex.Callback):
    """The pipeline's own log instead of a progress bar."""

    def on_eval(self, run: tinkex.Run, row: dict) -> None:
        log.info("step %d: held-out loss %.4f", row["step"], row["eval_loss"])


def extract(database: Path) -> list[dict]:
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS faq (question TEXT, answer TEXT)")
        if not connection.execute("SELECT count(*) FROM faq").fetchone()[0]:
            rows = [(f"Where is shelf {n}?", f"In aisle {n % 3}.") for n in range(30)]
            connection.executemany("INSERT INTO faq VALUES (?, ?)", rows)
        found = connection.execute("SELECT question, answer FROM faq ORDER BY question").fetchall()
    return [{"prompt": f"{question}\n", "completion": answer} for question, answer in found]


def train(rows: list[dict], folder: Path) -> tinkex.Run:
    return tinkex.finetune(
        rows, "tiny", folder, resume=True, rank=8, learning_rate=5e-3, batch_size=6, epochs=4,
        patience=3, keep=1, progress=False, callbacks=[ToLog()],
    )  # fmt: skip


def publish(run: tinkex.Run, folder: Path) -> None:
    losses = [row["eval_loss"] for row in run.metrics if "eval_loss" in row]
    if min(losses) >= losses[0]:
        raise ValueError(f"not better than the base model: {losses[0]:.4f} -> {min(losses):.4f}")
    run.export(folder, "peft", force=True)


run = train(extract(Path("faq.sqlite")), Path("run"))
publish(run, Path("published"))
print("published:", *sorted(path.name for path in Path("published").iterdir()))
