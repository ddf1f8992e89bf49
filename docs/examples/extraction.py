"""Extraction: sentences to JSON, checked with a metric that you write, for the base and the run."""

import json

import tinkex

NAMES, CITIES = ["Ada", "Ben", "Cleo", "Dan", "Eve", "Finn"], ["Rome", "Oslo", "Lima", "Cairo"]
rows = [
    {
        "prompt": f"{name} lives in {city}.\n",
        "completion": json.dumps({"name": name, "city": city}),
    }
    for name in NAMES
    for city in CITIES
]
run = tinkex.finetune(
    rows[4:],
    "tiny",
    "run",
    eval_data=rows[:4],
    rank=32,
    learning_rate=4e-3,
    batch_size=5,
    epochs=20,
)


def is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


with run:
    answers = [run.sample(row["prompt"], temperature=0, max_tokens=40) for row in rows[:4]]
print(f"{sum(map(is_json, answers))} of {len(answers)} answers are JSON; the first: {answers[0]}")
