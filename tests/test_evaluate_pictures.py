"""Pictures of any world beside real ones: painters of whom it is known how good they are, and a peer's formula."""

import json
import math

import datasets
import pytest
import torch
from conftest import TINY_RUN, train
from PIL import Image
from torch_fidelity import calculate_metrics, register_feature_extractor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.metric_kid import kernel_mmd

from minidiff.errors import DataError, InputError
from minidiff.evaluate.__main__ import main, read
from minidiff.evaluate.pictures import Real, cmmd, judge_pictures, prompt_scores, real_pictures, tells_apart
from minidiff.shapes import example, render
from minidiff.text import tiny

N = 60


@pytest.fixture(scope="module")
def eyes():
    return tiny().agreement()


def scenes(first: int) -> Real:
    found = [example("test", first + i, 0, {"single_object": 1.0}) for i in range(N)]
    images = torch.stack([torch.from_numpy(render(e.scene, 32)).permute(2, 0, 1) for e in found])
    return Real(images / 127.5 - 1, [e.captions[0] for e in found], "scenes")


@pytest.fixture(scope="module")
def real() -> Real:
    return scenes(0)


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=-1, keepdim=True)


def test_cmmd_is_the_kernel_distance_of_a_peer():
    a, b = unit(40, 16), (unit(40, 16, seed=1) + 0.3) / 1.5
    peer = kernel_mmd(a.double().numpy(), b.double().numpy(), kid_kernel="rbf", kid_kernel_rbf_sigma=10.0)
    assert cmmd(a, b) == pytest.approx(1000 * peer, rel=1e-6) and cmmd(a, b) > 0.1


def test_cmmd_of_two_points_is_a_closed_form_and_halves_of_one_set_are_no_distance_apart():
    u, v = torch.tensor([[1.0, 0.0]] * 3), torch.tensor([[0.0, 1.0]] * 5)
    assert cmmd(u, v) == pytest.approx(1000 * 2 * (1 - math.exp(-2 / 200)), rel=1e-6)
    halves = [cmmd(*unit(12, 8, seed=i).split([5, 7])) for i in range(300)]  # few, of different number
    mean, error = torch.tensor(halves).mean(), torch.tensor(halves).std() / 300**0.5
    assert abs(mean) < 4 * error and error < 0.2  # with pairs of a point with itself it would be 3


def test_a_painter_of_the_real_pictures_gets_what_the_real_ones_get(eyes, real):
    def painter(prompts, seeds):
        assert prompts == real.captions and list(seeds) == list(range(5, 5 + N))
        return real.images

    report = judge_pictures(painter, real, eyes, seed=5).report
    for name in ("clip_score", "r_precision"):
        assert report[f"{name}_drawn"] == report[f"{name}_real"]
    assert report["r_precision_real"] > 0.5 and report["cmmd_drawn"] <= 0 and report["n"] == N


def test_who_paints_the_right_world_but_not_the_prompt_is_found_out(eyes, real):
    """As a set the pictures are as good as real ones, but they fit their captions by chance."""
    found = judge_pictures(lambda prompts, seeds: scenes(1000).images, real, eyes)
    report = found.report
    assert not tells_apart(report["r_precision_drawn"], report["choices"], N)
    assert report["clip_score_drawn"] < report["clip_score_real"] - 10
    noise = judge_pictures(lambda prompts, seeds: torch.randn(N, 3, 32, 32), real, eyes).report
    assert abs(report["cmmd_drawn"]) < 0.5 < 2 < noise["cmmd_drawn"]
    assert "These eyes cannot tell" not in "\n".join(found.lines)  # it is the painter who is blind


@pytest.mark.parametrize("level", [-1.0, 0.0, 3.0])
def test_G6_pictures_that_are_all_alike_have_finite_scores_and_find_no_caption(eyes, real, level):
    report = judge_pictures(lambda prompts, seeds: torch.full((N, 3, 32, 32), level), real, eyes).report
    assert all(math.isfinite(x) for x in report.values() if isinstance(x, float))
    assert report["r_precision_drawn"] < 0.1 and report["cmmd_drawn"] > 5


def test_eyes_that_are_blind_for_a_world_are_said_to_be(eyes, real):
    strange = real._replace(captions=[f"memo number {i}" for i in range(N)])
    lines = judge_pictures(lambda prompts, seeds: real.images, strange, eyes).lines
    assert "eyes=MODEL/WEIGHTS" in lines[-1]


def test_without_captions_there_is_a_distance_and_no_agreement(eyes, real):
    some = real._replace(captions=["", *real.captions[1:4], *[""] * (N - 4)])
    assert judge_pictures(lambda prompts, seeds: real.images, some, eyes).report["choices"] == 3
    found = judge_pictures(lambda prompts, seeds: real.images, real._replace(captions=[""] * N), eyes)
    assert found.report["clip_score_drawn"] is None and "R-precision" not in "\n".join(found.lines)


def test_r_precision_counts_distinct_captions_and_no_ties(eyes):
    """Pictures of whom two share a caption choose from the distinct ones; a fit that is no better does not count."""
    captions = ["a red star", "a red star", "a blue ring"]
    vectors = eyes.captions(captions)
    assert prompt_scores(eyes, vectors, captions, seed=0) == pytest.approx((100, 1))
    neither = torch.zeros_like(vectors)
    assert prompt_scores(eyes, neither, captions, seed=0) == (0, 0)


# ------------------------------------------------------------------------------------------------- a whole run


@pytest.fixture
def parquet(tmp_path):
    pictures = [Image.new("RGB", (40, 32), (20 * i, 0, 0)) for i in range(12)]
    table = {"picture": pictures, "words": [f"number {i}" for i in range(12)], "part": ["a"] * 5 + ["b"] * 7}
    rows = datasets.Dataset.from_dict(table).cast_column("picture", datasets.Image())
    rows.to_parquet(tmp_path / "rows.parquet")
    return ["data=parquet", f"data.path={tmp_path}/rows.parquet", "data.image=picture", "data.caption=words"] + [
        "data.split_column=part", "data.train_split=a", "data.validation_split=b"
    ]  # fmt: skip


class Mean(FeatureExtractorBase):
    """Sees a picture's mean colour, so that a test needs no Inception."""

    def __init__(self, name, features_list, **_):
        super().__init__(name, features_list)

    @staticmethod
    def get_provided_features_list():
        return ("mean",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "mean"

    def forward(self, x):
        return (x.float().mean(dim=(2, 3)),)


def test_a_run_is_compared_with_pictures_that_are_named(tiny_run, parquet, capsys):
    main([f"run={tiny_run}", *parquet, "steps=2", "n=6", "device=cpu", "save=true"])
    report, said = json.loads((tiny_run / "eval.json").read_text()), capsys.readouterr().out
    assert report["n"] == 6 and report["evaluations"] == 4 and report["split"] == "heldout"
    assert report["cmmd_drawn"] > report["cmmd_real"] and (tiny_run / "eval.png").stat().st_size > 1000
    assert "CLIP score" in said and "rows.parquet, heldout: 6 pictures, seen by minidiff-tiny" in said
    folders = {name: str(tiny_run / "eval" / name) for name in ("drawn", "real")}
    register_feature_extractor("mean", Mean)
    seen = calculate_metrics(
        input1=folders["drawn"], input2=folders["real"], kid=True, kid_subset_size=6, kid_subsets=1, cuda=False,
        feature_extractor="mean", verbose=False, cache=False, save_cpu_ram=True,
    )  # fmt: skip
    assert seen["kernel_inception_distance_mean"] > 0
    assert "fidelity --fid --kid --kid-subset-size 6" in said and "2048" in said


def test_a_run_of_another_world_is_compared_with_what_it_held_out(tmp_path, parquet, capsys):
    """Also if it knows every word of the shapes world: what it was trained on decides."""
    small = [x for x in TINY_RUN if not x.startswith("data.")] + ["image_size=16", "name=numbers"]
    run = train(tmp_path, *parquet, base=small)
    main([f"run={run}", "device=cpu"])
    report = json.loads((run / "eval.json").read_text())
    assert report["n"] == 7 and report["data"].endswith("rows.parquet, heldout")  # as many as there are
    main([f"run={run}", "data=shapes", "n=1", "device=cpu"])
    assert "two_objects" in json.loads((run / "eval.json").read_text())["categories"]


def test_the_training_pictures_may_be_taken_instead(parquet):
    from minidiff.config import compose

    values = compose("train", parquet)
    assert real_pictures(values, "train", 500, 16).captions == [f"number {i}" for i in range(5)]
    held = real_pictures(values, "heldout", 4, 16)
    assert held.captions == [f"number {i}" for i in range(5, 9)] and held.images.shape == (4, 3, 16, 16)
    with pytest.raises(DataError, match="MD-EVAL-004"):
        real_pictures(values, "heldout", 3, 16)


@pytest.mark.parametrize(
    "options, words",
    [(["split=test"], "heldout or train"), (["eyes=ViT-L-14"], "MODEL/WEIGHTS"), (["eyes=no/thing"], "MD-TEXT-002")],
)
def test_what_does_not_work_for_pictures_is_said_before_any_is_drawn(tiny_run, parquet, options, words):
    with pytest.raises(InputError, match=words):
        main([f"run={tiny_run}", *parquet, "device=cpu", *options])


def test_save_is_true_or_false():
    with pytest.raises(InputError, match="true or false"):
        read(["run=x", "save=yes"])
