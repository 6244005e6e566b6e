import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from minidiff.errors import InputError
from minidiff.shapes import (
    BACKGROUNDS,
    CATEGORIES,
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    TEXTURES,
    WORDINGS,
    Claim,
    Description,
    Scene,
    Thing,
    caption,
    distance,
    example,
    parse,
    render,
)
from minidiff.shapes.claim import RELATIONS
from minidiff.shapes.sample import HELDOUT_COLOURED, HELDOUT_TOGETHER, novelty

unchecked = pytest.mark.usefixtures("without_shape_checks")


def things(scene: Scene) -> list[tuple]:
    return sorted((t.shape, t.colour, t.size, t.texture, t.place) for t in scene.things)


def measures(scene: Scene) -> np.ndarray:
    rows = sorted((t.shape, t.colour, t.size, t.texture, round(t.x, 1), t.x, t.y, t.r) for t in scene.things)
    return np.array([row[-3:] for row in rows])


def noisy(image: np.ndarray, std: float, rng: np.random.Generator) -> np.ndarray:
    return np.rint((np.clip(image / 127.5 - 1 + std * rng.standard_normal(image.shape), -1, 1) + 1) * 127.5).astype(
        np.uint8
    )


@unchecked
@pytest.mark.parametrize("std", [0.0, 0.1])
@pytest.mark.parametrize("px", [32, 64])
def test_parse_undoes_render(px, std):
    """2,000 scenes, clean and under noise of standard deviation 0.1."""
    rng, wrong = np.random.default_rng(0), []
    for i in range(2000):
        scene = example(("train", "heldout")[i % 2], i).scene
        read = parse(noisy(render(scene, px), std, rng) if std else render(scene, px))
        if (read.background, things(read)) != (scene.background, things(scene)):
            wrong.append(f"{i}: {scene} was read as {read}")
        elif not std and (away := distance(render(scene, px), read)) > 0.02:
            wrong.append(f"{i}: {away} away")
    assert wrong == []


@unchecked
def test_parse_measures_position_and_size():
    for i in range(100):
        scene = example("train", i, weights={"single_object": 1.0}).scene
        np.testing.assert_allclose(measures(parse(render(scene, 32))), measures(scene), atol=0.01)


@pytest.mark.parametrize("make", [np.zeros, np.ones])
def test_parse_never_fails_on_what_is_no_scene(make):
    rng = np.random.default_rng(0)
    assert parse((255 * make((32, 32, 3))).astype(np.uint8)).things == ()
    parse(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    half = np.zeros((32, 32, 3), np.uint8)
    half[:, 16:] = 255
    parse(half)


def test_a_fit_ends_even_if_rounding_makes_every_neighbour_look_better(monkeypatch):
    window = sys.modules["minidiff.shapes.parse"]._Window
    calls = iter(range(100))  # a picture was once read for ever

    def errors(self, shape, textures, spots):
        next(calls)
        return np.array([[1.0, 1.0, 0.9999, 1.0, 1.0, 1.0, 1.0]]), np.zeros((1, 7), dtype=int)

    monkeypatch.setattr(window, "errors", errors)
    spot = np.array([0.0, 0.0, 0.3], dtype=np.float32)
    assert window.fit(window.__new__(window), "circle", "solid", spot)[0] == 1.0


def test_a_speck_is_no_thing_but_counts_in_the_distance():
    picture = render(Scene("black", ()), 32).copy()
    picture[4:6, 4:6] = 255
    read = parse(picture)
    assert read.things == () and distance(picture, read) > 0.05


def test_scenes_look_alike_at_every_resolution():
    for i in range(20):
        scene = example("train", i).scene
        coarse = np.asarray(Image.fromarray(render(scene, 64)).resize((32, 32), Image.Resampling.BOX)).astype(float)
        assert np.abs(coarse - render(scene, 32)).mean() < 1.5


@pytest.mark.parametrize("split", ["train", "test", "heldout"])
def test_examples_are_functions_of_seed_split_and_index(split):
    again = [example(split, i, seed) for seed in (0, 1) for i in range(5)]
    assert again == [example(split, i, seed) for seed in (0, 1) for i in range(5)]
    assert len({e.captions for e in again}) == 10


@unchecked
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_siblings_share_colours_and_background_and_differ_in_the_rest(split):
    families = [[example(split, 8 * i + j, siblings=8) for j in range(8)] for i in range(200)]
    swapped = 0
    for family in families:
        assert len({e.category for e in family}) == len({e.scene.background for e in family}) == 1
        assert len({frozenset(t.colour for t in e.scene.things) for e in family}) == 1
        looks = {frozenset((t.shape, t.size, t.texture, t.place) for t in e.scene.things) for e in family}
        assert len(looks) > (2 if family[0].category == "position" else 4)  # twins are half as many
        kinds = [[(t.colour, t.shape) for t in e.scene.things] for e in family]
        if family[0].category == "attribute_binding":
            assert {novelty(pair) for pair in kinds} == {(int(split == "heldout"), 0)}
            swapped += len({frozenset(pair) for pair in kinds}) == 2
    assert swapped  # with the same two colours and the same two shapes
    assert len({(f[0].scene.background, f[0].scene.things[0].colour) for f in families}) > 20


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_relation_is_true_of_one_twin_and_false_of_the_other(split):
    pairs = 0
    for i in range(0, 400, 2):
        one, other = (example(split, i + j, weights={"position": 1.0}, siblings=16) for j in (0, 1))
        assert one.scene.background == other.scene.background
        for a, b in zip(one.scene.things, other.scene.things, strict=True):
            assert b == replace(a, x=-a.x, y=-a.y)
        if len(one.scene.things) == 2:
            pairs += 1
            for this, that in ((one, other), (other, one)):
                assert all(claim.relation and claim.holds(this.scene) for claim in this.claims)
                assert not any(claim.holds(that.scene) for claim in this.claims)
    assert pairs > 100


def test_things_stay_inside_and_apart():
    for i in range(500):
        scene = example("train", i).scene
        for k, a in enumerate(scene.things):
            assert max(abs(a.x), abs(a.y)) + a.r < 0.95
            for b in scene.things[:k]:
                assert np.hypot(a.x - b.x, a.y - b.y) > a.r + b.r + 2 * 2 / 32


@unchecked
def test_heldout_compositions_are_never_trained_and_always_tested():
    for i in range(1500):
        for split in ("train", "test"):
            assert novelty([(t.colour, t.shape) for t in example(split, i).scene.things]) == (0, 0)
        kinds = [(t.colour, t.shape) for t in example("heldout", i).scene.things]
        coloured = any(kind in HELDOUT_COLOURED for kind in kinds)
        together = frozenset(shape for _, shape in kinds) in HELDOUT_TOGETHER
        assert coloured or together
    # every part of a held-out composition is well known from training
    assert {c for c, _ in HELDOUT_COLOURED} == set(COLOURS)


@unchecked
@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_caption_claims_something_true(split, category):
    for i in range(200):
        e = example(split, i, weights={category: 1.0})
        assert e.category == category and len(e.captions) == len(e.claims)
        assert all(claim.holds(e.scene) for claim in e.claims)


def other(options, value):
    return next(x for x in options if x != value)


@pytest.mark.parametrize("category", CATEGORIES)
def test_claims_can_be_false(category):
    vocabulary = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "texture": TEXTURES, "place": PLACES}
    for i in range(60):
        e = example("train", i, weights={category: 1.0})
        claim, told = e.claims[0], e.claims[0].things[0]
        for name, options in vocabulary.items():
            if (value := getattr(told, name)) is not None:
                false = replace(claim, things=(replace(told, **{name: other(options, value)}), *claim.things[1:]))
                alike = name in ("shape", "colour") and category in ("two_objects", "position", "attribute_binding")
                assert alike or not false.holds(e.scene)
        assert not replace(claim, background=other(BACKGROUNDS, e.scene.background)).holds(e.scene)
        crowd = (*e.scene.things, e.scene.things[0])
        assert not claim.holds(Scene(e.scene.background, crowd))
        assert not claim.holds(Scene(e.scene.background, crowd[1:-1]))


def test_binding_is_decided_per_thing():
    def thing(shape, colour, x):
        return Thing(shape, colour, "small", "solid", x, 0.0, 0.28)

    claim = Claim(
        category="attribute_binding",
        things=(Description(shape="circle", colour="red"), Description(shape="square", colour="blue")),
    )
    right = Scene("white", (thing("square", "blue", -0.5), thing("circle", "red", 0.5)))
    swapped = Scene("white", (thing("square", "red", -0.5), thing("circle", "blue", 0.5)))
    assert claim.holds(right) and not claim.holds(swapped)
    for relation, holds in {"right of": True, "left of": False, "above": False, "below": False}.items():
        assert replace(claim, relation=relation).holds(right) is holds
    assert set(RELATIONS) == {"right of", "left of", "above", "below"}


def test_no_caption_says_two_different_things():
    meaning: dict[str, Claim] = {}
    for i in range(150):
        e = example("train", i)
        for claim in e.claims:
            for wording in range(WORDINGS):
                text = caption(claim, wording)
                same = meaning.setdefault(text, claim)
                assert sorted(map(repr, same.things)) == sorted(map(repr, claim.things)) or same == claim, text
                assert (same.relation, same.count, same.background) == (claim.relation, claim.count, claim.background)


def test_captions_have_several_wordings_and_fit_the_text_encoder():
    from minidiff.text import TINY, Tokenizer

    tokenizer = Tokenizer(TINY)
    texts = [text for i in range(500) for text in example("train", i).captions]
    assert all(tokenizer.lost(text) == "" for text in texts)
    for category in CATEGORIES:
        claim = example("train", 1, weights={category: 1.0}).claims[0]
        assert len({caption(claim, k) for k in range(WORDINGS)}) >= 3


@pytest.mark.parametrize("wrong, words", [({"split": "trian"}, "'train'"), ({"weights": {"color": 1.0}}, "'colour'")])
def test_unknown_names_are_refused_with_a_guess(wrong, words):
    with pytest.raises(InputError, match=words):
        example(**({"split": "train", "index": 0} | wrong))
