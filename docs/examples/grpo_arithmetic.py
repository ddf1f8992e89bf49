"""Reinforcement learning with a reward that can be checked: answers that are short and digits.

`tiny` knows no arithmetic, so it learns the form; on smollm2 the sum itself is learned, too.
"""

import tinkex

rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(6) for b in range(6)]


def reward(answer: str, row: dict) -> dict:
    """Half of the reward is for the form, half for the sum."""
    digits = sum(character.isdigit() for character in answer) / max(1, len(answer))
    return {"reward": digits / 2 + 0.5 * (answer.strip() == row["answer"]), "digits": digits}


run = tinkex.reinforce(
    rows,
    reward,
    "tiny",
    "run",
    rank=8,
    learning_rate=2e-2,
    batch_size=6,
    group_size=8,
    max_tokens=6,
    plain=True,
    epochs=3,
)
rewards = [row["reward"] for row in run.metrics if "reward" in row]
print(f"reward: {rewards[0]:.3f} at first, {rewards[-1]:.3f} at last")
run.plot("loss.svg")
