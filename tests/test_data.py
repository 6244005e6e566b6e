import io
import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from minidiff import data
from minidiff.errors import DataError, InputError


def png(colour, size=(8, 8), mode="RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, "PNG")
    return file.getvalue()


def rows(n: int = 10, **columns) -> datasets.Dataset:
    """Row i is a grey picture of level i with the captions "i a", "i b"."""
    images = [{"bytes": png((i, i, i)), "path": None} for i in range(n)]
    table = {"image": images, "captions": [[f"{i} a", f"{i} b"] for i in range(n)]} | columns
    return datasets.Dataset.from_dict(table).cast_column("image", datasets.Image(decode=False))


def stream(n: int = 10, **options) -> data.CaptionedImages:
    return data.CaptionedImages(rows(n), "image", "captions", image_size=8, **options)


def take(batches, count):
    return [next(batches) for _ in range(count)]


def seen(samples, places) -> list[tuple[int, str]]:
    return [(int(samples[i][0][0, 0, 0]), samples[i][1]) for i in places]


def test_every_image_once_per_epoch_in_a_new_order_with_its_own_caption():
    samples = stream(10)
    epochs = [seen(samples, range(10 * e, 10 * e + 10)) for e in range(4)]
    for epoch in epochs:
        assert sorted(level for level, _ in epoch) == list(range(10))
        assert all(caption.startswith(f"{level} ") for level, caption in epoch)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert {caption[-1] for epoch in epochs for _, caption in epoch} == {"a", "b"}


def test_C4_caption_and_row_depend_on_seed_and_place_alone():
    places = [25, 3, 17]
    assert seen(stream(), places) == seen(stream(), places)
    assert seen(stream(), range(30)) != seen(stream(seed=1), range(30))
    fixed = stream(shuffle=False)
    assert seen(fixed, [0, 13]) == [(0, "0 a"), (3, "3 a")]


@pytest.mark.parametrize("workers", [0, 2])
def test_D6_a_stream_that_starts_later_goes_on_where_the_other_was(workers):
    whole = take(data.loader(stream(), 4, workers=workers), 6)
    late = take(data.loader(stream(), 4, start=12), 3)
    for a, b in zip(whole[3:], late, strict=True):
        assert (a.captions, a.index) == (b.captions, b.index)
        assert torch.equal(a.images, b.images)


def test_ranks_share_every_global_batch():
    one = take(data.loader(stream(), 4), 3)
    two = [take(data.loader(stream(), 2, rank=r, ranks=2), 3) for r in (0, 1)]
    for whole, a, b in zip(one, *two, strict=True):
        assert whole.index == a.index + b.index


def test_A3_a_batch_that_cannot_be_shared_out_is_refused_with_the_arithmetic():
    assert data.share(12, ranks=2, accumulate=3) == 2
    with pytest.raises(InputError, match="2 process.*=3 = 6 .* 6 and 12"):
        data.share(10, ranks=2, accumulate=3)


def test_batches_come_in_minus_one_to_one():
    batch = data.Batch(torch.tensor([0, 255], dtype=torch.uint8).reshape(1, 1, 1, 2).expand(1, 3, 1, 2), [""], [0], [])
    assert batch.x().unique().tolist() == [-1, 1]


@pytest.mark.parametrize(
    "mode, colour",
    [("RGBA", (255, 0, 0, 0)), ("LA", (0, 0)), ("P", 0)],
    ids=["RGBA", "LA", "P with a transparent index"],
)
def test_B6_transparency_shows_the_background_not_what_it_hides(mode, colour):
    file = io.BytesIO()
    picture = Image.new(mode, (8, 8), colour)
    picture.save(file, "PNG", **({"transparency": 0} if mode == "P" else {}))
    shown = data.load_image({"bytes": file.getvalue(), "path": None}, 8, (10, 200, 30))
    assert shown[:, 4, 4].tolist() == [10, 200, 30]


def test_B7_exif_orientation_is_applied_once():
    picture = Image.fromarray(np.tile(np.linspace(0, 255, 16, dtype=np.uint8)[None, :, None], (16, 1, 3)))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=100, exif=exif)
    shown = data.load_image({"bytes": file.getvalue(), "path": None}, 16, (255, 255, 255))
    assert shown[0, 8, 0] > 200 and shown[0, 8, -1] < 50


def test_pictures_are_scaled_by_the_short_side_and_cropped_in_the_centre():
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255
    file = io.BytesIO()
    Image.fromarray(wide).save(file, "PNG")
    assert data.load_image({"bytes": file.getvalue(), "path": None}, 10, (0, 0, 0)).min() > 250


def test_B1_B2_unreadable_images_give_way_to_the_next_row_and_are_named():
    good = rows(4)
    images = [*good["image"]]
    images[1] = {"bytes": b"<html>not a picture</html>", "path": None}
    images[2] = {"bytes": images[2]["bytes"][:40], "path": None}
    broken = datasets.Dataset.from_dict({"image": images, "captions": good["captions"]})
    broken = broken.cast_column("image", datasets.Image(decode=False))
    samples = data.CaptionedImages(broken, "image", "captions", image_size=8, shuffle=False)
    image, caption, _, skipped, row = samples[1]
    assert caption == "3 a" and image[0, 0, 0] == 3 and row == 3
    assert [text.split(":")[0] for text in skipped] == ["row 1", "row 2"]
    assert data.collate([samples[i] for i in range(4)]).skipped[0].startswith("row 1")


def test_B3_a_source_without_a_single_image_stops_in_words():
    images = [{"bytes": b"rubbish", "path": None}] * 3
    table = datasets.Dataset.from_dict({"image": images, "captions": ["a", "b", "c"]})
    samples = data.CaptionedImages(
        table.cast_column("image", datasets.Image(decode=False)), "image", "captions", image_size=8
    )
    with pytest.raises(DataError, match="None of 3 rows in succession"):
        samples[0]


@pytest.mark.parametrize("value", [None, "", "  \n", []])
def test_C2_a_row_without_words_trains_unconditionally(value):
    table = rows(1).remove_columns("captions").add_column("captions", [value])
    assert data.CaptionedImages(table, "image", "captions", image_size=8)[0][1] == ""


def test_C4_a_dictionary_of_captions_asks_for_a_column():
    table = rows(1).remove_columns("captions").add_column("captions", [{"en": "a", "de": "b"}])
    with pytest.raises(DataError, match="'de', 'en'"):
        data.CaptionedImages(table, "image", "captions", image_size=8)[0]


# ---------------------------------------------------------------------------------------------------- sources


@pytest.fixture
def parquet_file(tmp_path):
    table = rows(10, style=["x"] * 5 + ["y"] * 5).rename_columns({"image": "picture", "captions": "words"})
    table.to_parquet(tmp_path / "rows.parquet")
    return tmp_path / "rows.parquet"


def test_parquet_reads_any_column_names(parquet_file):
    source = data.parquet(str(parquet_file), image="picture", caption="words")
    assert len(source.train) + len(source.validation) == 10
    samples = data.CaptionedImages(source.train, source.image, source.caption, image_size=8)
    assert samples[0][1].split()[0] == str(int(samples[0][0][0, 0, 0]))


def test_parquet_splits_by_a_column(parquet_file):
    source = data.parquet(
        str(parquet_file), image="picture", caption="words", split_column="style", train_split="y", validation_split="x"
    )
    assert [c[0] for c in source.train["words"]] == [f"{i} a" for i in range(5, 10)]
    assert [c[0] for c in source.validation["words"]] == [f"{i} a" for i in range(5)]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"image": "picture", "caption": "word"}, "data.caption.*picture.*words.*Did you mean 'words'"),
        ({"image": "img", "caption": "words"}, "data.image.*Did you mean 'picture'"),
        (
            {"image": "picture", "caption": "words", "split_column": "style", "train_split": "z"},
            "data.train_split.*'x', 'y'",
        ),
    ],
)
def test_C1_a_missing_column_or_split_lists_what_is_there(parquet_file, options, words):
    with pytest.raises(DataError, match=words):
        data.parquet(str(parquet_file), **options)


def test_C8_nothing_to_read_is_said(tmp_path):
    with pytest.raises(DataError, match="No file matches"):
        data.parquet(str(tmp_path / "*.parquet"))
    with pytest.raises(DataError, match="not a folder"):
        data.folder(str(tmp_path / "none"))
    rows(1).select([]).to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(DataError, match="no rows"):
        data.parquet(str(tmp_path / "empty.parquet"))


def test_folder_reads_metadata_jsonl(tmp_path):
    lines = []
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(png((i, i, i)))
        lines.append(json.dumps({"file_name": f"{i}.png", "caption": f"{i} a"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    source = data.folder(str(tmp_path))
    samples = data.CaptionedImages(source.train, source.image, source.caption, image_size=8)
    assert all(caption == f"{level} a" for level, caption in seen(samples, range(3)))


def test_shapes_go_through_the_same_door():
    source = data.shapes(image_size=32, n=6, validation=2, seed=0)
    assert isinstance(source.train.features["image"], datasets.Image)
    from minidiff.shapes import WEIGHTS, example, render

    samples = data.CaptionedImages(source.train, source.image, source.caption, image_size=32, shuffle=False)
    for i in range(6):
        truth = example("train", i, 0, WEIGHTS)
        assert torch.equal(samples[i][0], torch.from_numpy(render(truth.scene, 32)).permute(2, 0, 1))
        assert samples[i][1] == truth.captions[1]  # the first is a prompt for tests
