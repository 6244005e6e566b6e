import shutil

import pytest
import torch

from minidiff import text
from minidiff.errors import MachineError
from minidiff.resources import bundled
from minidiff.text import TINY, TextEncoder, Tokenizer, create_clip, tiny


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return tiny()


def test_tokens_mask_and_vector_are_openclips_own(encoder):
    captions = ["a red circle", "two small blue stars on a navy background"]
    cond = encoder(captions)
    clip, ids = encoder._clip, encoder.tokenizer(captions)
    vectors = clip.encode_text(ids, normalize=True)
    torch.testing.assert_close(cond.vector, vectors * vectors.shape[1] ** 0.5)
    # start, three words, end
    assert cond.mask.sum(1).tolist()[0] == 5
    # the caption's vector is the projected end token of the last layer
    ends = cond.tokens[torch.arange(2), cond.mask.sum(1) - 1] @ clip.text_projection
    torch.testing.assert_close(torch.nn.functional.normalize(ends, dim=-1), vectors, rtol=1e-4, atol=1e-5)


def test_tokens_come_from_the_layer_that_was_asked_for_and_the_vector_goes_if_it_is_not_wanted(encoder):
    captions, clip = ["a red circle", "two small blue stars on a navy background"], encoder._clip
    early = tiny(layer=-3, pooled=False)
    x = clip.token_embedding(encoder.tokenizer(captions)) + clip.positional_embedding
    for block in clip.transformer.resblocks[:2]:  # of four
        x = block(x, attn_mask=clip.attn_mask)
    cond = early(captions)
    torch.testing.assert_close(cond.tokens, clip.ln_final(x) * cond.mask[..., None], rtol=1e-4, atol=1e-5)
    assert cond.vector is None and early.vector_dim is None


def test_each_distinct_caption_is_encoded_once(encoder, monkeypatch):
    encoded = []
    original = encoder._encode
    monkeypatch.setattr(encoder, "_encode", lambda captions: encoded.extend(captions) or original(captions))
    first = encoder(["an unheard caption", "an unheard caption", "another one"])
    again = encoder(["another one", "an unheard caption"])
    assert encoded == ["an unheard caption", "another one"]
    assert torch.equal(first.tokens[2], again.tokens[0])


@pytest.mark.parametrize("pool", ["argmax", "eos"])
@pytest.mark.parametrize("causal", [True, False])
def test_a_caption_gets_the_places_it_fills_if_nobody_looks_at_the_rest(causal, pool):
    encoder = TextEncoder(TINY)  # random weights
    if not causal:
        encoder._clip.attn_mask = None
    encoder._clip.text_pool_type, encoder._clip.text_eos_id = pool, encoder.tokenizer([""]).max().item()
    captions = [" ".join(["star"] * n) for n in (1, 14, 15, 30, 40)]
    places = [encoder._tokenize(caption).shape[1] for caption in captions]
    assert places == ([16, 16, 32, 32, 32] if causal else [32] * 5)
    ids, cond = encoder.tokenizer(captions), encoder(captions)
    whole = encoder._clip.forward_intermediates(text=ids, text_indices=1, normalize_intermediates=True)
    torch.testing.assert_close(cond.vector, whole["text_features"] * cond.vector.shape[1] ** 0.5)
    torch.testing.assert_close(cond.tokens, whole["text_intermediates"][-1] * cond.mask[..., None])


def test_expected_captions_fill_up_batches_and_come_out_the_same(monkeypatch):
    patient, hasty = tiny(), tiny()
    captions = [f"{number} red circles" for number in range(text.BATCH + 3)]
    patient.expect(captions)
    patient(["a blue star", captions[0]])
    monkeypatch.setattr(patient, "_encode", None)  # what is remembered needs no transformer
    filled = text.BATCH - 2
    together = patient(captions[:filled])
    for i, caption in enumerate(captions[:filled]):
        assert torch.equal(together.tokens[i], hasty([caption]).tokens[0])
        assert torch.equal(together.vector[i], hasty([caption]).vector[0])


def test_expected_captions_wait_for_a_batch_of_their_length(monkeypatch):
    patient, hasty, batches = tiny(), tiny(), []
    original = patient._encode
    monkeypatch.setattr(patient, "_encode", lambda captions: batches.append(list(captions)) or original(captions))
    short, long = ([f"{n} red circles" + more for n in range(20)] for more in ("", " and stars" * 8))
    patient.expect([caption for pair in zip(short, long, strict=True) for caption in pair])
    patient(["a blue star", long[3]])
    assert [sorted(batch) for batch in batches] == [
        sorted(["a blue star", *short[:15]]),
        sorted([long[3], *long[:3], *long[4:16]]),
    ]
    batches.clear()
    both = patient([*short, *long])
    assert batches == [short[15:], long[16:]]
    for i, caption in enumerate([*short, *long]):
        assert torch.equal(both.tokens[i], hasty([caption]).tokens[0])


def test_the_memory_cannot_be_written_through(encoder):
    cond = encoder(["a red circle"])
    before = cond.tokens.clone()
    cond.tokens.zero_()
    assert torch.equal(encoder(["a red circle"]).tokens, before)


def test_a_caption_does_not_depend_on_its_batch(encoder):
    alone = TextEncoder(**encoder.recipe)(["a green ring"])
    among = TextEncoder(**encoder.recipe)(["two blue stars", "a green ring"])
    torch.testing.assert_close(alone.vector[0], among.vector[1], rtol=1e-5, atol=1e-5)


def test_the_empty_prompt_is_start_and_end(encoder):
    assert encoder([""]).mask.sum().item() == 2


def test_C3_long_captions_keep_their_end_token_and_say_what_is_lost():
    tokenizer = Tokenizer(TINY)
    caption = " ".join(["star"] * (tokenizer.length - 2) + ["lost", "words"])
    ids = tokenizer([caption])
    assert ids.shape == (1, tokenizer.length)
    assert ids[0, -1] == ids.max() == tokenizer([""]).max()
    assert tokenizer.lost(caption) == "lost words"
    assert tokenizer.lost("a short one") == ""


def test_layers_differ_and_so_do_identities(encoder):
    before_last = tiny(layer=-2)
    assert before_last.identity != encoder.identity
    assert not torch.allclose(before_last(["a star"]).tokens, encoder(["a star"]).tokens)
    assert torch.equal(before_last(["a star"]).vector, encoder(["a star"]).vector)


def test_identity_follows_the_weights(encoder):
    assert tiny().identity == encoder.identity
    assert text.TextEncoder(TINY).identity != encoder.identity  # random weights


def test_pretrained_weights_without_a_network_say_what_to_do(monkeypatch):
    import open_clip

    def unreachable(*_, **__):
        raise RuntimeError("cannot reach the hub")

    monkeypatch.setattr(open_clip, "create_model", unreachable)
    with pytest.raises(MachineError, match="internet.*text=tiny"):
        create_clip("ViT-B-32", "laion2b_s34b_b79k")


@pytest.mark.parametrize("name", ["openclip_b32", "openclip_l14", "openclip_h14"])
def test_the_named_pretrained_encoders_exist_in_openclip(name):
    import open_clip
    from omegaconf import OmegaConf

    from minidiff.config import CONF

    conf = OmegaConf.load(CONF / "text" / f"{name}.yaml")
    assert conf.pretrained in open_clip.list_pretrained_tags_by_model(conf.model)


def test_E5_a_caption_has_the_same_bits_whatever_it_is_encoded_with():
    captions = [f"a {size} {colour} star" for size in ("small", "large") for colour in ("red", "green", "blue", "navy")]
    together = tiny()(captions)
    for order in (range(8), (5, 2), (7,), (3, 1, 0, 2, 6)):
        fresh = tiny()
        cond = fresh([captions[i] for i in order])
        for k, i in enumerate(order):
            assert torch.equal(cond.tokens[k], together.tokens[i]) and torch.equal(cond.vector[k], together.vector[i])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tiny()(captions).tokens, together.tokens)


@pytest.fixture
def theirs(tmp_path, monkeypatch, no_network):
    """Weights that OpenCLIP knows by the tag `theirs` and finds on the hub, an empty cache, and no network."""
    import huggingface_hub
    import open_clip

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, TINY, {"theirs": {"hf_hub": "owner/clip/", "url": ""}})
    return no_network


def test_D5_offline_weights_in_the_cache_load_without_a_request(theirs, tmp_path, encoder):
    snapshot = tmp_path / "models--owner--clip" / "snapshots" / "0123abc"
    (snapshot.parents[1] / "refs").mkdir(parents=True)
    (snapshot.parents[1] / "refs" / "main").write_text(snapshot.name)
    snapshot.mkdir(parents=True)
    shutil.copy(bundled("clip_shapes") / "model.safetensors", snapshot / "open_clip_model.safetensors")
    cached = TextEncoder(TINY, pretrained="theirs")
    assert cached.identity == encoder.identity and theirs == []
    assert torch.equal(cached(["a red circle"]).tokens, encoder(["a red circle"]).tokens)


def test_D5_offline_weights_that_are_not_there_are_named_with_the_command_that_fetches_them(theirs):
    with pytest.raises(MachineError, match="MD-TEXT-001.*'theirs'") as e:
        TextEncoder(TINY, pretrained="theirs")
    assert "`hf download owner/clip open_clip_model.safetensors`" in str(e.value)
    assert e.value.exit_code == 6 and theirs == []


@pytest.mark.parametrize("name", ["openclip_b32", "openclip_l14", "openclip_h14"])
def test_D5_the_pretrained_encoders_lie_on_the_hub(name):
    import open_clip

    from minidiff.config import compose

    recipe = compose("train", [f"text={name}"])["text"]
    place = open_clip.get_pretrained_cfg(recipe["model"], recipe["pretrained"])["hf_hub"]
    assert place.startswith("laion/") and place.endswith("/")  # so that the command above names their file
