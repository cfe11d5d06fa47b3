"""Operators: adjoints, regularised inverses and pseudoinverses, against their matrices; kernels."""

import math

import pytest
import torch

from dnnlib.errors import UserError
from training.restoration.operators import (
    AveragePool,
    Blur,
    Mask,
    box_kernel,
    gaussian_kernel,
    motion_kernel,
    pseudoinverse,
)

SHAPE = (2, 6, 8)  # of images


def mask() -> torch.Tensor:
    return (torch.rand(1, 1, *SHAPE[1:], generator=torch.Generator().manual_seed(0)) < 0.4).float()


OPERATORS = {
    "mask": lambda: Mask(mask()),
    "pool": lambda: AveragePool(2),
    "gaussian": lambda: Blur(gaussian_kernel(0.7), SHAPE[1:]),
    "box": lambda: Blur(box_kernel(4), SHAPE[1:]),  # singular: it loses whole frequencies
    "motion": lambda: Blur(motion_kernel(5, 30), SHAPE[1:]),
}


@pytest.fixture(params=OPERATORS)
def operator(request):
    return OPERATORS[request.param]()


def matrix_of(operator) -> torch.Tensor:
    """A, float64 [values, pixels]."""
    pixels = math.prod(SHAPE)
    return operator(torch.eye(pixels, dtype=torch.float64).reshape(-1, *SHAPE)).flatten(1).T


def test_adjoint(operator):
    A = matrix_of(operator)
    y = torch.randn(3, *operator(torch.zeros(1, *SHAPE)).shape[1:], dtype=torch.float64)
    torch.testing.assert_close(operator.adjoint(y).flatten(1), y.flatten(1) @ A)


@pytest.mark.parametrize("ridge", [0.0, 0.3, torch.tensor([0.01, 1.0, 30.0], dtype=torch.float64).reshape(3, 1, 1, 1)])
def test_solve(operator, ridge):
    A, x = matrix_of(operator), torch.randn(3, *SHAPE, dtype=torch.float64)
    y = operator(x)
    gram = A @ A.T
    for i, level in enumerate(torch.as_tensor(ridge).flatten().expand(3).tolist()):
        inverse = torch.linalg.pinv(gram + level * torch.eye(len(gram), dtype=torch.float64), rtol=1e-10)
        torch.testing.assert_close(
            operator.solve(y, ridge)[i].flatten(), inverse @ y[i].flatten(), rtol=1e-6, atol=1e-6
        )


def test_pseudoinverse(operator):
    """It agrees with what was measured, and adds nothing that the operator cannot see."""
    A, x = matrix_of(operator), torch.randn(3, *SHAPE, dtype=torch.float64)
    found = pseudoinverse(operator, operator(x))
    torch.testing.assert_close(found.flatten(1), x.flatten(1) @ (torch.linalg.pinv(A, rtol=1e-6) @ A).T)
    torch.testing.assert_close(operator(found), operator(x))


def test_precision_is_that_of_the_images(operator):
    x = torch.randn(2, *SHAPE)
    assert operator(x).dtype == operator.adjoint(operator(x)).dtype == operator.solve(operator(x), 0.1).dtype == x.dtype


def test_pictures_of_measurements():
    x = torch.rand(1, *SHAPE)
    known = mask().bool()
    assert (OPERATORS["mask"]().picture(x * known, -1.0) == torch.where(known, x, -1.0)).all()
    small = AveragePool(2)(x)
    torch.testing.assert_close(
        AveragePool(2).picture(small, -1.0), small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    )
    assert OPERATORS["mask"]().observed(x).sum() == 2 * known.sum() and AveragePool(2).observed(small).all()


@pytest.mark.parametrize("shape", [(3, 5), (4, 2), (9, 8)])
def test_blur_is_a_convolution_on_a_torus(shape):
    x, kernel = torch.randn(1, 1, 6, 8), torch.rand(shape, dtype=torch.float64)
    expected = torch.zeros_like(x)
    for i in range(shape[0]):
        for j in range(shape[1]):
            expected += kernel[i, j].item() * x.roll((i - shape[0] // 2, j - shape[1] // 2), (2, 3))
    torch.testing.assert_close(Blur(kernel, (6, 8))(x), expected)


def test_kernels():
    for kernel in (gaussian_kernel(1.3), box_kernel(4), motion_kernel(5, 20), motion_kernel(4, 0)):
        assert kernel.sum().item() == pytest.approx(1) and (kernel >= 0).all()
    line = gaussian_kernel(2.0)
    offsets = torch.arange(len(line), dtype=torch.float64) - len(line) // 2
    assert (line.sum(dim=0) * offsets**2).sum().sqrt().item() == pytest.approx(2.0, rel=0.02)  # cut off at 3 std
    torch.testing.assert_close(motion_kernel(5, 90), motion_kernel(5, 0).T)
    torch.testing.assert_close(motion_kernel(5, 30), motion_kernel(5, 210))
    across = motion_kernel(5, 0)
    assert across[2].sum().item() == pytest.approx(1) and (across[2] > 0.1).all()
    rising = motion_kernel(5, 45)  # from the lower left to the upper right
    assert rising[1, 3] > 0.1 and rising[3, 1] > 0.1 and rising[1, 1] == 0


def test_what_does_not_fit():
    with pytest.raises(UserError, match="images of 8x6 cannot be divided into cells of 4x4"):
        AveragePool(4)(torch.zeros(1, *SHAPE))
    with pytest.raises(UserError, match="1 where pixels are known and 0 elsewhere"):
        Mask(torch.full([1, 1, 6, 8], 0.5))
