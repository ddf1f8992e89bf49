"""Distillation: a small adapter learns from a larger one, on its own answers."""

import tinkex

rows = [{"prompt": f"{n} is ", "completion": "even." if n % 2 == 0 else "odd."} for n in range(24)]
teacher = tinkex.finetune(
    rows, "tiny", "teacher", rank=32, learning_rate=5e-3, batch_size=6, epochs=6
)

student = tinkex.distill(
    [{"prompt": row["prompt"]} for row in rows],
    teacher.sampler_path,
    "tiny",
    "student",
    rank=8,
    learning_rate=2e-2,
    batch_size=8,
    max_tokens=6,
    plain=True,
    epochs=5,
)
for row in student.metrics:
    print({key: round(value, 3) for key, value in row.items() if "kl" in key or key == "step"})
