"""What the nearest real images say."""

import pytest
import torch
from conftest import DIGITS

from training.metrics.small_images import RealImages, within_class_distance


@pytest.fixture(scope="module")
def reals() -> RealImages:
    return RealImages(DIGITS)


def test_copies_are_near_and_of_their_class(reals):
    found = reals.compare(reals.images, reals.classes)
    assert found["fd_pixels"] == pytest.approx(0, abs=1e-4)
    assert found["distance_ratio"] == found["noise"] == 0 and found["agreement"] == 1
    assert found["diversity"] == pytest.approx(reals.diversity)
    assert 0.09 < found["smallest_class"] <= 0.1 <= found["largest_class"] < 0.11
    assert 0.98 < reals.agreement < 1


@pytest.mark.filterwarnings("ignore:fd_pixels of")
def test_noise_is_noise(reals):
    noise = torch.randint(0, 256, (50, *reals.images.shape[1:]), generator=torch.Generator().manual_seed(0))
    found = reals.compare(noise.to(torch.uint8))
    assert found["noise"] == 1 and found["distance_ratio"] > 2 and found["fd_pixels"] > 10
    assert "agreement" not in found and "diversity" not in found


@pytest.mark.filterwarnings("ignore:fd_pixels of")
def test_one_class_only(reals):
    found = reals.compare(reals.images[reals.classes == 3])
    assert (found["smallest_class"], found["largest_class"]) == (0, 1)


def test_distance_within_classes():
    images = torch.tensor([[0, 0], [3, 4], [10, 0], [10, 0], [255, 255]], dtype=torch.uint8).reshape(5, 1, 1, 2)
    assert within_class_distance(images, torch.tensor([0, 0, 1, 1, 2])) == pytest.approx((5 + 0) / 2)
