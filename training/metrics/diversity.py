"""How different images are from each other, and how evenly they are spread over classes."""

import numpy as np
import torch

from dnnlib.errors import UserError
from training.metrics.arrays import ROWS, Array, checked_pair, double, nearest


def vendi_score(features: Array) -> float:
    """Vendi score (Friedman & Dieng 2023, arXiv 2210.02410): the effective number of different images, 1 to N.

    exp(-sum_i l_i log l_i) with the eigenvalues l_i of K / N, where K_ij = cos(x_i, x_j) is the similarity of two
    images. With the normalised features as the rows of X, K = X X^T has the eigenvalues of X^T X, which is [D, D] and
    takes one pass. It is therefore never more than D, and grows with the number of images.

    Args:
        features: [N, D].

    Raises:
        UserError: no images, features that are all zero, or NaN or infinity.
    """
    x = torch.as_tensor(features)
    if x.ndim != 2 or len(x) == 0:
        raise UserError(f"the Vendi score takes features of shape [N, D], not {list(x.shape)}")
    gram: torch.Tensor | None = None
    for i in range(0, len(x), ROWS):
        part = double(x[i : i + ROWS])
        lengths = part.norm(dim=1, keepdim=True)
        if not lengths.all():
            raise UserError("the Vendi score compares directions of features, and those of an image are all zero")
        part = part / lengths
        gram = part.mT @ part if gram is None else gram.addmm_(part.mT, part)
    assert gram is not None
    values = torch.linalg.eigvalsh(gram / len(x))
    return float(torch.special.entr(values.clamp(min=0)).sum().exp())


def class_balance(real: Array, classes: Array, fake: Array) -> dict[str, float]:
    """How evenly generated images are spread over the classes of real ones. The class of an image is that of the real
    one whose features are nearest.

    Args:
        real: features [N, D].
        classes: of the real images, integers [N].
        fake: features [M, D].

    Returns:
        `imbalance`, the total variation distance between the shares of classes, sum_c |q_c - p_c| / 2, from 0 (as real
        images) to 1; and `rarest`, the smallest ratio q_c / p_c: 0 where a class is never made. With so many images,
        even real ones give values a little above 0 and below 1.

    Raises:
        UserError: not one class per real image, or a set holds NaN or infinity.
    """
    real, fake = checked_pair(real, fake)
    labels = torch.from_numpy(np.ascontiguousarray(classes)) if isinstance(classes, np.ndarray) else classes
    if labels.shape != real.shape[:1]:
        raise UserError(f"the reference has {len(labels)} classes for the features of {len(real)} images: make another")
    _, numbers = labels.to(real.device).unique(return_inverse=True)
    count = int(numbers.max()) + 1
    found = numbers[nearest(fake, real, 1)[1][:, 0]]
    p, q = (x.bincount(minlength=count).double() / len(x) for x in (numbers, found))
    return {"imbalance": float((q - p).abs().sum() / 2), "rarest": float((q / p).min())}
