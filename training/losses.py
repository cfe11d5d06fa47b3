"""Training objectives and the distribution of noise levels seen in training."""

import torch

from dnnlib.util import UserError
from training.denoiser import Preconditioned
from training.schedules import EPS, DiscreteVE, DiscreteVP, Schedule, wide


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


class ScoreLoss:
    """Denoising score matching (Song et al. 2021, arXiv 2011.13456, Eq. 7), of SMLD and DDPM where levels are discrete.

    With x = y + sigma(t) n, all of them compare the noise in x with what the network takes it for,
    (x - D(x; sigma)) / sigma, which is -sigma times the score.

    Args:
        schedule: of the noise; of the network's preconditioning, too.
        reduce_mean: take the mean of the squares over an image, as VP presets do; otherwise half their sum (VE).
        likelihood_weighting: weight times by g(t)^2 / std(t)^2, which bounds the likelihood (Song et al. 2021,
            "Maximum Likelihood Training of Score-Based Diffusion Models", arXiv 2101.09258, Theorem 1).
        importance_sampling: draw times in proportion to that weight, in place of multiplying by it. The weight is
            d ln(sigma^2) / dt, so ln sigma is then uniform.

    Raises:
        UserError: a weighting of likelihoods with discrete levels.
    """

    def __init__(
        self,
        schedule: Schedule,
        reduce_mean: bool = True,
        likelihood_weighting: bool = False,
        importance_sampling: bool = False,
    ):
        self.num_levels = schedule.num_scales if isinstance(schedule, (DiscreteVE, DiscreteVP)) else None
        if self.num_levels is not None and likelihood_weighting:
            raise UserError("likelihood weighting needs continuous times, not discrete levels")
        if importance_sampling and not likelihood_weighting:
            raise UserError("importance sampling of times needs likelihood weighting")
        self.schedule = schedule
        self.reduce_mean = reduce_mean
        self.likelihood_weighting = likelihood_weighting
        self.importance_sampling = importance_sampling
        self.ln_sigma_range = schedule.sigma(torch.tensor([EPS, 1.0], dtype=torch.float64)).log()

    def times(self, uniform: torch.Tensor) -> torch.Tensor:
        """Map draws from U[0, 1) to times, float64, elementwise: in [1e-5, 1), or one of the levels' times."""
        u = wide(uniform)
        if self.num_levels is not None:
            return (u * self.num_levels).floor() / (self.num_levels - 1)
        if self.importance_sampling:
            first, last = self.ln_sigma_range.tolist()
            return self.schedule.time((first + (last - first) * u).exp())
        return EPS + (1 - EPS) * u

    def __call__(
        self,
        net: Preconditioned,
        images: torch.Tensor,
        labels: torch.Tensor | None = None,
        *,
        t: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            net: the raw network with the preconditioning `Epsilon(schedule)`.
            images: clean images y, float32 [N, C, H, W].
            labels: conditions, as `net` takes them.
            t: times [N]; drawn if None.
            noise: unit-variance noise n shaped like `images`; drawn if None.

        Returns:
            Loss per image, float32 [N]. The training objective is its sum over the batch divided by N.
        """
        if t is None:
            t = self.times(torch.rand(images.shape[0], device=images.device))
        if noise is None:
            noise = torch.randn_like(images)
        sigma = self.schedule.sigma(t)
        column = sigma.float().reshape(-1, 1, 1, 1).to(images.device)
        F_x, c = net.raw(images + column * noise, sigma, labels)
        # (y - D) / sigma, without the difference of y and D: c_skip is 1.
        square = (noise + c.c_out / column * F_x).square().flatten(1)
        loss = square.mean(dim=1) if self.reduce_mean else square.sum(dim=1) / 2
        if self.importance_sampling:
            loss = loss * (2 * (self.ln_sigma_range[1] - self.ln_sigma_range[0])).item()
        elif self.likelihood_weighting:
            loss = loss * (self.schedule.diffusion(t) / self.schedule.std(t)).square().to(loss)
        return loss
