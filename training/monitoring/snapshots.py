"""Snapshots of a training run."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from torch_utils import distributed
from training.config.training import TrainConfig
from training.dataset.images import ImageFolderDataset
from training.encoders import Encoder
from training.monitoring.health import weight_beyond_float16
from training.monitoring.outdir import snapshot_name
from training.optimizers import EMA
from training.snapshot import save_network


class SnapshotWriter:
    """Writes the averaged networks of a run.

    Args:
        config, dataset, encoder: of the run; what files say of it.
        outdir: where they go.
    """

    def __init__(self, config: TrainConfig, dataset: ImageFolderDataset, encoder: Encoder, outdir: Path):
        assert config.dataset is not None
        self.encoder, self.outdir = encoder, outdir
        self.described = {
            "config": config.to_json(),
            "dataset": config.dataset.to_json(),
            "class_names": dataset.class_names,
            "text_encoder": None if dataset.captions is None else dataset.captions.encoder,
        }

    def __call__(self, net: torch.nn.Module, ema: EMA, nimg: int, object_to: Callable[[str | None, int], None]) -> None:
        """Write the averages of a network; to be called by all processes, of which the first one writes.

        Args:
            net: in training.
            ema: its averages.
            nimg: images seen so far.
            object_to: is shown what is wrong with an average, or None, before anything is written.
        """
        average_batch_statistics_(net)
        averaged: Sequence = list(zip(ema.stds, ema.get(), strict=True))
        dtypes = []
        with distributed.fail_together():
            for _, (ema_net, _) in averaged:
                name = weight_beyond_float16(ema_net)
                object_to(None if name is None else f"{name} holds values that float16 cannot", nimg)
                dtypes.append(torch.float16 if name is None else torch.float32)
        if distributed.get_rank() == 0:
            for (std, (ema_net, suffix)), dtype in zip(averaged, dtypes, strict=True):
                path = self.outdir / snapshot_name(nimg, suffix)
                save_network(path, ema_net, self.encoder, {"nimg": nimg, "ema_std": std, **self.described}, dtype)
        distributed.wait_for_first()


def average_batch_statistics_(net: torch.nn.Module) -> None:
    """Give all processes the mean of the running statistics that their batch norms have gathered."""
    for module in net.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            for buffer in (module.running_mean, module.running_var):
                if buffer is not None:
                    distributed.all_reduce_sum_(buffer).div_(distributed.get_world_size())
