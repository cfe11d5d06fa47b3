"""The training loop. It knows no family: what it trains comes from the registry."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from dnnlib.errors import RunError
from dnnlib.util import code_version
from torch_utils import checkpoint, distributed
from torch_utils.device import check_compiler, resolve_precision, select_device, set_up_device
from torch_utils.gradients import use_channels_last
from torch_utils.training_stats import Collector
from training.config.training import OPTIONS_NAME, TrainConfig
from training.dataset.images import ImageFolderDataset
from training.dataset.listing import many
from training.dataset.order import RunSampler, begin_loader_process, collate, start_loading
from training.encoders import Encoder, data_spec, encoder_for
from training.families import trained_by
from training.flops import count_parameters
from training.monitoring.health import Divergence, weight_beyond_float16
from training.monitoring.journal import Journal, status_line
from training.monitoring.outdir import STATE_PATTERN, check_outdir, next_steps, snapshot_name
from training.monitoring.previews import Previews
from training.monitoring.snapshot_metrics import SnapshotEvaluation
from training.monitoring.states import StateWriter, disk_needs
from training.monitoring.tracker import Tracker
from training.monitoring.validation import Validation
from training.rounds import Share, image_seeds
from training.samplers.noise import StackedRandomGenerator
from training.snapshot import save_network
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
    image in the run), so a resumed run continues as if it had never stopped, on any number of processes.
    Dropout masks depend on the index of the first image of their round: to continue exactly with dropout on
    another number of processes, keep `batch_gpu`.

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
        self.share = Share.of(config)
        encoder = encoder_for(dataset, config.data.encoder, config.data.trust_encoder, journal.log)
        self.architecture = architecture = trained_by(config)
        self.net = net = build_network(config, dataset, encoder).to(device)
        self.encoder = encoder.for_pixels(*net.spec.pixel_range)
        net.precision = resolve_precision(config.run.precision, device)
        if device.type != "mps":
            use_channels_last(net)
        assert architecture.ema is not None and architecture.objective is not None
        assert architecture.optimizer is not None
        self.ema = architecture.ema(net, config)
        core: Any = architecture.core(net)
        core.checkpoint_activations = config.run.checkpoint_activations
        if config.run.compile:
            check_compiler(device)
            core.compile(dynamic=False)
        self.objective = architecture.objective(net, config)
        self.optimizer = architecture.optimizer(net, config)
        self.stats = Collector(device)
        self.states = StateWriter(outdir, config.run.keep_checkpoints, config.run.milestones, journal.log)
        self.nimg, self.seconds = 0, 0.0
        self.preview_seconds = 0.0  # that the last preview took

    def restore(self) -> bool:
        """Continue from the newest training state; False if there is nothing left to do."""
        config, journal, outdir = self.config, self.journal, self.outdir
        with distributed.fail_together():
            found = checkpoint.restore_newest_state(outdir, STATE_PATTERN, self.load_state_dict, journal.log)
        newest = torch.tensor([self.nimg])
        distributed.broadcast_([newest])
        if distributed.any_rank(newest.item() != self.nimg):
            raise RunError(f"{outdir}: the processes read different training states: check the disk, and try again")
        if found:
            if self.nimg >= config.run.duration:
                journal.log(f"Nothing to do: {outdir} has its {self.nimg} images. A longer --duration continues it.")
                return False
            journal.log(f"Resuming at {self.nimg} images from {outdir}")
        else:
            if list(outdir.glob("network-snapshot-*")):
                journal.log(f"There are snapshots but no training state in {outdir}: starting again from 0 images")
            if config.run.init_from:
                self.take_initial_weights(config.run.init_from)
        distributed.broadcast_([*self.net.parameters(), *self.net.buffers()])
        dataset, share, world_size = self.dataset, self.share, distributed.get_world_size()
        for line in dataset.summary():
            journal.log(line)
        if self.encoder.vae_name:
            journal.log(f"Encoder: {self.encoder.describe()}")
        assert config.dataset is not None
        journal.log(
            f"Training on {dataset.size_text()}, {many(config.dataset.label_dim, 'class')}: "
            f"{count_parameters(self.net)} parameters, "
            f"{self.net.precision}, {world_size} x {self.device.type}, "
            f"{many(share.rounds, 'round')} of {many(share.batch_gpu, 'image')} per step"
        )
        if distributed.get_rank() == 0:
            journal.log(f"Disk: {disk_needs(config, count_parameters(self.net), self.nimg, outdir)}")
        return True

    def take_initial_weights(self, path: str) -> None:
        """Start with those of a snapshot; the averages, too."""
        with distributed.fail_together():
            for line in take_weights_(self.net, path, self.encoder):
                self.journal.log(line)
        assert self.architecture.ema is not None
        self.ema = self.architecture.ema(self.net, self.config)

    def train(self, suspend: distributed.SuspendSignals) -> None:
        """Train until the end, or until a signal asks to stop; reports, saves and measures at their intervals."""
        config, journal = self.config, self.journal
        run = config.run
        evaluation = None
        if run.metrics:
            evaluation = SnapshotEvaluation(
                run.metrics, run.metrics_ref, run.metrics_num, self.net, self.encoder, self.device, config.sampler()
            )
        validation = None
        with distributed.fail_together():
            if run.val_data:
                validation = Validation(config, self.encoder, self.net, self.device)
                journal.log(validation.describe())
            if run.tracker != "none" and distributed.get_rank() == 0:
                journal.report_to(Tracker(run.tracker, self.outdir, config.to_json(), journal.log))
        previews = None
        with distributed.fail_together():
            if distributed.get_rank() == 0 and self.preview_interval != 0:
                shown = (config.sampler(run.preview_steps), run.preview_images)
                previews = Previews(self.dataset, self.encoder, self.device, self.outdir, journal.log, *shown)
                journal.show(self.outdir / "reals.png", self.nimg)
        journal.start(self.nimg, run.duration)
        start_nimg, start = self.nimg, time.time()
        self.start_time = start - self.seconds
        self.tick = Tick(self.nimg, time.time(), int(self.optimizer.nonfinite))
        self.diverged = Divergence(self.outdir)
        self.net.train()
        batches = self.load_batches()  # last, since loader processes do not like it when the start fails

        def due(interval: int) -> bool:
            since_start = self.nimg > start_nimg
            return since_start and (self.nimg >= run.duration or (interval > 0 and self.nimg % interval == 0))

        while True:
            done = self.nimg >= run.duration
            if due(run.status):
                self.report_status()
            if due(run.snapshot):
                self.save_snapshots()
                if validation is not None:
                    self.measure_snapshots(validation)
            saved = due(run.checkpoint) or (self.nimg > start_nimg and self.is_state_old())
            if saved:
                self.save_state()
            # What takes long comes after the state, and is left where a signal asks to stop.
            if self.preview_interval != 0 and due(self.preview_interval):
                self.draw_preview(previews, suspend)
            if evaluation is not None and due(run.snapshot) and not distributed.any_rank(suspend.received):
                self.measure_snapshots(evaluation)
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

    @property
    def preview_interval(self) -> int:
        """Images between previews; 0 = none."""
        run = self.config.run
        return run.snapshot if run.preview is None else run.preview

    def load_batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Images and labels of each round from here on."""
        config, share = self.config, self.share
        sampler = RunSampler(
            len(self.dataset),
            config.run.seed,
            self.nimg,
            config.run.batch,
            share.part,
            share.batch_gpu,
            visits=self.dataset.captions is not None,
        )
        workers = config.data.workers or 0
        loader = torch.utils.data.DataLoader(
            self.dataset,
            batch_sampler=sampler,
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
        with self.architecture.step(self.net):
            for first in self.share.starts(self.nimg):
                loss = self.loss_of_round(first, *next(batches))
                self.stats.report("loss", loss.mean(dim=list(range(1, loss.ndim))) if loss.ndim > 1 else loss)
                (loss.sum() * (optimizer.loss_scaling / run.batch)).backward()
            regularizer = self.objective.regularizer(self.net, self.nimg)
            if regularizer is not None:  # gradients are summed over processes
                (regularizer * (optimizer.loss_scaling / distributed.get_world_size())).backward()
        for name, value in self.objective.report().items():
            self.stats.report(name, torch.as_tensor(value, device=self.device))
        optimizer.step(self.nimg)
        self.nimg += run.batch
        self.ema.update(self.nimg, run.batch)
        self.journal.advance(run.batch)

    def loss_of_round(self, first: int, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Loss [N, ...] of images whose indices in the run begin with `first`."""
        config, device = self.config, self.device
        seeds = image_seeds(config.run.seed, np.arange(first, first + self.share.batch_gpu))
        rnd = StackedRandomGenerator(device, seeds.tolist())
        torch.manual_seed(int(seeds[0]))  # of dropout masks
        images = self.encoder.encode_latents(images.to(device, non_blocking=True), rnd.randn_like)
        cond = labels.to(device, non_blocking=True)
        return self.objective(self.net, images, cond, rnd=rnd, nimg=self.nimg)

    def report_status(self) -> None:
        """Report what happened since the last report."""
        now = time.time()
        tick, nonfinite = self.tick, int(self.optimizer.nonfinite)
        on_gpu = self.device.type == "cuda"
        fields = {
            "nimg": self.nimg,
            **self.stats.collect(),
            "lr": self.optimizer.learning_rate(self.nimg),
            "nonfinite_gradients": nonfinite - tick.nonfinite,
            "images_per_second": (self.nimg - tick.nimg) / (now - tick.time),
            "seconds": now - self.start_time,
            "cpu_mem_gb": psutil.Process().memory_info().rss / 2**30,
            "gpu_mem_gb": torch.cuda.max_memory_allocated(self.device) / 2**30 if on_gpu else 0.0,
            "time": now,
        }
        self.journal.report(fields)
        self.journal.log(status_line(fields, self.config.run.duration, self.seconds_of_previews_left()))
        if details := ", ".join(f"{name} {fields[name]:.4g}" for name in self.objective.report()):
            self.journal.log(f"  {details}")
        if fields["nonfinite_gradients"] > 0:
            self.journal.log(f"Warning: {self.optimizer.describe_nonfinite(fields['nonfinite_gradients'])}")
        if math.isnan(fields["loss"]):
            raise RunError(
                f"the loss is not finite at {self.nimg} images: start in a new --outdir with a lower --lr or --ls; "
                f"or repeat the command with --precision=bf16 or fp32 to continue from the last training state"
            )
        self.object_to(self.diverged(fields["loss"]))
        self.tick = Tick(self.nimg, now, nonfinite)

    def object_to(self, problem: str | None) -> None:
        """Say that the run has gone wrong; with --on-divergence=stop, before anything more is saved of it.

        Raises:
            RunError: it has, and is to stop.
        """
        if problem is None:
            return
        text = f"training has diverged at {self.nimg} images: {problem}"
        if self.config.run.on_divergence == "stop":
            raise RunError(
                f"{text}. The training state before that is kept; start in a new --outdir with a lower --lr, "
                f"or continue regardless with --on-divergence=warn"
            )
        self.journal.log(f"Warning: {text}")

    def save_snapshots(self) -> None:
        """Write the averaged networks; on the first process."""
        average_batch_statistics_(self.net)
        averaged = list(zip(self.ema.stds, self.ema.get(), strict=True))
        with distributed.fail_together():
            for _, (ema_net, _) in averaged:
                name = weight_beyond_float16(ema_net)
                self.object_to(None if name is None else f"{name} holds values that float16 cannot")
        if distributed.get_rank() != 0:
            return
        config = self.config
        assert config.dataset is not None
        for std, (ema_net, suffix) in averaged:
            metadata = {
                "nimg": self.nimg,
                "ema_std": std,
                "config": config.to_json(),
                "dataset": config.dataset.to_json(),
                "class_names": self.dataset.class_names,
                "text_encoder": None if self.dataset.captions is None else self.dataset.captions.encoder,
            }
            path = self.outdir / snapshot_name(self.nimg, suffix)
            dtype = torch.float16 if weight_beyond_float16(ema_net) is None else torch.float32
            save_network(path, ema_net, self.encoder, metadata, dtype)

    def draw_preview(self, previews: Previews | None, suspend: distributed.SuspendSignals) -> None:
        """Draw what the last averaged network makes; on the first process."""
        if previews is not None:
            ema_net, _ = self.ema.get()[-1]
            begin = time.time()
            path = self.outdir / f"fakes-{self.nimg // 1000:07d}.png"
            previews.draw(ema_net, path, lambda: suspend.received)
            self.journal.show(path, self.nimg)
            self.preview_seconds = time.time() - begin
            self.tick.time += self.preview_seconds

    def seconds_of_previews_left(self) -> float:
        """How long the previews still to come will take, going by the last one."""
        interval, left = self.preview_interval, self.config.run.duration - self.nimg
        return -(-left // interval) * self.preview_seconds if interval > 0 else 0.0

    def measure_snapshots(self, evaluation: SnapshotEvaluation | Validation) -> None:
        """Measure the snapshots that were just saved; to be called by all processes."""
        begin = time.time()
        for ema_net, suffix in self.ema.get():
            results = evaluation(ema_net, self.outdir / snapshot_name(self.nimg, suffix), self.nimg)
            self.journal.report_metrics(self.nimg, f"EMA{suffix}", results)
        self.tick.time += time.time() - begin

    def save_state(self) -> None:
        """Write all that a resumed run needs; to be called by all processes."""
        state = self.state_dict()
        if distributed.get_rank() == 0:
            self.states.save(self.nimg, state)

    def state_dict(self) -> dict[str, Any]:
        objective = self.objective.state_dict()
        return {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
            "stats": self.stats.state_dict(),  # of all processes
            "nonfinite": int(self.optimizer.nonfinite),
            **({"objective": objective} if objective else {}),
            "nimg": self.nimg,
            "seconds": time.time() - self.start_time,
            "code_version": code_version(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.load_state_dict(state["ema"])
        self.stats.load_state_dict(state["stats"])
        self.optimizer.nonfinite.fill_(state["nonfinite"])
        self.objective.load_state_dict(state.get("objective", {}))
        self.nimg, self.seconds = state["nimg"], state["seconds"]


@dataclass
class Tick:
    """When the last status was reported, and what it reported."""

    nimg: int
    time: float
    nonfinite: int


def average_batch_statistics_(net: torch.nn.Module) -> None:
    """Give all processes the mean of the running statistics that their batch norms have gathered."""
    for module in net.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            for buffer in (module.running_mean, module.running_var):
                if buffer is not None:
                    distributed.all_reduce_sum_(buffer).div_(distributed.get_world_size())
