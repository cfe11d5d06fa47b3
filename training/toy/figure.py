"""Pictures of the toy example: the paper's figure, and the view of a training run.

Needs matplotlib, which is optional and imported only when a picture is drawn.
"""

import functools
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import torch

from dnnlib.errors import UserError, one_line
from dnnlib.files import atomic_write
from training.networks.toy import ToyModel
from training.toy.data import gt
from training.toy.evaluation import Quality, measure, support_level
from training.toy.models import Models
from training.toy.sampling import sample_toy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

FORMATS = (".png", ".pdf", ".svg")
VIEW = (-1.65, 1.65)  # limits of x and of y in the upper panels
Box = tuple[tuple[float, float], tuple[float, float]]  # limits of x and of y
CLOSEUP: dict[str, Box] = {  # of the lower panels: forks of the class's tree
    "A": ((0.3, 1.1), (0.55, 1.35)),
    "B": ((-0.2, 0.6), (-1.4, -0.6)),
    "AB": ((0.3, 1.1), (0.55, 1.35)),
}
SIGMA_MID = 0.03  # noise level of the densities in the lower panels
GRID = 320  # points along each side of a density
SAMPLES = 8192  # measured for each upper panel
SHOWN = 2048  # how many of them are drawn
TRAJECTORIES, PATH_SIGMA = 40, 0.1  # how many are drawn, and their noise level at the start
RATIO_NATS = 5  # range of the colours of the ratio, below its maximum
ARROWS = 18  # along each side of the ratio
BOTH_COLOR, CLASS_COLOR, POINT_COLOR, GUIDED_COLOR = "#d9d9d9", "#fdc98b", "#1a1a1a", "#0060c0"
FRAME_SECONDS = 0.1


def require_matplotlib() -> None:
    """Refuse to draw pictures without matplotlib.

    Raises:
        UserError: it is not installed, or does not start with the user's settings.
    """
    try:
        import matplotlib.pyplot  # noqa: F401
    except ImportError:
        raise UserError("pictures need matplotlib: pip install matplotlib") from None
    except ValueError as err:  # $MPLBACKEND is unknown; the message continues with all known ones
        reason = one_line(err).partition("; supported values")[0]
        raise UserError(f"matplotlib does not start: {reason} (unset MPLBACKEND)") from None


def check_format(path: Path) -> None:
    """Refuse a name under which a picture cannot be saved.

    Raises:
        UserError: another suffix.
    """
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"--save={path}: pictures are saved as {', '.join(FORMATS)}")


def new_figure(window: bool, **kwargs: Any) -> "tuple[Figure, bool]":
    """A figure, and whether it has a window.

    Args:
        window: use a window if there is a display.
        kwargs: arguments of matplotlib's figure.

    Raises:
        UserError: a window is wanted, but matplotlib's backend for windows is not installed.
    """
    if window:
        from matplotlib import pyplot

        try:
            figure = pyplot.figure(**kwargs)
        except (ImportError, RuntimeError) as err:
            reason = one_line(err)
            raise UserError(f"matplotlib cannot show figures: {reason} (unset MPLBACKEND, or set it to agg)") from None
        if getattr(figure.canvas, "required_interactive_framework", None) is not None:
            return figure, True
        pyplot.close(figure)
    from matplotlib.figure import Figure

    return Figure(**kwargs), False


def save_figure(figure: "Figure", path: Path, made_by: str) -> None:
    """Write a figure with a note of what made it; the format is that of the suffix.

    Raises:
        OSError: the file could not be written.
    """
    key = {".png": "Description", ".pdf": "Subject", ".svg": "Description"}[path.suffix.lower()]
    with atomic_write(path, sync=False) as f:
        figure.savefig(f, format=path.suffix[1:].lower(), metadata={key: made_by})


# ---------------------------------------------------------------------------------------------------------
# The paper's figure


def draw_paper_figure(figure: "Figure", models: Models, guidance: float, cfg_guidance: float, seed: int) -> None:
    """Draw samples in the upper row, and what guides them in the lower row (Figures 1 and 2 of the paper).

    Args:
        models: without `gnet`, everything that needs a guide is left out, which gives 2 x 2 instead of 2 x 4 panels.
        guidance, cfg_guidance: weights of autoguidance and of classifier-free guidance.
        seed: of the samples.
    """
    cls, net, gnet = models.cls, models.net, models.gnet
    device = next(net.parameters()).device
    distribution, box = gt(cls, device), CLOSEUP[cls]
    noise = torch.randn(SAMPLES, 2, generator=torch.Generator(device).manual_seed(seed), device=device)
    generator = torch.Generator(device).manual_seed(seed)
    samples = {
        "Ground truth": distribution.sample(SAMPLES, generator=generator),
        "No guidance": sample_toy(net, noise),
    }
    lower: list[Callable[[Axes], None]] = [
        lambda axes: _draw_density(axes, box, net, "Density of the model, $p_1$", "Oranges")
    ]
    if gnet is not None:
        cfg_samples = sample_toy(net, noise, models.cfg_net, cfg_guidance)
        samples[f"Classifier-free guidance, $w = {cfg_guidance:g}$"] = cfg_samples
        samples[f"Autoguidance, $w = {guidance:g}$"] = sample_toy(net, noise, gnet, guidance)
        lower.append(lambda axes: _draw_density(axes, box, gnet, "Density of its guide, $p_0$", "Greens"))
        lower.append(lambda axes: _draw_ratio(axes, box, net, gnet))
    lower.append(lambda axes: _draw_trajectories(axes, cls, box, net, gnet, guidance, generator))

    panels = figure.subplots(2, len(samples))
    for letter, axes, (title, x) in zip("abcd", panels[0], samples.items(), strict=False):
        _draw_samples(axes, cls, x)
        axes.set_title(f"({letter}) {title}\n{_numbers(measure(distribution, x))}", fontsize=13)
        (x0, x1), (y0, y1) = box
        axes.plot([x0, x1, x1, x0, x0], [y0, y0, y1, y1, y0], color="black", linewidth=1)
    for letter, axes, draw in zip("cd" if gnet is None else "efgh", panels[1], lower, strict=True):
        draw(axes)
        axes.set_title(f"({letter}) {axes.get_title()}", fontsize=13)


def _numbers(quality: Quality) -> str:
    return f"outliers {quality.outliers.value:.1%}, branch KL {quality.branch_kl.value:.2f}"


def _grid(xlim: tuple[float, float], ylim: tuple[float, float], points: int, device: torch.device) -> torch.Tensor:
    """Points [points, points, 2] of a grid, rows along y."""
    x, y = (torch.linspace(*limits, points, device=device) for limits in (xlim, ylim))
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)


def _frame(axes: "Axes", xlim: tuple[float, float], ylim: tuple[float, float]) -> None:
    axes.set(xlim=xlim, ylim=ylim, aspect="equal", xticks=[], yticks=[])


def _fill_support(axes: "Axes", cls: str, xlim: tuple[float, float], ylim: tuple[float, float], color: str) -> None:
    x, y, logp = _log_density(cls, xlim, ylim)
    axes.contourf(x, y, logp, levels=[support_level(gt(cls)), math.inf], colors=[color])


@functools.cache
def _log_density(cls: str, xlim: tuple[float, float], ylim: tuple[float, float]) -> tuple[np.ndarray, ...]:
    """Coordinates [GRID] along both axes, and log-density [GRID, GRID]; cached, as several panels show it."""
    grid = _grid(xlim, ylim, GRID, torch.device("cpu"))
    logp = gt(cls).logp(grid)
    logp = logp.clamp(min=support_level(gt(cls)) - 10)  # far lower values would make the contours ragged
    return grid[0, :, 0].numpy(), grid[:, 0, 1].numpy(), logp.numpy()


def _draw_samples(axes: "Axes", cls: str, x: torch.Tensor) -> None:
    _fill_support(axes, "AB", VIEW, VIEW, BOTH_COLOR)
    _fill_support(axes, cls, VIEW, VIEW, CLASS_COLOR)
    points = x[:SHOWN].cpu().numpy()
    axes.scatter(points[:, 0], points[:, 1], s=2, color=POINT_COLOR, linewidths=0)
    _frame(axes, VIEW, VIEW)


def _draw_density(axes: "Axes", box: Box, model: ToyModel, title: str, colors: str) -> None:
    """Draw a model's density at `SIGMA_MID`, which it gives up to a factor."""
    grid = _grid(*box, GRID, next(model.parameters()).device)
    logp = model.logp(grid, SIGMA_MID)
    density = (logp - logp.max()).exp().detach().cpu().numpy()
    extent = (*box[0], *box[1])
    image = axes.imshow(density, origin="lower", extent=extent, cmap=colors, interpolation="bilinear")
    _color_bar(axes, image, "density, share of the maximum", [0, 0.5, 1])
    axes.set_title(title)
    _frame(axes, *box)


def _color_bar(axes: "Axes", image: "AxesImage", label: str, ticks: list[float]) -> None:
    """A bar in the upper left corner that says what the colours are."""
    corner = axes.inset_axes((0.02, 0.87, 0.46, 0.11), xticks=[], yticks=[])
    corner.patch.set_alpha(0.9)
    bar = axes.figure.colorbar(image, cax=corner.inset_axes((0.08, 0.68, 0.84, 0.22)), orientation="horizontal")
    bar.set_ticks(ticks)
    bar.ax.tick_params(labelsize=8, length=2, pad=1)
    bar.set_label(label, fontsize=8, labelpad=0)


def _draw_ratio(axes: "Axes", box: Box, net: ToyModel, gnet: ToyModel) -> None:
    """Draw log p_1 / p_0 at `SIGMA_MID`, with arrows along its gradient."""
    device = next(net.parameters()).device
    grid = _grid(*box, GRID, device)
    ratio = (net.logp(grid, SIGMA_MID) - gnet.logp(grid, SIGMA_MID)).detach().cpu().numpy()
    extent = (*box[0], *box[1])
    ratio -= ratio.max()  # known up to a constant
    image = axes.imshow(
        ratio, origin="lower", extent=extent, cmap="Purples", vmin=-RATIO_NATS, vmax=0, interpolation="bilinear"
    )
    coarse = _grid(*box, ARROWS, device)
    gradient = net.score(coarse, SIGMA_MID) - gnet.score(coarse, SIGMA_MID)
    length = gradient.norm(dim=-1, keepdim=True)
    arrows = (gradient / length * length.clamp(max=length.quantile(0.8).item())).cpu().numpy()
    places = coarse.cpu().numpy()
    _color_bar(axes, image, "nats, from the maximum", [-RATIO_NATS, 0])
    axes.quiver(places[..., 0], places[..., 1], arrows[..., 0], arrows[..., 1], color=POINT_COLOR, width=0.004)
    axes.set_title(r"Their ratio, $\log\, p_1 / p_0$")
    _frame(axes, *box)


def _draw_trajectories(
    axes: "Axes",
    cls: str,
    box: Box,
    net: ToyModel,
    gnet: ToyModel | None,
    guidance: float,
    generator: torch.Generator,
) -> None:
    """Draw paths without and with guidance, from the same points of p(x; `PATH_SIGMA`)."""
    x = gt(cls, generator.device).sample(SAMPLES, PATH_SIGMA, generator)
    (x0, x1), (y0, y1) = box
    inside = (x[:, 0] > x0) & (x[:, 0] < x1) & (x[:, 1] > y0) & (x[:, 1] < y1)
    noise = x[inside][:TRAJECTORIES] / PATH_SIGMA
    _fill_support(axes, cls, *box, CLASS_COLOR)
    variants = [("without guidance", "gray", None), ("with autoguidance", GUIDED_COLOR, gnet)]
    for label, color, guide in variants if gnet is not None else variants[:1]:
        path: list[torch.Tensor] = []
        sample_toy(net, noise, guide, guidance, sigma_max=PATH_SIGMA, on_step=path.append)
        x, y = torch.stack(path).cpu().numpy().transpose(2, 0, 1)
        axes.plot(x, y, color=color, linewidth=0.8)
        axes.plot(x[-1], y[-1], ".", color=color, markersize=6, label=label)
    axes.legend(loc="upper right", fontsize=10, framealpha=0.9)
    axes.set_title("Sampling trajectories")
    _frame(axes, *box)


# ---------------------------------------------------------------------------------------------------------
# Training


def check_frames(path: Path) -> None:
    """Refuse to save frames where that cannot work.

    Raises:
        UserError: a suffix other than .gif, a folder of that name instead of a file or the reverse, or matplotlib does
            not work.
    """
    require_matplotlib()
    if path.suffix.lower() not in ("", ".gif"):
        raise UserError(f"--save={path}: frames are saved as a .gif file, or as PNG files in a folder")
    if path.is_dir() if path.suffix else path.is_file():
        raise UserError(
            f"--save={path}: there is already a {'folder' if path.suffix else 'file'} of that name: choose another"
        )


class TrainingView:
    """Samples of a model in training: in a window if there is a display, and as frames in files.

    Args:
        cls: class that is learned.
        device: of the model.
        save: a .gif file for an animation, or a folder for one PNG per frame; None = no frames.
        window: whether a window is wanted.

    Raises:
        UserError: a window is wanted, but matplotlib's backend for windows is not installed.
    """

    def __init__(self, cls: str, device: torch.device, save: Path | None, window: bool):
        self.figure, self.window = new_figure(window, figsize=(6, 6.4), layout="constrained")
        self.save = save
        self.frames: list[PIL.Image.Image] = []
        if not self.wanted:
            return
        self.noise = torch.randn(SHOWN, 2, generator=torch.Generator(device).manual_seed(0), device=device)
        self.axes = self.figure.subplots()
        _draw_samples(self.axes, cls, self.noise.new_zeros(0, 2))
        self.points = self.axes.scatter([], [], s=3, color=POINT_COLOR, linewidths=0)
        if self.window:
            self.figure.show()

    @property
    def wanted(self) -> bool:
        """Whether anything that is drawn is seen or saved."""
        return self._window_is_open() or self.save is not None

    def draw(self, iteration: int, loss: float, net: ToyModel) -> None:
        """Show the samples of the network after an iteration, and save the frame."""
        self.points.set_offsets(sample_toy(net, self.noise).cpu().numpy())
        self.axes.set_title(f"iteration {iteration}, loss {loss:.4f}", fontsize=13)
        if self._window_is_open():
            self.figure.canvas.draw_idle()
            self.figure.canvas.flush_events()
        if self.save is None:
            return
        frame = io.BytesIO()
        self.figure.savefig(frame, format="png")
        if self.save.suffix.lower() == ".gif":
            self.frames.append(PIL.Image.open(frame).convert("RGB").quantize(64))
        else:
            with atomic_write(self.save / f"iter{iteration:04d}.png", sync=False) as f:
                f.write(frame.getvalue())

    def finish(self) -> None:
        """Write the animation, and wait until the user closes the window."""
        if self.save is not None and self.frames:
            first, *rest = self.frames
            with atomic_write(self.save, sync=False) as f:
                first.save(
                    f, format="gif", save_all=True, append_images=rest, duration=int(FRAME_SECONDS * 1000), loop=0
                )
        if self._window_is_open():
            from matplotlib import pyplot

            pyplot.show()

    def _window_is_open(self) -> bool:
        if not self.window:
            return False
        from matplotlib import pyplot

        return pyplot.fignum_exists(self.figure.number)


def open_view(cls: str, device: torch.device, save: Path | None, window: bool) -> TrainingView | None:
    """The view of a training run; None if there is nothing to show it in, or to save.

    Args:
        cls, device, save: as for `TrainingView`.
        window: whether a window is wanted; if there cannot be one, a note is printed, as it is only an extra.
    """
    if window:
        try:
            require_matplotlib()
            return TrainingView(cls, device, save, window=True)
        except UserError as err:
            print(f"Note: no window: {err}")
    return TrainingView(cls, device, save, window=False) if save is not None else None
