"""An architecture unknown to tinkex, with its own names, layers and head.

It averages the previous tokens, has no attention and no cache, and caps its logits after a factor.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutput


class AveragingConfig(transformers.PretrainedConfig):
    model_type = "averaging"

    def __init__(self, vocab_size: int = 300, dim: int = 32, depth: int = 2, **more: Any) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = self.dim = dim
        self.num_hidden_layers = self.depth = depth
        self.max_position_embeddings = 256
        super().__init__(**{"tie_word_embeddings": False, **more})


class HalvedLinear(nn.Linear):
    """A subclass with its own forward, which computes the same."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + (0 if self.bias is None else self.bias)


class Stage(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mixer = nn.ModuleDict({"into": nn.Linear(dim, 2 * dim), "out": HalvedLinear(dim, dim)})
        self.wide = nn.Linear(dim, 48, bias=False)
        self.narrow = nn.Linear(48, dim)

    def forward(self, x: Tensor) -> Tensor:
        value, weight = self.mixer["into"](self.norm(x)).chunk(2, dim=-1)
        weight = weight.sigmoid()
        mean = (value * weight).cumsum(1) / weight.cumsum(1)
        x = x + self.mixer["out"](mean)
        return x + self.narrow(torch.relu(self.wide(x)).square())


class AveragingForCausalLM(transformers.PreTrainedModel, GenerationMixin):
    config_class = AveragingConfig
    base_model_prefix = "body"
    _no_split_modules = ("Stage",)

    def __init__(self, config: AveragingConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.dim)
        self.stages = nn.ModuleList(Stage(config.dim) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim)
        self.to_words = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def get_output_embeddings(self) -> nn.Module:
        return self.to_words

    def prepare_inputs_for_generation(self, input_ids: Tensor, **_: Any) -> dict[str, Tensor]:
        return {"input_ids": input_ids}

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutput:
        x = self.words(input_ids)
        for stage in self.stages:
            x = stage(x)
        return CausalLMOutput(logits=2.5 * self.to_words(self.norm(x)))


transformers.AutoConfig.register("averaging", AveragingConfig)
transformers.AutoModelForCausalLM.register(AveragingConfig, AveragingForCausalLM)
