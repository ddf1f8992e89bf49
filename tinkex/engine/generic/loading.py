"""Loads a model for the generic path, and tests what it supports.

Models that transformers cannot load as causal language models are refused with the reason. The
behaviour of head and cache is measured: a few tokens are computed in several ways and compared.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

from tinkex.engine import configuration, finished_lora, lora
from tinkex.engine.attention import Packing, soft_cap_
from tinkex.engine.base_model import Prompt
from tinkex.engine.configuration import Unsupported
from tinkex.engine.generic.adapted import HEAD, Adapted
from tinkex.engine.generic.model import GenericModel
from tinkex.engine.generic.sampling import GenericSampling
from tinkex.engine.linears import Linear

logger = logging.getLogger("tinkex.engine")

#: Settings that may be a soft cap of the logits.
_CAPS = ("final_logit_softcapping", "logits_soft_cap")

#: Largest difference between two ways to compute one number, relative to the largest number.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 6e-2}

#: Names of a vision-language checkpoint's text part -> those of its text model.
_TEXT_PART = {
    r"^model\.language_model\.": "model.",
    r"^language_model\.model\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
}

#: Parts of a vision-language checkpoint that its text model does not use.
_OTHER_PARTS = ("vis", "image", "audio", "projector", "merger", "mtp", "speech", "embed_")


def text_model(config: Any) -> tuple[Any, type]:
    """The configuration of the text that a model computes, and the class of its module.

    Raises:
        Unsupported: If it is not a causal language model.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING as CAUSAL

    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise Unsupported(
            f"is an encoder-decoder ({kind}); this server trains decoders, which continue a text"
        )
    text = config.get_text_config()
    _check_positions(text)
    if text is not config and type(text) in CAUSAL:
        return text, CAUSAL[type(text)]
    if type(config) in CAUSAL and not hasattr(config, "vision_config"):
        return config, CAUSAL[type(config)]
    if hasattr(config, "vision_config"):
        raise Unsupported(
            f"is a vision-language model ({kind}), and transformers cannot load its text part alone"
        )
    raise Unsupported(
        f"has architecture {kind!r}, for which transformers has no causal language model"
    )


def _check_positions(config: Any) -> None:
    """Check that position embeddings do not depend on the length of the text: a batch has several.

    Raises:
        Unsupported: If it is not.
    """
    for own in configuration.rope_parameters(config):
        if own.get("rope_type") == "dynamic":
            raise Unsupported(
                "has position embeddings of type 'dynamic', which change with the length of the "
                "text; supported are models whose positions do not"
            )


def read(directory: Path, config: Any = None, dtype: Any = "auto") -> Any:
    """The module of the model in *directory*, on the CPU, its parameters frozen.

    Args:
        config: read by transformers from the directory; None reads it here.

    Raises:
        Unsupported: If its files do not fit.
    """
    import transformers

    config = config or transformers.AutoConfig.from_pretrained(directory)
    text, kind = text_model(config)
    is_part = text is not config
    model, report = kind.from_pretrained(  # type: ignore[attr-defined]
        directory,
        config=text,
        dtype=dtype,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
        **({"key_mapping": _TEXT_PART} if is_part else {}),
    )
    _check_report(report, is_part=is_part)
    return model.eval().requires_grad_(False)


@attrs.frozen(eq=False)
class Description:
    """What is known of a model before its weights are read.

    Attributes:
        kind: the class of its module.
        parameters: how many; tied ones count once.
        linears: the matrices that can be adapted, on the meta device.
    """

    kind: type
    parameters: int
    linears: Mapping[str, Linear]
    has_tied_head: bool


def describe(config: Any) -> Description:
    """What is known of a model from its configuration alone.

    Raises:
        Unsupported: As `text_model`, or if it has layers that cannot be adapted.
    """
    text, kind = text_model(config)
    with torch.device("meta"):
        module = kind(text)
    linears = _adapted(module).linears
    count = sum(parameter.numel() for parameter in module.parameters())
    is_tied = module.get_output_embeddings().weight is module.get_input_embeddings().weight
    return Description(kind, count, linears, is_tied)


def _adapted(model: Any) -> Adapted:
    try:
        return Adapted(model)
    except ValueError as exc:
        raise Unsupported(str(exc)) from exc


def load(config: Any, directory: Path, device: torch.device, dtype: torch.dtype) -> GenericModel:
    """Load a model that `text_model` has passed.

    Raises:
        Unsupported: If its files do not fit, or it computes something that cannot be adapted.
    """
    return prepare(read(directory, config, dtype).to(device))


def prepare(model: Any) -> GenericModel:
    """Make a `GenericModel` from a loaded module. Changes the module permanently.

    Raises:
        Unsupported: As `load`.
    """
    model.config.output_router_logits = False
    base = GenericModel(
        _adapted(model),
        vocab=model.get_output_embeddings().weight.shape[0],
        context=configuration.context(model.config),
        eos_tokens=configuration.eos_tokens(model.config, model.generation_config),
    )
    with torch.no_grad():
        base = _with_head(base)
        _check_causal(base)
    base = attrs.evolve(base, activation_bytes=_activation_bytes(base))
    with torch.no_grad():
        return _with_cache(base)


def _check_report(report: Any, *, is_part: bool) -> None:
    """Check transformers' report on the tensor names in the files.

    Args:
        is_part: True if the files hold more than the model.
    """
    missing = sorted(report["missing_keys"])
    unexpected = sorted(
        key
        for key in report["unexpected_keys"]
        if not (is_part and any(part in key for part in _OTHER_PARTS))
    )
    for label, keys in (("lacks", missing), ("has unexpected", unexpected)):
        if keys:
            shown = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
            raise Unsupported(
                f"does not have the tensors that its config.json describes: it {label} {shown}. "
                "Give a directory written by save_pretrained() of the whole model"
            )


# -- what the model does --------------------------------------------------------------------------


def _tokens(base: GenericModel, count: int, start: int = 0) -> Tensor:
    """(count,) token ids of a probe, all different if the vocabulary is large enough."""
    few = min(base.vocab, base.adapted.model.get_input_embeddings().weight.shape[0])
    return ((torch.arange(count) * 7 + start + 1) % few).to(base.device)


def _bare(base: GenericModel) -> finished_lora.MixedLinears:
    return finished_lora.MixedLinears(
        base.linears, finished_lora.Stack([None]), np.zeros(1, np.int64)
    )


def _is_close(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> bool:
    scale = float(theirs.abs().max())
    return float((ours - theirs).abs().max()) <= _TOLERANCE.get(dtype, 6e-2) * max(scale, 1e-3)


def _capped(logits: Tensor, cap: float) -> Tensor:
    return soft_cap_(logits.clone(), cap) if cap else logits


def _with_head(base: GenericModel) -> GenericModel:
    """*base* with the factor or soft cap that its model applies to the head's output.

    Raises:
        ValueError: If it is neither.
    """
    ids = _tokens(base, 8)[None]
    expected = base.adapted.model(input_ids=ids, use_cache=False).logits[0].float()
    linears = _bare(base)
    with base.adapted.using(linears):
        hidden = base.hidden(ids, use_cache=False)[0]
    product = linears.forward(HEAD, hidden).float()
    for found in _heads(base, product, expected):
        logits = product * found.logit_scale
        if _is_close(_capped(logits, found.logit_cap), expected, base.dtype):
            return found
    raise Unsupported(
        "computes its logits by more than a linear layer with a factor or a soft cap; "
        f"its class is {type(base.adapted.model).__name__}"
    )


def _check_causal(base: GenericModel) -> None:
    """Check that no token sees a later one.

    Raises:
        Unsupported: If one does.
    """
    ids = _tokens(base, 12)[None]
    with base.adapted.using(_bare(base)):
        whole = base.hidden(ids, use_cache=False)[0, :7].float()
        part = base.hidden(ids[:, :7], use_cache=False)[0].float()
    if not _is_close(part, whole, base.dtype):
        raise Unsupported("attends to later tokens, too; only causal models can be trained here")


def _heads(base: GenericModel, product: Tensor, expected: Tensor) -> list[GenericModel]:
    """Candidates for the head's factor or cap, likeliest first."""
    config = base.adapted.model.config
    caps = [float(getattr(config, name)) for name in _CAPS if getattr(config, name, None)]
    heads = [base, *(attrs.evolve(base, logit_cap=cap) for cap in caps)]
    if base.linears[HEAD].bias is None:  # a factor can be applied to the head's input
        measured = float((product * expected).sum() / product.square().sum())
        known = [value for n, value in config.to_dict().items() if "scal" in n or "mult" in n]
        factors = [float(f) for f in known if isinstance(f, (int, float)) and f]
        exact = [f for g in factors for f in (g, 1 / g) if abs(f / measured - 1) < 1e-3]
        heads += [attrs.evolve(base, logit_scale=factor) for factor in (*exact, measured)]
    return heads


def _activation_bytes(base: GenericModel) -> int:
    """Bytes of activations that autograd saves per token, measured."""
    count = 32
    own = {parameter.data_ptr() for parameter in base.adapted.model.parameters()}
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    layout = lora.Layout(base.linears, lora.Shape(1, train_unembed=False))
    flat = torch.zeros(layout.size, device=base.device)
    linears = lora.TrainedLinears(base.linears, layout, flat, torch.zeros_like(flat))
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
    with torch.enable_grad(), hooks, base.adapted.using(linears):
        base.hidden(_tokens(base, count)[None], use_cache=False)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    size = sum(nbytes for place, nbytes in storages.items() if place not in own)
    return max(1, size // count)


def _with_cache(base: GenericModel) -> GenericModel:
    """*base* with the sizes of its cache if sequences can join and leave it; else unchanged."""
    for equal in (False, True):
        tried = attrs.evolve(base, position_bytes=1, needs_equal_lengths=equal)
        try:
            sizes = _try_cache(tried)
        except Exception as exc:  # whatever a model does with a cache that it does not know
            logger.debug("the cache of %s cannot be used: %s", type(base.adapted.model), exc)
            continue
        if sizes is not None:
            position, sequence = sizes
            tried = attrs.evolve(tried, position_bytes=position, sequence_bytes=sequence)
            return attrs.evolve(tried, reads_in_pieces=_can_read_in_pieces(tried))
    logger.info(
        "%s has no cache that sequences can join and leave; every token is sampled from the whole "
        "text.",
        type(base.adapted.model).__name__,
    )
    return base


def _try_cache(base: GenericModel) -> tuple[int, int] | None:
    """Bytes of a position and of a sequence in the cache; None if its logits differ.

    Three sequences of different lengths: two begin together, one joins later, one leaves.
    """
    texts = [_tokens(base, count, start) for count, start in ((14, 0), (13, 3), (17, 5))]
    cuts, state = (9, 8, 6), GenericSampling(base)

    def begin(*numbers: int) -> dict[int, Tensor]:
        prompts = [
            Prompt(texts[i][: cuts[i]].cpu().numpy().astype(np.int32), None, [[i]]) for i in numbers
        ]
        return dict(zip(numbers, state.begin(prompts, None)))

    found: dict[tuple[int, int], Tensor] = {}  # (text, tokens read) -> logits
    read = dict(enumerate(cuts))
    found |= {(i, read[i]): logits for i, logits in begin(0, 1).items()}
    sizes = _cache_bytes(state)
    for step in range(4):
        if step == 1:
            found[2, read[2]] = begin(2)[2]
        if step == 3:
            state.remove(0)
        tokens = np.array([int(texts[i][min(read[i], len(texts[i]) - 1)]) for i in range(3)])
        rows, logits = state.advance(
            tokens, np.zeros(3, np.int64), dict.fromkeys(range(3)), in_turn=False
        )
        for row, own in zip(rows.tolist(), logits):
            read[row] += 1
            found[row, read[row]] = own
    for i, text in enumerate(texts):
        with base.adapted.using(_bare(base)):
            hidden = base.hidden_rows(text, Packing([len(text)], base.device))
        logits = _bare(base).forward(HEAD, hidden).float()
        for (row, count), own in found.items():
            expected = _capped(logits[count - 1], base.logit_cap)
            if row == i and not _is_close(own, expected, base.dtype):
                return None
    return sizes


def _can_read_in_pieces(base: GenericModel) -> bool:
    """True if a prompt read in pieces gives the same logits. Some models with states restart at
    every piece of more than one token."""
    text = _tokens(base, 19)
    state = GenericSampling(base)
    reader = state.read(Prompt(text.cpu().numpy().astype(np.int32), None))
    try:
        read = torch.cat([reader.read(count) for count in (7, 1, 5, 6)])
    except Exception as exc:  # whatever a model does with a cache that it does not know
        logger.debug("%s cannot read in pieces: %s", type(base.adapted.model), exc)
        return False
    with base.adapted.using(_bare(base)):
        expected = base.hidden_rows(text, Packing([len(text)], base.device))
    logits = [_bare(base).forward(HEAD, hidden).float() for hidden in (read, expected)]
    return all(_is_close(own, other, base.dtype) for own, other in zip(*logits))


def _cache_bytes(state: GenericSampling) -> tuple[int, int]:
    """Bytes of one position, and of one empty sequence."""
    [cache] = state.caches
    positions = sequences = 0
    for layer in cache.layers:
        for name in ("keys", "values"):
            x = getattr(layer, name, None)
            if x is not None and x.numel():
                positions += x.nbytes // (x.shape[0] * x.shape[2])
        for name in ("conv_states", "recurrent_states"):
            for x in getattr(layer, name, {}).values():
                if x is not None:
                    sequences += x.nbytes // len(x)
    return positions, sequences
