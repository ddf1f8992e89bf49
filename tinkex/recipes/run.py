"""Run: reads the folder of a run, and samples from, exports or plots it.

Reads the folder at every access, so it is up to date while the run trains. Works with any recipe
whose state.json has the keys of `run_folder.State`.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from tinkex import errors, types
from tinkex.checkpoints import card
from tinkex.checkpoints import export as exporting
from tinkex.recipes import answers, charts, run_folder
from tinkex.recipes.conversation import Conversation, Sampled, Settings
from tinkex.sampling import SamplingClient
from tinkex.service import ServiceClient
from tinkex.text.renderer import Renderer


class Rows(list[dict[str, Any]]):
    """A list of dicts that can become a DataFrame."""

    def to_pandas(self) -> Any:
        """A pandas.DataFrame with a column per key. Needs pandas (tinkex[data])."""
        try:
            import pandas  # type: ignore[import-not-found,import-untyped,unused-ignore]
        except ImportError as exc:
            raise errors.MissingExtraError(
                "a DataFrame needs pandas, which is not installed: pip install 'tinkex[data]'."
            ) from exc
        return pandas.DataFrame(list(self))


class Run:
    """A run in its folder. Made by `tinkex.finetune` and `tinkex.load_run`.

    Args:
        folder: of the run.
        base_url, api_key: of the server that holds its weights; as for `ServiceClient`.
    """

    def __init__(
        self, folder: str | Path, base_url: str | None = None, api_key: str | None = None
    ) -> None:
        self.folder = Path(folder)
        self._address = base_url, api_key
        self._lock = threading.Lock()  # guards the two below
        self._service: ServiceClient | None = None
        self._sampler: SamplingClient | None = None

    def __repr__(self) -> str:
        return f"<Run {self.folder} [{self.description}]>"

    # The content of the folder

    @property
    def state(self) -> dict[str, Any]:
        """The content of state.json; {} before the run has begun."""
        return run_folder.read_json(self.folder / "state.json") or {}

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that the run was started with."""
        return dict(self.state.get("settings") or {})

    @property
    def base_model(self) -> str:
        return str(self.settings.get("base_model") or "")

    @property
    def step(self) -> int:
        """The last step with a row of metrics or a checkpoint; 0 before the first."""
        return max([int(row["step"]) for row in self.metrics] + [int(self.state.get("step") or 0)])

    @property
    def total_steps(self) -> int:
        return int(self.state.get("total_steps") or 0)

    @property
    def checkpoint(self) -> str | None:
        """tinker:// path of the last saved state, with optimizer."""
        path: str | None = self.state.get("checkpoint")
        return path

    @property
    def sampler_path(self) -> str | None:
        """tinker:// path of the final weights; None until the run is finished."""
        path: str | None = self.state.get("sampler_path")
        return path

    @property
    def is_finished(self) -> bool:
        return self.sampler_path is not None

    @property
    def description(self) -> str:
        """The progress of the run: finished, or the step of its last checkpoint."""
        state = self.state
        if state.get("sampler_path"):
            return "finished"
        return f"saved after step {state.get('step') or 0} of {state.get('total_steps') or '?'}"

    @property
    def adapter(self) -> Path | None:
        """Folder of the PEFT adapter; None until the run is finished."""
        folder = self.folder / "adapter"
        return folder if self.is_finished and folder.is_dir() else None

    @property
    def metrics(self) -> Rows:
        """metrics.jsonl: a dict per step, in order; `to_pandas()` makes a DataFrame."""
        return Rows(run_folder.read_rows(self.folder / "metrics.jsonl"))

    @property
    def samples(self) -> Rows:
        """samples.jsonl: samples taken during training, with "step", "prompt", "text"."""
        return Rows(run_folder.read_rows(self.folder / "samples.jsonl"))

    # Actions

    def plot(self, path: str | Path | None = None) -> charts.Plot:
        """
        The losses, or the rewards, as a picture that a notebook displays.

        Args:
            path: also write it there, as SVG.
        """
        plot = charts.plot(self.metrics)
        if path is not None:
            plot.save(path)
        return plot

    def sampling_client(self) -> SamplingClient:
        """A client of the trained model, opened at the first call and reused.

        Raises:
            ValueError: If the run is not finished.
        """
        if self.sampler_path is None:
            raise ValueError(
                f"the run in {self.folder} is not finished ({self.description}); resume it first: "
                "tinkex.finetune(..., resume=True) or tinkex train --resume."
            )
        with self._lock:
            if self._sampler is None:
                self._service = ServiceClient(*self._address)
                self._sampler = self._service.create_sampling_client(model_path=self.sampler_path)
            return self._sampler

    def sample(
        self,
        prompt: str | Sequence[Mapping[str, Any]],
        *,
        max_tokens: int = 128,
        temperature: float = 1.0,
        seed: int | None = None,
        **params: Any,
    ) -> str:
        """
        Sample the trained model's answer to *prompt*.

        Args:
            prompt: text to continue, or messages of a conversation.
            params: more fields of `types.SamplingParams`: top_p, top_k, stop.

        Raises:
            ValueError: If the run is not finished, or a parameter is invalid.
            TinkexError: If the server cannot be reached, or does not have the weights.
        """
        sampler = self.sampling_client()
        tokenizer = sampler.get_tokenizer()
        renderer = Renderer(tokenizer)
        if isinstance(prompt, str):
            tokens = types.ModelInput.from_ints(renderer.encode_prompt(prompt))
        else:
            rendered = renderer.prompt([dict(message) for message in prompt])
            tokens = rendered.model_input
            params.setdefault("stop", rendered.stop or None)
        options = types.SamplingParams(
            max_tokens=max_tokens, temperature=temperature, seed=seed, **params
        )
        return "".join(answers.pieces(sampler, tokens, options, tokenizer))

    def chat(
        self, *, system: str = "", max_tokens: int = 512, temperature: float = 0.7
    ) -> list[dict[str, Any]]:
        """
        Chat with the trained model in a terminal or a notebook, until an empty line or Ctrl-D.

        Ctrl-C stops an answer. `tinkex chat` has more commands.

        Returns:
            The messages of the conversation.
        """
        sampler = self.sampling_client()
        settings = Settings(max_tokens, temperature, None)
        conversation = Conversation(Sampled(sampler, sampler.get_tokenizer()), settings)
        conversation.set_system(system)
        while True:
            try:
                text = input("> ").strip()
            except EOFError:
                text = ""
            if not text:
                return conversation.messages
            try:
                for piece in conversation.ask(text):
                    print(answers.shown(piece), end="", flush=True)
                print()
            except KeyboardInterrupt:
                print(" [stopped]", file=sys.stderr)

    def export(
        self,
        folder: str | Path,
        form: str = "hf",
        *,
        gguf_type: Literal["F16", "Q8_0", "F32"] = "F16",
        base_model: str | None = None,
        force: bool = False,
    ) -> Path:
        """
        Write the trained model into *folder* for other programs, as `tinkex export` does.

        Args:
            form: "peft" is the adapter, "hf" a Hugging Face directory, "gguf" a file for llama.cpp.
            gguf_type: of the matrices.
            base_model: directory, GGUF file or hub id; by default that of the run.
            force: replace *folder* if it exists.

        Raises:
            ValueError: If the run is not finished, *folder* exists, or *form* is not known.
        """
        if self.adapter is None:
            raise ValueError(f"the run in {self.folder} is not finished ({self.description}).")
        folder = Path(folder)
        exporting.export_adapter(
            self.adapter,
            base_model or self.base_model,
            folder,
            form,
            name=folder.resolve().name,
            gguf_type=gguf_type,
            force=force,
            training=self.training,
        )
        return folder

    @property
    def training(self) -> card.Training:
        """The training data and settings for a model card."""
        losses = [row["eval_loss"] for row in self.metrics if "eval_loss" in row]
        settings = {key: value for key, value in self.settings.items() if key != "base_model"}
        # Other methods store another measure there than a loss per token.
        is_loss = settings.get("method", "sft") == "sft"
        evaluated = (losses[0], losses[-1]) if losses and is_loss else None
        digest = str(self.state.get("data_sha256", ""))
        return card.Training(digest, self.total_steps, settings, evaluated)

    def close(self) -> None:
        """Close the sampling client, if there is one."""
        with self._lock:
            service, self._service, self._sampler = self._service, None, None
        if service is not None:
            service.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def load_run(folder: str | Path, base_url: str | None = None, api_key: str | None = None) -> Run:
    """
    Load the run in *folder*, finished or not.

    Args:
        base_url, api_key: of the server that holds its weights; by default as for `ServiceClient`.

    Raises:
        ValueError: If there is no run in *folder*, or its state cannot be read.
    """
    run = Run(folder, base_url, api_key)
    if not run.state:
        raise ValueError(f"there is no run in {folder}: it has no state.json.")
    return run
