"""Golden files of U-ViT, and the networks that they describe."""

import golden_files
import torch
from conftest import GOLDEN
from golden_files import error, rule_p

from training.networks.uvit import UViT

ROOM = GOLDEN / "uvit"
__all__ = ["ROOM", "GoldenFile", "error", "names", "network", "rule_p"]


class GoldenFile(golden_files.GoldenFile):
    family = "uvit"


names = GoldenFile.names


def network(kwargs: dict, cls: str = "uvit", state: dict[str, torch.Tensor] | None = None) -> UViT:
    """The network of a description: `cls` says in which published module it is, that of text or the other."""
    published_text = dict(clip_dim=768, num_clip_token=77) if "t2i" in cls else {}
    net = UViT(**{**published_text, **kwargs})
    if state is not None:
        net.load_state_dict(state)
    return net.eval()
