"""Preferences: short answers are chosen, long-winded ones rejected (DPO)."""

import tinkex

ANSWERS = {"2 + 2": "4", "3 + 3": "6", "4 + 1": "5", "5 + 4": "9", "6 + 1": "7", "2 + 6": "8"}
rows = [
    {
        "prompt": f"{question} = ",
        "chosen": answer,
        "rejected": f"well, let me think about it, {answer}",
    }
    for question, answer in ANSWERS.items()
]

run = tinkex.preference.dpo(
    rows * 4, "tiny", "run", rank=8, learning_rate=1e-3, batch_size=6, epochs=3, beta=0.1
)
names = [key for key in run.metrics[1] if key != "step"]
for row in (run.metrics[1], run.metrics[-1]):
    print(f"step {row['step']}:", {key: round(row[key], 4) for key in names if key in row})
