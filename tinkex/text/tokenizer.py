"""Loads and caches the tokenizer of a model.

The server names a model's tokenizer; otherwise a few rules apply. Does not know about clients;
takes names.
"""

from __future__ import annotations

import codecs
import hashlib
import importlib.util
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import date as Date
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from tinkex import errors
from tinkex.text import gguf, hub, registry, templates

T = TypeVar("T")

#: The tokenizer of the built-in model, kept inside the package.
BUILT_IN = {"tinkex/tiny": "tiny", "tiny": "tiny"}

LLAMA_3 = "thinkingmachineslabinc/meta-llama-3-tokenizer"
KIMI_K2 = "moonshotai/Kimi-K2-Thinking"
KIMI_K2_REVISION = "612681931a8c906ddb349f8ad0f582cb552189cd"

#: Loads something with encode(text) and decode(ids) for a tokenizer's id.
LoadFunction = Callable[[str], Any]


class Encoding(Protocol):
    """A text as tokens.

    Attributes:
        ids: the tokens.
        offsets: the characters, start and end, that each token covers.
    """

    @property
    def ids(self) -> list[int]: ...

    @property
    def offsets(self) -> Sequence[tuple[int, int]]: ...


class Tokenizer:
    """Text to token ids and back, with the model's special tokens and chat template.

    Args:
        backend: a `tokenizers.Tokenizer`.
        settings: of the model's tokenizer_config.json.
    """

    def __init__(self, backend: Any, settings: dict[str, Any] | None = None) -> None:
        self._backend = backend
        self._settings = settings or {}
        #: A Jinja template of a conversation, or None.
        self.chat_template: str | None = _template(self._settings.get("chat_template"))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The token ids of *text*."""
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, got {type(text).__name__}.")
        self._encode_whole_texts()
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def _encode_whole_texts(self) -> None:
        """Disable padding and truncation, which transformers leaves set in its backend."""
        if getattr(self._backend, "padding", None) is not None:
            self._backend.no_padding()
        if getattr(self._backend, "truncation", None) is not None:
            self._backend.no_truncation()

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special_tokens: bool = False) -> str:
        """The text of token ids."""
        if isinstance(ids, np.ndarray):
            ids = ids.tolist()
        if not isinstance(ids, Sequence) or not all(
            isinstance(i, (int, np.integer)) and not isinstance(i, bool) and i >= 0 for i in ids
        ):
            shown = repr(ids)
            raise TypeError(
                "ids must be a list of token ids (integers >= 0), got "
                f"{shown if len(shown) <= 60 else shown[:57] + '...'}."
            )
        text: str = self._backend.decode([int(i) for i in ids], skip_special_tokens)
        return text

    @property
    def vocab_size(self) -> int:
        size: int = self._backend.get_vocab_size(with_added_tokens=True)
        return size

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text, or None."""
        return self._special("eos_token")

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a text, or None."""
        return self._special("bos_token")

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        date: Date | None = None,
    ) -> str:
        """A conversation as the text that the model was trained on.

        `tinkex.render` gives tokens and weights as well.

        Raises:
            ValueError: If the model has no chat template, or the template does not accept the
                messages.
            MissingExtraError: If Jinja is not installed.
        """
        if self.chat_template is None:
            raise ValueError("this tokenizer has no chat template; write the conversation as text.")
        return templates.render_template(
            self.chat_template,
            list(messages),
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            variables=self.special_texts,
            date=date,
        )[0]

    @cached_property
    def special_texts(self) -> dict[str, str]:
        """The special tokens by their names in chat templates, such as "bos_token"."""
        names = [name for name in self._settings if name.endswith("_token")]
        return {name: text for name in names if (text := self._text_of(name))}

    @cached_property
    def control_tokens(self) -> dict[str, int]:
        """Every special token, text to id; users' text must not be encoded as one of these."""
        if not hasattr(self._backend, "get_added_tokens_decoder"):
            return {text: i for i, text in self._added.items()}
        added = self._backend.get_added_tokens_decoder()
        return {token.content: i for i, token in added.items() if token.special}

    @cached_property
    def _added(self) -> dict[int, str]:
        entries = self._settings.get("added_tokens_decoder", {})
        return {
            int(i): entry["content"] for i, entry in entries.items() if entry.get("special", True)
        }

    @cached_property
    def first_cuts(self) -> list[str]:
        """Tokens at which a text is split before any other processing.

        Empty if one of them depends on white space or a letter before it, so that the parts are not
        independent.
        """
        if not hasattr(self._backend, "get_added_tokens_decoder"):
            return []
        added = self._backend.get_added_tokens_decoder().values()
        found = [token for token in added if not token.normalized and token.content]
        if any(token.lstrip or token.single_word for token in found):
            return []
        return [token.content for token in found]

    @cached_property
    def fingerprint(self) -> str:
        """A hash of everything that determines the tokens of a conversation."""
        backend = self._backend.to_str() if hasattr(self._backend, "to_str") else repr(self)
        settings = json.dumps([self.special_texts, self.chat_template], sort_keys=True)
        return hashlib.sha256(f"{backend}{settings}".encode()).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[Encoding]:
        """
        The tokens of each text.

        No special tokens are added; special tokens in the text are recognised.
        """
        self._encode_whole_texts()
        encoded: list[Encoding] = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return encoded

    def _text_of(self, name: str) -> str:
        value = self._settings.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        return value or ""

    def _special(self, name: str) -> int | None:
        text = self._text_of(name)
        return self._backend.token_to_id(text) if text else None

    def __repr__(self) -> str:
        return f"<Tokenizer of {self.vocab_size} tokens>"


def _template(value: Any) -> str | None:
    """A chat template, in either of the forms in the file."""
    if isinstance(value, list):
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


def tokenizer_id(model_name: str, told: str | None = None) -> str:
    """The id of a model's tokenizer: from the server (*told*), or derived from the model's name.

    A ":suffix" is cut off; Llama 3 has an ungated mirror; `org/model/variant` is `org/model`.
    """
    if not isinstance(model_name, str) or not model_name:
        raise TypeError(f"model_name must be a non-empty str, got {model_name!r}.")
    if model_name in BUILT_IN:
        return model_name  # it is in the package, whatever the server's path
    if model_name in registry.KNOWN and not (told and os.path.isdir(told)):
        # The copy on this machine, or else the public repository.
        return str(registry.find(model_name) or registry.KNOWN[model_name].hub_id)
    if told:
        return told if Path(told).is_absolute() else told.split(":", 1)[0]
    if os.path.isdir(model_name) or gguf.is_gguf(model_name):
        return model_name
    name = model_name.split(":", 1)[0]
    if name.startswith("meta-llama/Llama-3"):
        return LLAMA_3
    parts = name.split("/")
    return "/".join(parts[:2]) if len(parts) == 3 and all(parts) else name


def resolve_base_model(name: str) -> str:
    """
    The absolute path if *name* is a folder or a GGUF file here, otherwise the name.

    A relative path would name another model, or none, in another working directory.
    """
    if name in BUILT_IN:
        return name  # even if there is a folder with that name
    return str(Path(name).resolve()) if os.path.isdir(name) or gguf.is_gguf(name) else name


_cache: dict[tuple[str, str | None, LoadFunction | None], Any] = {}
_locks: dict[tuple[str, str | None, LoadFunction | None], threading.Lock] = {}
_guard = threading.Lock()  # guards _cache and _locks


def check_load_fn(load_fn: object) -> None:
    """Raise TypeError unless *load_fn* is callable or None."""
    if load_fn is not None and not callable(load_fn):
        raise TypeError(f"load_fn must be a function of a tokenizer's id, got {load_fn!r}.")


def same_argument(name: str, value: T | None, alias: str, alias_value: T | None) -> T | None:
    """An argument with two names. TypeError if it is given under both."""
    if value is not None and alias_value is not None:
        raise TypeError(f"{name} and {alias} are the same argument; give only one of them.")
    return alias_value if value is None else value


def load(
    identifier: str, *, revision: str | None = None, load_fn: LoadFunction | None = None
) -> Any:
    """The tokenizer *identifier*, loaded once for each (identifier, revision, load_fn).

    Args:
        load_fn: loads it instead; its result needs encode(text) and decode(ids).

    Raises:
        TokenizerError: With what was tried and what to do.
    """
    check_load_fn(load_fn)
    key = (identifier, revision, load_fn)
    with _guard:
        if key in _cache:
            return _cache[key]
        lock = _locks.setdefault(key, threading.Lock())
    with lock:  # loading may take long, so the lock is per tokenizer
        with _guard:
            if key in _cache:
                return _cache[key]
        tokenizer = _load(identifier, revision, load_fn)
        with _guard:
            _cache[key] = tokenizer
            _locks.pop(key, None)
        return tokenizer


def _load(identifier: str, revision: str | None, load_fn: LoadFunction | None) -> Any:
    if load_fn is not None:
        try:
            return load_fn(identifier)
        except Exception as exc:
            raise errors.TokenizerError(
                f"load_fn could not load the tokenizer {identifier}: {exc}"
            ) from exc
    if identifier in BUILT_IN:
        return from_directory(Path(__file__).parents[1] / "engine" / BUILT_IN[identifier])
    if os.path.isdir(identifier):
        return from_directory(Path(identifier))
    if gguf.is_gguf(identifier):
        return from_gguf(Path(identifier))
    if identifier == KIMI_K2:
        return _from_kimi(revision or KIMI_K2_REVISION)
    return _from_hub(identifier, revision)


def from_directory(directory: Path) -> Tokenizer:
    """The tokenizer of a model directory (tokenizer.json, tokenizer_config.json)."""
    import tokenizers  # takes 20 ms, so only when needed

    path = directory / "tokenizer.json"
    if not path.is_file():
        raise errors.TokenizerError(
            f"{directory} has no tokenizer.json; save the model's fast tokenizer there "
            "(transformers: tokenizer.save_pretrained)."
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as exc:  # the library raises bare Exception
        raise errors.TokenizerError(f"{path} is not a usable tokenizer: {exc}") from exc
    return Tokenizer(backend, _settings(directory))


def from_gguf(path: Path) -> Tokenizer:
    """The tokenizer in a GGUF file."""
    try:
        file = gguf.read(path)
        return Tokenizer(gguf.build_tokenizer(file), gguf.settings(file))
    except (ValueError, OSError) as exc:
        raise errors.TokenizerError(str(exc)) from exc


def _settings(directory: Path) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    path = directory / "tokenizer_config.json"
    if path.is_file():
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as exc:
            raise errors.TokenizerError(f"{path} is not JSON: {exc}") from exc
        if not isinstance(settings, dict):
            raise errors.TokenizerError(f"{path} holds a {type(settings).__name__}, not an object.")
    template = directory / "chat_template.jinja"
    if template.is_file():
        settings["chat_template"] = template.read_text(encoding="utf-8")
    return settings


def _from_hub(identifier: str, revision: str | None) -> Tokenizer:
    """Through huggingface_hub if it is installed: it handles caches, tokens and gated models."""
    files = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        return _from_hub_by_tokenizers(identifier, revision)
    directory = None
    for name in files:
        try:
            if name == "tokenizer.json" and not hub.is_cached(identifier, name, revision):
                hub.check_file(identifier, name, revision)
            path = Path(hf_hub_download(identifier, name, revision=revision))
            directory = path.parent
        except Exception as exc:
            if name == "tokenizer.json":
                raise _unloadable(identifier, exc) from exc
    if directory is None:
        raise _unloadable(identifier, ValueError("no files"))
    return from_directory(directory)


def _from_hub_by_tokenizers(identifier: str, revision: str | None) -> Tokenizer:
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_pretrained(identifier, revision=revision or "main")
    except Exception as exc:  # the library raises bare Exception
        raise _unloadable(identifier, exc) from exc
    return Tokenizer(backend)


def _unloadable(identifier: str, exc: BaseException) -> errors.TokenizerError:
    if identifier.startswith((".", "/", "~")):
        return errors.TokenizerError(f"there is no model directory {identifier}.")
    reason = " ".join(str(exc).split())[:300]
    return errors.TokenizerError(
        f"Failed to load tokenizer {identifier} from the hub: {reason}. Is this machine online, "
        "the name right, and (for a gated model) HF_TOKEN set? Offline, give a model directory "
        "as base_model, or load_fn=."
    )


def _from_kimi(revision: str) -> Any:
    """Kimi K2 has no fast tokenizer: its tiktoken file is read by the library of that name."""
    if importlib.util.find_spec("tiktoken") is None:
        raise errors.MissingExtraError(
            f"the tokenizer of {KIMI_K2} needs tiktoken, which is not installed: "
            "pip install 'tinkex[kimi]'."
        )
    try:
        from huggingface_hub import hf_hub_download

        if not hub.is_cached(KIMI_K2, "tiktoken.model", revision):
            hub.check_file(KIMI_K2, "tiktoken.model", revision)
        model = Path(hf_hub_download(KIMI_K2, "tiktoken.model", revision=revision))
        settings = Path(hf_hub_download(KIMI_K2, "tokenizer_config.json", revision=revision))
    except Exception as exc:
        raise _unloadable(KIMI_K2, exc) from exc
    return kimi_tokenizer(model, settings)


#: Kimi K2's pattern for words, before byte pairs are merged (from its published tokenizer).
KIMI_PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


class _TiktokenBackend:
    """A tiktoken Encoding with the backend methods that `Tokenizer` uses."""

    class _Encoded:
        def __init__(self, ids: list[int], offsets: Sequence[tuple[int, int]] = ()) -> None:
            self.ids, self.offsets = ids, offsets

    def __init__(self, encoding: Any, special: dict[str, int]) -> None:
        self._encoding = encoding
        self._special = special

    def encode(self, text: str, add_special_tokens: bool = True) -> _TiktokenBackend._Encoded:
        return self._Encoded(self._encoding.encode(text, allowed_special="all"))

    def encode_batch(
        self, texts: list[str], add_special_tokens: bool = True
    ) -> list[_TiktokenBackend._Encoded]:
        return [self._with_offsets(self.encode(text).ids) for text in texts]

    def _with_offsets(self, ids: list[int]) -> _TiktokenBackend._Encoded:
        """Add offsets; a token that ends inside a character covers that character, too."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        offsets = []
        length = 0
        for part in self._encoding.decode_tokens_bytes(ids):
            start = length
            length += len(decoder.decode(part))
            is_inside_character = bool(decoder.getstate()[0])
            offsets.append((start, length + is_inside_character))
        return self._Encoded(ids, offsets)

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        if skip_special_tokens:
            special = set(self._special.values())
            ids = [i for i in ids if i not in special]
        text: str = self._encoding.decode(ids)
        return text

    def token_to_id(self, text: str) -> int | None:
        return self._special.get(text)

    def get_vocab_size(self, with_added_tokens: bool = True) -> int:
        size: int = self._encoding.n_vocab
        return size


def kimi_tokenizer(model: Path, settings_file: Path) -> Tokenizer:
    """The tokenizer of a tiktoken.model file and its tokenizer_config.json."""
    import tiktoken  # type: ignore[import-not-found,unused-ignore]
    from tiktoken.load import (  # type: ignore[import-not-found,unused-ignore]
        load_tiktoken_bpe,
    )

    settings = json.loads(settings_file.read_text(encoding="utf-8"))
    ranks = load_tiktoken_bpe(str(model))
    added = settings.get("added_tokens_decoder", {})
    special = {entry["content"]: int(number) for number, entry in added.items()}
    encoding = tiktoken.Encoding(
        name="kimi-k2",
        pat_str=KIMI_PATTERN,
        mergeable_ranks=ranks,
        special_tokens=special,
    )
    return Tokenizer(_TiktokenBackend(encoding, special), settings)
