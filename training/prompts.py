"""Prompts: the texts that generated images follow, and what makes contexts of them."""

from pathlib import Path

import torch

from dnnlib.errors import UserError, one_line
from torch_utils import distributed
from training.config.generation import GenerationConfig, SamplingConfig
from training.encoders import ContextEncoder, TextEncoder, text_encoder_from_record
from training.snapshot import Snapshot


def given_prompts(sampling: SamplingConfig) -> list[str]:
    """The texts that the user gives, on the command line and in a file.

    Raises:
        UserError: the file cannot be read, or holds none.
    """
    prompts = list(sampling.prompt)
    if sampling.prompts is not None:
        try:
            lines = Path(sampling.prompts).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as err:
            raise UserError(f"--prompts={sampling.prompts}: cannot be read ({one_line(err)})") from None
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise UserError(f"--prompts={sampling.prompts}: holds no text")
        prompts += found
    return prompts


def text_encoder_for(config: GenerationConfig, snapshot: Snapshot, device: torch.device) -> ContextEncoder | None:
    """What makes contexts of prompts; the network learns from it what the empty text is. None = no prompts.

    Raises:
        UserError: the network follows no texts, or does not fit the text encoder.
    """
    networks, sampling, spec = config.networks, config.sampling, snapshot.net.spec
    given = bool(sampling.prompt) or sampling.prompts is not None
    follows_text = spec.conditioning.kind == "tokens"
    if not given:
        if follows_text:
            distributed.print0("Note: no --prompt is given: images follow the empty text")
        elif networks.text_encoder is not None:
            raise UserError("--text-encoder has no effect without --prompt")
        return None
    if not follows_text:
        kind = "classes" if spec.conditioning.size else "nothing"
        raise UserError(f"--prompt is for networks that follow texts, and --net={networks.net} follows {kind}")
    record = snapshot.metadata.get("text_encoder")
    if record is None:
        raise UserError(f"{networks.net} does not say which text encoder it was trained with")
    encoder = text_encoder_from_record(str(networks.net), record, networks.text_encoder)
    if (encoder.tokens, encoder.width) != spec.conditioning.shape:
        raise UserError(
            f"the text encoder makes {encoder.tokens} tokens of width {encoder.width}, and {networks.net} takes "
            f"{spec.conditioning.tokens} of width {spec.conditioning.size}"
        )
    if isinstance(encoder, TextEncoder):
        encoder.to(device)
    if not snapshot.net.empty_context.any():  # published files do not hold it
        snapshot.net.empty_context.copy_(encoder.encode([""])[0])
    return encoder
