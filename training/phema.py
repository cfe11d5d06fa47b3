"""Power-function EMA: maths, trackers and post-hoc reconstruction.

Source: Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", CVPR 2024
(arXiv 2312.02696), Section 3 and Appendix C; equation numbers refer to it. This file needs only torch and
NumPy and can be used on its own.

An EMA profile is a power function of training time t: weights seen at time t count in proportion to t^gamma.
Its relative width sigma_rel ("std" below) names the profile.
"""

import copy
import itertools
from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch

MAX_CONDITION = 1 / np.finfo(np.float64).eps  # beyond, rounding decides what solutions are

# ---------------------------------------------------------------------------------------------------------
# Maths (float64, NumPy)


def exp_to_std(exp):
    """Relative width sigma_rel of exponent gamma (Eq. 123), elementwise."""
    gamma = np.float64(exp)
    return np.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def std_to_exp(std):
    """Exponent gamma of relative width sigma_rel (Eq. 126), elementwise: the inverse of `exp_to_std`."""
    std = np.float64(std)
    t = std.flatten() ** -2
    gamma = [np.roots([1, 7, 16 - ti, 12 - ti]).real.max() for ti in t]
    return np.array(gamma).reshape(std.shape)


def power_function_response(ofs, std, len, axis=0):
    """Weight of each training time 0 .. len-1 in the EMA taken at time `ofs` (Eqs. 108 and 121).

    `ofs` and `std` broadcast; the times lie along a new `axis`. Each response sums to 1.
    """
    ofs, std = np.broadcast_arrays(np.float64(ofs), np.float64(std))
    gamma = np.expand_dims(std_to_exp(std), axis)
    ofs = np.expand_dims(ofs, axis)
    shape = [1] * ofs.ndim
    shape[axis] = -1
    t = np.arange(len, dtype=np.float64).reshape(shape)
    response = np.where(t <= ofs, (np.minimum(t, ofs) / ofs) ** gamma, 0)
    return response / response.sum(axis=axis, keepdims=True)


def power_function_correlation(a_ofs, a_std, b_ofs, b_std):
    """Inner product of two continuous profiles (Eq. 151), elementwise.

    They end at times `a_ofs` and `b_ofs` (any unit, the same for both) and have widths `a_std` and `b_std`.
    """
    a_ofs, b_ofs = np.float64(a_ofs), np.float64(b_ofs)
    a_exp, b_exp = std_to_exp(a_std), std_to_exp(b_std)
    earlier, later = np.minimum(a_ofs, b_ofs), np.maximum(a_ofs, b_ofs)
    later_exp = np.where(a_ofs < b_ofs, b_exp, a_exp)
    return (a_exp + 1) * (b_exp + 1) / (a_exp + b_exp + 1) * (earlier / later) ** later_exp / later


def power_function_beta(std, t_next, t_delta):
    """Decay of the running average for a step of length `t_delta` that ends at `t_next` (Eq. 127)."""
    return (1 - t_delta / t_next) ** (std_to_exp(std) + 1)


def _products(in_ofs, in_std, out_ofs, out_std):
    """Inner products of stored profiles with each other [n, n], with those wanted [n, m], and of these [m]."""
    in_ofs, in_std = (x.flatten() for x in np.broadcast_arrays(np.float64(in_ofs), np.float64(in_std)))
    out_ofs, out_std = (x.flatten() for x in np.broadcast_arrays(np.float64(out_ofs), np.float64(out_std)))
    A = power_function_correlation(in_ofs[:, None], in_std[:, None], in_ofs[None], in_std[None])
    B = power_function_correlation(in_ofs[:, None], in_std[:, None], out_ofs[None], out_std[None])
    return A, B, power_function_correlation(out_ofs, out_std, out_ofs, out_std)


def solve_posthoc_coefficients(in_ofs, in_std, out_ofs, out_std):
    """Least-squares weights that turn stored averages into averages of other profiles (Algorithm 3).

    Args:
        in_ofs, in_std: end time (any unit) and width of each stored average, [n].
        out_ofs, out_std: end time and width of each average wanted, [m] (broadcast).

    Returns:
        float64 [n, m]; every column sums to 1.

    Raises:
        ValueError: the stored averages are too alike to be told apart.
    """
    A, B, _ = _products(in_ofs, in_std, out_ofs, out_std)
    lengths = np.sqrt(np.diag(A))
    eigenvalues = np.abs(np.linalg.eigvalsh(A / lengths / lengths[:, None]))
    condition = eigenvalues.max() / max(eigenvalues.min(), np.finfo(np.float64).tiny)
    if not condition < MAX_CONDITION:
        raise ValueError(
            f"the {len(A)} stored averages are too alike to be told apart (condition number {condition:.0e}; at most "
            f"{MAX_CONDITION:.0e} works)"
        )
    X = np.linalg.solve(A, B)
    return X / X.sum(axis=0)


def posthoc_error(in_ofs, in_std, out_ofs, out_std, coefs):
    """How far sums of stored averages are from the averages wanted: |sum_i x_i p_i - p| / |p| of the responses.

    The norms are those of the inner product that `solve_posthoc_coefficients` makes small (Eq. 151). 0 is exact; with
    weights that are independent at different times, it would be the error over the average itself.

    Args:
        in_ofs, in_std, out_ofs, out_std: as there.
        coefs: what it returned, x [n, m].

    Returns:
        float64 [m].
    """
    A, B, wanted = _products(in_ofs, in_std, out_ofs, out_std)
    squares = (coefs * (A @ coefs)).sum(axis=0) - 2 * (coefs * B).sum(axis=0) + wanted
    return np.sqrt(np.maximum(squares, 0) / wanted)


# ---------------------------------------------------------------------------------------------------------
# Trackers


def _frozen_copy(net: torch.nn.Module, device: torch.device | str | None = None) -> torch.nn.Module:
    """A copy in eval mode and without gradients, of at least float32: averages move by less than float16 can tell.

    Args:
        device: of the copy; None = that of each tensor.
    """
    made = copy.deepcopy(net).eval().requires_grad_(False)
    for tensor in itertools.chain(made.parameters(), made.buffers()):
        dtype = torch.promote_types(tensor.dtype, torch.float32) if tensor.is_floating_point() else tensor.dtype
        tensor.data = tensor.data.to(device, dtype)
    return made


def _parameters(net: torch.nn.Module, like: torch.nn.Module) -> list[torch.Tensor]:
    """The parameters of a network, with types and on devices of those of its copy."""
    pairs = zip(net.parameters(), like.parameters(), strict=True)
    return [p.detach().to(average.device, average.dtype) for p, average in pairs]


@torch.no_grad()
def _lerp_parameters(ema: torch.nn.Module, latest: list[torch.Tensor], beta: float) -> None:
    """ema = beta * ema + (1 - beta) * latest for all parameters, in place."""
    torch._foreach_lerp_(list(ema.parameters()), latest, 1 - beta)


@torch.no_grad()
def _copy_buffers(ema: torch.nn.Module, net: torch.nn.Module) -> None:
    for dst, src in zip(ema.buffers(), net.buffers(), strict=True):
        dst.copy_(src)


class PowerFunctionEMA:
    """Running power-function averages of a module's parameters, one per width in `stds`.

    The averages are float32 whatever the module computes in (float64 stays). Nothing waits for a GPU unless the
    averages are on another device.

    Args:
        net: the module to follow, of any class that can be copied.
        stds: relative widths of the profiles.
        device: where the averages are, such as 'cpu' to spare a GPU's memory; None = where the parameters are.
        every: update the averages once in so many steps, as if the parameters had been the latest ones since the last
            time. The decay is that of all these steps, so that the profile is the same, only in fewer pieces.
    """

    def __init__(
        self,
        net: torch.nn.Module,
        stds: Sequence[float] = (0.050, 0.100),
        device: torch.device | str | None = None,
        every: int = 1,
    ):
        self.net = net
        self.stds = list(stds)
        self.every = every
        self.emas = [_frozen_copy(net, device) for _ in self.stds]
        self.nimg = 0  # at the latest step
        self.pending = 0  # images since the averages were updated

    def update(self, cur_nimg: int, batch_size: int) -> None:
        """Take in the parameters after an optimiser step; `cur_nimg` counts the step's images too."""
        self.nimg = cur_nimg
        self.pending += batch_size
        if self.pending >= self.every * batch_size:
            self._take_in()

    def _take_in(self) -> None:
        """Bring the averages up to the latest step (Eq. 127; decays of consecutive steps multiply to that of all)."""
        if self.pending > 0 and self.emas:
            latest = _parameters(self.net, self.emas[0])
            for std, ema in zip(self.stds, self.emas, strict=True):
                _lerp_parameters(ema, latest, float(power_function_beta(std, self.nimg, self.pending)))
        self.pending = 0

    def get(self) -> list[tuple[torch.nn.Module, str]]:
        """The averaged networks up to the latest step, buffers copied from the live one, each with its file name
        suffix."""
        self._take_in()
        for ema in self.emas:
            _copy_buffers(ema, self.net)
        return [(ema, f"-{std:.3f}") for std, ema in zip(self.stds, self.emas, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to continue exactly."""
        emas = [ema.state_dict() for ema in self.emas]
        return {"stds": list(self.stds), "emas": emas, "nimg": self.nimg, "pending": self.pending}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the averages of a `state_dict`, or of one without nimg and pending, as earlier versions wrote.

        Raises:
            ValueError: the state tracks other widths or another network, or has missing or unknown entries. Nothing
                has changed then.
        """
        _check_entries("EMA state", {"stds", "emas"}, state, optional={"nimg", "pending"})
        if list(state["stds"]) != self.stds or len(state["emas"]) != len(self.stds):
            raise ValueError(f"EMA state tracks stds {state['stds']}, not {self.stds}")
        for ema, ema_state in zip(self.emas, state["emas"], strict=True):
            wanted = ema.state_dict()
            _check_entries("EMA state of a network", wanted.keys(), ema_state)
            for name, tensor in wanted.items():
                if isinstance(tensor, torch.Tensor) and ema_state[name].shape != tensor.shape:
                    shapes = f"{list(ema_state[name].shape)} instead of {list(tensor.shape)}"
                    raise ValueError(f"EMA state of a network: {name!r} is {shapes}")
        for ema, ema_state in zip(self.emas, state["emas"], strict=True):
            ema.load_state_dict(ema_state)
        self.nimg, self.pending = state.get("nimg", 0), state.get("pending", 0)


def _check_entries(what: str, wanted: Set[str], found: Mapping[str, Any], optional: Set[str] = frozenset()) -> None:
    """Check that a state has the entries that it needs, and no others.

    Raises:
        ValueError: names the first one.
    """
    for problem, names in [("lacks", wanted - found.keys()), ("has unknown", found.keys() - wanted - optional)]:
        if names:
            raise ValueError(f"{what} {problem} {min(names)!r}")


class LatestWeights:
    """No average: the weights themselves, in the place of one."""

    def __init__(self, net: torch.nn.Module):
        self.net = net
        self.stds = [None]
        self.copy = _frozen_copy(net)

    def update(self, cur_nimg: int, batch_size: int) -> None:
        """Nothing: there is nothing to average."""

    def get(self) -> list[tuple[torch.nn.Module, str]]:
        """A copy of the network in eval mode, with an empty file name suffix."""
        with torch.no_grad():
            torch._foreach_copy_(list(self.copy.parameters()), list(self.net.parameters()))
        _copy_buffers(self.copy, self.net)
        return [(self.copy, "")]

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Nothing: a state holds nothing of it."""


class TraditionalEMA:
    """Exponential moving average with a half-life, shortened at the start of training.

    Args:
        net: the network to follow.
        halflife_Mimg: half-life in millions of images.
        rampup_ratio: upper limit of the half-life as a share of the images seen; None = no limit.
    """

    def __init__(self, net: torch.nn.Module, halflife_Mimg: float = 2, rampup_ratio: float | None = 0.09):
        self.net = net
        self.halflife_Mimg = halflife_Mimg
        self.rampup_ratio = rampup_ratio
        self.ema = _frozen_copy(net)

    def update(self, cur_nimg: int, batch_size: int) -> None:
        """Take in the parameters after an optimiser step; `cur_nimg` counts the step's images too."""
        halflife = self.halflife_Mimg * 1e6
        if self.rampup_ratio is not None:
            halflife = min(halflife, cur_nimg * self.rampup_ratio)
        _lerp_parameters(self.ema, _parameters(self.net, self.ema), 0.5 ** (batch_size / max(halflife, 1e-8)))

    def get(self) -> torch.nn.Module:
        _copy_buffers(self.ema, self.net)
        return self.ema

    def state_dict(self) -> dict:
        return self.ema.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.ema.load_state_dict(state)


class RampedEMA:
    """Exponential moving average with a constant decay per step, smaller in the first steps (Song et al. 2021).

    After step k the decay is min(rate, (1 + k) / (10 + k)). Parameters that are not trained are copied.

    Args:
        net: the network to follow.
        rate: decay per step; 0 = the average is the network itself.
        ramp_up: whether the decay is smaller at first.
    """

    def __init__(self, net: torch.nn.Module, rate: float = 0.999, ramp_up: bool = True):
        self.net = net
        self.rate = rate
        self.ramp_up = ramp_up
        self.ema = _frozen_copy(net)

    def update(self, cur_nimg: int, batch_size: int) -> None:
        """Take in the parameters after an optimiser step; `cur_nimg` counts the step's images too."""
        steps = cur_nimg / batch_size
        decay = min(self.rate, (1 + steps) / (10 + steps)) if self.ramp_up else self.rate
        _lerp_parameters(self.ema, _parameters(self.net, self.ema), decay)

    def get(self) -> torch.nn.Module:
        """The averaged network, buffers and untrained parameters copied from the live one."""
        _copy_buffers(self.ema, self.net)
        with torch.no_grad():
            for dst, src in zip(self.ema.parameters(), self.net.parameters(), strict=True):
                if not src.requires_grad:
                    dst.copy_(src)
        return self.ema

    def state_dict(self) -> dict:
        return self.ema.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.ema.load_state_dict(state)


class ProfilesAndRampedEMA:
    """Power-function averages, and an exponential one that is saved as '-ema'.

    Args:
        net: the network to follow.
        stds: widths of the power-function averages.
        rate, ramp_up: decay per step of the exponential one, see `RampedEMA`.
    """

    def __init__(self, net: torch.nn.Module, stds: Sequence[float], rate: float, ramp_up: bool = True):
        self.profiles = PowerFunctionEMA(net, stds)
        self.ramped = RampedEMA(net, rate, ramp_up)
        self.stds: list[float | None] = [*self.profiles.stds, None]

    def update(self, cur_nimg: int, batch_size: int) -> None:
        """Take in the parameters after an optimiser step; `cur_nimg` counts the step's images too."""
        self.profiles.update(cur_nimg, batch_size)
        self.ramped.update(cur_nimg, batch_size)

    def get(self) -> list[tuple[torch.nn.Module, str]]:
        """The averaged networks, each with its file name suffix."""
        return [*self.profiles.get(), (self.ramped.get(), "-ema")]

    def state_dict(self) -> dict:
        return {"profiles": self.profiles.state_dict(), "ramped": self.ramped.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Take over the averages of a `state_dict`.

        Raises:
            ValueError: the state tracks other widths.
        """
        self.profiles.load_state_dict(state["profiles"])
        self.ramped.load_state_dict(state["ramped"])
