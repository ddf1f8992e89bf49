"""Distillation: a small model learns from one five times its size, on its own answers."""

from pathlib import Path

import torch
import transformers

import tinkex
from tinkex.engine import tiny

# A larger model with the same tokenizer. (For real ones, take two sizes of one family.)
shape = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "head_dim": 64}
torch.manual_seed(0)
larger = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(**{**tiny.CONFIG, **shape}, initializer_range=1 / 16)
)
torch.nn.init.normal_(larger.model.embed_tokens.weight)
larger.save_pretrained("larger")
tiny.write_tokenizer(Path("larger"))

rows = [{"prompt": f"{n} is ", "completion": "even." if n % 2 == 0 else "odd."} for n in range(24)]
lessons = {"learning_rate": 5e-3, "batch_size": 6}
with tinkex.ServiceClient() as service:
    teacher = tinkex.finetune(rows, "larger", "teacher", service=service, epochs=6, **lessons)
    # A student learns little from answers that no teacher would give: first some examples.
    start = tinkex.finetune(rows, "tiny", "start", service=service, rank=8, epochs=2, **lessons)
    student = tinkex.distill(
        [{"prompt": row["prompt"]} for row in rows],
        teacher.sampler_path,
        "tiny",
        "student",
        service=service,
        start_from=str(start.folder),
        rank=8,
        learning_rate=5e-3,
        batch_size=8,
        group_size=4,
        max_tokens=6,
        plain=True,
        epochs=5,
        deterministic=True,
    )
for row in student.metrics:
    print({key: round(value, 3) for key, value in row.items() if "kl" in key or key == "step"})
