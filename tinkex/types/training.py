"""Creating, training, saving and loading a model: requests and results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Union

import attrs

from tinkex.types import checks, display
from tinkex.types.data import Datum
from tinkex.types.dataclass_form import like_a_dataclass
from tinkex.types.losses import LossConfigValue
from tinkex.types.ready import Ready
from tinkex.types.tensors import TensorData

__all__ = [
    "AdamOptimizerConfig",
    "AdamParams",
    "CopyWeightsRequest",
    "CopyWeightsResponse",
    "CreateModelRequest",
    "CreateModelResponse",
    "DimuonOptimizerConfig",
    "DimuonParams",
    "ForwardBackwardOutput",
    "ForwardBackwardRequest",
    "GetInfoRequest",
    "GetInfoResponse",
    "LoadWeightsRequest",
    "LoadWeightsResponse",
    "LoraConfig",
    "ModelData",
    "ModelID",
    "OptimParams",
    "OptimStepRequest",
    "OptimStepResponse",
    "OptimizerConfig",
    "SaveWeightsExternalRequest",
    "SaveWeightsExternalResponse",
    "SaveWeightsForSamplerRequest",
    "SaveWeightsForSamplerResponse",
    "SaveWeightsRequest",
    "SaveWeightsResponse",
    "UnloadModelRequest",
    "UnloadModelResponse",
    "WeightsInfoRequest",
    "WeightsInfoResponse",
    "optimizer_config",
]

ModelID = str

#: Largest accepted LoRA rank.
MAX_RANK = 4096


@attrs.frozen
class LoraConfig:
    """The LoRA adapter of a model.

    Args:
        rank: of the low-rank matrices, 1 to 4096.
        seed: of the adapter's initialization; None lets the server choose. train_mlp, train_attn,
        train_unembed: which linear layers are adapted; at least one. A train_unembed of None lets
        the server choose: tinkex's adapts the head unless it is tied to the embedding.
    """

    rank: int = attrs.field(
        default=32,
        validator=checks.integer(f"an integer from 1 to {MAX_RANK}", lambda n: 1 <= n <= MAX_RANK),
    )
    seed: int | None = attrs.field(
        default=None,
        validator=checks.integer(
            "an integer from 0 to 2**63 - 1, or None", lambda n: 0 <= n < 2**63, optional=True
        ),
    )
    train_unembed: bool | None = attrs.field(default=None, validator=checks.boolean_or_none)
    train_mlp: bool = attrs.field(default=True, validator=checks.boolean)
    train_attn: bool = attrs.field(default=True, validator=checks.boolean)

    def __attrs_post_init__(self) -> None:
        if not (self.train_mlp or self.train_attn) and self.train_unembed is False:
            raise ValueError(
                "At least one of train_mlp, train_attn, or train_unembed must be true."
            )


@attrs.frozen
class AdamParams:
    """Settings of one AdamW step; each step may have different ones.

    Update: m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2;
    w <- w - lr weight_decay w;  w <- w - lr m_hat / (sqrt(v_hat) + eps)
    (Loshchilov and Hutter 2019, as in torch.optim.AdamW).

    Args:
        grad_clip_norm: largest global L2 norm of the gradient; 0 is no limit.
    """

    learning_rate: float = attrs.field(
        default=1e-4, validator=checks.number("a number >= 0", lambda x: x >= 0)
    )
    beta1: float = attrs.field(
        default=0.9, validator=checks.number("a number in [0, 1)", lambda x: 0 <= x < 1)
    )
    beta2: float = attrs.field(
        default=0.95, validator=checks.number("a number in [0, 1)", lambda x: 0 <= x < 1)
    )
    eps: float = attrs.field(
        default=1e-12, validator=checks.number("a number > 0", lambda x: x > 0)
    )
    weight_decay: float = attrs.field(
        default=0.0, validator=checks.number("a number >= 0", lambda x: x >= 0)
    )
    grad_clip_norm: float = attrs.field(
        default=0.0, validator=checks.number("a number >= 0", lambda x: x >= 0)
    )


@attrs.frozen
class DimuonParams:
    """Settings of one step of Dimuon, the official service's other optimizer.

    Args:
        grad_clip_norm: largest global L2 norm of the gradient; 0 is no limit.
        beta1: of the running average of gradients.
    """

    learning_rate: float = attrs.field(validator=checks.number("a number >= 0", lambda x: x >= 0))
    grad_clip_norm: float = attrs.field(
        default=0.0, validator=checks.number("a number", lambda x: True)
    )
    beta1: float = attrs.field(
        default=0.9, validator=checks.number("a number in [0, 1)", lambda x: 0 <= x < 1)
    )
    type: Literal["dimuon"] = "dimuon"


OptimParams = Union[AdamParams, DimuonParams]


@attrs.frozen
class AdamOptimizerConfig:
    """Train the model with AdamW."""

    type: Literal["adamw"] = "adamw"


@attrs.frozen
class DimuonOptimizerConfig:
    """Train the model with Dimuon, on servers that support it."""

    type: Literal["dimuon"] = "dimuon"
    version: int = 1


OptimizerConfig = Union[AdamOptimizerConfig, DimuonOptimizerConfig]


def optimizer_config(optimizer: OptimizerConfig | None) -> dict[str, Any] | None:
    """The optimizer field of a request: None for AdamW, which is the default of all servers.

    Raises:
        TypeError: If it is not an optimizer configuration.
    """
    if optimizer is None or isinstance(optimizer, AdamOptimizerConfig):
        return None
    if not isinstance(optimizer, DimuonOptimizerConfig):
        raise TypeError(
            "optimizer must be types.AdamOptimizerConfig() or types.DimuonOptimizerConfig(), got "
            f"{optimizer!r}."
        )
    return attrs.asdict(optimizer)


@attrs.frozen
class CreateModelRequest:
    session_id: str
    model_seq_id: int
    base_model: str
    lora_config: LoraConfig = attrs.field(factory=LoraConfig)
    user_metadata: dict[str, Any] | None = None
    #: Only "adamw" is offered by the local server.
    optimizer_config: dict[str, Any] | None = None
    #: A PEFT adapter directory on the server's machine to start from (local server only).
    adapter: str | None = None


@attrs.frozen
class CreateModelResponse:
    model_id: str


@attrs.frozen
class GetInfoRequest:
    model_id: str


@attrs.frozen
class ModelData:
    model_name: str | None = None
    arch: str | None = None
    tokenizer_id: str | None = None


@attrs.frozen
class GetInfoResponse:
    """The server's description of a model. Fields that it does not send are None."""

    model_id: str
    model_data: ModelData = attrs.field(factory=ModelData)
    is_lora: bool | None = None
    lora_rank: int | None = None
    model_name: str | None = None
    optimizer_config: dict[str, Any] | None = None
    train_unembed: bool | None = None

    @property
    def base_model(self) -> str | None:
        """The base model's name, from any of the fields in which servers send it."""
        return self.model_data.model_name or self.model_name


@attrs.frozen
class UnloadModelRequest:
    model_id: str


@attrs.frozen
class UnloadModelResponse:
    model_id: str | None = None


@attrs.frozen
class ForwardBackwardRequest:
    """One batch: compute the loss and, unless *forward_only*, add its gradients to the model's."""

    model_id: str
    seq_id: int
    data: list[Datum]
    loss_fn: str
    loss_fn_config: Mapping[str, LossConfigValue] | None = None
    forward_only: bool = False


@like_a_dataclass
@attrs.frozen
class ForwardBackwardOutput:
    """The result of `forward` and `forward_backward`.

    Attributes:
        loss_fn_outputs: for each datum, arrays by name; "logprobs" is float32 in the shape of the
            datum's target_tokens, in nats.
        metrics: numbers by name; "loss:sum" is the loss summed over tokens and datums.
        loss_fn_output_type: the server's name for the outputs.
    """

    loss_fn_outputs: list[dict[str, TensorData]] = attrs.field(factory=list)
    metrics: dict[str, float] = attrs.field(factory=dict)
    loss_fn_output_type: str = "ArrayRecord"

    def __repr__(self) -> str:
        datums = display.count(len(self.loss_fn_outputs), "datum")
        names = ", ".join(sorted(self.loss_fn_outputs[0])) if self.loss_fn_outputs else "nothing"
        return f"<ForwardBackwardOutput of {datums}: {names}; {display.numbers(self.metrics)}>"

    def _repr_html_(self) -> str:
        """The metrics as a table, for notebooks."""
        title = f"ForwardBackwardOutput of {display.count(len(self.loss_fn_outputs), 'datum')}"
        return display.html_fields(title, self.metrics)

    @property
    def loss(self) -> float:
        """The loss summed over tokens and datums ("loss:sum"); ValueError if there is none."""
        if "loss:sum" not in self.metrics:
            raise ValueError(
                f"the server gave no 'loss:sum'; its metrics are {sorted(self.metrics)}."
            )
        return self.metrics["loss:sum"]


@attrs.frozen
class OptimStepRequest:
    model_id: str
    seq_id: int
    adam_params: AdamParams | None = attrs.field(factory=AdamParams)
    #: In place of adam_params, for models with another optimizer.
    optimizer_params: DimuonParams | None = None


@attrs.frozen
class OptimStepResponse:
    """The result of `optim_step`.

    Attributes:
        metrics: measured by the server. "no_gradient" is 1.0 if there was no gradient to apply
            (embedded engine).
    """

    metrics: dict[str, float] = attrs.field(factory=dict, converter=checks.dict_or_empty)

    def _repr_html_(self) -> str:
        """The metrics as a table, for notebooks."""
        return display.html_fields("OptimStepResponse", self.metrics)


@attrs.frozen
class SaveWeightsRequest:
    model_id: str
    seq_id: int
    path: str
    ttl_seconds: int | None = None
    overwrite: bool = False
    user_metadata: dict[str, Any] | None = None


@attrs.frozen
class SaveWeightsResponse:
    """path: of the saved state, `tinker://<model>/weights/<name>`."""

    path: str


@attrs.frozen
class SaveWeightsForSamplerRequest:
    """Named (`path`), or unnamed for a sampling session at once (`sampling_session_seq_id`)."""

    model_id: str
    seq_id: int
    path: str | None = None
    sampling_session_seq_id: int | None = None
    kind: str = "snapshot"
    ttl_seconds: int | None = None
    user_metadata: dict[str, Any] | None = None


@attrs.frozen
class SaveWeightsForSamplerResponse:
    """path for the named form, sampling_session_id for the unnamed one."""

    path: str | None = None
    sampling_session_id: str | None = None


@attrs.frozen
class SaveWeightsExternalRequest:
    """Save weights as files that can be fetched separately.

    Args:
        path: the name.
        age_encryption_recipients: public keys (https://age-encryption.org) to encrypt every file
            to; None does not encrypt.
    """

    model_id: str
    seq_id: int
    path: str
    ttl_seconds: int | None = None
    age_encryption_recipients: list[str] | None = None


@attrs.frozen
class SaveWeightsExternalResponse:
    """path: `tinker://<model>/external_weights/<name>`; size_bytes: total size of the files."""

    path: str
    size_bytes: int | None = None


@attrs.frozen
class LoadWeightsRequest:
    """Into an existing model (model_id, seq_id), or as a new one (session_id, model_seq_id)."""

    path: str
    optimizer: bool = False
    model_id: str | None = None
    seq_id: int | None = None
    session_id: str | None = None
    model_seq_id: int | None = None
    base_model: str | None = None
    user_metadata: dict[str, Any] | None = None
    optimizer_config: dict[str, Any] | None = None
    weights_access_token: str | None = attrs.field(default=None, repr=False)


@attrs.frozen
class LoadWeightsResponse:
    path: str | None = None
    model_id: str | None = None


@attrs.frozen
class CopyWeightsRequest:
    """Copy a checkpoint into a run of a session, or into a project."""

    source_path: str
    session_id: str | None = None
    model_seq_id: int | None = None
    destination_project_id: str | None = None
    ttl_seconds: int | None = None
    weights_access_token: str | None = attrs.field(default=None, repr=False)


@attrs.frozen
class CopyWeightsResponse:
    tinker_path: str


@attrs.frozen
class WeightsInfoRequest:
    tinker_path: str


@attrs.frozen
class WeightsInfoResponse(Ready):
    """The model of a checkpoint."""

    base_model: str
    is_lora: bool = True
    lora_rank: int | None = None
    train_unembed: bool | None = None
    train_mlp: bool | None = None
    train_attn: bool | None = None
    optimizer_config: dict[str, Any] | None = None
