"""What made gradients of a training run NaN or infinite: parameters, layer, images, and whether it happens again."""

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from dnnlib.errors import RunError
from torch_utils import distributed
from torch_utils.device import eagerly
from torch_utils.nonfinite import nonfinite_by_name, nonfinite_origin
from training.dataset.order import collate
from training.monitoring.states import on_cpu

DELAY = 2  # steps after which a GPU's counts are read, when it has long been through with them
MOST_IMAGES = 4  # that each process looks for
SHOWN = 3  # parameters in a message


class Counts:
    """Counts of the latest steps, made on the device: read at once on a CPU, and some steps later on a GPU, so that no
    step waits for it; on others when `wait` says so."""

    def __init__(self, device: torch.device):
        self.device = device
        self.pending: deque[tuple[int, torch.Tensor, torch.cuda.Event | None]] = deque()

    def add(self, nimg: int, count: torch.Tensor) -> None:
        """Add the count [] of the step that begins at `nimg` images."""
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            count = count.to("cpu", non_blocking=True)
            event.record()
            self.pending.append((nimg, count, event))
        else:
            self.pending.append((nimg, count, None))

    def read(self, wait: bool) -> list[int]:
        """Where the steps begin whose counts are not 0, of those that have not been read.

        Args:
            wait: read those of the latest steps of a GPU, too.
        """
        kept = 0 if wait else {"cpu": 0, "cuda": DELAY}.get(self.device.type, len(self.pending))
        found = []
        while len(self.pending) > kept:
            nimg, count, event = self.pending.popleft()
            if event is not None:
                event.synchronize()
            if int(count) > 0:
                found.append(nimg)
        return found


@dataclass
class Finding:
    """What a process found when it repeated its part of a step.

    `images` have their indices in the run and in the dataset, the names of their files, and their noise levels.
    """

    parameters: dict[str, int] = field(default_factory=dict)  # number of gradients that are not finite
    weights: dict[str, int] = field(default_factory=dict)  # number of weights that are not finite
    layer: str | None = None  # the first that makes NaN or infinities of finite inputs
    images: list[dict[str, Any]] = field(default_factory=list)
    every: bool = False  # image of the process does it, as far as was tried
    repeated: bool | None = False  # gradients of all processes were not finite again; None = it was not tried


class Incidents:
    """Looks at the gradients of each step. Where some are not finite, the first time since the last report, it repeats
    the step with the network as it was before it on a CPU, and as it is two steps later on a GPU: if gradients are
    finite then, something has computed wrongly; if not, it is the data or the weights, and the images that make them so
    are looked for. The network, the gradients and the objective are left as they were.

    Args:
        run: the run (`TrainingRun`).
    """

    def __init__(self, run: Any):
        self.run = run
        self.counts = Counts(run.device)
        self.reported = False  # since the last status report

    def look(self, nimg: int, nonfinite: torch.Tensor) -> None:
        """See the gradients of all processes, before they change the weights; to be called by all processes.

        Args:
            nimg: images seen before the step.
            nonfinite: number of gradients that are not finite, int64 [].

        Raises:
            RunError: with --on-nonfinite=stop, there are some.
        """
        self.counts.add(nimg, nonfinite)
        self.check(wait=False)

    def check(self, wait: bool = True) -> None:
        """Look into what is known of the steps so far; to be called by all processes.

        Raises:
            RunError: with --on-nonfinite=stop, gradients were not finite.
        """
        for nimg in self.counts.read(wait):
            if not self.reported:
                self.reported = True
                self._inquire(nimg)

    def _inquire(self, nimg: int) -> None:
        """Find out what happened in a step, and say so."""
        run = self.run
        if run.config.run.shard > 1:  # where no process computes anything alone
            named = run.held.named_parameters()
            found = Finding(parameters=nonfinite_by_name((name, p.grad) for name, p in named), repeated=None)
        else:
            with self._everything_as_it_was():
                found = self._repeat(nimg)
        findings = distributed.gather_to_first(found)
        with distributed.fail_together():
            if distributed.get_rank() == 0:
                finding = merged(findings)
                text = describe(finding, nimg)
                after = nimg + run.config.run.batch
                run.journal.record({"nimg": after, "nonfinite": {"step": nimg, **asdict(finding)}})
                if run.optimizer.on_nonfinite == "stop":
                    raise RunError(
                        f"{text}. Nothing has been saved since; to continue from the last training state regardless, "
                        f"repeat the command with --on-nonfinite=skip or zero"
                    )
                run.journal.log(f"Warning: {text}")

    @contextmanager
    def _everything_as_it_was(self) -> Iterator[None]:
        """Afterwards, the network, gradients, objective and random numbers are as before."""
        run = self.run
        tensors = [*run.net.parameters(), *run.net.buffers(), run.optimizer.gradients]
        kept, objective = on_cpu([x.data for x in tensors]), on_cpu(run.objective.state_dict())
        gpus = [run.device] if run.device.type == "cuda" else []
        with torch.random.fork_rng(gpus), eagerly(run.config.run.compile):
            yield
        for x, value in zip(tensors, kept, strict=True):
            x.data.copy_(value)
        run.objective.load_state_dict(objective)

    def _repeat(self, nimg: int) -> Finding:
        """What this process finds when all repeat a step."""
        run = self.run
        found = Finding(weights=nonfinite_by_name(run.net.named_parameters()), parameters=self._bad_gradients())
        starts = run.share.starts(nimg)
        rounds = [range(first, first + run.share.batch_gpu) for first in starts]
        run.optimizer.zero_gradients()
        run.backward(nimg, map(self._items, rounds))
        distributed.all_reduce_sum_(run.optimizer.gradients)
        found.repeated = not bool(run.optimizer.gradients.isfinite().all())
        if not found.repeated:
            return found
        found.parameters = found.parameters or self._bad_gradients()  # on a GPU, those of the step are gone
        for images in filter(self._fails, rounds):
            found.layer = found.layer or self._layer(images)
            if found.weights or len(found.images) == MOST_IMAGES:
                break
            for image in itertools.islice(self._failing(images), MOST_IMAGES - len(found.images)):
                found.images.append(self._described(image))
        tried = [image["run_index"] for image in found.images]
        found.every = bool(found.weights) or tried == list(itertools.chain(*rounds))[:MOST_IMAGES]
        return found

    def _failing(self, images: Sequence[int]) -> Iterator[int]:
        """Images by which gradients are not finite, one after the other, of some that fail together."""
        if len(images) == 1:
            yield images[0]
            return
        middle = len(images) // 2
        for part in (images[:middle], images[middle:]):
            if self._fails(part):
                yield from self._failing(part)

    def _fails(self, images: Sequence[int]) -> bool:
        """Whether the loss of some successive images of the run, or its gradients, are not finite."""
        run = self.run
        run.optimizer.zero_gradients()
        with run.architecture.step(run.net):
            loss = run.loss_of_round(images[0], *self._items(images))
            (loss.sum() * (run.optimizer.loss_scaling / run.config.run.batch)).backward()
        return not bool(loss.isfinite().all() and run.optimizer.gradients.isfinite().all())

    def _items(self, images: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """What the loader gave for some images of the run."""
        return collate(self.run.dataset.__getitems__(self.run.sampler.items(np.array(images)).tolist()))

    def _bad_gradients(self) -> dict[str, int]:
        return nonfinite_by_name((name, p.grad) for name, p in self.run.net.named_parameters())

    def _described(self, image: int) -> dict[str, Any]:
        """An image that `_fails` has just seen alone."""
        dataset = self.run.dataset
        item = int(self.run.sampler.items(np.array([image]))[0]) % len(dataset)
        sigma = self.run.objective.of_each_image().get("sigma")
        level = {} if sigma is None else {"sigma": float(sigma)}
        return {"run_index": image, "index": item, "name": dataset.name(item), **level}

    def _layer(self, images: Sequence[int]) -> str | None:
        """The first layer that makes NaN or infinities of finite inputs, of some images."""
        run = self.run
        with run.architecture.step(run.net):
            return nonfinite_origin(run.net, lambda: run.loss_of_round(images[0], *self._items(images)))


def merged(findings: Sequence[Finding]) -> Finding:
    """What all processes found together."""
    first = findings[0]
    parameters = first.parameters
    if first.repeated is None:  # each process has its pieces; what all of them have counts with the first's
        parameters = {name: n for f in reversed(findings) for name, n in f.parameters.items()}
    return Finding(
        parameters=parameters,
        weights=first.weights,
        layer=next((f.layer for f in findings if f.layer), None),
        images=[image for f in findings for image in f.images],
        every=all(f.every for f in findings),
        repeated=first.repeated,
    )


def describe(found: Finding, nimg: int) -> str:
    """What happened in the step that began at `nimg` images, on one line."""
    names = ", ".join(f"{name} {n}" for name, n in list(found.parameters.items())[:SHOWN])
    more = f", and {len(found.parameters) - SHOWN} more parameters" if len(found.parameters) > SHOWN else ""
    text = f"gradients of the step at {nimg} images were not finite ({names or 'none of this process'}{more})"
    if found.repeated is None:
        return f"{text}; with --shard, the step is not repeated"
    if not found.repeated:
        return f"{text}, but were when it was repeated: the processor, its memory or a driver has computed wrongly"
    text += ", and were not when it was repeated"
    if found.layer:
        text += f"; first in layer {found.layer}"
    if found.weights:
        return f"{text}; weights are not finite: {', '.join(list(found.weights)[:SHOWN])}"
    if found.every:
        return f"{text}; every image that was tried alone does it: weights are too large, or --precision too low"
    if not found.images:
        return f"{text}; no image alone does it"
    shown = [
        f"{image['index']} ({image['name']})" + (f" at sigma {image['sigma']:.4g}" if "sigma" in image else "")
        for image in found.images[:MOST_IMAGES]
    ]
    return f"{text}; caused by {'image' if len(shown) == 1 else 'images'} {', '.join(shown)}"
