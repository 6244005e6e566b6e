"""Captions as data sets have them."""

import datetime
import math

import pytest

from minidiff.data import CaptionedImages, parquet, treat_empty_captions
from minidiff.data.captions import texts
from minidiff.errors import DataError, InputError
from minidiff.text import tiny


@pytest.mark.parametrize(
    "value", [None, "", " \t\n", [], [None, ""], math.nan, [math.nan], "\0\x07", b"", [[], [None]]]
)
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
        ([["a", "b"], [], ["c"]], ["a", "b", "c"]),
    ],
)
def test_C5_odd_types_become_texts(value, expected):
    assert texts(value) == expected


def test_C5_bytes_that_are_no_text_are_a_bad_row():
    with pytest.raises(UnicodeDecodeError):
        texts(b"\xff\xfe\xfa")


COLUMNS = {
    "int": ([3, 0, -1, 12], ["3", "0", "-1", "12"], 0, 0),
    "float": ([1.5, math.nan, None, 2.0], ["1.5", "", "", "2.0"], 2, 0),
    "bool": ([True, False, None, True], ["True", "False", "", "True"], 1, 0),
    "bytes": ([b"a star", "größer".encode(), b"\xff\xfe", b""], ["a star", "größer", "", ""], 1, 1),
    "lists": ([["a", None], [], None, ["b"]], ["a", "", "", "b"], 2, 0),
    "date": ([datetime.date(2020, 1, k) for k in (1, 2, 3, 4)], [f"2020-01-0{k}" for k in (1, 2, 3, 4)], 0, 0),
}


@pytest.mark.parametrize("column, expected, empty, bad", COLUMNS.values(), ids=COLUMNS.keys())
def test_C2_C5_columns_of_any_type_are_read_and_what_they_lack_is_counted(column, expected, empty, bad, tmp_path):
    source = odd_source(tmp_path, column)
    samples = CaptionedImages(source.train, source.image, source.caption, image_size=8, shuffle=False)
    read = [samples[i] for i in range(4)]
    assert [s.caption for s in read] == expected  # a bad row gives way to the next one
    assert sum(len(s.skipped) for s in read) == bad
    known = samples.all_captions()
    assert samples.without_caption == empty and set(known) == set(expected) | ({""} if empty else set())
    assert tiny()(known).tokens.isfinite().all()


def odd_source(folder, column):
    """A parquet file whose four rows have these captions, to train on and again to validate."""
    import datasets
    from test_data import png

    images = [{"bytes": png((i, i, i)), "path": None} for i in range(4)]
    table = {"image": images * 2, "captions": [*column, *column], "s": ["train"] * 4 + ["test"] * 4}
    rows = datasets.Dataset.from_dict(table).cast_column("image", datasets.Image())
    rows.to_parquet(folder / "rows.parquet")
    return parquet(str(folder / "rows.parquet"), split_column="s")


def test_C2_rows_without_words_are_kept_left_out_or_refused(tmp_path):
    source = odd_source(tmp_path, [" ", "a", None, "b"])
    assert treat_empty_captions(source, "unconditional") is source
    dropped = treat_empty_captions(source, "drop")
    assert dropped.train["captions"][:] == dropped.validation["captions"][:] == ["a", "b"]
    assert dropped.remarks == ("2 of 4 rows have no caption and were left out",)
    assert dropped.fingerprint() != source.fingerprint()  # resuming compares
    with pytest.raises(DataError, match="MD-DATA-017.*2 of 4 .*'captions'.*empty_caption=raise") as e:
        treat_empty_captions(source, "raise")
    assert e.value.exit_code == 3
    nothing = odd_source(tmp_path, ["", None, " ", None])
    with pytest.raises(DataError, match="MD-DATA-017.*4 of 4 .*empty_caption=drop"):
        treat_empty_captions(nothing, "drop")
    whole = odd_source(tmp_path, ["a", "b", "c", "d"])
    assert treat_empty_captions(whole, "raise").fingerprint() == whole.fingerprint()


def test_C2_training_counts_them_and_the_option_is_heard(tmp_path, capsys):
    from conftest import train

    odd_source(tmp_path, ["a star", "", None, "a ring"])
    small = ["steps=1", "batch_size=4", "image_size=16", "net.channels=[16]", "net.attend=[true]", "net.groups=4"]
    small += ["device=cpu", "precision=fp32", "workers=0", "sampling_steps=2", "data=parquet", "data.split_column=s"]
    small += [f"data.path={tmp_path}/rows.parquet"]
    train(tmp_path, base=small)
    assert "2 of 4 rows have no caption and train unconditionally" in capsys.readouterr().out
    train(tmp_path, "empty_caption=drop", "name=dropped", base=small)
    shown = capsys.readouterr().out
    assert "2 of 4 rows have no caption and were left out" in shown and "2 images to train on" in shown
    with pytest.raises(InputError, match="MD-CONF-005.*empty_caption=x must be one of unconditional, drop, raise"):
        train(tmp_path, "empty_caption=x", "name=x", base=small)


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
