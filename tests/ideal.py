"""Networks that know the answer: for normal data, whose ideal denoiser is D(x; sigma) = STD^2 / (STD^2 + sigma^2) x."""

from torch import Tensor, nn

from training.schedules import VE, Schedule

STD = 0.5  # of normal data, whose ideal denoiser is known


class Ideal(nn.Module):
    """The noise (VP, sub-VP) or the score (VE) that an ideal network finds in the state u of normal data."""

    def __init__(self, schedule: Schedule):
        super().__init__()
        self.schedule = schedule
        self.seen: list[Tensor] = []

    def forward(self, u, labels, cond=None):
        self.seen += [u, labels]
        sigma = labels.double()
        if not isinstance(self.schedule, VE):
            t = labels.double() / self.schedule.label(1.0)
            sigma, u = self.schedule.sigma(t), u / self.schedule.scale(t).reshape(-1, 1, 1, 1)
        sigma = sigma.reshape(-1, 1, 1, 1)
        score = -u.double() / (STD**2 + sigma**2)
        return (score if isinstance(self.schedule, VE) else -sigma * score).float()
