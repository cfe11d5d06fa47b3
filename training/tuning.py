"""Runs that tune the network of a snapshot: which network that is, and whether it suits a dataset."""

import dataclasses
from pathlib import Path
from typing import Any

from dnnlib.errors import UserError
from training.conditioning import DataSpec
from training.config.consistency import NETWORKS, ConsistencyTraining
from training.config.training import TrainConfig
from training.dataset.images import ImageFolderDataset
from training.encoders import data_spec, encoder_for
from training.families import architecture_name, architecture_of
from training.networks.edm2 import Precond
from training.preconditioning import EDMOfSchedule
from training.snapshot import build_for, open_snapshot


def has_edm_preconditioning(net: Any) -> bool:
    """Whether a network is a denoiser with c_skip(0) = 1, c_out(0) = 0 and an output of unit scale at all levels."""
    return isinstance(net, Precond) or isinstance(getattr(net, "preconditioning", None), EDMOfSchedule)


def with_tuned_network(
    config: ConsistencyTraining, outdir: Path | None = None
) -> tuple[ConsistencyTraining, DataSpec | None]:
    """The configuration with the network of `run.init_from` and the conditions that it knows, and its data.

    Args:
        outdir: of the run; where it has begun, its options name the network, and the snapshot is not looked at any
            more. What its data are is None then.

    Raises:
        UserError: there is no such snapshot, or its network cannot be tuned.
    """
    source = config.run.init_from
    if not source:
        raise UserError("which network is to be tuned? Give its snapshot by --init-from")
    begun = None if outdir is None else ConsistencyTraining.of_begun(outdir)
    if begun is not None:
        conditions = {"cond": begun.data.cond, "captions": begun.data.captions}
        return dataclasses.replace(config.from_flat(conditions, config), network=begun.network), None
    net: Any = build_for(open_snapshot(source))[0]
    architecture = architecture_of(net)
    if not has_edm_preconditioning(net):
        raise UserError(
            f"--init-from={source}: holds a network of {architecture.family} without EDM's preconditioning, which "
            f"consistency models need: give one of train_edm2.py, or of train_uvit.py with --predict=edm"
        )
    spec, arguments = net.spec, dict(net.init_kwargs)
    if architecture.take_data is not None:
        architecture.take_data(arguments)
    kind = spec.conditioning.kind
    conditions = {"cond": kind != "none", "captions": kind == "tokens"}
    network = NETWORKS[architecture_name(net)].from_json(arguments)
    return dataclasses.replace(config.from_flat(conditions, config), network=network), spec


def check_same_data(config: TrainConfig, dataset: ImageFolderDataset, spec: DataSpec) -> None:
    """Check that a network sees of a dataset what it was trained on, so that all of it goes on being used.

    Args:
        spec: the network's data.

    Raises:
        UserError: it does not.
    """
    found = data_spec(dataset, encoder_for(dataset, config.data.encoder, config.data.trust_encoder))
    parts = [
        ("resolution", spec.resolution, found.resolution),
        ("channels", spec.channels, found.channels),
        ("conditions of the shape", spec.conditioning.shape, found.conditioning.shape),
    ]
    for what, theirs, ours in parts:
        if theirs != ours:
            raise UserError(
                f"--data={config.data.data}: has {what} {ours}, and the network of --init-from={config.run.init_from} "
                f"{theirs}: give the data that it was trained on, or such as they are"
            )
