"""Metrics of the snapshots of a training run."""

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dnnlib.files import file_sha256
from torch_utils import distributed
from training.config.generation import SamplingConfig
from training.config.samplers import SamplerConfig
from training.encoders import Encoder
from training.families import architecture_of
from training.generation import ImageBatches, image_resolution
from training.generators import Generator
from training.metrics.evaluation import Evaluation, save_records
from training.monitoring.outdir import unmeasured

BATCH = 64


class _AskedToStopError(Exception):
    """A process was asked to stop while it measured."""


class SnapshotEvaluation:
    """Metrics of each snapshot of a training run, always on images of the same seeds.

    Args:
        metrics, ref, device: as for `Evaluation`.
        num_images: how many to generate.
        net: the network of the run.
        encoder: decodes what the network generates.
        sampler: what makes images.
        stop: whether this process was asked to stop, which is looked at after each batch of images.

    Raises:
        UserError: as `Evaluation` and its `check`, or the encoder cannot decode to pixels.
        RunError: a download failed.
    """

    def __init__(
        self,
        metrics: Sequence[str],
        ref: str,
        num_images: int,
        net: Any,
        encoder: Encoder,
        device: torch.device,
        sampler: SamplerConfig,
        stop: Callable[[], bool] = lambda: False,
    ):
        self.evaluation = Evaluation(metrics, ref, device)
        self.num_images, self.encoder, self.device = num_images, encoder, device
        self.sampling, self.stop = SamplingConfig(sampler=sampler), stop
        with distributed.fail_together():
            encoder.prepare(device)
            resolution = image_resolution(net.spec, encoder, device)
        self.evaluation.check(num_images, resolution)

    def __call__(self, net: Any, path: Path, nimg: int) -> dict[str, float]:
        """Values by name, which are also recorded beside the snapshot; on the first process, empty on the others, and
        where a process was asked to stop.

        Args:
            net: the network that was saved at `path`.
            nimg: training progress in images.
        """
        saved = copy.deepcopy(net)
        for parameter in saved.parameters():
            parameter.copy_(parameter.half())  # as in the file, so that measuring the file gives the same results

        def generator(batch_size: int | None) -> Generator:
            return architecture_of(saved).generator(saved, self.sampling, batch_size)

        seeds = range(self.num_images)
        images = ImageBatches(generator, self.encoder, seeds, self.device, max_batch_size=BATCH, verbose=False)
        provenance = {
            "nimg": nimg,
            "net": path.name,
            "net_sha256": file_sha256(path) if distributed.get_rank() == 0 else "",
            "seeds": f"0-{self.num_images - 1}",
            **generator(None).describe(),
        }
        try:
            records = self.evaluation(self._until_stopped(images), provenance, verbose=False)
        except _AskedToStopError:
            return {}
        # What was recorded before the process was killed stays as it is.
        save_records(path.parent, [r for r in records if path.name in unmeasured(path.parent, r["metric"], nimg)])
        return {name: value for record in records for name, value in record["results"].items()}

    def _until_stopped(self, images: ImageBatches) -> Iterator[Any]:
        """The batches, until a process is asked to stop: then all of them leave together.

        Raises:
            _AskedToStopError: this is so.
        """
        together = images.num_batches % distributed.get_world_size() == 0  # else some have fewer batches
        for batch in images:
            if together and distributed.any_rank(self.stop()):
                raise _AskedToStopError
            yield batch
