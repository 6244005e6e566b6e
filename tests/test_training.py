"""What goes wrong in the middle of a training, end to end."""

import json
import math
import pickle

import pytest
import torch
from conftest import train

from minidiff import checkpoint
from minidiff.errors import MachineError, NumericsError
from minidiff.space import blurred
from minidiff.tasks.diffusion import BLUR, Draws, TextToImage

FAST = ["every.preview=100", "every.validate=100", "every.save=100", "data.n=24", "optim=adamw"]


def poison(monkeypatch, updates: set[int]) -> None:
    original, count = TextToImage.loss, iter(range(1000))

    def loss(self, batch):
        value, extra = original(self, batch)
        return (value * math.nan if next(count) in updates else value), extra

    monkeypatch.setattr(TextToImage, "loss", loss)


def test_F2_F3_F6_R6_a_transient_nan_is_seen_in_the_log_and_in_no_weight(tmp_path, monkeypatch, capsys):
    poison(monkeypatch, {1})
    run = train(tmp_path, *FAST, "steps=4", "every.log=4")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]  # the bad step is logged although its turn had not come
    assert math.isnan(rows[0]["loss"]) and rows[0]["left_out"] == 1 and math.isfinite(rows[1]["loss"])
    saved = checkpoint.load(run / "checkpoints" / "step_00000004", ["model", "ema", "optimizer"])
    assert all(x.isfinite().all() for named in saved.tensors.values() for x in named.values())
    assert saved.state["ema_updates"] == 3 and saved.state["samples_seen"] == 32
    assert "warning: step 2 is not finite (loss nan" in capsys.readouterr().out


def test_R6_F1_a_run_that_stays_nan_stops_and_keeps_its_last_checkpoint(tmp_path, monkeypatch):
    poison(monkeypatch, {2, 3, 4, 5})
    with pytest.raises(NumericsError, match="MD-NUM-001.*step 5.*Rows of the last update: "):
        train(tmp_path, *FAST, "steps=9", "every.save=2")
    newest = checkpoint.latest(tmp_path / "runs" / "shapes" / "checkpoints")
    assert newest.name == "step_00000004"
    assert checkpoint.load(newest, []).state["ema_updates"] == 2


def test_G5_R9_a_preview_that_fails_is_a_warning_and_changes_nothing(tmp_path, monkeypatch, capsys):
    whole = train(tmp_path / "whole", *FAST, "steps=3", "every.preview=1")
    with monkeypatch.context() as patch:
        patch.setattr(TextToImage, "preview", lambda *_: 1 / 0)
        failed = train(tmp_path / "failed", *FAST, "steps=3", "every.preview=1")
    assert capsys.readouterr().out.count("warning: no preview at step") == 4
    a, b = (checkpoint.load(x / "checkpoints" / "step_00000003", ["model", "ema"]).tensors for x in (whole, failed))
    assert all(torch.equal(x, b[part][name]) for part in a for name, x in a[part].items())


@pytest.mark.parametrize("update, saved", [(1, []), (4, ["step_00000002"])], ids=["first", "later"])
def test_F12_out_of_memory_leaves_the_checkpoint_and_says_what_to_do(update, saved, tmp_path, monkeypatch):
    original, count = TextToImage.loss, iter(range(1, 100))

    def loss(self, batch):
        if next(count) == update:
            raise torch.OutOfMemoryError("out of memory")
        return original(self, batch)

    monkeypatch.setattr(TextToImage, "loss", loss)
    with pytest.raises(MachineError, match="MD-ENV-004.*batch_size=8 and image_size=32") as e:
        train(tmp_path, *FAST, "steps=9", "every.save=2")
    assert e.value.exit_code == 6 and "last checkpoint" not in str(e.value)  # at the first update there is none
    folder = tmp_path / "runs" / "shapes" / "checkpoints"
    assert [p.name for p in sorted(folder.glob("step_*"))] == saved and bool(checkpoint.latest(folder)) == bool(saved)


def test_F12_out_of_memory_in_sampling_skips_the_preview_alone(tmp_path, monkeypatch, capsys):
    from minidiff.pipeline import Pipeline

    sample, calls = Pipeline.sample, iter(range(100))

    def too_large(self, *arguments, **options):
        if next(calls) == 1:  # of the previews at steps 0, 1, 2, 3
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return sample(self, *arguments, **options)

    monkeypatch.setattr(Pipeline, "sample", too_large)
    run = train(tmp_path, *FAST, "steps=3", "every.preview=1")
    assert "warning: no preview at step 1 (OutOfMemoryError: CUDA out of memory" in capsys.readouterr().out
    assert sorted(p.stem for p in (run / "samples").iterdir()) == [f"step_0000000{k}" for k in (0, 2, 3)]
    assert checkpoint.latest(run / "checkpoints").name == "step_00000003"


def test_F13_a_spike_of_the_loss_is_said_and_nothing_else(tmp_path, monkeypatch, capsys):
    calm = train(tmp_path / "calm", *FAST, "steps=24")
    assert "is usual here" not in capsys.readouterr().out
    original, count = TextToImage.loss, iter(range(1, 100))

    def loss(self, batch):
        value, extra = original(self, batch)
        return value + (1000 if next(count) in (22, 23) else 0), extra  # a constant has no gradient

    monkeypatch.setattr(TextToImage, "loss", loss)
    spiked = train(tmp_path / "spiked", *FAST, "steps=24")
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("is usual here; the update was made") == 1
    assert "warning: the loss of step 22 is 1e+03" in shown and "resume=CHECKPOINT" in shown
    assert "is usual here" in (spiked / "log.txt").read_text()
    a, b = (checkpoint.load(x / "checkpoints" / "step_00000024", ["model", "ema"]).tensors for x in (calm, spiked))
    assert all(torch.equal(x, b[part][name]) for part in a for name, x in a[part].items())


def test_F11_on_a_cpu_deterministic_changes_no_bit(tmp_path):
    runs = [
        train(tmp_path / str(wanted), *FAST, "steps=3", "optim=muon", f"deterministic={wanted}")
        for wanted in ("true", "false")
    ]
    a, b = (checkpoint.load(x / "checkpoints" / "step_00000003", ["model", "ema"]).tensors for x in runs)
    assert all(torch.equal(x, b[part][name]) for part in a for name, x in a[part].items())
    assert not torch.are_deterministic_algorithms_enabled()


def test_F11_noise_that_workers_drew_trains_to_the_same_bits(tmp_path):
    runs = [train(tmp_path / str(n), *FAST, "steps=4", f"workers={n}") for n in (0, 2)]
    a, b = (checkpoint.load(x / "checkpoints" / "step_00000004", ["model", "ema"]).tensors for x in runs)
    assert all(torch.equal(x, b[part][name]) for part in a for name, x in a[part].items())


def test_workers_elsewhere_than_on_linux_are_sent_what_draws_the_noise():
    from conftest import TINY_RUN

    from minidiff.config import build, compose

    draw = build(compose("train", TINY_RUN)["task"]).draw
    sent = pickle.dumps(draw)
    assert len(sent) < 1000  # and not a network
    for mine, theirs in zip(draw([5, 2**40]), pickle.loads(sent)([5, 2**40]), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_F11_two_runs_on_a_gpu_are_equal_bit_for_bit(tmp_path):
    options = [*FAST, "steps=5", "device=cuda", "precision=bf16", "deterministic=true"]
    runs = [train(tmp_path / name, *options) for name in ("one", "two")]
    a, b = (checkpoint.load(x / "checkpoints" / "step_00000005", ["model", "ema"]).tensors for x in runs)
    assert all(torch.equal(x, b[part][name]) for part in a for name, x in a[part].items())


@pytest.mark.parametrize("drop_cond", [0.0, 1.0])
def test_F8_every_parameter_takes_part_whatever_is_dropped(drop_cond):
    from conftest import TINY_RUN

    from minidiff.config import build, compose
    from minidiff.data import Batch

    task = build(compose("train", [*TINY_RUN, f"drop_cond={drop_cond}"])["task"])
    batch = Batch(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), ["a star", "a red ring"], [0, 1], [])
    task.loss(batch)[0].backward()
    assert [name for name, p in task.model.named_parameters() if p.grad is None] == []


def test_G1_a_prompt_of_10_000_letters_is_drawn_and_captioned_in_no_time(tiny_run):
    import minidiff
    from minidiff.viz import grid

    pipe, prompt = minidiff.load(tiny_run, device="cpu"), "x" * 10_000
    image = pipe(prompt, steps=1)[0]
    assert pipe.text.tokenizer.lost(prompt) and grid([image], [prompt]).height < 3000


def test_E2_a_disk_without_room_for_one_checkpoint_is_said_before_training(tmp_path, monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setattr("minidiff.machine.shutil.disk_usage", lambda _: SimpleNamespace(free=4_000_000))
    with pytest.raises(MachineError, match="MD-ENV-005.*4 MiB free.*takes about 5"):  # 0.30 M parameters
        train(tmp_path, *FAST, "steps=1")
    assert not list(tmp_path.rglob("step_*"))


def test_blur_takes_its_share_of_the_samples_and_changes_no_other_draw():
    sharp, soft = (Draws(seed=1, drop_cond=0.1, blur=blur, shape=(1, 1, 1))(range(4000)) for blur in (0.0, 0.5))
    assert all(torch.equal(x, y) for x, y in zip(sharp[:3], soft[:3], strict=True))
    assert not sharp[3].any()
    spreads, keep = soft[3][soft[3] > 0], soft[2]
    assert len(spreads) / 4000 == pytest.approx(0.5, abs=0.03)
    assert BLUR[0] <= spreads.min() < 1.05 * BLUR[0] and 0.95 * BLUR[1] < spreads.max() <= BLUR[1]
    told, untold = ((soft[3][rows] > 0).double().mean().item() for rows in (keep, ~keep))
    assert told == pytest.approx(untold, abs=0.08)


@pytest.mark.parametrize(
    "recipe, share",
    [
        ("", 0.5),
        ("objective=flow process=flow", 0.5),
        ("objective=eps process=linear weighting=min_snr", 0.5),
        ("weighting=uniform", 0.5),
        ("objective=eps process=scaled_linear weighting=uniform", 0),  # DDPM's, and Stable Diffusion's
        ("objective=eps process=table weighting=uniform", 0),
        ("objective=v weighting=uniform", 0),
        ("objective=edm process=edm weighting=uniform", 0),
        ("objective=eps process=linear weighting=uniform blur=0.2", 0.2),
    ],
)
def test_blur_is_left_out_where_an_error_without_noise_would_outweigh_all(recipe, share):
    from conftest import TINY_RUN

    from minidiff.config import build, compose

    assert build(compose("train", [*TINY_RUN, *recipe.split()])["task"]).draw.blur == share


def test_the_network_is_shown_the_blurred_picture_and_asked_for_the_sharp_one(monkeypatch):
    from conftest import TINY_RUN

    from minidiff.config import build, compose
    from minidiff.data import Batch

    task = build(compose("train", [*TINY_RUN, "blur=0.5"])["task"])
    images = torch.randint(0, 256, (32, 3, 32, 32), dtype=torch.uint8)
    batch = Batch(images, ["a red star"] * 32, list(range(32)), [])
    calls = []
    monkeypatch.setattr(
        type(task.pipeline.denoiser), "loss", lambda self, x0, cond, t, eps, shown: calls.append((x0, shown)) or x0
    )
    task.loss(batch)
    ((x0, shown),) = calls
    spreads = task.draw(batch.index)[3]
    assert 0 < (spreads > 0).sum() < 32
    for image, x, seen, spread in zip(batch.x(), x0, shown, spreads, strict=True):
        assert torch.equal(task.pipeline.space.decode(x[None])[0], image)
        wanted = blurred(image[None], spread[None])[0]
        torch.testing.assert_close(task.pipeline.space.decode(seen[None])[0], wanted)
