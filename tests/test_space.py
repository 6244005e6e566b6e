import pytest
import torch

from minidiff.errors import InputError
from minidiff.space import Pixels


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_pixels_lose_nothing_and_keep_noise_white(patch):
    space = Pixels(image_size=16, patch=patch)
    images = torch.randn(3, 3, 16, 16)
    x0 = space.encode(images)
    assert x0.shape[1:] == space.shape
    assert torch.equal(space.decode(x0), images)
    assert torch.equal(x0.flatten().sort().values, images.flatten().sort().values)  # a permutation: white stays white


def test_a_patch_holds_neighbouring_pixels():
    images = torch.arange(16.0).reshape(1, 1, 4, 4).expand(1, 3, 4, 4)
    assert Pixels(4, patch=2).encode(images)[0, :4, 0, 0].tolist() == [0, 1, 4, 5]


def test_A4_a_size_that_does_not_divide_is_refused_with_the_nearest():
    with pytest.raises(InputError, match="48 and 52"):
        Pixels(image_size=50, patch=4)
