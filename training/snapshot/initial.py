"""Where a run starts: with the weights of another network, as far as they fit (`--init-from`)."""

from typing import Any

import torch

from dnnlib.errors import UserError
from training.encoders import Encoder, same_latents
from training.families import ARCHITECTURES, architecture_name
from training.snapshot.files import load_network

# Buffers that follow from the configuration and the data, and are no weights: noise levels, and the empty text.
DERIVED = ("sigmas", "empty_context")


@torch.no_grad()
def take_weights_(net: Any, path: str, encoder: Encoder) -> list[str]:
    """Give a network the tensors of a snapshot that it has, too, in the same shape.

    So the number of classes or channels, the resolution or the width of parts may differ.

    Args:
        net: a network of the registry, freshly initialised.
        path: snapshot, or a URL of one.
        encoder: of the data that it will be trained on.

    Returns:
        What was taken and what was not, a line each, and whether the snapshot knows other latents.

    Raises:
        UserError: no such snapshot, one of another architecture, or one of which nothing fits.
    """
    snapshot = load_network(path)
    mine, theirs = (ARCHITECTURES[architecture_name(n)].family for n in (net, snapshot.net))
    if mine != theirs:
        raise UserError(f"--init-from={path}: holds a network of {theirs}, and this run trains one of {mine}")
    ours = {name: t for name, t in net.state_dict().items() if name.rpartition(".")[2] not in DERIVED}
    found = snapshot.net.state_dict()
    taken = [name for name, tensor in ours.items() if name in found and found[name].shape == tensor.shape]
    if not any(ours[name].ndim > 1 for name in taken):  # gains and other single numbers always fit
        raise UserError(f"--init-from={path}: no weight of it has a name and shape of this run's network")
    for name in taken:
        ours[name].copy_(found[name])
    count, of = (sum(ours[name].numel() for name in names) for names in (taken, ours))
    nimg = snapshot.metadata.get("nimg")
    trained = "" if nimg is None else f", trained on {nimg} images"
    lines = [f"Starting with {len(taken)} of {len(ours)} tensors ({count / of:.1%} of the values) of {path}{trained}"]
    if snapshot.note:
        lines.append(f"Note: {path}: {snapshot.note}")
    for name in (name for name in ours if name not in taken):
        there = f"{list(found[name].shape)} there" if name in found else "not there"
        lines.append(f"  as initialised: {name} {list(ours[name].shape)}, {there}")
    unused = [name for name in found if name not in ours and name.rpartition(".")[2] not in DERIVED]
    if unused:
        lines.append(f"  not used: {', '.join(unused)}")
    if not same_latents(snapshot.encoder, encoder):
        ours_are, theirs_are = encoder.describe(), snapshot.encoder.describe()
        lines.append(f"Note: {path} was trained on other data than this run sees: {theirs_are}; here: {ours_are}")
    return lines
