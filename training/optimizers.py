"""From gradients to weights: optimiser, learning rate, and what is done to gradients that are not finite."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import torch

from torch_utils import distributed
from torch_utils.gradients import (
    Totals,
    channels_last_views,
    clip_by_norm_,
    count_nonfinite,
    flat_gradients,
    flat_weights,
    replace_nonfinite_,
    storage_order,
)
from training.config.nvae import NVAETraining
from training.lr import warmup_cosine

FP16_SCALE = 2.0**10  # of the loss, at the start of a run in float16
SCALE_STEPS = 2000  # steps without overflow after which it doubles


# Is shown the number of gradients that are not finite, int64 [], on the device, before they change weights.
Look = Callable[[torch.Tensor], None]


def unseen(_nonfinite: torch.Tensor) -> None:
    """Nobody looks."""


class Optimizer(Protocol):
    """Changes the weights by their gradients.

    `gradients` are those of all weights, one vector, of which the gradients of the parameters are views.
    `nonfinite` counts what was not finite since the start of the run, int64 []: elements of gradients, or steps.
    `on_nonfinite` says what is done about that: 'zero' sets these elements to 0; with 'skip' and 'stop', the step
    changes nothing.
    `loss_scaling` is what the loss is to be multiplied by before its gradients are computed.
    """

    gradients: torch.Tensor
    nonfinite: torch.Tensor
    on_nonfinite: str
    loss_scaling: float

    def learning_rate(self, nimg: int) -> float:
        """The learning rate after `nimg` images."""
        ...

    def describe_nonfinite(self, count: int) -> str:
        """What was done about the latest `count` of what was not finite, in words."""
        ...

    def zero_gradients(self) -> None:
        """Forget the gradients of the step before."""
        ...

    def step(self, nimg: int, look: Look = unseen) -> None:
        """Change the weights by the gradients of all processes, `nimg` images having been seen before."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to continue exactly."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class EMA(Protocol):
    """Averages the weights over training, with one or several profiles of relative widths `stds`; None = another."""

    @property
    def stds(self) -> Sequence[float | None]: ...

    def update(self, cur_nimg: int, batch_size: int) -> None:
        """Take in the weights after an optimiser step; `cur_nimg` counts the step's images too."""
        ...

    def get(self) -> list[tuple[torch.nn.Module, str]]:
        """The averaged networks, each with its file name suffix."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to continue exactly."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class AdamOptimizer:
    """Adam, or AdamW. Gradients that are not finite become 0 by default (EDM2, Appendix B.2).

    Args:
        net: whose parameters are trained. Their gradients become views of one vector, `gradients`.
        learning_rate: as a function of the images seen before a step.
        betas, eps, weight_decay: Adam's constants.
        decoupled: apply the decay to the weights themselves (AdamW).
        undecayed: names of parameters that the decay leaves out.
        max_norm: to which the norm of all gradients together is cut; 0 = not.
        loss_scaling: what the loss is multiplied by before its gradients are computed.
        on_nonfinite: see `Optimizer`; None = 'zero'.

    `nonfinite` counts the gradient elements that were replaced, or the steps that were skipped, since the start of the
    run, int64 [], on the device.
    `totals` says how gradients are summed over processes; `names` are those of the parameters in Adam's order.
    """

    def __init__(
        self,
        net: torch.nn.Module,
        learning_rate: Callable[[int], float],
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.0,
        decoupled: bool = False,
        undecayed: Collection[str] = (),
        max_norm: float = 0.0,
        loss_scaling: float = 1.0,
        on_nonfinite: str | None = None,
    ):
        self.rate, self.max_norm, self.loss_scaling = learning_rate, max_norm, loss_scaling
        self.on_nonfinite = on_nonfinite or "zero"
        self.totals = Totals()
        self.gradients = flat_gradients(net.parameters())
        device = self.gradients.device
        self.fused = device.type != "mps"
        make = torch.optim.AdamW if decoupled else torch.optim.Adam
        trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
        decayed, others = ([n for n in trained if (n in undecayed) == without] for without in (False, True))
        self.names = [*decayed, *others]
        self.orders = [storage_order(trained[name]) for name in self.names]
        groups: list[dict[str, Any]] = [{"params": channels_last_views(trained[name] for name in decayed)}]
        if others:
            groups.append({"params": channels_last_views(trained[name] for name in others), "weight_decay": 0.0})
        self.adam = make(groups, learning_rate(0), betas, eps, weight_decay, fused=self.fused)
        self.nonfinite = torch.zeros([], dtype=torch.int64, device=device)

    def learning_rate(self, nimg: int) -> float:
        """The learning rate after `nimg` images."""
        return self.rate(nimg)

    def describe_nonfinite(self, count: int) -> str:
        """What was done about non-finite gradients, in words."""
        if self.on_nonfinite == "zero":
            return f"{count} non-finite gradients were replaced by 0"
        return f"{count} steps with non-finite gradients were skipped"

    def zero_gradients(self) -> None:
        """Forget the gradients of the step before."""
        self.gradients.zero_()

    def step(self, nimg: int, look: Look = unseen) -> None:
        """Change the weights by the gradients of all processes, `nimg` images having been seen before."""
        self.totals.sum_(self.gradients)
        if self.loss_scaling != 1:
            self.gradients /= self.loss_scaling
        count = self.totals.count_nonfinite(self.gradients)
        look(count)
        on_gpu = self.gradients.device.type == "cuda"
        if self.on_nonfinite == "zero":
            self.nonfinite += count
            if on_gpu or count > 0:  # a GPU is not waited for
                replace_nonfinite_(self.gradients)
        else:
            self.nonfinite += count > 0
            if on_gpu:  # Adam's kernel leaves out the step itself
                self.adam.found_inf = (count > 0).float()  # type: ignore[attr-defined]
            elif count > 0:
                return
        if self.max_norm > 0:
            clip_by_norm_(self.gradients, self.max_norm, self.totals.norm(self.gradients))
        for group in self.adam.param_groups:
            group["lr"] = self.learning_rate(nimg)
        self.adam.step()

    def state_dict(self) -> dict[str, Any]:
        """Adam's state, its moments in the shapes of the weights."""
        return _permuted(self.adam.state_dict(), [sorted(range(len(o)), key=o.__getitem__) for o in self.orders])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adam.load_state_dict(_permuted(state, self.orders))
        for group in self.adam.param_groups:
            group["fused"] = self.fused  # a matter of the device, which may have changed


def _permuted(state: dict[str, Any], orders: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Adam's state with the dimensions of its moments permuted: files hold them as the weights are, [out, in, ...]."""
    moments = {
        idx: {name: x.permute(*orders[idx]).contiguous() if x.ndim > 0 else x for name, x in values.items()}
        for idx, values in state["state"].items()
    }
    return {**state, "state": moments}


# ---------------------------------------------------------------------------------------------------------
# NVAE


class AdamaxOptimizer:
    """Adamax with warm-up and cosine (Kingma & Ba 2015, section 7.1). Steps with non-finite gradients are skipped by
    default.

    The running statistics of batch norms are then put back, too: what a step without effect has seen would stay in
    them. In float16 the loss is scaled up as far as gradients allow: where they overflow, the step is skipped in any
    case, and the loss scaled half as far from then on.

    Args:
        net: whose parameters are trained. They and their gradients become views of one vector each.
        config: of the run; its schedule stretches over `config.run.duration`.

    `nonfinite` counts the steps whose gradients were not finite since the start of the run, int64 [], on the device.
    """

    def __init__(self, net: torch.nn.Module, config: NVAETraining):
        self.net, self.config, self.duration = net, config.optimizer, config.run.duration
        self.scales = getattr(net, "precision", "fp32") == "fp16"
        self.loss_scaling = config.run.ls * (FP16_SCALE if self.scales else 1)
        self.good_steps = 0  # since the loss scaling changed
        self.on_nonfinite = config.run.on_nonfinite or "skip"
        self.gradients = flat_gradients(net.parameters())
        self.weights = flat_weights(net.parameters())
        self.weights.grad = self.gradients
        c = config.optimizer
        betas = (c.betas[0], c.betas[1])
        self.adamax = torch.optim.Adamax(
            [self.weights], lr=c.lr, betas=betas, eps=c.eps, weight_decay=c.weight_decay, foreach=True
        )
        self.nonfinite = torch.zeros([], dtype=torch.int64, device=self.gradients.device)
        self.statistics = [buffer for buffer in net.buffers() if buffer.is_floating_point() and buffer.ndim > 0]
        self.good_statistics = [buffer.clone() for buffer in self.statistics]
        self.first_skipped = ""  # where, since the last report

    def learning_rate(self, nimg: int) -> float:
        """The learning rate after `nimg` images."""
        c = self.config
        return warmup_cosine(nimg, self.duration, c.lr, c.learning_rate_min, c.warmup_portion * self.duration)

    def describe_nonfinite(self, count: int) -> str:
        """In how many steps gradients were not finite, what was done, and where the first of them became so."""
        where, self.first_skipped = self.first_skipped, ""
        done = "had these replaced by 0" if self.on_nonfinite == "zero" else "were skipped"
        return f"{count} steps with non-finite gradients {done}" + (f", first in {where}" if where else "")

    def zero_gradients(self) -> None:
        """Forget the gradients of the step before."""
        self.gradients.zero_()

    def step(self, nimg: int, look: Look = unseen) -> None:
        """Change the weights by the gradients of all processes, `nimg` images having been seen before."""
        distributed.sum_gradients_(self.gradients)
        if self.loss_scaling != 1:
            self.gradients /= self.loss_scaling
        # Whether to skip is decided here, and not on the device: waiting for it once is little beside a step of NVAE.
        finite = bool(self.gradients.sum().isfinite() or self.gradients.isfinite().all())
        overflow = not finite and self.scales and self.loss_scaling > 1  # which is how the scale is found
        look(torch.zeros_like(self.nonfinite) if finite or overflow else count_nonfinite(self.gradients))
        if not finite:
            self._forget_statistics(nimg)
            replace_nonfinite_(self.gradients)
        if finite or (self.on_nonfinite == "zero" and not overflow):
            for group in self.adamax.param_groups:
                group["lr"] = self.learning_rate(nimg)
            self.adamax.step()
        if finite:
            self.good_steps += 1
            _copy_(self.good_statistics, self.statistics)
        if self.scales and self.good_steps >= SCALE_STEPS:
            self.loss_scaling, self.good_steps = self.loss_scaling * 2, 0

    def _forget_statistics(self, nimg: int) -> None:
        """Note where the step became non-finite, and put the statistics of batch norms back."""
        self.nonfinite += 1
        if not self.first_skipped:
            self.first_skipped = f"{self._first_nonfinite()} at {nimg} images"
        _copy_(self.statistics, self.good_statistics)
        if self.scales:
            self.loss_scaling, self.good_steps = self.loss_scaling / 2, 0

    def _first_nonfinite(self) -> str:
        """The first layer, in the order of the network, whose input was not finite; otherwise, whose gradients are."""
        for name, buffer in self.net.named_buffers():
            if buffer.is_floating_point() and not buffer.isfinite().all():
                return f"the input of {name.rpartition('.')[0]}"
        for name, p in self.net.named_parameters():
            if p.grad is not None and not p.grad.isfinite().all():
                return f"the gradients of {name.rpartition('.')[0]}"
        return "a sum over processes"

    def state_dict(self) -> dict[str, Any]:
        """Adamax's moments by the names of parameters and in their shapes, and what scaling depends on."""
        state = self.adamax.state[self.weights]
        moments = {name: self._by_name(state[name]) for name in ("exp_avg", "exp_inf") if name in state}
        steps = int(state["step"]) if "step" in state else 0
        return {"step": steps, **moments, "loss_scaling": self.loss_scaling, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`; the network has its own state by now."""
        if state["step"]:
            mine = self.adamax.state[self.weights]
            mine["step"] = torch.tensor(float(state["step"]))
            for name in ("exp_avg", "exp_inf"):
                mine[name] = torch.zeros_like(self.weights)
                for key, view in self._views(mine[name]).items():
                    view.copy_(state[name][key])
        if self.scales:
            self.loss_scaling, self.good_steps = state["loss_scaling"], state["good_steps"]
        _copy_(self.good_statistics, self.statistics)

    def _by_name(self, vector: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: view.clone(memory_format=torch.contiguous_format) for name, view in self._views(vector).items()}

    def _views(self, vector: torch.Tensor) -> dict[str, torch.Tensor]:
        """Elements of a vector like `weights` by the names of parameters, in their shapes."""
        named = [(name, p) for name, p in self.net.named_parameters() if p.requires_grad]
        parts = vector.split([p.numel() for _, p in named])
        return {name: part.as_strided(p.shape, p.stride()) for (name, p), part in zip(named, parts, strict=True)}


def _copy_(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copy tensors one by one into others; networks without batch norms have none."""
    if targets:
        torch._foreach_copy_(targets, sources)
