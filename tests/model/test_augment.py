import numpy as np
import pytest
import torch

from model.augment import strong_view
from tests.model.examples import image


@pytest.mark.parametrize("hw", [(64, 64), (50, 91), (8, 8)], ids=str)
def test_a_strong_view_has_the_same_size_and_range_and_other_pixels(hw):
    picture = image(hw)
    before = picture.clone()
    for seed in range(20):
        view = strong_view(picture, np.random.default_rng(seed))
        assert view.shape == picture.shape
        assert view.dtype == torch.float32
        assert 0 <= view.min() <= view.max() <= 1
        assert not torch.equal(view, picture)
    assert torch.equal(picture, before)


def test_the_seed_alone_decides():
    views = [strong_view(image(), np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])


def test_nothing_moves():
    """A bright square on dark ground stays the brightest where it was, whatever is drawn but cut out."""
    picture = torch.full((3, 64, 64), 0.2)
    picture[:, 16:32, 40:56] = 0.8
    for seed in range(30):
        view = strong_view(picture, np.random.default_rng(seed)).mean(dim=0)
        assert view[18:30, 42:54].median() > view[36:60, 4:36].median()
