"""How well stored averages can stand for others: expected and true errors of post-hoc EMA, and a picture of them."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from dnnlib.errors import UserError
from dnnlib.files import atomic_write
from dnnlib.util import code_version
from training.phema import posthoc_error, power_function_response
from training.snapshot.reconstruction import StoredAverage, coefficients
from training.snapshot.sums import weighted_sums

LARGE = 0.25  # error of a response that brings a note
LARGE_ROUNDING = 0.005  # likewise, that of rounding
# Root mean square of what rounding changes, relative to a number.
ROUNDING = {torch.float16: 2**-12, torch.bfloat16: 2**-9, torch.float32: 2**-25}
TIMES = 2000  # of a picture
PANELS = 12


def expected_errors(inputs: Sequence[StoredAverage], out_nimg: int, stds: Sequence[float]) -> np.ndarray:
    """`posthoc_error` of averages of some widths at a time, float64 [stds]; from names and headers of files alone."""
    times, widths = [avg.nimg for avg in inputs], [avg.std for avg in inputs]
    coefs = coefficients(inputs, out_nimg, stds)
    return posthoc_error(times, widths, out_nimg, stds, coefs)


def rounding_errors(inputs: Sequence[StoredAverage], out_nimg: int, stds: Sequence[float]) -> np.ndarray:
    """What the rounding of stored weights makes of the weights of results, relative to these: float64 [stds].

    Weights of n snapshots that were rounded by a share u add up to an error of u sqrt(sum_i x_i^2).
    """
    names = sorted(inputs[-1].parameters())[:1]
    shares = [ROUNDING.get(avg.file.dtype(name), 0.0) for avg in inputs for name in names]  # type: ignore[arg-type]
    return np.linalg.norm(np.array(shares)[:, None] * coefficients(inputs, out_nimg, stds), axis=0)


def describe_errors(inputs: Sequence[StoredAverage], out_nimg: int, stds: Sequence[float]) -> list[str]:
    """What to expect of the averages of some widths: a line, and one about those that will be far off.

    Networks change slowly, so the errors of their parameters are smaller by far: `true_errors` measures them.
    """
    errors = expected_errors(inputs, out_nimg, stds)
    listed = ", ".join(f"{std:.3f} {error:.1%}" for std, error in zip(stds, errors, strict=True))
    lines = [f"Expected errors, of the weights of training times in {len(inputs)} snapshots: {listed}"]
    rounding = rounding_errors(inputs, out_nimg, stds)
    coarse = [f"{std:.3f} {error:.1%}" for std, error in zip(stds, rounding, strict=True) if error > LARGE_ROUNDING]
    if coarse:
        lines.append(
            f"Note: large sums nearly cancel, so that the rounding of stored weights becomes an error of the result: "
            f"{', '.join(coarse)}"
        )
    bad = [std for std, error in zip(stds, errors, strict=True) if error > LARGE]
    if bad:
        lines.append(
            f"Note: the snapshots cannot represent {', '.join(f'{std:.3f}' for std in bad)} well: narrow profiles need "
            f"more snapshots towards the end, wide ones earlier snapshots, and both are helped by tracked widths "
            f"(--ema-std) near theirs"
        )
    return lines


def true_error(inputs: Sequence[StoredAverage], wanted: StoredAverage) -> tuple[float, float]:
    """The expected error of the average that some snapshots make in the place of a stored one, and the true one.

    That is the error of the parameters as one vector, over its length.
    """
    nimg, std = wanted.nimg, wanted.std
    expected = float(expected_errors(inputs, nimg, [std])[0])
    coefs = torch.from_numpy(coefficients(inputs, nimg, [std])).float()
    error, size = 0.0, 0.0
    names, files = sorted(wanted.parameters()), [avg.file for avg in inputs]
    with weighted_sums(files, files[-1], coefs, names, torch.float32) as get_pieces:
        position: dict[str, int] = {}
        for name, piece in get_pieces(names):
            start = position.get(name, 0)
            position[name] = start + piece.shape[1]
            values = wanted.file.get_tensor(name).flatten()[start : position[name]].double()
            error += (piece[0].double() - values).square().sum().item()
            size += values.square().sum().item()
    return expected, (error / size) ** 0.5


def true_errors(inputs: Sequence[StoredAverage], out_nimg: int) -> Iterator[tuple[float, float, float]]:
    """For each average that is stored for a time: its width, and the `true_error` of what the other snapshots make.

    Raises:
        UserError: there are no others.
    """
    for stored in [avg for avg in inputs if avg.nimg == out_nimg]:
        others = [avg for avg in inputs if avg is not stored]
        if not others:
            raise UserError(f"--verify needs another snapshot than {stored.path}")
        yield stored.std, *true_error(others, stored)


def draw_responses(path: Path, inputs: Sequence[StoredAverage], out_nimg: int, stds: Sequence[float]) -> None:
    """Draw which weight each training time has in averages of some widths, wanted and reconstructed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    chosen = [stds[i] for i in np.unique(np.linspace(0, len(stds) - 1, PANELS).round().astype(int))]
    times, widths = np.array([avg.nimg for avg in inputs]), [avg.std for avg in inputs]
    coefs = coefficients(inputs, out_nimg, chosen)
    errors = posthoc_error(times, widths, out_nimg, chosen, coefs)
    ends = times / out_nimg * (TIMES - 1)
    made = power_function_response(ends, widths, TIMES) @ coefs * TIMES
    wanted = power_function_response(np.full(len(chosen), TIMES - 1.0), chosen, TIMES) * TIMES
    t = np.linspace(0, 1, TIMES)
    columns = min(len(chosen), 4)
    rows = -(-len(chosen) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(4.5 * columns, 3.2 * rows), layout="constrained", squeeze=False)
    for index, place in enumerate(axes.flat):
        if index >= len(chosen):
            place.axis("off")
            continue
        place.plot(t, made[:, index], color="tab:orange", label="from the snapshots")
        place.plot(t, wanted[:, index], color="black", linestyle="--", linewidth=1, label="wanted")
        for end in np.unique(times) / out_nimg:
            place.axvline(end, color="tab:blue", alpha=0.15, linewidth=1)
        place.set_title(f"{chosen[index]:.3f}: {errors[index]:.1%}")
        place.set_xlabel("training time")
        place.set_ylim(min(0.0, 1.1 * made[:, index].min()), 1.15 * wanted[:, index].max())
    axes.flat[0].legend()
    fig.suptitle("Weight of each training time in an average (lines: snapshots)")
    with atomic_write(path) as f:
        description = f"reconstruct_phema.py --plot, OpenEDM2 {code_version()}"
        fig.savefig(f, format="png", dpi=80, metadata={"Description": description})
    plt.close(fig)
