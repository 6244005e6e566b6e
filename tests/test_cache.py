"""What was computed once is not computed again, and what lies on the disk is never believed unseen."""

from pathlib import Path

import pytest
import torch
from conftest import train
from test_space import kl

from minidiff import checkpoint, interop, text
from minidiff.cache import Cache, cache_folder, content_key
from minidiff.data import Batch
from minidiff.pipeline import Pipeline
from minidiff.space import Latents
from minidiff.tasks.diffusion import TextToImage


def key(i: int) -> bytes:
    return content_key(torch.tensor([i]))


def filled(folder: Path, n: int = 5) -> Cache:
    """Returns a cache of n vectors of different lengths, in one file."""
    cache = Cache(folder)
    for i in range(n):
        cache[key(i)] = torch.arange(i, 2 * i + 3, dtype=torch.float32)
    cache.flush()
    return cache


def test_vectors_come_back_bit_for_bit_to_every_process_that_opens_the_folder(tmp_path):
    a = filled(tmp_path)
    b = filled(tmp_path)  # as another process would, at the same time
    assert len(list(tmp_path.iterdir())) == 2 and (a.found, a.made, b.found) == (0, 5, 5)
    for cache in (a, b, Cache(tmp_path)):
        assert all(torch.equal(cache.get(key(i)), torch.arange(i, 2.0 * i + 3)) for i in range(5))
        assert cache.get(key(7)) is None
    a[key(9)] = torch.ones(2)
    assert torch.equal(a.get(key(9)), torch.ones(2)) and Cache(tmp_path).get(key(9)) is None  # not yet written
    (tmp_path / ".tmp-of-a-killed-process").write_bytes(b"half")
    assert Cache(tmp_path).found == 5


def test_C12_a_truncated_or_flipped_file_never_gives_a_wrong_vector_and_is_deleted(tmp_path):
    filled(tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    damaged = [whole[:n] for n in (0, 7, 100, len(whole) // 2, len(whole) - 1)]
    damaged += [whole[:i] + bytes([whole[i] ^ 4]) + whole[i + 1 :] for i in range(len(whole))]
    lost = 0
    for content in damaged:
        file.write_bytes(content)
        cache = Cache(tmp_path)
        rows = [cache.get(key(i)) for i in range(5)]
        assert all(x is None or torch.equal(x, torch.arange(i, 2.0 * i + 3)) for i, x in enumerate(rows))
        lost += any(x is None for x in rows)
        assert file.exists() == all(x is not None for x in rows)
    assert lost > 0.9 * len(damaged)
    again = filled(tmp_path)
    assert again.made == 5 and Cache(tmp_path).found == 5


def test_a_disk_that_refuses_is_said_and_costs_only_the_keeping(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    cache = filled(tmp_path)
    monkeypatch.setattr("minidiff.cache.write_tensors", full)
    cache[key(8)] = torch.ones(3)
    cache.flush()
    assert "No space left" in cache.trouble and cache.get(key(8)) is None and cache.get(key(4)) is not None
    monkeypatch.undo()
    fresh = Cache(tmp_path)
    fresh[key(8)], fresh[key(9)] = torch.tensor([float("nan")]), torch.ones(1)
    fresh.flush()
    assert Cache(tmp_path).get(key(8)) is None and Cache(tmp_path).get(key(9)) is not None


def test_the_folder_is_the_users_cache_unless_it_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("auto") == tmp_path / "minidiff" and cache_folder("none") is None
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder("auto") == Path.home() / ".cache" / "minidiff" and cache_folder("d/e") == Path("d/e")


# ------------------------------------------------------------------------------------------------ text embeddings

CAPTIONS = ["a red star", "", "two small blue rings on a navy background"]


def never(*_):
    raise AssertionError("it encodes again")


def tower(pad: str = "!", quick_gelu: bool = False) -> text.Tower:
    """Returns a small random tower, always the same, with the tokenizer of the padding token."""
    bpe = text.Tokenizer(text.TINY)._bpe
    special = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {special.get(piece, piece): i for i, piece in bpe.decoder.items()}
    tokenizer = text.TowerTokenizer(vocabulary, list(bpe.bpe_ranks), pad=pad, length=12)
    torch.manual_seed(0)
    shape = {"width": 16, "mlp_width": 32, "heads": 2, "layers": 1, "length": 12, "vocabulary": len(vocabulary)}
    return text.Tower(text.TowerShape(**shape, quick_gelu=quick_gelu), tokenizer)


@pytest.mark.parametrize("make", [text.tiny, tower])
def test_C12_a_caption_is_encoded_once_for_all_runs_with_the_same_bits(make, tmp_path, monkeypatch):
    plain, first = make()(CAPTIONS), make()
    cache = first.remember_in(tmp_path)
    made = first(CAPTIONS)
    cache.flush()
    second = make()
    assert second.remember_in(tmp_path).found == 3
    monkeypatch.setattr(second, "_encode", never)
    for cond in (made, second(CAPTIONS), second(CAPTIONS)):
        for port in ("tokens", "vector", "mask"):
            a, b = getattr(plain, port), getattr(cond, port)
            assert (a is b is None) or torch.equal(a, b), port
    with pytest.raises(AssertionError, match="again"):
        second(["another caption"])


def test_C12_another_encoder_layer_or_tokenizer_never_finds_the_embeddings(tmp_path):
    first = text.tiny()
    cache = first.remember_in(tmp_path)
    first(CAPTIONS)
    cache.flush()
    assert cache.made == 3
    for other in (text.tiny(layer=-2), text.TextEncoder(text.TINY)):  # another layer, other weights
        cache = other.remember_in(tmp_path)
        other(CAPTIONS)
        assert (cache.found, cache.made) == (0, 3)
    for quick_gelu in (False, True):  # the same weights, another activation
        encoder = tower(quick_gelu=quick_gelu)
        cache = encoder.remember_in(tmp_path)
        encoder(CAPTIONS)
        cache.flush()
        assert (cache.found, cache.made) == (0, 3)
    caches = []
    for pad in ("!", "<|endoftext|>"):  # the same weights, another tokenizer
        encoder = tower(pad)
        encoder._memory = text.Embeddings(Cache(tmp_path / "one"), encoder.tokenizer, 16)
        encoder(CAPTIONS)
        encoder._memory.cache.flush()
        caches.append(encoder._memory.cache)
    assert [x.made for x in caches] == [3, 3]


# ------------------------------------------------------------------------------------------------ latents


def batch(images: torch.Tensor) -> Batch:
    return Batch(images, [""] * len(images), list(range(len(images))), [])


def task(folder: Path | None) -> TextToImage:
    """Returns a task whose pipeline has a space and no network."""
    pipeline = Pipeline.__new__(Pipeline)
    pipeline.space, pipeline.text = Latents(kl(), 16), text.tiny()
    pipeline.denoiser = torch.nn.Linear(1, 1)  # which says where the device is
    made = TextToImage(pipeline, drop_cond=0.1, blur=0.5, seed=0)
    if folder is not None:
        made.remember_in(folder)
    return made


def test_C12_latents_are_known_by_the_pixels_and_the_autoencoder(tmp_path, monkeypatch):
    images = torch.randint(256, (9, 3, 16, 16), dtype=torch.uint8)
    expected = task(None)._x0(batch(images))
    first = task(tmp_path)
    assert torch.equal(first._x0(batch(images)), expected) and first.embeddings is None  # the tiny encoder is fast
    assert first.flush() == "9 latents were computed for the cache" and first.latents.made == 9
    second = task(tmp_path)
    assert "9 latents of earlier runs" in second.remember_in(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(second.pipeline.space, "code", never)
        assert torch.equal(second._x0(batch(images[[3, 1]])), expected[[3, 1]])
        with pytest.raises(AssertionError, match="again"):
            second._x0(batch(images.flip(3)[:1]))
    # what was measured comes after, so that another scale is no other cache
    second.pipeline.space.vae.scale *= 2
    torch.testing.assert_close(second._x0(batch(images)), 2 * expected)
    other = task(None)
    next(other.pipeline.space.vae.parameters()).data += 1
    other.pipeline.space = Latents(other.pipeline.space.vae, 16)
    assert "0 latents" in other.remember_in(tmp_path)


def test_C12_a_second_training_takes_latents_and_embeddings_from_the_first(tmp_path, monkeypatch, capsys):
    from minidiff.tasks import diffusion

    monkeypatch.setattr(diffusion, "WORTH", 0)
    interop.save_vae(kl(), tmp_path / "vae")
    options = ["space=latents", f"space.vae={tmp_path / 'vae'}", f"cache={tmp_path / 'cache'}", "net.channels=[16]"]
    options += ["net.attend=[true]"]
    one = train(tmp_path / "one", *options)
    shown = capsys.readouterr().out
    assert "0 captions and 0 latents of earlier runs" in shown and "latents were computed for the cache" in shown
    two = train(tmp_path / "two", *options)
    shown = capsys.readouterr().out
    assert " 0 latents of earlier runs" not in shown and "were computed for the cache" not in shown
    without = train(tmp_path / "without", *options, "cache=none")
    a, b, c = (
        checkpoint.load(x / "checkpoints" / "step_00000004", ["model"]).tensors["model"] for x in (one, two, without)
    )
    for name, x in a.items():
        assert torch.equal(x, b[name]), name
        torch.testing.assert_close(x, c[name], rtol=0, atol=1e-4)
    assert not [x for x in (tmp_path / "cache").rglob("*") if x.is_file() and x.suffix != ".safetensors"]
