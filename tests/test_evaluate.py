import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from minidiff.errors import InputError
from minidiff.evaluate.__main__ import evaluate, main, read
from minidiff.evaluate.scenes import interval, score_scenes, summary
from minidiff.resources import bundled
from minidiff.shapes import CATEGORIES, COLOURS, example, render

N = 6


def drawing(scene) -> torch.Tensor:
    return torch.from_numpy(render(scene, 32)).permute(2, 0, 1).float() / 127.5 - 1


def tasks(split="heldout"):
    return [example(split, i, 0, {name: 1.0}) for name in CATEGORIES for i in range(N)]


def test_an_oracle_that_draws_what_is_claimed_is_perfect():
    def oracle(prompts, seeds):
        assert len(set(seeds)) == len(seeds)
        scenes = {e.captions[0]: e.scene for e in tasks()}
        return torch.stack([drawing(scenes[p]) for p in prompts])

    report = summary(score_scenes(oracle, n=N))
    assert report["overall"] == 1 and report["rms"] < 0.02 and report["wrong"] == {}
    assert set(report["categories"]) == set(CATEGORIES) and report["n"] == 6 * N


def test_a_painter_who_confuses_colours_fails_where_colours_are_named():
    other = dict(zip(COLOURS, [*list(COLOURS)[1:], list(COLOURS)[0]], strict=True))

    def confused(prompts, seeds):
        scenes = {e.captions[0]: e.scene for e in tasks()}
        swapped = [tuple(replace(t, colour=other[t.colour]) for t in scenes[p].things) for p in prompts]
        return torch.stack(
            [drawing(replace(scenes[p], things=things)) for p, things in zip(prompts, swapped, strict=True)]
        )

    report = summary(score_scenes(confused, n=N))
    assert report["categories"]["two_objects"] == 1  # names shapes only
    for name in ("single_object", "colour", "counting", "attribute_binding"):
        assert report["categories"][name] == 0
    assert report["wrong"] == {"colour": N}


def test_noise_scores_nothing_and_never_fails():
    report = summary(score_scenes(lambda prompts, seeds: torch.randn(len(prompts), 3, 32, 32), n=2))
    assert report["overall"] == 0 and report["rms"] > 0.5


def test_wilson_interval_covers_and_stays_in_range():
    assert interval(0.95, 100) == pytest.approx((0.888, 0.978), abs=2e-3)
    assert interval(1.0, 10)[1] == 1 and interval(0.0, 10)[0] == 0


def test_a_run_is_scored_into_eval_json(tiny_run, capsys):
    import minidiff

    pipe = minidiff.load(tiny_run, device="cpu")
    options = read([f"run={tiny_run}", "n=1", "steps=2", "guidance=2"])
    evaluate(pipe, options, tiny_run)
    report = json.loads((tiny_run / "eval.json").read_text())
    assert {"overall", "categories", "rms", "n", "weights", "split"} <= report.keys()
    assert report["n"] == 6 and report["weights"] == "ema" and report["split"] == "heldout"
    assert report["evaluations"] == 4  # two steps, two answers each
    assert np.isclose(report["overall"], np.mean(list(report["categories"].values())))
    assert (tiny_run / "eval.png").stat().st_size > 1000 and "overall" in capsys.readouterr().out


def test_of_candidates_all_network_evaluations_count(tiny_run, tmp_path, capsys):
    import minidiff

    pipe = minidiff.load(tiny_run, device="cpu")
    report = evaluate(pipe, read([f"run={tiny_run}", "n=1", "steps=2", "guidance=2", "candidates=3"]), tmp_path)
    assert report["evaluations"] == 12 and report["candidates"] == 3
    assert "12 network evaluations a picture, guidance 2, the best of 3 in OpenCLIP's eyes" in capsys.readouterr().out


def test_the_bundled_run_which_holds_no_configuration_is_of_the_shapes_world(tmp_path):
    run = shutil.copytree(bundled("shapes_run"), tmp_path / "run")
    main([f"run={run}", "n=1", "device=cpu"])
    assert json.loads((run / "eval.json").read_text())["n"] == 6


@pytest.mark.parametrize(
    "arguments, words",
    [(["rnu=x"], "Did you mean 'run'"), (["run=x", "n=many"], "whole number"), (["n=3"], "run=runs")],
)
def test_wrong_options_are_named(arguments, words):
    with pytest.raises(InputError, match=words):
        read(arguments)
