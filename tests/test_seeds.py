import torch

from minidiff.seeds import generator


def draw(*place) -> float:
    return torch.rand((), generator=generator(*place)).item()


def test_every_place_draws_its_own_numbers_again_and_again():
    places = [(seed, purpose, i) for seed in (0, 1) for purpose in ("noise", "order") for i in range(3)]
    numbers = [draw(*place) for place in places]
    assert len(set(numbers)) == len(places)
    assert numbers == [draw(*place) for place in places]


def test_seed_zero_is_a_seed():
    torch.manual_seed(1)
    first = draw(0, "noise", 0)
    torch.manual_seed(2)
    assert draw(0, "noise", 0) == first != draw(1, "noise", 0)
