"""What the tests of NVAE against golden values share: finding files, building networks, comparing."""

import os
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, Golden

from training.losses_vae import POWER_EPS, VAEObjective, reconstruction_loss
from training.networks.nvae import NVAE, Output
from training.snapshot.published_nvae import network_options

if not (GOLDEN / "nvae").is_dir():
    pytest.skip("no golden values of NVAE here: OPENEDM2_GOLDEN names a set that has them", allow_module_level=True)

# The set in this repository is a small part of the whole one: it has these files, and the README says which entries.
SMALL_SET = ("network_*", "preset_*", "layers", "losses", "optimiser")
WHOLE_SET = (*SMALL_SET, "evaluation", "data", "checkpoints*")
EXPECTED = WHOLE_SET if os.environ.get("OPENEDM2_GOLDEN") else SMALL_SET


def skip_without(pattern: str) -> None:
    """Skip a module whose files only the whole set has. In another set than ours, missing ones are failures."""
    if pattern not in EXPECTED:
        pytest.skip(f"OPENEDM2_GOLDEN names no set with nvae/{pattern}.npz", allow_module_level=True)


Close = Callable[..., None]  # the fixture `close`
FORWARD, GRADIENT = 1e-5, 2e-5  # see the README of the golden set


def files(pattern: str) -> list[str]:
    """Names for `Golden` of the files that match."""
    return sorted(os.fspath(p.relative_to(GOLDEN).with_suffix("")) for p in GOLDEN.glob(f"nvae/{pattern}.npz"))


def largest_error(actual, expected) -> float:
    """max |actual - expected| / max |expected|."""
    if isinstance(actual, torch.Tensor):
        actual = actual.detach().cpu()
    actual, expected = np.float64(actual), np.float64(expected)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float(np.abs(actual - expected).max(initial=0) / max(np.abs(expected).max(initial=0), 1e-30))


def published_network(args: dict, state: dict[str, torch.Tensor] | None = None) -> NVAE:
    """The network of a published run, in eval mode; the only key of ours that a published state lacks is `init_done`."""
    net = NVAE(**network_options(args)).eval()
    if state is not None:
        missing, unexpected = net.load_state_dict(state, strict=False)
        assert not unexpected and all(key.endswith("init_done") for key in missing), (missing, unexpected)
    return net


def published_objective(net: NVAE, args: dict, total: int) -> VAEObjective:
    """The objective of a published run of `total` steps, of one image each: the unit of its schedules."""
    chosen = {name: value for name, value in args.items() if name.startswith(("kl_", "weight_decay_norm"))}
    return VAEObjective(net, total, **chosen)


def start_power_method(objective: VAEObjective, start: dict[str, torch.Tensor]) -> None:
    """Begin from stored draws, named u/OUTxCOLS and v/OUTxCOLS."""
    assert start
    for key, draws in start.items():
        buffer = objective.spectral_norms.get_buffer(key.replace("/", "_"))
        buffer.copy_(F.normalize(draws, dim=1, eps=POWER_EPS))


def stored_noise(g: Golden, prefix: str) -> list[torch.Tensor]:
    stored = g.state(prefix)
    return [stored[str(i)] for i in range(len(stored))]


def check_output(
    close: Close, g: Golden, prefix: str, net: NVAE, x: torch.Tensor, out: Output, tolerance: float
) -> None:
    """All outputs that the file has under a prefix, and -log p(x | z) as `recon`."""
    for key in out._fields:
        if f"{prefix}/{key}" in g.arrays:
            close(getattr(out, key), g[f"{prefix}/{key}"], tolerance, f"{prefix}/{key}")
    close(reconstruction_loss(net, out.logits, x), g[f"{prefix}/recon"], tolerance, f"{prefix}/recon")
