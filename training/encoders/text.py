"""Text encoders: captions -> contexts, the tokens that a text-conditional network sees."""

import functools
import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from dnnlib.download import hub_is_known, offline
from dnnlib.errors import UserError, one_line
from training.config.data import MAX_CHANNELS, MAX_TOKENS
from training.config.edm2 import PUBLISHED_CLIP
from training.config.fields import Config, option

CLIP_TOKENS = 77


@dataclass(frozen=True, kw_only=True)
class TextEncoderArguments(Config):
    """Arguments of text encoders, and how large they may be in a file."""

    model: str = option("", flag=None)
    tokens: int = option(CLIP_TOKENS, flag=None, low=1, high=MAX_TOKENS)
    width: int = option(1, flag=None, low=1, high=MAX_CHANNELS)


class ContextEncoder(Protocol):
    """Makes contexts of texts, `tokens` vectors of `width` numbers for each."""

    tokens: int
    width: int

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        """float32 [n, tokens, width] on the CPU. The empty text stands for none."""
        ...

    @property
    def init_kwargs(self) -> dict[str, Any]:
        """Arguments that build an equal encoder, as plain JSON values."""
        ...


class TextEncoder:
    """The text model of CLIP, by transformers: its last hidden state after the final layer norm.

    Texts are cut or padded to `tokens` tokens. All of them count, also those of the padding, as in Stable Diffusion and
    U-ViT: there is no attention mask.

    Args:
        model: a name on the Hugging Face hub, or a folder.
        tokens: per text.
        width: of its hidden state; None = as it is.
        named_by: the file that names it; '' = the user does. What a file names is fetched only if it is the published
            one.
        batch_size: texts at a time.

    Raises:
        UserError: transformers is not installed, or the model is missing, damaged or of another width.
    """

    def __init__(
        self,
        model: str = PUBLISHED_CLIP,
        tokens: int = CLIP_TOKENS,
        width: int | None = None,
        named_by: str = "",
        batch_size: int = 64,
    ):
        self.model = os.path.abspath(model) if os.path.isdir(model) else model
        self.tokens, self.named_by, self.batch_size = tokens, named_by, batch_size
        self.width = self._loaded[1].config.hidden_size
        if width not in (None, self.width):
            raise UserError(f"the text encoder {model} is {self.width} wide, not {width}: it is another one")

    @property
    def init_kwargs(self) -> dict[str, Any]:
        return {"model": self.model, "tokens": self.tokens, "width": self.width}

    @functools.cached_property
    def _loaded(self) -> tuple[Any, Any]:
        """The tokenizer and the model."""
        try:
            from transformers import CLIPTextModel, CLIPTokenizer
        except ImportError:
            raise UserError("texts need transformers: pip install transformers") from None
        unknown = bool(self.named_by) and self.model != PUBLISHED_CLIP
        no_network = offline() or not hub_is_known()
        options: dict[str, Any] = {"local_files_only": no_network or unknown or os.path.isdir(self.model)}
        try:
            tokenizer = CLIPTokenizer.from_pretrained(self.model, **options)
            model = CLIPTextModel.from_pretrained(self.model, use_safetensors=True, **options)
        except Exception as err:  # transformers has errors of its own
            named = f" that {self.named_by} names" if self.named_by else ""
            failed = f"the text encoder {self.model}{named} could not be loaded"
            if no_network and self.model == PUBLISHED_CLIP:
                raise UserError(
                    f"{failed}: it is not in huggingface_hub's cache, and there is no network, or none is wanted: "
                    f"run python snapshot_tool.py prefetch {PUBLISHED_CLIP} where there is one, and bring the cache "
                    f"(HF_HOME)"
                ) from None
            raise UserError(f"{failed}: {one_line(err)[:200]}") from None
        return tokenizer, model.eval().requires_grad_(False)

    def to(self, device: torch.device) -> "TextEncoder":
        """The same, with the model on a device."""
        self._loaded[1].to(device)
        return self

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        """See `ContextEncoder.encode`."""
        tokenizer, model = self._loaded
        parts = []
        for start in range(0, len(texts), self.batch_size):
            part = list(texts[start : start + self.batch_size])
            tokens = tokenizer(part, truncation=True, max_length=self.tokens, padding="max_length", return_tensors="pt")
            parts.append(model(input_ids=tokens["input_ids"].to(model.device)).last_hidden_state.float().cpu())
        return torch.cat(parts)


class WordEncoder:
    """A vector of random numbers for each word: tells texts apart, and knows no language. For small experiments.

    The numbers depend on the word alone, small letters or capitals.

    Args:
        tokens: words per text; shorter texts are padded.
        width: numbers per word.
    """

    def __init__(self, tokens: int = 8, width: int = 32):
        self.tokens, self.width = tokens, width

    @property
    def init_kwargs(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "width": self.width}

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        """See `ContextEncoder.encode`."""
        contexts = np.zeros([len(texts), self.tokens, self.width], np.float32)
        for row, text in zip(contexts, texts, strict=True):
            words = re.findall(r"\w+", text.casefold())
            for i in range(self.tokens):
                row[i] = self._vector(words[i] if i < len(words) else "")
        return torch.from_numpy(contexts)

    def _vector(self, word: str) -> np.ndarray:
        digest = hashlib.sha256(word.encode()).digest()
        # RandomState is the generator whose numbers NumPy promises not to change.
        return np.random.RandomState(np.frombuffer(digest, np.dtype("<u4"))).standard_normal(self.width)


# The registry: names in files.
TEXT_ENCODERS: dict[str, type[TextEncoder] | type[WordEncoder]] = {
    cls.__name__: cls for cls in (TextEncoder, WordEncoder)
}


def text_record(encoder: ContextEncoder) -> dict[str, Any]:
    """What a file says of a text encoder, for `text_encoder_from_record`."""
    return {"name": type(encoder).__name__, "kwargs": encoder.init_kwargs}


def text_encoder_from_record(source: str, record: Any, model: str | None = None) -> ContextEncoder:
    """The text encoder that a file names.

    Args:
        source: names the file in errors.
        model: folder or name that the user gives in place of the recorded one.

    Raises:
        UserError: an unknown name, arguments that do not make one, or a model that is missing.
    """
    if not isinstance(record, dict) or record.get("name") not in TEXT_ENCODERS:
        raise UserError(f"{source}: its text encoder is none of {', '.join(TEXT_ENCODERS)}")
    kwargs = record.get("kwargs")
    TextEncoderArguments.from_json(kwargs)
    assert isinstance(kwargs, dict)
    encoder_class: Any = TEXT_ENCODERS[record["name"]]
    trust: dict[str, Any] = {"named_by": source} if encoder_class is TextEncoder else {}
    if model is not None:
        if not trust:
            raise UserError(f"--text-encoder={model}: the texts of {source} are encoded by words, not by a model")
        kwargs, trust = {**kwargs, "model": model}, {}
    try:
        return encoder_class(**kwargs, **trust)
    except TypeError as err:
        raise UserError(f"{source}: the arguments of its text encoder do not fit ({one_line(err)[:100]})") from None
