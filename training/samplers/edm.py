"""Samplers: solvers that follow a denoiser along a decreasing grid of noise levels, and their random numbers."""

import math
from collections import deque
from collections.abc import Callable, Sequence

import torch

from dnnlib.errors import UserError
from training.denoiser import Denoiser
from training.guidance import GuidedDenoiser
from training.samplers.coefficients import MULTISTEP, check_solver
from training.samplers.grids import edm_sigmas


class StackedRandomGenerator:
    """One random generator per sample, so that a sample depends on its seed and not on its batch.

    Args:
        device: where the numbers are drawn.
        seeds: one integer per sample, taken modulo 2^32.

    The first dimension of every size asked for must equal the number of seeds.
    """

    def __init__(self, device: torch.device | str, seeds: Sequence[int]):
        self.generators = [torch.Generator(device).manual_seed(int(seed) % 2**32) for seed in seeds]

    def _stack(self, draw: Callable[..., torch.Tensor], size: Sequence[int], **kwargs) -> torch.Tensor:
        assert size[0] == len(self.generators), f"{len(self.generators)} generators cannot fill size {list(size)}"
        return torch.stack(
            [draw(list(size[1:]), generator=g, **{"device": g.device, **kwargs}) for g in self.generators]
        )

    def randn(self, size: Sequence[int], **kwargs) -> torch.Tensor:
        return self._stack(torch.randn, size, **kwargs)

    def randn_like(self, x: torch.Tensor) -> torch.Tensor:
        return self.randn(x.shape, dtype=x.dtype)

    def randint(self, high: int, size: Sequence[int], **kwargs) -> torch.Tensor:
        def draw(shape: list[int], **draw_kwargs) -> torch.Tensor:
            return torch.randint(high, shape, **draw_kwargs)

        return self._stack(draw, size, **kwargs)


def ode_sampler(
    denoiser: Denoiser,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    labels: torch.Tensor | None = None,
    solver: str = "heun",
    S_churn: float = 0,
    S_min: float = 0,
    S_max: float = math.inf,
    S_noise: float = 1,
    dtype: torch.dtype = torch.float32,
    randn_like: Callable[[torch.Tensor], torch.Tensor] = torch.randn_like,
    on_step: Callable[[torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Solve dx/dsigma = (x - D(x; sigma)) / sigma (EDM, Algorithms 1 and 2; `solvers` for the multistep ones).

    The last step, to sigma = 0, gives D itself with every solver.

    Args:
        denoiser: D(x; sigma, labels).
        noise: unit-variance noise [N, C, H, W].
        sigmas: decreasing noise levels [steps + 1] on the CPU, ending in 0.
        labels: class vectors [N, label_dim] or None.
        solver: 'heun' evaluates D twice per step except the last, all others of `solvers.SOLVERS` once.
        S_churn, S_min, S_max, S_noise: amount, range and scale of the noise added at each step (EDM, Algorithm 2).
        dtype: what the solution is kept in.
        randn_like: source of that added noise.
        on_step: called with the solution at every noise level, first to last.

    Returns:
        Samples [N, C, H, W] in `dtype`.

    Raises:
        UserError: as `solvers.check_solver`.
    """
    check_solver(solver, S_churn)
    if solver in MULTISTEP:
        sigmas = sigmas.unique_consecutive()  # coefficients are made of their distances
    steps = len(sigmas) - 1
    x = noise.to(dtype) * sigmas[0].item()
    known: deque[tuple[float, torch.Tensor]] = deque(maxlen=MULTISTEP[solver].order if solver in MULTISTEP else 1)
    if on_step is not None:
        on_step(x)
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        if S_churn > 0 and S_min <= sigma <= S_max:
            gamma = min(S_churn / steps, math.sqrt(2) - 1)
            sigma_hat = sigma * (1 + gamma)
            x = x + (sigma_hat**2 - sigma**2).sqrt().item() * S_noise * randn_like(x)
            sigma = sigma_hat
        D = denoiser(x.float(), sigma, labels).to(dtype)
        if solver in MULTISTEP and sigma_next > 0:
            known.appendleft((sigma.item(), D))
            coefficients = MULTISTEP[solver].coefficients([level for level, _ in known], sigma_next.item())
            x = (sigma_next / sigma).item() * x
            for coefficient, (_, D) in zip(coefficients, known, strict=True):
                x = x + coefficient * D
        else:
            h = (sigma_next - sigma).item()
            d = (x - D) / sigma.item()
            x_next = x + h * d
            if solver == "heun" and sigma_next > 0:
                d_next = (x_next - denoiser(x_next.float(), sigma_next, labels).to(dtype)) / sigma_next.item()
                x_next = x + h * (d + d_next) / 2
            x = x_next
        if on_step is not None:
            on_step(x)
    return x


def edm_sampler(
    net: Denoiser,
    noise: torch.Tensor,
    labels: torch.Tensor | None = None,
    gnet: Denoiser | None = None,
    num_steps: int = 32,
    sigma_min: float = 0.002,
    sigma_max: float = 80,
    rho: float = 7,
    guidance: float = 1,
    S_churn: float = 0,
    S_min: float = 0,
    S_max: float = math.inf,
    S_noise: float = 1,
    dtype: torch.dtype = torch.float32,
    randn_like: Callable[[torch.Tensor], torch.Tensor] = torch.randn_like,
    guidance_interval: tuple[float, float] = (0.0, math.inf),
    solver: str = "heun",
) -> torch.Tensor:
    """Heun's method, or another, on EDM's grid of noise levels, with optional guidance and churn.

    `schedules.edm_sigmas` describes `num_steps` to `rho`, `guidance.GuidedDenoiser` the guidance, and
    `ode_sampler` the rest. Heun's method evaluates the network 2 * num_steps - 1 times, all others num_steps times.

    Raises:
        UserError: `guidance` differs from 1 and there is no `gnet`; or as `solvers.check_solver`.
    """
    denoiser = net
    if guidance != 1:
        if gnet is None:
            raise UserError(f"guidance {guidance} needs a guiding network (gnet)")
        denoiser = GuidedDenoiser(net, gnet, guidance, guidance_interval)
    return ode_sampler(
        denoiser,
        noise,
        edm_sigmas(num_steps, sigma_min, sigma_max, rho),
        labels,
        solver,
        S_churn=S_churn,
        S_min=S_min,
        S_max=S_max,
        S_noise=S_noise,
        dtype=dtype,
        randn_like=randn_like,
    )
