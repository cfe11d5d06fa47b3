"""The training loop. It knows no family: what it trains comes from the registry."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnnlib.errors import RunError
from dnnlib.util import code_version
from torch_utils import checkpoint, distributed
from torch_utils.device import check_compiler, resolve_precision, select_device, set_up_device
from torch_utils.training_stats import Collector
from training.config.training import BY_IMAGE, OPTIONS_NAME, TrainConfig
from training.dataset.images import ImageFolderDataset
from training.dataset.order import RunSampler, begin_loader_process, collate, start_loading
from training.encoders import Encoder, data_spec, encoder_for
from training.families import trained_by
from training.holding import Shared, Whole
from training.monitoring.diagnosis import Diagnosis
from training.monitoring.diagnosis import status_line as diagnosis_line
from training.monitoring.incidents import Incidents
from training.monitoring.journal import Journal
from training.monitoring.observers import Observers
from training.monitoring.outdir import STATE_PATTERN, check_outdir, is_owed, next_steps
from training.monitoring.snapshots import SnapshotWriter
from training.monitoring.states import StateWriter
from training.monitoring.status import StatusReports, opening_lines
from training.networks.dropout import ImageMasks, masks_of_round
from training.rounds import Share, image_seeds
from training.samplers.noise import StackedRandomGenerator
from training.snapshot.initial import take_weights_

SMALL_DATASET = 1 << 26  # bytes; decoded datasets up to this size are kept in memory in any case


def build_network(config: TrainConfig, dataset: ImageFolderDataset, encoder: Encoder) -> Any:
    """A freshly initialised network: the same for the same seed, on every device and process."""
    torch.manual_seed(config.run.seed)
    net = trained_by(config).build(config.network, data_spec(dataset, encoder))
    if dataset.captions is not None:
        net.empty_context.copy_(torch.from_numpy(dataset.captions.empty))
    return net


def training_loop(config: TrainConfig, dataset: ImageFolderDataset, outdir: Path, resume: bool = True) -> None:
    """Train until `config.run.duration` images, continuing what `outdir` holds.

    Progress is counted in images (nimg). Data order, noise levels and noise are functions of (seed, index of the
    image in the run), and so are dropout masks unless `dropout_masks` says otherwise; so a resumed run continues as if
    it had never stopped, on any number of processes and with any `batch_gpu`, up to the rounding of sums. Batch norm
    (NVAE) looks at the images of a round of all processes: there, the number of these has to stay.

    Raises:
        UserError: `outdir` holds another configuration, or a run although `resume` is False.
        RunError: no image since the last status report had a finite loss.
    """
    with distributed.fail_together():
        journal = Journal(outdir)
    with journal, distributed.SuspendSignals() as suspend:
        with distributed.fail_together():
            check_outdir(outdir, config, resume)
        if distributed.get_rank() == 0:
            config.save(outdir / OPTIONS_NAME)
        run = TrainingRun(config, dataset, outdir, journal)
        if run.restore():
            with run.states:
                run.train(suspend)


class TrainingRun:
    """A network in training, what changes it, and what watches it.

    Args:
        config: what is trained, and how.
        dataset: the images, as `config.dataset` describes them.
        outdir: where results go.
        journal: where progress is reported.
    """

    def __init__(self, config: TrainConfig, dataset: ImageFolderDataset, outdir: Path, journal: Journal):
        self.config, self.dataset, self.outdir, self.journal = config, dataset, outdir, journal
        self.device = device = select_device(config.run.device)
        set_up_device(device, huge_pages=True)
        torch.backends.cudnn.benchmark = config.run.bench
        if config.data.cache or dataset.decoded_bytes() <= SMALL_DATASET:
            dataset.keep_in_memory()
        self.share, shard = Share.of(config), config.run.shard
        encoder = encoder_for(dataset, config.data.encoder, config.data.trust_encoder, journal.log)
        self.architecture = architecture = trained_by(config)
        self.net = net = build_network(config, dataset, encoder).to(device)
        self.encoder = encoder.for_pixels(*net.spec.pixel_range)
        net.precision = resolve_precision(config.run.precision, device)
        core: Any = architecture.core(net)
        core.checkpoint_activations = config.run.checkpoint_activations
        self.holding = Whole(architecture, net) if shard == 1 else Shared(architecture, net, shard)
        self.held = self.holding.held  # of the network, by this process
        self.masks = ImageMasks(net) if config.run.dropout_masks == BY_IMAGE else masks_of_round
        if config.run.compile:
            check_compiler(device)
            self.holding.compile()
        assert architecture.ema is not None and architecture.objective is not None
        assert architecture.optimizer is not None
        self.ema = self.holding.averages(architecture.ema(self.held, config))
        self.objective = architecture.objective(net, config)
        self.optimizer = architecture.optimizer(self.held, config)
        self.holding.attach(self.optimizer)
        self.stats = Collector(device)
        self.nimg, self.seconds = 0, 0.0
        self.sampler = RunSampler(
            len(dataset),
            config.run.seed,
            self.nimg,
            config.run.batch,
            self.share.part,
            self.share.batch_gpu,
            visits=dataset.captions is not None,
        )
        self.diagnosis = Diagnosis(config, net, device, self.share)
        self.incidents = Incidents(self)
        self.states = StateWriter(outdir, config.run.keep_checkpoints, config.run.milestones, journal.log)

    def restore(self) -> bool:
        """Continue from the newest training state; False if there is nothing left to do."""
        config, journal, outdir = self.config, self.journal, self.outdir
        with distributed.fail_together():
            restore, load = self.load_state_dict, self.holding.load
            found = checkpoint.restore_newest_state(outdir, STATE_PATTERN, restore, journal.log, load)
        newest = torch.tensor([self.nimg])
        distributed.broadcast_([newest])
        if distributed.any_rank(newest.item() != self.nimg):
            raise RunError(f"{outdir}: the processes read different training states: check the disk, and try again")
        if found:
            if self.nimg >= config.run.duration and not distributed.from_first(is_owed(outdir, config.run, self.nimg)):
                journal.log(f"Nothing to do: {outdir} has its {self.nimg} images. A longer --duration continues it.")
                return False
            journal.log(f"Resuming at {self.nimg} images from {outdir}")
        else:
            if list(outdir.glob("network-snapshot-*")):
                journal.log(f"There are snapshots but no training state in {outdir}: starting again from 0 images")
            if config.run.init_from:
                self.take_initial_weights(config.run.init_from)
        distributed.broadcast_([*self.holding.everywhere(), *self.net.buffers()])
        if distributed.get_rank() == 0:
            for line in opening_lines(config, self.dataset, self.encoder, self.net, self.share, self.nimg, outdir):
                journal.log(line)
        return True

    def take_initial_weights(self, path: str) -> None:
        """Start with those of a snapshot; the averages, too."""
        with distributed.fail_together():
            for line in self.holding.take_(
                lambda net: take_weights_(net, path, self.encoder),
                lambda: build_network(self.config, self.dataset, self.encoder),
            ):
                self.journal.log(line)
        assert self.architecture.ema is not None
        self.ema = self.holding.averages(self.architecture.ema(self.held, self.config))

    def train(self, suspend: distributed.SuspendSignals) -> None:
        """Train until the end, or until a signal asks to stop; reports, saves and measures at their intervals."""
        config, journal = self.config, self.journal
        run = config.run
        of_run = (config, self.dataset, self.encoder, self.net, self.device)
        observers = Observers(*of_run, journal, self.nimg, lambda: suspend.received)
        save_snapshots = SnapshotWriter(config, self.dataset, self.encoder, self.outdir)
        journal.start(self.nimg, run.duration)
        start_nimg, start = self.nimg, time.time()
        watched = (self.optimizer, self.objective, self.stats)
        self.status = status = StatusReports(config, journal, self.device, *watched, self.nimg, self.seconds)
        with distributed.fail_together():
            self.diagnosis.prepare(self.dataset, self.encoder)
        self.net.train()
        batches = self.load_batches()  # last, since loader processes do not like it when the start fails

        def due(interval: int) -> bool:
            since_start = self.nimg > start_nimg
            return since_start and (self.nimg >= run.duration or (interval > 0 and self.nimg % interval == 0))

        while True:
            done = self.nimg >= run.duration
            if due(run.status):
                self.incidents.check()
                status.report(self.nimg, observers.seconds_of_previews_left(self.nimg))
                self.incidents.reported = False
            if run.diagnose and due(run.diagnose):
                self.report_diagnosis()
            if due(run.snapshot):
                self.incidents.check()
                save_snapshots(self.net, self.ema, self.nimg, status.object_to)
                if observers.validation is not None:
                    status.pause(observers.measure(observers.validation, self.ema, self.nimg))
            saved = due(run.checkpoint) or (self.nimg > start_nimg and self.is_state_old())
            if saved:
                self.save_state()
            # What takes long comes after the state, and is left where a signal asks to stop.
            status.pause(observers.look(self.ema, self.nimg, due))
            limit = self.limit_reached(self.nimg - start_nimg, time.time() - start)
            suspended = distributed.any_rank(suspend.received or bool(limit))
            if suspended and not saved and self.nimg > start_nimg:
                self.save_state()
            if done or suspended:
                break
            self.states.raise_failure()
            self.step(batches)
        self.states.wait()
        if not done:
            journal.log(f"Suspended at {self.nimg} images{limit and f' by {limit}'}; repeat the command to continue")
            return
        journal.log(f"Done: {self.nimg} images in {self.outdir}. A longer --duration continues it.")
        if self.architecture.makes_images:
            for line in next_steps(self.outdir, self.dataset, self.architecture.presets.get(config.preset)):
                journal.log(line)

    def limit_reached(self, nimg: int, seconds: float) -> str:
        """The option that ends this start after so many images and seconds of it; '' = none does."""
        run = self.config.run
        if run.slice and nimg >= run.slice:
            return f"--slice={run.slice}"
        return f"--max-time={run.max_time:g}" if run.max_time and seconds >= 3600 * run.max_time else ""

    def is_state_old(self) -> bool:
        """Whether --checkpoint-minutes have passed since the last training state, or the start."""
        minutes = self.config.run.checkpoint_minutes
        if minutes == 0:
            return False
        return distributed.any_rank(distributed.get_rank() == 0 and self.states.age() >= 60 * minutes)  # it writes them

    def load_batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Images and labels of each round from here on."""
        self.sampler.start = self.nimg
        workers = self.config.data.workers or 0
        loader = torch.utils.data.DataLoader(
            self.dataset,
            batch_sampler=self.sampler,
            num_workers=workers,
            collate_fn=collate,
            worker_init_fn=begin_loader_process,
            pin_memory=self.device.type == "cuda",
            multiprocessing_context="spawn" if workers > 0 else None,
        )
        return start_loading(loader)

    def step(self, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """One optimiser step on `batch` images."""
        run, optimizer = self.config.run, self.optimizer
        optimizer.zero_gradients()
        self.backward(self.nimg, batches, self.see_losses)
        for name, value in self.objective.report().items():
            self.stats.report(name, torch.as_tensor(value, device=self.device))
        optimizer.step(self.nimg, self.look_at_gradients)
        self.nimg += run.batch
        self.ema.update(self.nimg, run.batch)
        self.journal.advance(run.batch)

    def backward(
        self,
        nimg: int,
        batches: Iterator[tuple[torch.Tensor, torch.Tensor]],
        see: Callable[[torch.Tensor], None] = lambda _loss: None,
    ) -> None:
        """Add this process's gradients of the step that begins at `nimg` images; `see` is shown the losses."""
        scaling = self.optimizer.loss_scaling
        with self.holding.step():
            for first in self.share.starts(nimg):
                loss = self.loss_of_round(first, *next(batches))
                see(loss)
                (loss.sum() * (scaling / self.config.run.batch)).backward()
            regularizer = self.objective.regularizer(self.net, nimg)
            if regularizer is not None:  # gradients are summed over processes
                (regularizer * (scaling / distributed.get_world_size())).backward()

    def see_losses(self, loss: torch.Tensor) -> None:
        """Take in the losses [N, ...] of a round."""
        loss = loss.mean(dim=list(range(1, loss.ndim))) if loss.ndim > 1 else loss
        self.stats.report("loss", loss)
        self.diagnosis.see_losses(loss, self.objective.of_each_image())

    def look_at_gradients(self, nonfinite: torch.Tensor) -> None:
        """Take in the gradients of all processes, before they change the weights."""
        if self.diagnosis.due(self.nimg + self.config.run.batch):
            self.diagnosis.see_gradients()
        self.incidents.look(self.nimg, nonfinite)

    def loss_of_round(self, first: int, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Loss [N, ...] of images whose indices in the run begin with `first`."""
        config, device = self.config, self.device
        seeds = image_seeds(config.run.seed, np.arange(first, first + len(images)))
        rnd = StackedRandomGenerator(device, seeds.tolist())
        self.masks(seeds, device)
        images = self.encoder.encode_latents(images.to(device, non_blocking=True), rnd.randn_like)
        cond = labels.to(device, non_blocking=True)
        return self.objective(self.net, images, cond, rnd=rnd, nimg=self.nimg)

    def report_diagnosis(self) -> None:
        """Record what goes on inside; to be called by all processes."""
        begin = time.time()
        record = self.diagnosis.record(self.nimg)
        if distributed.get_rank() == 0:
            self.journal.record(record)
            self.journal.log(diagnosis_line(record))
        self.status.pause(time.time() - begin)

    def save_state(self) -> None:
        """Write all that a resumed run needs; to be called by all processes.

        Raises:
            RunError: they do not hold the same weights.
        """
        self.incidents.check()
        self.holding.check_same(f"weights at {self.nimg} images")
        self.holding.save(self.states, self.nimg, self.state_dict())
        distributed.wait_for_first()

    def state_dict(self) -> dict[str, Any]:
        objective, diagnosis = self.objective.state_dict(), self.diagnosis.state_dict()
        return {
            "net": self.held.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
            "stats": self.stats.state_dict(),  # of all processes
            "nonfinite": int(self.optimizer.nonfinite),
            **({"objective": objective} if objective else {}),
            **({"diagnosis": diagnosis} if diagnosis else {}),
            "nimg": self.nimg,
            "seconds": self.status.seconds(),
            "code_version": code_version(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.held.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.load_state_dict(state["ema"])
        self.stats.load_state_dict(state["stats"])
        self.optimizer.nonfinite.fill_(state["nonfinite"])
        self.objective.load_state_dict(state.get("objective", {}))
        self.diagnosis.load_state_dict(state.get("diagnosis", {}))
        self.nimg, self.seconds = state["nimg"], state["seconds"]
