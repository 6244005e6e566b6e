from dataclasses import replace

import numpy as np
import pytest
import torch
from test_cache import tower

from minidiff.data import Batch
from minidiff.errors import InputError
from minidiff.pipeline import load
from minidiff.shapes import caption, example, render
from minidiff.tasks.clip import ContrastivePretraining
from minidiff.text import Agreement, tiny

COUNT = 48


@pytest.fixture(scope="module")
def agreement() -> Agreement:
    return tiny().agreement()


@pytest.fixture(scope="module")
def scenes() -> list:
    return [example("test", i, 0, {"single_object": 1.0}) for i in range(COUNT)]


def pictures(scenes: list, size: int) -> torch.Tensor:
    return torch.from_numpy(np.stack([render(e.scene, size) for e in scenes])).permute(0, 3, 1, 2)


@pytest.mark.parametrize("name, other", [("colour", "orange"), ("texture", "striped"), ("size", "small")])
@pytest.mark.parametrize("size", [32, 64])
def test_a_picture_fits_its_own_caption_better_than_one_that_is_wrong_in_one_word(agreement, scenes, name, other, size):
    chosen = [e for e in scenes if getattr(e.scene.things[0], name) != other]
    claims = [
        replace(e.claims[0], things=(replace(e.claims[0].things[0], **{name: getattr(e.scene.things[0], name)}),))
        for e in chosen
    ]
    wrong = [replace(claim, things=(replace(claim.things[0], **{name: other}),)) for claim in claims]
    images = pictures(chosen, size).float() / 127.5 - 1
    right, other = (agreement(images, [caption(claim, 0) for claim in some]) for some in (claims, wrong))
    assert (right > other).float().mean() > 0.9


def test_a_picture_fits_the_relation_that_is_true_of_it_better_than_its_opposite(agreement):
    examples = [example("test", i, weights={"position": 1.0}) for i in range(COUNT)]
    examples = [e for e in examples if e.claims[0].relation]
    claims = [e.claims[0] for e in examples]
    opposite = [replace(claim, things=claim.things[::-1]) for claim in claims]
    images = pictures(examples, 32).float() / 127.5 - 1
    right, other = (agreement(images, [caption(claim, 0) for claim in some]) for some in (claims, opposite))
    assert len(examples) > 20 and (right > other).float().mean() > 0.9


def test_pictures_are_shown_as_in_training(agreement, scenes):
    task = ContrastivePretraining()
    task.model.load_state_dict(agreement._clip.state_dict())
    task.model.eval()
    images, captions = pictures(scenes, 32), [e.captions[0] for e in scenes]
    batch = Batch(images, captions, list(range(COUNT)), [])
    with torch.no_grad():
        cosine = task._logits(batch).diagonal() / task.model.logit_scale.exp()
    torch.testing.assert_close(agreement(batch.x(), captions), cosine, rtol=0, atol=1e-5)


def test_pretrained_models_see_pictures_by_their_own_mean_and_deviation(agreement, scenes, monkeypatch):
    visual, images = agreement._clip.visual, pictures(scenes, 32).float() / 127.5 - 1
    captions = [e.captions[0] for e in scenes]
    usual = agreement(images, captions)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.3, 0.2, 0.1])
    monkeypatch.setattr(visual, "image_mean", tuple(mean.tolist()))
    monkeypatch.setattr(visual, "image_std", tuple(std.tolist()))
    seen = ((images + 1) / 2 - 0.5) / 0.5  # what it saw before; such that it sees the same now:
    shifted = (seen * std.view(3, 1, 1) + mean.view(3, 1, 1)) * 2 - 1
    torch.testing.assert_close(agreement(shifted, captions), usual, rtol=0, atol=1e-5)


def test_a_text_half_alone_cannot_choose():
    with pytest.raises(InputError, match="MD-TEXT-004.*candidates"):
        tower().agreement()


def test_candidates_of_a_text_half_alone_are_refused_before_anything_is_drawn(tiny_run, monkeypatch):
    pipe = load(tiny_run, device="cpu")
    monkeypatch.setattr(pipe, "text", tower())
    monkeypatch.setattr(pipe, "_states", lambda *_: pytest.fail("it draws"))
    with pytest.raises(InputError, match="MD-TEXT-004"):
        pipe.sample(["a star"], [0], candidates=2)
