"""Text towers against transformers: random weights, tiny widths, the standard vocabulary and one of our own."""

import functools
import json

import pytest
import torch

from minidiff.cond import Cond
from minidiff.errors import InputError
from minidiff.interop.text import load_text, save_text
from minidiff.text import Tower

transformers = pytest.importorskip("transformers")

START, END = "<|startoftext|>", "<|endoftext|>"
CAPTIONS = [
    "",
    "a photo of an astronaut riding a horse on mars",
    "  Ünïcode,   CAPITALS;\tand 1234 don't matter… <|endoftext|> it goes on! wow!!",
    "日本語 🙂 & &amp; ’quoted’",
    "star " * 100,
]
SD1 = {"hidden_act": "quick_gelu", "eos_token_id": 2}  # as in its config, which counts from an older transformers
SD2 = {"hidden_act": "gelu", "num_hidden_layers": 3}
PLAIN, PROJECTED = "CLIPTextModel", "CLIPTextModelWithProjection"
every_tower = pytest.mark.parametrize(
    "kind, pad, config",
    [(PLAIN, END, SD1), (PLAIN, "!", SD2), (PROJECTED, END, {"projection_dim": 24}), (PROJECTED, "!", SD2)],
    ids=["sd1", "sd2", "projected", "projected_sd2"],
)


@functools.cache
def standard_vocabulary():
    import open_clip

    bpe = open_clip.SimpleTokenizer()
    rename = {"<start_of_text>": START, "<end_of_text>": END}
    return {rename.get(piece, piece): i for piece, i in bpe.encoder.items()}, list(bpe.bpe_ranks)


def own_vocabulary():
    letters = "abcdefghijklmnopqrstuvwxyz!"
    merges = [("s", "t"), ("a", "r</w>"), ("st", "ar</w>"), ("o", "n</w>")]
    pieces = [*letters, *(x + "</w>" for x in letters), *("".join(pair) for pair in merges), START, END]
    return {piece: i for i, piece in enumerate(pieces)}, merges


def folder(tmp_path, kind, pad=END, vocabulary=None, modern=False, **config):
    """Writes text_encoder/ and tokenizer/ with transformers; returns its model and tokenizer."""
    pieces, merges = vocabulary or standard_vocabulary()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    special = {"vocab_size": len(pieces), "bos_token_id": pieces[START], "eos_token_id": pieces[END]}
    torch.manual_seed(0)
    model = getattr(transformers, kind)(transformers.CLIPTextConfig(**(sizes | special | config))).eval()
    for x in model.parameters():  # norms and biases too, so that none can be forgotten
        x.data = 0.3 * torch.randn(x.shape)
    model.save_pretrained(tmp_path / "text_encoder")
    place = tmp_path / "tokenizer"
    place.mkdir(exist_ok=True)
    (place / "vocab.json").write_text(json.dumps(pieces), encoding="utf-8")
    lines = "".join(f"{a} {b}\n" for a, b in merges)
    (place / "merges.txt").write_text("#version: 0.2\n" + lines, encoding="utf-8")
    named = {"bos_token": START, "eos_token": END, "unk_token": END}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": END} | named
    (place / "tokenizer_config.json").write_text(json.dumps(settings))
    (place / "special_tokens_map.json").write_text(json.dumps(named | {"pad_token": pad}))
    tokenizer = transformers.CLIPTokenizer.from_pretrained(place)
    if modern:
        for file in place.iterdir():
            file.unlink()
        tokenizer.save_pretrained(place)
        assert not (place / "vocab.json").exists()
    return model, tokenizer


def ids_of(tokenizer, captions):
    padded = tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    return padded.input_ids


def said(model, ids):
    """Returns transformers' tokens and vectors, without a mask, as diffusers asks for them."""
    with torch.no_grad():
        out = model(input_ids=ids)
    return out.last_hidden_state, out.text_embeds if "text_embeds" in out else out.pooler_output


@every_tower
def test_tokens_and_vectors_are_transformers(tmp_path, kind, pad, config):
    model, tokenizer = folder(tmp_path, kind, pad, **config)
    tower = load_text(tmp_path)
    ids = ids_of(tokenizer, CAPTIONS)
    assert torch.equal(tower.tokenizer(CAPTIONS), ids)
    assert ids[0, -1] == (49407 if pad == END else 0)
    tokens, vectors = said(model, ids)
    cond = tower(CAPTIONS)
    assert cond.mask is None and cond.tokens.shape == (5, 77, 32)
    torch.testing.assert_close(cond.tokens, tokens, rtol=0, atol=1e-5)
    torch.testing.assert_close(cond.vector, vectors, rtol=0, atol=1e-5)
    assert tower.token_dim == 32 and tower.vector_dim == vectors.shape[1]


@pytest.mark.parametrize("modern", [False, True], ids=["vocab.json", "tokenizer.json"])
@pytest.mark.parametrize("pad", [END, "!"])
def test_a_folder_may_have_a_vocabulary_of_its_own(tmp_path, pad, modern):
    model, tokenizer = folder(tmp_path, PLAIN, pad, own_vocabulary(), modern=modern)
    tower = load_text(tmp_path)
    captions = ["a star on a star", "7 stars! on Mars", "é"]
    ids = ids_of(tokenizer, captions)
    assert torch.equal(tower.tokenizer(captions), ids)
    # two of the pieces of "a star" are one letter and one word
    assert ids[0, 1:3].tolist() == [tower.tokenizer.vocabulary["a</w>"], tower.tokenizer.vocabulary["star</w>"]]
    torch.testing.assert_close(tower(captions).tokens, said(model, ids)[0], rtol=0, atol=1e-5)


@every_tower
def test_what_is_saved_is_the_same_to_the_bit_and_transformers_loads_it(tmp_path, kind, pad, config):
    model, tokenizer = folder(tmp_path / "theirs", kind, pad, **config)
    tower = load_text(tmp_path / "theirs")
    save_text(tower, tmp_path / "ours")
    again = load_text(tmp_path / "ours")
    assert again.shape == tower.shape and again.identity == tower.identity
    for name, x in tower.weights.items():
        assert torch.equal(again.weights[name], x)
    assert torch.equal(again(CAPTIONS).tokens, tower(CAPTIONS).tokens)
    ours, info = getattr(transformers, kind).from_pretrained(
        tmp_path / "ours" / "text_encoder", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for (name, x), (_, y) in zip(model.state_dict().items(), ours.state_dict().items(), strict=True):
        assert torch.equal(x, y), name
    bpe = transformers.CLIPTokenizer.from_pretrained(tmp_path / "ours" / "tokenizer")
    assert torch.equal(ids_of(bpe, CAPTIONS), ids_of(tokenizer, CAPTIONS))


def test_half_precision_is_read_as_float32(tmp_path):
    model, _ = folder(tmp_path, PLAIN)
    model.half().save_pretrained(tmp_path / "text_encoder")
    tower = load_text(tmp_path)
    assert {x.dtype for x in tower.weights.values()} == {torch.float32}
    assert torch.equal(tower.weights["positional_embedding"], model.embeddings.position_embedding.weight.float())


def test_it_plugs_in_where_openclips_encoders_do(tmp_path, monkeypatch):
    folder(tmp_path, PLAIN, "!")
    tower, encoded = load_text(tmp_path), []
    original = tower._encode
    monkeypatch.setattr(tower, "_encode", lambda captions: encoded.extend(captions) or original(captions))
    cond, null = tower(["a star", "a star", "a moon"]), tower([""])
    assert encoded == ["a star", "a moon", ""]
    both = Cond.cat([cond, null.repeat(3)])
    assert both.tokens.shape == (6, 77, 32) and both.mask is None
    cond.tokens.zero_()
    assert tower(["a star"]).tokens.abs().sum() > 0
    assert isinstance(tower.to("cpu"), Tower)
    assert tower.tokenizer.lost("star " * 75 + "lost words") == "lost words"
    assert tower.tokenizer.lost("a star") == ""


def test_identity_follows_weights_and_padding(tmp_path):
    folder(tmp_path / "a", PLAIN)
    folder(tmp_path / "b", PLAIN, "!")
    a, b = load_text(tmp_path / "a"), load_text(tmp_path / "b")
    assert a.identity != b.identity
    before = a.identity
    a.load_weights({name: x + 1 for name, x in a.weights.items()})
    assert a.identity != before


@pytest.mark.parametrize(
    "damage, code, words",
    [
        ({"hidden_act": "relu"}, "MD-INTEROP-402", "hidden_act='relu'"),
        ({"architectures": ["T5EncoderModel"]}, "MD-INTEROP-402", "T5EncoderModel"),
        ({"num_hidden_layers": 5}, "MD-INTEROP-403", "missing: encoder.layers.4"),
        ({"num_hidden_layers": 3}, "MD-INTEROP-403", "not in the config: encoder.layers.3"),
        ({"intermediate_size": 64}, "MD-INTEROP-403", "instead of \\[64, 32\\]"),
        ({"vocab_size": 100}, "MD-INTEROP-404", "no id above 99"),
    ],
)
def test_a_tower_that_is_none_of_ours_is_refused_in_words(tmp_path, damage, code, words):
    folder(tmp_path, PLAIN)
    file = tmp_path / "text_encoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | damage))
    with pytest.raises(InputError, match=words) as error:
        load_text(tmp_path)
    assert error.value.code == code


@pytest.mark.parametrize(
    "missing", ["text_encoder/config.json", "text_encoder/model.safetensors", "tokenizer/merges.txt"]
)
def test_missing_files_are_named(tmp_path, missing):
    folder(tmp_path, PLAIN)
    (tmp_path / missing).unlink()
    (tmp_path / "text_encoder" / "pytorch_model.bin").write_bytes(b"\x80\x02.")  # nobody opens it
    with pytest.raises(InputError, match="MD-INTEROP-401") as error:
        load_text(tmp_path)
    assert missing in str(error.value)


def test_padding_that_the_vocabulary_lacks_is_refused(tmp_path):
    folder(tmp_path, PLAIN)
    (tmp_path / "tokenizer" / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "<pad>"}}))
    with pytest.raises(InputError, match="MD-INTEROP-404.*<pad>"):
        load_text(tmp_path)
