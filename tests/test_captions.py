"""Captions as data sets have them."""

import math

import pytest

from minidiff.data.captions import texts
from minidiff.errors import DataError
from minidiff.text import tiny


@pytest.mark.parametrize("value", [None, "", " \t\n", [], [None, ""], math.nan, [math.nan], "\0\x07", b""])
def test_C2_no_words_are_the_empty_caption(value):
    assert texts(value) == [""]


@pytest.mark.parametrize(
    "value, expected",
    [
        (7, ["7"]),
        (1.5, ["1.5"]),
        (True, ["True"]),
        ("größer".encode(), ["größer"]),
        (["a", None, "b"], ["a", "b"]),
        (("a",), ["a"]),
        ([1, "x"], ["1", "x"]),
    ],
)
def test_C5_odd_types_become_texts(value, expected):
    assert texts(value) == expected


def test_C5_bytes_that_are_no_text_are_a_bad_row():
    with pytest.raises(UnicodeDecodeError):
        texts(b"\xff\xfe\xfa")


@pytest.mark.parametrize("value", [{"en": "a"}, [{"en": "a"}]])
def test_C4_a_dictionary_asks_for_a_key(value):
    with pytest.raises(DataError, match=r"MD-DATA-008.*\['en'\]"):
        texts(value)


@pytest.mark.parametrize(
    "value, expected",
    [
        ("a\0b\x1b[31mc", "ab[31mc"),
        ("a\u2028b\r\nc\xa0d", "a b c d"),
        ("\ud800lone", "lone"),
        ("a 👩‍🚀 שלום", "a 👩‍🚀 שלום"),
        ("<script>alert(1)</script> &amp;", "<script>alert(1)</script> &amp;"),
    ],
)
def test_C6_strange_characters_neither_stop_training_nor_disappear_without_need(value, expected):
    assert texts(value) == [expected]
    assert tiny()([expected]).tokens.isfinite().all()


def test_C3_long_captions_keep_their_end_token_and_are_reported_once(tmp_path, capsys):
    import datasets
    from conftest import train
    from test_data import png

    long = "a red star " * 40 + "and the lost end"
    encoder = tiny()
    ids = encoder.tokenizer([long])
    assert ids.max() == ids[0, -1] and encoder.tokenizer.lengths(ids).tolist() == [encoder.tokenizer.length]
    rows = {"image": [{"bytes": png((i, i, i)), "path": None} for i in range(40)], "captions": ["a star"] * 39 + [long]}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(tmp_path / "rows.parquet")
    small = ["steps=1", "batch_size=8", "image_size=16", "net.channels=[16]", "net.attend=[true]", "net.groups=4"]
    small += ["device=cpu", "precision=fp32", "workers=0", "sampling_steps=2", "data=parquet"]
    train(tmp_path, f"data.path={tmp_path}/rows.parquet", base=small)
    shown = capsys.readouterr().out
    assert shown.count("1 of 2 distinct captions are longer than") == 1 and "and the lost end'" in shown
