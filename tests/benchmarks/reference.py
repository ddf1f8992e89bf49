"""A user's code with transformers and PEFT, in a separate process.

Separate, so that our settings (of threads, malloc and torch) do not affect it. `Reference` is the
caller's end; `python reference.py BASE ADAPTER DTYPE DEVICE` is the process, which reads pickled
(method, arguments) from standard input and writes results.
"""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

#: Environment variables that tinkex.engine sets for its process.
OURS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "THP_MEM_ALLOC_ENABLE")


class Reference:
    """A process with the model loaded; each method of `Loop` can be called."""

    def __init__(
        self, base: Path, adapter: Path, dtype: str = "float32", device: str = "cpu"
    ) -> None:
        environment = {k: v for k, v in os.environ.items() if k not in OURS}
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(base), str(adapter), dtype, device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of `Loop` and return its result; RuntimeError if the process has ended."""
        pipe_in, pipe_out = self._process.stdin, self._process.stdout
        if pipe_in is None or pipe_out is None:
            raise RuntimeError("the reference process has no pipes.")
        try:
            pickle.dump((method, arguments), pipe_in)
            pipe_in.flush()
            return pickle.load(pipe_out)
        except (EOFError, BrokenPipeError) as exc:
            status = self._process.wait()
            raise RuntimeError(f"the reference ended with status {status} in {method}().") from exc

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


class Loop:
    """The loops themselves."""

    def __init__(self, base: str, adapter: str, dtype: str, device: str) -> None:
        import peft
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        self._torch, self._device = torch, device
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = transformers.AutoModelForCausalLM.from_pretrained(
                base, dtype=getattr(torch, dtype)
            )
            self._model = peft.PeftModel.from_pretrained(model, adapter, is_trainable=True)
        self._model.to(device)
        trained = [p for p in self._model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def parameters_used(self, adapter: bool) -> int:
        """Parameters that each token is multiplied with in the layers, and in their adapters."""
        return sum(
            p.numel()
            for name, p in self._model.named_parameters()
            if name.endswith("proj.base_layer.weight") or (adapter and "lora" in name)
        )

    def step(self, texts: Sequence[np.ndarray], size: int) -> float:
        """A usual training step: padded batches, cross_entropy on all logits, AdamW."""
        torch, total = self._torch, 0.0
        self._model.train()
        for start in range(0, len(texts), size):
            batch = texts[start : start + size]
            longest = max(len(text) for text in batch)
            ids = torch.zeros(len(batch), longest, dtype=torch.long)
            mask = torch.zeros(len(batch), longest, dtype=torch.long)
            for i, text in enumerate(batch):
                ids[i, : len(text)] = torch.from_numpy(text)
                mask[i, : len(text)] = 1
            ids, mask = ids.to(self._device), mask.to(self._device)
            logits = self._model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1]).logits
            targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="sum"
            )
            loss.backward()
            total += loss.item()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return total

    def generate(self, prompts: Sequence[np.ndarray], samples: int, length: int) -> None:
        """transformers' generate on a left-padded batch."""
        torch = self._torch
        self._model.eval()
        longest = max(len(prompt) for prompt in prompts)
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            ids[i, longest - len(prompt) :] = torch.from_numpy(prompt)
            mask[i, longest - len(prompt) :] = 1
        with torch.no_grad():
            self._model.generate(
                input_ids=ids.to(self._device),
                attention_mask=mask.to(self._device),
                do_sample=True,
                top_k=0,
                num_return_sequences=samples,
                max_new_tokens=length,
                min_new_tokens=length,
                pad_token_id=0,
                eos_token_id=None,
            )

    def generate_one_by_one(self, prompt: np.ndarray, samples: int, length: int) -> None:
        """The same prompt, one sample at a time."""
        for _ in range(samples):
            self.generate([prompt], 1, length)

    def prompt_logprobs(self, prompts: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Log-probabilities of each prompt's tokens but the first, prompt by prompt."""
        torch, found = self._torch, []
        self._model.eval()
        with torch.no_grad():
            for prompt in prompts:
                ids = torch.from_numpy(prompt)[None].to(self._device)
                logits = self._model(input_ids=ids).logits[:, :-1].float()
                chosen = logits.log_softmax(-1).gather(2, ids[:, 1:, None])
                found.append(chosen[0, :, 0].cpu().numpy())
        return found

    def peak(self) -> int:
        """Peak resident memory of this process, in bytes."""
        return peak_memory()


def peak_memory() -> int:
    """Peak resident bytes of this process. Not getrusage's, which are its parent's at first."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+)", status)
    if found is None:
        raise RuntimeError("/proc/self/status does not tell VmHWM.")
    return 1024 * int(found[1])


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # keep the output of libraries out of the results
    loop = Loop(*sys.argv[1:])
    while True:
        try:
            method, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(getattr(loop, method)(*arguments), answers)
        answers.flush()


if __name__ == "__main__":
    main()
