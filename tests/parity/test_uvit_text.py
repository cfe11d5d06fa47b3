"""Contexts of CLIP's text model against the golden values (tolerance in their README)."""

import pytest
from uvit_golden import ROOM, GoldenFile, names

from training.encoders import TextEncoder

CONTEXT = 1e-4
FILES = names("text*")


@pytest.mark.parametrize("name", FILES)
def test_contexts(name):
    pytest.importorskip("transformers")
    g = GoldenFile(name)
    encoder = TextEncoder(str(ROOM / "text_tiny_clip"), tokens=g["input_ids"].shape[1])
    contexts = encoder.encode(g.meta["prompts"])
    assert (contexts - g["context"]).abs().max() <= CONTEXT
    tokenizer, _ = encoder._loaded
    ids = tokenizer(g.meta["prompts"], truncation=True, max_length=encoder.tokens, padding="max_length")["input_ids"]
    assert ids == g["input_ids"].tolist()
