"""Reinforcement learning in a conversation of several turns: an environment that answers back."""

import tinkex


class Letters:
    """The model has three turns to write nothing but letters; each turn is rewarded."""

    def __init__(self, row: dict) -> None:
        self.question, self.turns = row["prompt"], 0

    def reset(self) -> list[dict]:
        return [{"role": "user", "content": self.question}]

    def step(self, message: dict) -> tinkex.EnvStep:
        self.turns += 1
        said = message.get("content") or ""
        letters = sum(c.isascii() and c.isalpha() for c in said) / max(1, len(said))
        return tinkex.EnvStep(
            messages=[{"role": "user", "content": f"{letters:.0%} of it were letters. Again!"}],
            reward=letters / 3,
            done=self.turns == 3,
            metrics={"letters": letters},
        )


run = tinkex.reinforce(
    [{"prompt": f"Write a word about {what}."} for what in ("tea", "snow", "music", "bread")],
    base_model="tiny",
    output="run",
    env=Letters,
    rank=8,
    learning_rate=1e-2,
    batch_size=4,
    group_size=8,
    max_tokens=8,
    epochs=6,
)
rewards = [row["reward"] for row in run.metrics if "reward" in row]
print("reward by step:", *(f"{reward:.2f}" for reward in rewards))
