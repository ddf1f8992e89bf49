"""Reinforcement learning in a conversation of several turns: an environment that answers back."""

import tinkex


class Guess:
    """The model has three tries to say something with the secret letter in it."""

    def __init__(self, row: dict) -> None:
        self.secret, self.tries = row["secret"], 3

    def reset(self) -> list[dict]:
        return [{"role": "user", "content": "Guess my letter."}]

    def step(self, message: dict) -> tinkex.EnvStep:
        self.tries -= 1
        is_right = self.secret in (message.get("content") or "")
        said = "Yes!" if is_right else "No. Another letter?"
        return tinkex.EnvStep(
            messages=[{"role": "user", "content": said}],
            reward=float(is_right),
            done=is_right or self.tries == 0,
            metrics={"turns": 3 - self.tries},
        )


run = tinkex.reinforce(
    [{"prompt": "Guess my letter.", "secret": letter} for letter in "aeio"],
    base_model="tiny",
    output="run",
    env=Guess,
    rank=8,
    learning_rate=5e-3,
    batch_size=2,
    group_size=4,
    max_tokens=8,
    epochs=3,
)
for row in run.metrics:
    shown = {key: row[key] for key in ("step", "reward", "turns") if key in row}
    print({key: round(value, 3) for key, value in shown.items()})
