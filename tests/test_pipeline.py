import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import minidiff
from minidiff import grids, samplers
from minidiff.errors import CheckpointError, InputError
from minidiff.nn.attention import CrossAttention
from minidiff.pipeline import ImageNoise, to_pil, words
from minidiff.process import Table
from minidiff.text import Agreement


@pytest.fixture(scope="module")
def pipe(tiny_run):
    pipe = minidiff.load(tiny_run, device="cpu")
    torch.manual_seed(0)
    for p in pipe.denoiser.net.parameters():  # so that the prompt matters in a hardly trained network
        torch.nn.init.normal_(p, std=0.25)
    return pipe


PROMPTS = ["a red circle", "two blue stars", "a ring", "", "a large green cross", "a star", "a cross", "a square"]


@pytest.mark.parametrize("sampler", [samplers.ddim, samplers.ddpm, samplers.euler_ancestral], ids=lambda f: f.__name__)
def test_G3_a_picture_does_not_depend_on_its_batch_or_the_order_of_prompts(pipe, sampler):
    seeds = list(range(8))
    together = pipe.sample(PROMPTS, seeds, steps=3, sampler=sampler)
    for i in (0, 5):
        alone = pipe.sample([PROMPTS[i]], [seeds[i]], steps=3, sampler=sampler)
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-4)
    backwards = pipe.sample(PROMPTS[::-1], seeds[::-1], steps=3, sampler=sampler)
    torch.testing.assert_close(backwards.flip(0), together, rtol=0, atol=1e-4)
    in_parts = pipe.sample(PROMPTS, seeds, steps=3, sampler=sampler, batch_size=3)
    torch.testing.assert_close(in_parts, together, rtol=0, atol=1e-4)


def test_seed_zero_is_a_seed_and_seeds_differ(pipe):
    a, b = pipe.sample(["a star"] * 2, [0, 0], steps=2)
    c = pipe.sample(["a star"], [1], steps=2)[0]
    assert torch.equal(a, b) and not torch.allclose(a, c)
    together = pipe("a star", seed=0, n=2, steps=2)
    alone = [pipe("a star", seed=seed, steps=2)[0] for seed in (0, 1)]
    for one, other in zip(together, alone, strict=True):  # a batch of two may round to the next grey level (R7)
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1


def test_of_several_candidates_the_one_that_fits_best_is_kept_and_the_first_is_the_usual_picture(pipe, monkeypatch):
    asked = []

    def brightness(self, images, prompts):  # stands for what OpenCLIP finds
        asked.append(list(prompts))
        return images.mean(dim=(1, 2, 3))

    monkeypatch.setattr(Agreement, "__call__", brightness)
    prompts, seeds = ["a star", "a red circle"], [3, 4]
    first, kept = (pipe.sample(prompts, seeds, steps=2, candidates=k) for k in (1, 4))
    assert asked == [prompts] * 4
    drawn = []
    for k in range(4):
        *_, last = pipe._states(prompts, seeds, "", pipe.sampling.but(steps=2), candidate=k)
        drawn.append(pipe.space.decode(last.xt).clamp(-1, 1))
    torch.testing.assert_close(first, drawn[0])
    assert len({round(x[0].mean().item(), 6) for x in drawn}) == 4  # every candidate has noise of its own
    for i in range(2):
        torch.testing.assert_close(kept[i], max((x[i] for x in drawn), key=lambda x: x.mean()))
    alone = pipe.sample(prompts[1:], seeds[1:], steps=2, candidates=4)[0]
    torch.testing.assert_close(alone, kept[1], rtol=0, atol=1e-4)


def test_G2_guidance_zero_and_one_are_exact_and_cost_one_network_call(pipe, monkeypatch):
    rows = []
    forward = pipe.denoiser.net.forward
    monkeypatch.setattr(pipe.denoiser.net, "forward", lambda x, tau, cond: rows.append(len(x)) or forward(x, tau, cond))
    zero = pipe.sample(["a star"], [3], steps=2, guidance=0.0)
    one = pipe.sample(["a star"], [3], steps=2, guidance=1.0)
    assert rows == [1] * 4
    torch.testing.assert_close(zero, pipe.sample([""], [3], steps=2, guidance=1.0))
    assert not torch.allclose(one, zero)
    pipe.sample(["a star"], [3], steps=2, guidance=2.0)
    assert rows[-2:] == [2, 2]


@pytest.mark.parametrize("unit_start", [True, False])
def test_sampling_starts_from_the_noise_that_the_process_asks_for(pipe, monkeypatch, unit_start):
    table = Table("scaled_linear", 0.00085, 0.012, unit_start=unit_start)
    monkeypatch.setattr(pipe.denoiser, "process", table)
    first, *_ = pipe.steps("a star", seed=5, steps=2, grid=grids.trailing, sampler=samplers.ddim)
    std = 1.0 if unit_start else table.sigma(torch.ones((), dtype=torch.float64)).item()
    assert std == 1 or std < 0.998
    torch.testing.assert_close(first.xt, std * ImageNoise([5])(first.xt[None])[0])


def test_a_negative_prompt_takes_the_place_of_the_empty_one(pipe):
    plain = pipe.sample(["a star"], [0], steps=2, guidance=3.0)
    assert torch.equal(plain, pipe.sample(["a star"], [0], steps=2, guidance=3.0, negative=""))
    assert not torch.allclose(plain, pipe.sample(["a star"], [0], steps=2, guidance=3.0, negative="a ring"))
    same = pipe.sample(["a star"], [0], steps=2, guidance=3.0, negative="a star")
    torch.testing.assert_close(same, pipe.sample(["a star"], [0], steps=2, guidance=1.0), rtol=1e-3, atol=1e-3)


def test_steps_yield_every_state_and_end_in_the_picture(pipe):
    states = list(pipe.steps("a star", seed=5, steps=4, guidance=2.0))
    assert [s.t for s in states] == sorted((s.t for s in states), reverse=True)
    assert len(states) == 5 and states[-1].t == 0
    assert states[-1].image == pipe("a star", seed=5, steps=4, guidance=2.0)[0]
    process = pipe.denoiser.process
    for s in states[:-1]:  # clamped or not, the two estimates always make up xt
        t = torch.tensor(s.t, dtype=torch.float64)
        made_up = process.alpha(t).float() * s.x0_hat + process.sigma(t).float() * s.eps_hat
        torch.testing.assert_close(made_up, s.xt, rtol=1e-3, atol=1e-3)
        assert s.x0_hat.abs().max() <= 1


def test_settings_change_the_picture_and_unknown_ones_are_errors(pipe):
    base = {"steps": 4, "guidance": 3.0}
    plain = pipe.sample(["a star"], [0], **base)
    for change in (
        {"rescale": 1.0},
        {"low": 0.5},
        {"threshold": 0.999},
        {"threshold": 2.0},
        {"grid": samplers.uniform},
    ):
        assert not torch.allclose(plain, pipe.sample(["a star"], [0], **base, **change)), change
    with pytest.raises(TypeError, match="guidence"):
        pipe.sample(["a star"], [0], guidence=3.0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"guidance": float("nan")},
        {"rescale": 2.0},
        {"low": 0.9, "high": 0.1},
        {"threshold": -1.0},
        {"candidates": 0},
    ],
)
def test_G2_settings_out_of_range_are_refused(pipe, wrong):
    with pytest.raises(InputError):
        pipe.sample(["a star"], [0], **wrong)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_G2_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(InputError, match="seed"):
        ImageNoise([seed])


def test_unknown_words_are_named(pipe):
    assert pipe.unknown_words("a Red zebra, circle!") == ["zebra"]
    assert words("A red-blue star_ring") == ["a", "red", "blue", "star", "ring"]


def test_raw_and_ema_weights_are_different_and_both_kept(tiny_run):
    raw, ema = (minidiff.load(tiny_run, weights=w, device="cpu").denoiser.net.state_dict() for w in ("raw", "ema"))
    assert any(not torch.equal(raw[name], ema[name]) for name in raw)
    with pytest.raises(InputError, match="raw"):
        minidiff.load(tiny_run, weights="best")


def test_a_checkpoint_folder_loads_too(tiny_run):
    [newest] = [p for p in (tiny_run / "checkpoints").iterdir() if p.name == "step_00000004"]
    assert minidiff.load(newest, device="cpu").name.endswith("@4")


def test_a_missing_run_lists_those_there_are(tiny_run):
    with pytest.raises(CheckpointError, match="shapes"):
        minidiff.load(tiny_run.parent / "nope")


def test_another_text_encoder_is_refused(tiny_run, monkeypatch):
    from minidiff.text import TextEncoder

    original = TextEncoder.__init__

    def other(self, *args, **options):
        original(self, *args, **options)
        self.identity = "another encoder"

    monkeypatch.setattr(TextEncoder, "__init__", other)
    with pytest.raises(CheckpointError, match="another encoder"):
        minidiff.load(tiny_run)


def test_pictures_have_eight_bits_rounded_to_nearest():
    image = torch.tensor([-1.0, 0.0, 1.0, 5.0]).reshape(1, 1, 4).expand(3, 1, 4)
    assert [p[0] for p in to_pil(image).getdata()] == [0, 128, 255, 255]


def test_but_replaces_only_what_is_given(pipe):
    changed = pipe.sampling.but(steps=7, guidance=None)
    assert changed == replace(pipe.sampling, steps=7)


def test_keys_and_values_of_words_are_computed_once_and_the_picture_is_the_same_to_the_bit(pipe, monkeypatch):
    calls, original = [], CrossAttention.keys_values

    def counted(layer, tokens):
        calls.append(layer)
        return original(layer, tokens)

    monkeypatch.setattr(CrossAttention, "keys_values", counted)
    layers = [m for m in pipe.denoiser.net.modules() if isinstance(m, CrossAttention)]
    how = {"steps": 3, "guidance": 3.0, "low": 0.5}  # two conditions: both branches inside the interval, one outside
    once = pipe.sample(["a star", "a ring"], [0, 1], **how)
    assert len(layers) > 1 and sorted(map(id, calls)) == sorted(map(id, 2 * layers))
    calls.clear()
    monkeypatch.setattr(pipe.denoiser.net, "prepare", lambda cond: cond)
    assert torch.equal(pipe.sample(["a star", "a ring"], [0, 1], **how), once)
    assert len(calls) == 3 * len(layers)


def test_weights_that_change_between_two_pictures_are_heard(pipe):
    before = pipe.sample(["a star"], [0], steps=2)
    kv = next(m for m in pipe.denoiser.net.modules() if isinstance(m, CrossAttention)).kv.weight
    kv.data.mul_(-1)
    assert not torch.allclose(before, pipe.sample(["a star"], [0], steps=2), atol=1e-3)
    kv.data.mul_(-1)
    assert torch.equal(before, pipe.sample(["a star"], [0], steps=2))


def test_precision_is_a_choice_and_half_of_it_moves_pixels_a_little(pipe):
    exact = pipe.sample(["a star"], [0], steps=4)
    assert pipe.compute("bf16") == "bf16, eager"
    half = pipe.sample(["a star"], [0], steps=4)
    assert pipe.compute() == "fp32, eager"
    assert torch.equal(pipe.sample(["a star"], [0], steps=4), exact)
    assert half.dtype == torch.float32 and not torch.equal(half, exact)
    assert (half - exact).abs().mean() < 0.05


@pytest.mark.slow
def test_prepared_words_pass_through_the_compiler_in_one_piece():
    code = """
import torch
from minidiff.cond import Cond
from minidiff.nn.unet import UNet
shape = {"channels": [8, 16], "layers": 1, "attend": [True, True], "heads": 2, "groups": 4, "token_dim": 8}
net = UNet(in_channels=3, out_channels=3, **shape)
torch.nn.init.normal_(net.head.weight)
x, tau, cond = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 900.0]), Cond(tokens=torch.randn(2, 5, 8))
with torch.no_grad():
    traced = torch.compile(net.forward, backend="eager", fullgraph=True)
    torch.testing.assert_close(traced(x, tau, net.prepare(cond)), net(x, tau, cond))
"""  # in a process of its own, because checked annotations do not pass through the compiler
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
