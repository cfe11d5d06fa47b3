"""Linear operators A of inverse problems y = A x + sigma_y n, with their adjoints and exact regularised inverses.

Every one of them is cheap to diagonalise, so that (A A^T + ridge I)^-1, which the methods need, is exact: a mask and
the mean over cells have one singular value each, and a convolution on a torus is diagonal in Fourier's basis.
"""

import math
from typing import Protocol

import torch

from dnnlib.errors import UserError

SINGULAR = 1e-6  # singular values below this share of the largest count as zero where there is no ridge


class Operator(Protocol):
    """A linear operator on images."""

    def __call__(self, x: torch.Tensor, /) -> torch.Tensor:
        """A x of images [N, C, H, W]."""
        ...

    def adjoint(self, y: torch.Tensor, /) -> torch.Tensor:
        """A^T y, [N, C, H, W]."""
        ...

    def solve(self, y: torch.Tensor, ridge: torch.Tensor | float) -> torch.Tensor:
        """(A A^T + ridge I)^-1 y for y in the range of A; the pseudoinverse of A A^T where the ridge is 0.

        Args:
            y: shaped like A x.
            ridge: not negative; a number, or one per image, [N, 1, 1, 1].
        """
        ...

    def observed(self, y: torch.Tensor) -> torch.Tensor:
        """1 where a tensor shaped like A x is a measurement, and 0 where it only fills the shape."""
        ...

    def picture(self, y: torch.Tensor, blank: float) -> torch.Tensor:
        """What is known, as an image [N, C, H, W]; `blank` is the value of what is not."""
        ...


def pseudoinverse(operator: Operator, y: torch.Tensor) -> torch.Tensor:
    """The image of least norm among those whose A x is nearest to y: A^T (A A^T)^+ y, [N, C, H, W]."""
    return operator.adjoint(operator.solve(y, 0.0))


class Mask:
    """Known pixels: A x = m x. Measurements keep the shape of images, and are 0 where nothing is known.

    Args:
        mask: 1 where a pixel is known and 0 elsewhere, broadcast to images.

    Raises:
        UserError: other values.
    """

    def __init__(self, mask: torch.Tensor):
        if not ((mask == 0) | (mask == 1)).all():
            raise UserError("a mask must be 1 where pixels are known and 0 elsewhere")
        self.mask = mask.float()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.mask.to(x)

    adjoint = __call__

    def solve(self, y: torch.Tensor, ridge: torch.Tensor | float) -> torch.Tensor:
        return self(y) / (1 + ridge)

    def observed(self, y: torch.Tensor) -> torch.Tensor:
        return self.mask.to(y).expand_as(y)

    def picture(self, y: torch.Tensor, blank: float) -> torch.Tensor:
        return torch.where(self.observed(y) == 1, y, blank)


class AveragePool:
    """Means over cells of f x f pixels, [N, C, H / f, W / f]: what super-resolution starts from. A A^T = I / f^2.

    Args:
        factor: f.
    """

    def __init__(self, factor: int):
        self.factor = factor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        f = self.factor
        if x.shape[2] % f or x.shape[3] % f:
            raise UserError(f"images of {x.shape[3]}x{x.shape[2]} cannot be divided into cells of {f}x{f} pixels")
        return torch.nn.functional.avg_pool2d(x, f)

    def adjoint(self, y: torch.Tensor) -> torch.Tensor:
        f = self.factor
        return y.repeat_interleave(f, dim=2).repeat_interleave(f, dim=3) / f**2

    def solve(self, y: torch.Tensor, ridge: torch.Tensor | float) -> torch.Tensor:
        return y / (self.factor**-2 + ridge)

    def observed(self, y: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(y)

    def picture(self, y: torch.Tensor, blank: float) -> torch.Tensor:
        return pseudoinverse(self, y)


class Blur:
    """Convolution with a kernel on a torus: what leaves an image on one side comes back on the other.

    Fourier's basis makes it diagonal, with the transform of the kernel as eigenvalues.

    Args:
        kernel: float [h, w], its middle at (h // 2, w // 2); its sum is the brightness that it keeps. What of it is
            larger than the images comes back on the other side, too.
        size: height and width of the images, (H, W).
    """

    def __init__(self, kernel: torch.Tensor, size: tuple[int, int]):
        self.size = size
        rows, columns = ((torch.arange(n) - n // 2) % N for n, N in zip(kernel.shape, size, strict=True))
        wrapped = torch.zeros(size, dtype=torch.float64)
        wrapped.index_put_((rows[:, None], columns), kernel.double(), accumulate=True)
        self.eigenvalues = torch.fft.rfft2(wrapped)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._scaled(x, self._eigenvalues(x))

    def adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return self._scaled(y, self._eigenvalues(y).conj())

    def solve(self, y: torch.Tensor, ridge: torch.Tensor | float) -> torch.Tensor:
        squares = self._eigenvalues(y).abs().square() + ridge
        smallest = SINGULAR**2 * squares.amax(dim=(-2, -1), keepdim=True)
        return self._scaled(y, torch.where(squares > smallest, 1 / squares, 0.0))

    def observed(self, y: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(y)

    def picture(self, y: torch.Tensor, blank: float) -> torch.Tensor:
        return y

    def _eigenvalues(self, x: torch.Tensor) -> torch.Tensor:
        """The eigenvalues in the precision of images and on their device."""
        kind = torch.complex128 if x.dtype == torch.float64 else torch.complex64
        return self.eigenvalues.to(kind).to(x.device)

    def _scaled(self, x: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        return torch.fft.irfft2(torch.fft.rfft2(x) * factors, s=self.size)


def gaussian_kernel(std: float) -> torch.Tensor:
    """A normal distribution of that standard deviation in pixels, cut off at three of them, of sum 1, float64."""
    reach = max(1, math.ceil(3 * std))
    line = torch.exp(-torch.arange(-reach, reach + 1, dtype=torch.float64).square() / (2 * std**2))
    kernel = torch.outer(line, line)
    return kernel / kernel.sum()


def box_kernel(width: int) -> torch.Tensor:
    """The mean over width x width pixels, float64."""
    return torch.full([width, width], width**-2, dtype=torch.float64)


def motion_kernel(length: int, angle: float) -> torch.Tensor:
    """Motion along a straight line, of sum 1, float64 [length, length] or one larger where the length is even.

    Args:
        length: of the line in pixels.
        angle: from the horizontal, counterclockwise, in degrees.
    """
    reach = length // 2
    kernel = torch.zeros(2 * reach + 1, 2 * reach + 1, dtype=torch.float64)
    direction = math.cos(math.radians(angle)), -math.sin(math.radians(angle))
    # Points along the line, close enough to each other, spread over the four pixels around them.
    count = 8 * length
    for i in range(count):
        along = ((i + 0.5) / count - 0.5) * (length - 1)
        column, row = (reach + along * part for part in direction)
        for r in (math.floor(row), math.floor(row) + 1):
            for c in (math.floor(column), math.floor(column) + 1):
                weight = (1 - abs(row - r)) * (1 - abs(column - c))
                if weight > 0:
                    kernel[r, c] += weight
    return kernel / kernel.sum()
