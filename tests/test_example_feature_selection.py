"""The pieces of examples/feature_selection.py, and that what it claims holds."""

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
import feature_selection as example

import smoothops as so


def test_the_parts_share_no_image():
    data = example.make_data(0)
    assert sum(len(part.digits) for part in data) == 1797
    assert abs(len(data.train.digits) - 0.6 * 1797) < 1


def test_the_mask_adds_up_to_k_and_ends_hard():
    data = example.make_data(0)
    pixels, *masks = example.select(data.train, 5, 1.0, 0.01, 1e-3, 0, steps=150)
    assert len(masks) == 4
    for mask in masks:
        torch.testing.assert_close(mask.sum(), torch.tensor(5.0))
    assert masks[0].max() < 0.5
    assert masks[-1][pixels].min() > 0.9


def test_matching_pursuit_takes_what_explains_the_digit():
    """The digit is a function of two pixels, and a third repeats the first."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(200, 64, generator=generator)
    images[:, 9] = images[:, 3]
    digits = 2 * (images[:, 3] > 0.5).long() + (images[:, 40] > 0.5).long()
    chosen = set(example.by_pursuit(example.Part(images, digits), 2).tolist())
    assert chosen in ({3, 40}, {9, 40})


def test_better_than_one_pixel_at_a_time():
    data = example.make_data(0)
    ours, *_ = example.select(data.train, 8, 1.0, 0.01, 1e-3, 0)
    mutual = example.by_mutual_information(data.train, 8)
    assert example.judge(ours, data)[1] > example.judge(mutual, data)[1] + 2


def test_the_module_trains_its_scores():
    model = example.Selector(so.nn.Anneal(so.Quadratic(1.0), 0.1, 3), 4)
    model(torch.rand(6, 64)).square().sum().backward()
    assert (model.scores.grad != 0).any()
