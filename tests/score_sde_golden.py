"""Golden files of score-SDE models, and the networks and schedules that they describe."""

import functools
import inspect
from typing import Any

import golden_files
import torch
from golden_files import rule_p

from training.denoiser import Preconditioned
from training.networks.ncsnpp import DDPM, NCSNpp
from training.networks.ncsnv2 import NCSN, NCSNv2
from training.preconditioning import Epsilon
from training.schedules import VE, VP, DiscreteVE, DiscreteVP, Schedule, SubVP

# Published names of networks: the class, and what else the name says.
NETWORKS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ncsnpp": (NCSNpp, {}),
    "ddpm": (DDPM, {}),
    "ncsn": (NCSN, {}),
    **{f"ncsnv2_{plan}": (NCSNv2, {"plan": plan}) for plan in (64, 128, 256)},
}


class GoldenFile(golden_files.GoldenFile):
    family = "score_sde"

    def entries(self) -> dict[str, dict[str, Any]]:
        """Descriptions of the entries that have arrays."""
        found = {key: v for key, v in self.meta.items() if any(f"{a}/".startswith(f"{key}/") for a in self.arrays)}
        assert found
        return found

    def state(self, prefix: str, index: list | None) -> dict[str, torch.Tensor]:
        """The state dict `prefix/state`, which may be stored in one piece."""
        state = self.below(f"{prefix}/state")
        if index is not None:
            flat = self[f"{prefix}/state_flat"]
            pieces = flat.split([torch.Size(shape).numel() for _, shape in index])
            state |= {key: piece.reshape(shape) for (key, shape), piece in zip(index, pieces, strict=True)}
        return state


names = GoldenFile.names
opened = functools.cache(GoldenFile)  # for files that many tests read


def entries(pattern: str) -> list[tuple[str, str]]:
    """(file, entry) of all files of a pattern."""
    return [(name, entry) for name in names(pattern) for entry in GoldenFile(name).entries()]


def network(config: dict[str, dict[str, Any]]) -> torch.nn.Module:
    """The network that a published configuration describes; options of other kinds of networks have no effect."""
    model, data = config["model"], config["data"]
    cls, options = NETWORKS[model["name"]]
    taken = set(inspect.signature(NCSNpp if cls is DDPM else cls).parameters)
    if cls is DDPM:
        taken -= {"fir", "skip_rescale", "resblock_type", "embedding_type"}  # which are fixed
    options = options | {key: value for key, value in (data | model).items() if key in taken}
    return cls(data["image_size"], data["num_channels"], **options).eval()


def shared_entry(name: str) -> tuple[GoldenFile, dict[str, dict[str, Any]]]:
    """Where one of the small networks is that entries of other files name, and its configuration."""
    for g in map(opened, names("nets*")):
        if name in g.meta:
            return g, g.meta[name]["config"]
    raise AssertionError(f"no golden file nets*.npz has a network {name}")


def shared_network(name: str) -> torch.nn.Module:
    """One of the small networks."""
    g, config = shared_entry(name)
    net = network(config)
    net.load_state_dict(g.below(name))
    return net


def filled_network(config: dict[str, dict[str, Any]], weights: str) -> torch.nn.Module:
    """A network filled by a rule, described as 'P phase 0'."""
    rule, _, phase = weights.partition(" phase ")
    assert rule == "P"
    net = network(config)
    rule_p(net, float(phase))
    return net


def schedule(sde: str, parameters: dict[str, float], levels: int | None = None, first_time: float = 0.0) -> Schedule:
    """The schedule of an SDE, with discrete levels if their number is given."""
    if sde == "VE":
        bounds = (parameters["sigma_min"], parameters["sigma_max"])
        return VE(*bounds) if levels is None else DiscreteVE(*bounds, levels)
    bounds = (
        parameters.get("beta_0", parameters.get("beta_min")),
        parameters.get("beta_1", parameters.get("beta_max")),
    )
    if sde == "subVP":
        return SubVP(*bounds)
    assert sde == "VP"
    return VP(*bounds) if levels is None else DiscreteVP(*bounds, levels, first_time)


def denoiser(net: torch.nn.Module, of: Schedule) -> Preconditioned:
    """The denoiser around a network."""
    return Preconditioned(net, Epsilon(of), spec=None)


def gradient_errors(net: torch.nn.Module, order: list[str], g: GoldenFile, entry: str) -> dict[str, float]:
    """Largest errors of parameters' gradients, relative to the norm of all.

    What is stored is the norm of each, its product with c = (cos 0, cos 1, ...), and sometimes the whole. An error e in
    each of K elements changes the norm by up to e sqrt(K), so those are divided by sqrt(K), and products by |c|.
    """
    gradients = [net.get_parameter(key).grad for key in order]
    flat = [gradient.double().flatten() for gradient in gradients if gradient is not None]
    assert len(flat) == len(order)
    total = g[f"{entry}/grad_norms"].norm()
    cosines = [torch.arange(len(v), dtype=torch.float64).cos() for v in flat]
    norms = torch.stack([v.norm() for v in flat]) - g[f"{entry}/grad_norms"]
    dots = torch.stack([v @ c for v, c in zip(flat, cosines, strict=True)]) - g[f"{entry}/grad_dots"]
    differences = {
        "grad_norms": norms / torch.tensor([len(v) ** 0.5 for v in flat]),
        "grad_dots": dots / torch.stack([c.norm() for c in cosines]),
    }
    if f"{entry}/grad_flat" in g.arrays:
        differences["grad_flat"] = torch.cat(flat) - g[f"{entry}/grad_flat"]
    return {key: float(value.abs().max() / total) for key, value in differences.items()}
