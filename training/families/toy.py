"""The toy example in the registry."""

from typing import Any

import torch

from training.config.toy import ToyNetwork
from training.families.architecture import Architecture
from training.flops import Inputs
from training.networks.toy import ToyModel


def _network(arguments: dict[str, Any], _data: None) -> ToyModel:
    return ToyModel(**arguments)


def _inputs(net: Any, batch: int, device: torch.device | str) -> Inputs:
    return torch.zeros([batch, net.init_kwargs["in_dim"]], device=device), torch.ones(batch, device=device)


ENTRY = Architecture(
    family="toy example",
    paper="Karras et al., *Guiding a Diffusion Model with a Bad Version of Itself* (NeurIPS 2024, "
    "[arXiv 2406.02507](https://arxiv.org/abs/2406.02507))",
    network_class=ToyModel,
    network=ToyNetwork,
    make=_network,
    inputs=_inputs,
    makes_images=False,
)
