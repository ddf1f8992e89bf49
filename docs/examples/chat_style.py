"""A style for conversations: messages in, and the samples of one prompt as training goes."""

import tinkex

FACTS = {
    "What is the capital of France?": "Paris",
    "How many legs has a spider?": "Eight",
    "Which planet is red?": "Mars",
    "What do bees make?": "Honey",
    "What is 2 + 2?": "Four",
    "Who wrote Hamlet?": "Shakespeare",
}
rows = [
    {
        "messages": [
            {"role": "system", "content": "You are a pirate."},
            {"role": "user", "content": question},
            {"role": "assistant", "content": f"Arr! {answer}, matey!"},
        ]
    }
    for question, answer in FACTS.items()
]

run = tinkex.finetune(
    rows * 4,
    "tiny",
    "run",
    rank=16,
    learning_rate=5e-3,
    batch_size=4,
    epochs=4,
    prompts=["What do bees make?"],
)
for sample in run.samples[::3]:
    print(f"step {sample['step']}: {sample['text'][:60]!r}")
print(f"All about this run: {run.folder / 'report.html'}")
