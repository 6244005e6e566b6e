"""Image to image, inpainting, outpainting: what stays stays to the last grey level, and what changes is as prompted."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, train
from PIL import Image, ImageDraw

import minidiff
from minidiff.config import compose
from minidiff.errors import InputError
from minidiff.grids import log_snr
from minidiff.original import Original, prepare
from minidiff.process import Cosine
from minidiff.resources import bundled
from minidiff.shapes import Scene, Thing, parse, render
from minidiff.space import Pixels

STAR = Scene("navy", (Thing("star", "red", "small", "solid", -0.45, 0.0, 0.35),))


@pytest.fixture(scope="module")
def lesson():
    return minidiff.load(bundled("shapes_run"), device="cpu")


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return minidiff.load(train(tmp_path_factory.mktemp("latents"), "space=tiny", "steps=1"), device="cpu")


@pytest.fixture
def star() -> Image.Image:
    return Image.fromarray(render(STAR, 32))


def right_half(size: int = 32) -> Image.Image:
    mask = Image.new("L", (size, size), 0)
    ImageDraw.Draw(mask).rectangle((size // 2, 0, size, size), fill=255)
    return mask


# ------------------------------------------------------------------------------------------- what sampling does


def test_half_of_the_way_changes_the_colour_and_leaves_the_rest(lesson, star):
    """SDEdit's point, decided by the parser: coarse things are settled early, and stay."""
    drawn = lesson("a small blue star on a navy background", original=lesson.original(star, strength=0.5))[0]
    (thing,) = parse(np.asarray(drawn)).things
    assert (thing.shape, thing.colour, thing.size) == ("star", "blue", "small")
    assert abs(thing.x - STAR.things[0].x) < 0.1 and abs(thing.y - STAR.things[0].y) < 0.1


def test_what_is_drawn_anew_goes_with_what_stays_and_with_the_prompt(lesson, star):
    drawn = lesson("a green ring right of a red star", original=lesson.original(star, mask=right_half()))[0]
    read = parse(np.asarray(drawn))
    assert {(t.colour, t.shape) for t in read.things} == {("red", "star"), ("green", "ring")}
    assert np.array_equal(np.asarray(drawn)[:, :16], np.asarray(star)[:, :16])


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "heun", "dpmpp_2m"])
def test_in_any_space_pixels_that_stay_do_not_change_by_a_grey_level(tiny_run, latents, star, sampler):
    rough = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    mask = Image.fromarray((np.random.default_rng(1).random((32, 32)) < 0.5).astype(np.uint8) * 255)
    stays = np.asarray(mask) < 128
    for pipe in (minidiff.load(tiny_run, device="cpu"), latents):
        how = {"sampler": getattr(minidiff.samplers, sampler), "steps": 3}
        drawn = np.asarray(pipe("a star", original=pipe.original(rough, mask=mask), **how)[0])
        assert np.array_equal(drawn[stays], np.asarray(rough)[stays])
        assert (drawn[~stays] != np.asarray(rough)[~stays]).mean() > 0.5


def test_the_network_sees_what_stays_at_every_step(lesson, star):
    """The known half of each x0_hat is the picture's, and xt is that picture under noise that does not change."""
    original = lesson.original(star, mask=right_half())
    states = list(lesson.steps("a green ring right of a red star", original=original))
    process, x0 = lesson.denoiser.process, lesson.space.encode(original.image[None])[0]
    left = lesson.space.inside(original.keep)[0]
    for s in states[:-1]:
        t = torch.tensor(s.t, dtype=torch.float64)
        assert torch.equal(s.x0_hat[left], x0[left])
        noise = (s.xt - process.alpha(t).float() * x0)[left] / process.sigma(t).float()
        if s is states[0]:
            first = noise
        torch.testing.assert_close(noise, first, rtol=0, atol=2e-3)


def test_strength_is_the_share_of_steps_and_of_network_calls(lesson, star):
    for strength, steps in ((0.01, 1), (0.25, 3), (0.5, 6), (1.0, 12)):
        states = list(lesson.steps("a star", original=lesson.original(star, strength=strength)))
        assert len(states) == steps + 1
    times = log_snr(Cosine(), 10)
    some = Original(image=torch.zeros(3, 4, 4), strength=0.3).last(times)
    assert torch.equal(some, times[-4:])


def test_a_stronger_change_leaves_less_of_the_picture(lesson, star):
    far = []
    for strength in (0.1, 0.4, 1.0):
        drawn = lesson("two yellow squares on a pink background", original=lesson.original(star, strength=strength))[0]
        far.append(np.abs(np.asarray(drawn).astype(int) - np.asarray(star)).mean())
    assert far[0] < far[1] < far[2] and far[0] < 20


def test_G3_every_seed_has_its_picture_whatever_is_drawn_with_it(lesson, star):
    original = lesson.original(star, mask=right_half())
    together = lesson.sample(["a blue cross"] * 3, [5, 6, 7], original=original)
    alone = lesson.sample(["a blue cross"], [6], original=original)
    torch.testing.assert_close(together[1], alone[0], rtol=0, atol=2e-5)
    assert not torch.equal(together[0], together[1])


# ---------------------------------------------------------------------------------------------- what is given


def test_transparency_is_drawn_anew_and_shown_on_white():
    picture = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    picture.paste((0, 0, 0, 0), (4, 0, 8, 8))
    taken = prepare(picture, 8)
    assert taken.strength == 1 and taken.keep[:, :4].all() and not taken.keep[:, 4:].any()
    assert (taken.image[:, :, 4:] == 1).all() and (taken.image[0, :, :4] == 1).all()
    opaque = prepare(Image.new("RGBA", (8, 8), (255, 0, 0, 255)), 8)
    assert opaque.keep is None and opaque.strength == 0.75
    assert prepare(picture, 8, strength=0.5).strength == 0.5


def test_picture_and_mask_are_cropped_alike():
    wide = Image.new("RGB", (24, 8), "white")
    mask = Image.new("L", (24, 8), 0)
    mask.paste(255, (8, 0, 12, 8))  # the left half of the square in the middle
    assert prepare(wide, 4, mask=mask).keep.tolist() == [[False, False, True, True]] * 4


def test_a_region_is_inside_a_position_with_all_of_its_pixels(latents):
    region = torch.ones(32, 32, dtype=torch.bool)
    region[0, 0] = region[31, 17] = False
    pixels = Pixels(32, patch=4)
    assert torch.equal(pixels.decode(pixels.inside(region).float())[0, 1], region.float())
    inside, factor = latents.space.inside(region)[0, 0], latents.space.factor
    assert inside.shape == (32 // factor, 32 // factor) and (~inside).sum() == 2
    assert not inside[0, 0] and not inside[-1, 17 // factor]


@pytest.mark.parametrize(
    "mask, strength, words",
    [
        (Image.new("L", (8, 4)), None, "8×4 pixels and the image 4×4"),
        (Image.new("L", (4, 4), 0), None, "nothing is left to draw"),
        (None, 0.0, "MD-SAMPLE-016"),
        (None, 1.5, "MD-SAMPLE-016"),
    ],
)
def test_what_cannot_be_done_is_said(mask, strength, words):
    with pytest.raises(InputError, match=words):
        prepare(Image.new("RGB", (4, 4)), 4, mask=mask, strength=strength)


# ------------------------------------------------------------------------------------------------- sample.py


def run_sample(*arguments: str) -> None:
    sys.path.insert(0, str(ROOT))
    import sample

    sample.main.__wrapped__(compose("sample", [*arguments, "device=cpu"]))


def test_sample_changes_a_picture_and_says_so(tmp_path, star):
    star.save(tmp_path / "a star, red.png")
    right_half().save(tmp_path / "mask.png")
    files = [f"image={tmp_path}/a star, red.png", f"mask={tmp_path}/mask.png"]
    run_sample(f"run={bundled('shapes_run')}", "prompt=a green ring", *files, f"out={tmp_path}/out.png", "steps=2")
    drawn = Image.open(tmp_path / "out.png")
    assert np.array_equal(np.asarray(drawn)[:, :16], np.asarray(star)[:, :16])
    facts = json.loads(drawn.text["minidiff"])
    assert facts["image"] == "a star, red.png" and facts["mask"] == "mask.png" and facts["strength"] == 1


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["image=none.png"], r"MD-SAMPLE-014\] image=none.png cannot be read"),
        (["mask=none.png"], r"MD-SAMPLE-017\] mask= says"),
        (["strength=0.5"], "name one by image=FILE"),
        (["strength=much"], "MD-CONF-005.*strength=much"),
    ],
)
def test_sample_says_what_is_wrong_with_what_was_given(arguments, words):
    with pytest.raises(InputError, match=words):
        run_sample(f"run={bundled('shapes_run')}", "prompt=x", *arguments)
