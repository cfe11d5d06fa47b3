"""Batch norm statistics of NVAE that suit its samples (Vahdat & Kautz 2020, section 4 and appendix A)."""

import torch

from dnnlib.errors import UserError
from training.networks.nvae import NVAE
from training.networks.nvae_distributions import RandnLike
from training.networks.nvae_layers import effective_weights


@torch.no_grad()
def readjust_batch_norms_(
    net: NVAE,
    temperature: float,
    batches: int = 500,
    batch_size: int = 16,
    seed: int = 0,
    randn_like: RandnLike | None = None,
) -> None:
    """Let the decoder's batch norms see samples of a temperature instead of the training's activations.

    Their running statistics follow `batches` batches of samples from fixed seeds, in float32 (in float16, the published
    code's become NaN). Layers that samples do not pass stay as they are. On return, the network is in eval mode.

    Args:
        randn_like: source of normal draws, instead of one that `seed` fixes.

    Raises:
        UserError: the temperature is not above 0.
    """
    if not temperature > 0:
        raise UserError(f"temperature must be above 0, not {temperature}")
    generator = torch.Generator().manual_seed(seed)

    def seeded(template: torch.Tensor) -> torch.Tensor:
        return torch.randn(template.shape, generator=generator).to(template.device)

    draw = seeded if randn_like is None else randn_like
    precision, net.precision = net.precision, "fp32"
    net.eval()
    for norm in net.decoder_batch_norms():
        norm.train()
    try:
        with effective_weights(net), torch.autocast(net.prior_ftr0.device.type, enabled=False):
            for _ in range(batches):
                net.sample(batch_size, temperature, draw)
    finally:
        net.eval().precision = precision
