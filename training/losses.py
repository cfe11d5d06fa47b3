"""Training objectives and the distribution of noise levels seen in training."""

import torch


class EDM2Loss:
    """Denoising loss weighted by the learned uncertainty (EDM2, Eqs. 14-16 and 21).

    Noise levels are log-normal: ln(sigma) ~ N(P_mean, P_std^2).
    """

    def __init__(self, P_mean: float = -0.4, P_std: float = 1.0, sigma_data: float = 0.5):
        self.P_mean = P_mean
        self.P_std = P_std
        self.sigma_data = sigma_data

    def noise_levels(self, normal: torch.Tensor) -> torch.Tensor:
        """Map unit normal draws to sigma, elementwise."""
        return (self.P_mean + self.P_std * normal).exp()

    def __call__(
        self,
        net,
        images: torch.Tensor,
        labels: torch.Tensor | None = None,
        *,
        sigma: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            net: called as net(x, sigma, labels, return_logvar=True).
            images: clean images y, float32 [N, C, H, W].
            labels: class vectors [N, label_dim] or None.
            sigma: noise levels [N]; drawn if None.
            noise: unit-variance noise shaped like `images`; drawn if None.

        Returns:
            Loss per element, float32 [N, C, H, W]. The training objective is its sum over the batch divided by N.
        """
        if sigma is None:
            sigma = self.noise_levels(torch.randn(images.shape[0], device=images.device))
        if noise is None:
            noise = torch.randn_like(images)
        sigma = sigma.reshape(-1, 1, 1, 1)
        weight = (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2
        denoised, logvar = net(images + sigma * noise, sigma, labels, return_logvar=True)
        return weight / logvar.exp() * (denoised - images) ** 2 + logvar
