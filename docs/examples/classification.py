"""Classification: a label as the completion, and the labels' probabilities afterwards."""

import math

import tinkex

PLACES = ["ticket", "parcel", "letter", "phone", "window", "garden"]
GOOD, BAD = ["works well", "is lovely", "arrived early"], ["is broken", "came late", "is lost"]
rows = [
    {"prompt": f"The {place} {verdict}. Mood:", "completion": mood}
    for place in PLACES
    for mood, verdicts in ((" good", GOOD), (" bad", BAD))
    for verdict in verdicts
]

with tinkex.finetune(
    rows, "tiny", "run", rank=16, learning_rate=5e-3, batch_size=6, epochs=8, eval_fraction=0.1
) as run:
    sampler = run.sampling_client()
    question = sampler.encode("The ticket is broken. Mood:")
    scores = {}
    for label in (" good", " bad"):
        tokens = question + sampler.encode(label)
        logprobs = sampler.compute_logprobs(tokens).result()
        scores[label] = sum(value or 0.0 for value in logprobs[len(question) :])
    total = sum(map(math.exp, scores.values()))
    for label, score in scores.items():
        print(f"P({label.strip()}) = {math.exp(score) / total:.2f}")
