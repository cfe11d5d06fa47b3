"""Prompts: the texts that generated images follow, and what makes contexts of them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from dnnlib.errors import UserError, one_line
from torch_utils import distributed
from training.config.generation import GenerationConfig
from training.conversion.captions import captions_by_image, read_text
from training.dataset.captions import Captions
from training.dataset.images import ImageFolderDataset
from training.encoders import TextEncoder, text_encoder_from_record
from training.generators import PromptChoice
from training.snapshot import Snapshot

TABLES = (".json", ".csv", ".tsv")  # of captions by image


class StoredContexts:
    """The contexts that a dataset holds of its captions.

    Args:
        captions: those of the dataset.
        chosen: (image, number of the caption) of the texts that will be asked for.
    """

    def __init__(self, captions: Captions, chosen: Sequence[tuple[int, int]]):
        self.captions = captions
        self._places = {captions.texts[base][number]: (base, number) for base, number in chosen}

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        """float32 [n, tokens, width]."""
        places = [self._places[text] for text in texts]
        return torch.from_numpy(np.stack([self.captions.contexts(base)[number] for base, number in places]))


def one_caption_each(captions: Sequence[Sequence[str]]) -> list[tuple[int, int]]:
    """(Image, number of its caption): all images once in a random order, always the same, each with one of its captions
    drawn at random.
    """
    # RandomState is the generator whose numbers NumPy promises not to change.
    rnd = np.random.RandomState(0)
    return [(int(base), int(rnd.randint(len(captions[base])))) for base in rnd.permutation(len(captions))]


def prompts_for(config: GenerationConfig, snapshot: Snapshot, device: torch.device) -> PromptChoice | None:
    """The texts that the user gives and what makes contexts of them; None = none. The network learns what the empty
    text is, where its file does not say it.

    Raises:
        UserError: the network follows no texts, the texts cannot be read, or their contexts do not fit the network.
    """
    networks, sampling = config.networks, config.sampling
    kind = snapshot.net.spec.conditioning.kind
    if not sampling.prompt and sampling.prompts is None:
        if kind == "tokens":
            distributed.print0("Note: no --prompt is given: images follow the empty text")
        elif networks.text_encoder is not None:
            raise UserError("--text-encoder has no effect without --prompt")
        return None
    if kind != "tokens":
        follows = snapshot.net.spec.conditioning.describe()
        raise UserError(f"--prompt is for networks that follow texts, and --net={networks.net} follows {follows}")
    texts = list(sampling.prompt)
    if sampling.prompts is not None:
        path = Path(sampling.prompts)
        if path.is_dir() or path.suffix.lower() == ".zip":
            return _prompts_of_dataset(config, snapshot)
        texts += _texts_in(path)
    return _encoded_prompts(config, snapshot, texts, device)


def _texts_in(path: Path) -> list[str]:
    """The texts of a file of lines, or one caption of each image in a table of captions."""
    if path.suffix.lower() in TABLES:
        captions = list(captions_by_image(path, "--prompts").values())
        texts = [captions[base][number] for base, number in one_caption_each(captions)]
    else:
        texts = [line.strip() for line in read_text(path, "--prompts").splitlines() if line.strip()]
    if not texts:
        raise UserError(f"--prompts={path}: holds no text")
    return texts


def _prompts_of_dataset(config: GenerationConfig, snapshot: Snapshot) -> PromptChoice:
    """One caption of each image of the dataset of --prompts, with the contexts that it holds."""
    path, given = str(config.sampling.prompts), config.sampling.prompt
    if given or config.networks.text_encoder is not None:
        other = "--prompt" if given else "--text-encoder"
        raise UserError(f"--prompts={path}: its captions have their contexts already: leave out {other}")
    captions = ImageFolderDataset(path, use_captions=True).captions
    assert captions is not None
    record = snapshot.metadata.get("text_encoder")
    if record is not None and captions.encoder != record:
        raise UserError(
            f"--prompts={path}: its contexts are by another text encoder ({one_line(captions.encoder)}) than "
            f"{config.networks.net} was trained with ({one_line(record)}): give its texts in a .json, .csv or .txt file"
        )
    _check_shape(f"--prompts={path}: its contexts have", captions.shape, snapshot, config)
    _learn_empty_text(snapshot, torch.from_numpy(captions.empty))
    chosen = one_caption_each(captions.texts)
    distributed.print0(f"Prompts: one caption of each of {len(chosen)} images of {path}")
    texts = [captions.texts[base][number] for base, number in chosen]
    return PromptChoice(texts, StoredContexts(captions, chosen).encode)


def _encoded_prompts(
    config: GenerationConfig, snapshot: Snapshot, texts: Sequence[str], device: torch.device
) -> PromptChoice:
    """Texts with the encoder that the network was trained with."""
    source = str(config.networks.net)
    record = snapshot.metadata.get("text_encoder")
    if record is None:
        raise UserError(f"{source} does not say which text encoder it was trained with")
    encoder = text_encoder_from_record(source, record, config.networks.text_encoder)
    _check_shape("the text encoder makes", (encoder.tokens, encoder.width), snapshot, config)
    if isinstance(encoder, TextEncoder):
        encoder.to(device)
    _learn_empty_text(snapshot, encoder.encode([""])[0])
    return PromptChoice(texts, encoder.encode)


def _check_shape(what: str, shape: tuple[int, int], snapshot: Snapshot, config: GenerationConfig) -> None:
    """Check that contexts are those of the network."""
    wanted = snapshot.net.spec.conditioning
    if shape != wanted.shape:
        raise UserError(
            f"{what} {shape[0]} tokens of width {shape[1]}, and {config.networks.net} takes {wanted.tokens} of width "
            f"{wanted.size}"
        )


def _learn_empty_text(snapshot: Snapshot, context: torch.Tensor) -> None:
    """Tell a network what the empty text is, which published files do not hold."""
    if not snapshot.net.empty_context.any():
        snapshot.net.empty_context.copy_(context)
