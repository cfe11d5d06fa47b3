"""Metrics of the snapshots of a training run."""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch

from dnnlib.util import file_sha256
from torch_utils import distributed
from training.encoders import Encoder
from training.generation import generate_images, image_resolution
from training.metrics.evaluation import Evaluation, save_records
from training.networks.edm2 import Precond

BATCH = 64
SAMPLER = {
    "solver": "heun",
    "num_steps": 32,
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "rho": 7.0,
    "guidance": 1.0,
}


class SnapshotEvaluation:
    """Metrics of each snapshot of a training run, always on images of the same seeds.

    Args:
        metrics, ref, device: as for `Evaluation`.
        num_images: how many to generate.
        net: the network of the run.
        encoder: decodes what the network generates.

    Raises:
        UserError: as `Evaluation` and its `check`, or the encoder cannot decode to pixels.
        RunError: a download failed.
    """

    def __init__(
        self, metrics: Sequence[str], ref: str, num_images: int, net: Precond, encoder: Encoder, device: torch.device
    ):
        self.evaluation = Evaluation(metrics, ref, device)
        self.num_images, self.encoder, self.device = num_images, encoder, device
        with distributed.fail_together():
            encoder.prepare(device)
            resolution = image_resolution(net, encoder, device)
        self.evaluation.check(num_images, resolution)

    def __call__(self, net: Precond, path: Path, nimg: int) -> dict[str, float]:
        """Values by name, which are also recorded beside the snapshot; on the first process, empty on the others.

        Args:
            net: the network that was saved at `path`.
            nimg: training progress in images.
        """
        saved = copy.deepcopy(net)
        for parameter in saved.parameters():
            parameter.copy_(parameter.half())  # as in the file, so that measuring the file gives the same results
        images = generate_images(
            saved,
            encoder=self.encoder,
            seeds=range(self.num_images),
            max_batch_size=BATCH,
            device=self.device,
            verbose=False,
            **SAMPLER,
        )
        provenance = {
            "nimg": nimg,
            "net": path.name,
            "net_sha256": file_sha256(path) if distributed.get_rank() == 0 else "",
            "seeds": f"0-{self.num_images - 1}",
            "labels": "drawn from the seed" if net.label_dim > 0 else "none",
            "sampler": SAMPLER,
            "precision": net.precision,
        }
        records = self.evaluation(images, provenance)
        save_records(path.parent, records)
        return {name: value for record in records for name, value in record["results"].items()}
