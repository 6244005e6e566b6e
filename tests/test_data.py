import io
import json
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from minidiff import data
from minidiff.errors import DataError, InputError, MachineError


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


def test_rows_that_belong_together_are_shuffled_as_one():
    samples = stream(14, seed=3, together=4)
    epochs = [[samples[14 * e + i].row for i in range(14)] for e in range(5)]
    for order in epochs:
        assert sorted(order) == list(range(14))
        groups = [order[i : i + 4] for i in (0, 4, 8)]
        assert sorted(groups) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert len({tuple(order) for order in epochs}) > 1


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


# ---------------------------------------------------------------------------------------------------- what goes wrong


def broken(n: int, bad: set[int]) -> datasets.Dataset:
    """Like `rows`, but the pictures in `bad` are not pictures."""
    table = rows(n)
    images = [{"bytes": b"rubbish", "path": f"p{i}.png"} if i in bad else x for i, x in enumerate(table["image"])]
    made = datasets.Dataset.from_dict({"image": images, "captions": table["captions"]})
    return made.cast_column("image", datasets.Image(decode=False))


def test_B1_a_bad_row_is_always_replaced_by_the_same_one_and_named_with_its_path():
    samples = data.CaptionedImages(broken(10, {4}), "image", "captions", image_size=8, seed=3)
    again = data.CaptionedImages(broken(10, {4}), "image", "captions", image_size=8, seed=3)
    used = [samples[i].row for i in range(10)]
    assert used == [again[i].row for i in reversed(range(10))][::-1] and sorted(used) == [
        *range(4),
        *[5] * 2,
        *range(6, 10),
    ]
    (told,) = {text for i in range(10) for text in samples[i].skipped}
    assert told.startswith("row 4 (p4.png): not a picture in PNG")


def test_B1_the_first_bad_row_is_said_and_then_every_thousandth():
    bad = data.BadRows(rows=100_000, share=0.5)
    said = [text for i in range(2500) for text in bad.note([f"row {i}: truncated"] * 2)]
    assert [text.split()[3] for text in said] == ["0:", "1000:", "2000:"] and len(bad) == 2500


def test_B3_more_bad_rows_than_allowed_stop_with_the_reasons_counted():
    bad = data.BadRows(rows=1000, share=0.01)
    for i in range(10):
        bad.note([f"row {i}: {'truncated' if i % 3 else 'too small (1×1)'}"])
    with pytest.raises(
        DataError, match=r"MD-DATA-011.*11 of 1000.*7 × truncated \(such as row 1\); 4 × too small"
    ) as e:
        bad.note(["row 99: truncated"])
    assert e.value.exit_code == 3


def test_B3_training_stops_at_the_budget_and_says_the_rest_below_it(tmp_path, capsys):
    from conftest import train

    small = ["batch_size=8", "image_size=16", "net.channels=[16]", "net.attend=[true]", "net.groups=4", "device=cpu"]
    small += ["precision=fp32", "sampling_steps=2", "data=parquet", "workers=0", "data.split_column=s"]
    for name, bad in (("few", {3}), ("many", {3, 4, 9})):
        table = broken(40, bad).add_column("s", ["train"] * 36 + ["test"] * 4)
        table.to_parquet(tmp_path / f"{name}.parquet")
    train(tmp_path, f"data.path={tmp_path}/few.parquet", "steps=5", base=small)
    shown = capsys.readouterr().out
    assert shown.count("skipped row 3 (p3.png)") == 1 and "1 row(s) could not be read: 1 × not a picture" in shown
    with pytest.raises(DataError, match="MD-DATA-011.*max_bad=0.01"):
        train(tmp_path, f"data.path={tmp_path}/many.parquet", "steps=5", "name=many", base=small)
    train(tmp_path, f"data.path={tmp_path}/many.parquet", "steps=5", "name=more", "max_bad=0.1", base=small)


def test_B3_a_good_row_is_not_searched_for_for_ever():
    samples = data.CaptionedImages(broken(500, set(range(400))), "image", "captions", image_size=8, shuffle=False)
    with pytest.raises(DataError, match="MD-DATA-007.*None of 100 rows in succession"):
        samples[0]
    assert samples[310].row == 400


def test_C7_fewer_images_than_a_batch_still_train_each_once_per_epoch():
    batches = take(data.loader(stream(3), 8), 3)
    assert sorted(row for batch in batches for row in batch.rows) == sorted([0, 1, 2] * 8)


class Fails(data.CaptionedImages):
    def _read(self, row):
        if row == 5:
            raise RuntimeError("the cable was pulled")
        return super()._read(row)


@pytest.mark.parametrize("workers, who", [(0, "the main process"), (1, "worker 0")])
def test_D1_an_error_in_a_worker_comes_out_in_words_and_nobody_is_left(workers, who):
    import multiprocessing

    samples = Fails(rows(8), "image", "captions", image_size=8, shuffle=False)
    batches = data.loader(samples, 2, workers=workers)
    assert [b.rows for b in take(batches, 2)] == [[0, 1], [2, 3]]
    with pytest.raises(
        DataError, match=rf"MD-DATA-010.*{who} could not read sample 5.*RuntimeError: the cable was pulled"
    ):
        next(batches)
    assert multiprocessing.active_children() == []


class Dies(data.CaptionedImages):
    def _read(self, row):
        if row == 5:
            os.kill(os.getpid(), 9)
        return super()._read(row)


def test_D2_a_killed_worker_is_said_in_words():
    samples = Dies(rows(8), "image", "captions", image_size=8, shuffle=False)
    with pytest.raises(MachineError, match="MD-DATA-012.*DataLoader worker.*workers=0") as e, data.dead_workers():
        take(data.loader(samples, 2, workers=1), 4)
    assert e.value.exit_code == 6
    with pytest.raises(RuntimeError, match="something else"), data.dead_workers():
        raise RuntimeError("something else")


@pytest.mark.parametrize(
    "error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()], ids=["reset", "closed"]
)
def test_D2_a_worker_that_dies_while_it_sends_is_said_in_words(error, monkeypatch):
    def broken(*_, **__):
        yield data.collate([stream()[0]])
        raise error

    monkeypatch.setattr(data.batches, "DataLoader", broken)
    with pytest.raises(MachineError, match="MD-DATA-012.*DataLoader worker.*workers=0"), data.dead_workers():
        take(data.loader(stream(), 1, workers=1), 2)


def test_D3_what_a_worker_gets_can_be_sent_to_a_fresh_process():
    """macOS, Windows and Python 3.14 start workers anew: everything travels by pickle, and lambdas cannot."""
    from multiprocessing.reduction import ForkingPickler

    from minidiff.data.batches import _as_it_is, _Reader, _start_worker

    reader, *functions = ForkingPickler.loads(ForkingPickler.dumps([_Reader(stream()), _as_it_is, _start_worker]))
    assert reader[[3, 4]].rows == [stream()[3].row, stream()[4].row] and len(functions) == 2
    error = ForkingPickler.loads(ForkingPickler.dumps(DataError("MD-DATA-007", "none")))
    assert (error.code, str(error)) == ("MD-DATA-007", "[MD-DATA-007] none")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_D3_workers_that_start_anew_read_what_the_main_process_reads(method):
    import multiprocessing

    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {method}")
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(method, force=True)
    try:
        batches = data.loader(stream(), 4, workers=2)
        there = take(batches, 5)
        batches.close()
    finally:
        multiprocessing.set_start_method(before, force=True)
    for a, b in zip(there, take(data.loader(stream(), 4), 5), strict=True):
        assert (a.captions, a.index, a.rows) == (b.captions, b.index, b.rows) and torch.equal(a.images, b.images)


def test_D8_random_numbers_are_distinct_for_every_sample_and_the_same_on_every_rank():
    from minidiff.seeds import generator

    draws = {float(torch.rand((), generator=generator(0, "noise", i))) for i in range(2000)}
    assert len(draws) == 2000
    torch.manual_seed(1)  # nobody's global state matters
    np.random.seed(1)
    first = [b.captions for b in take(data.loader(stream(), 2), 6)]
    np.random.seed(2)
    assert first == [b.captions for b in take(data.loader(stream(), 2, workers=2), 6)]


# ---------------------------------------------------------------------------------------------------- folders, the hub


def image_folder(root, names, lines):
    root.mkdir(exist_ok=True)
    for name in names:
        (root / name).write_bytes(png((9, 9, 9)))
    (root / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": n, "caption": "x"}) for n in lines))
    return root


OUTSIDE = ["../secret.png", "/etc/hostname", "a/../../secret.png", "..\\secret.png", "file:///etc/hostname"]
OUTSIDE += ["https://example.org/x.png", "link.png", "x\0.png", "hf://datasets/a/b.png", "./../secret.png"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_T6_metadata_cannot_name_a_file_outside_of_its_folder(name, tmp_path):
    (tmp_path / "secret.png").write_bytes(png((1, 1, 1)))
    root = image_folder(tmp_path / "d", ["0.png"], ["0.png", name])
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(DataError, match="MD-DATA-015.*line 2"):
        data.folder(str(root))


def test_C9_lines_without_picture_and_pictures_without_line_are_counted(tmp_path):
    root = image_folder(tmp_path / "d", ["0.png", "1.png", "2.png"], ["0.png", "1.png", "gone.png", "lost.png"])
    remarks = data.sources._check_metadata(root)
    assert any("1 pictures have no line" in x and "2.png" in x for x in remarks)
    assert any("2 lines name no picture" in x and "gone.png" in x for x in remarks)


def test_C8_an_empty_folder_and_broken_metadata_are_said_in_words(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="MD-DATA-014.*metadata.jsonl"):
        data.folder(str(tmp_path / "empty"))
    root = image_folder(tmp_path / "d", ["0.png"], ["0.png"])
    (root / "metadata.jsonl").write_text("{not json")
    with pytest.raises(DataError, match="MD-DATA-014.*line 1"):
        data.folder(str(root))


def test_C1_a_column_that_holds_no_pictures_is_said(parquet_file):
    with pytest.raises(DataError, match="MD-DATA-013.*'words'"):
        data.parquet(str(parquet_file), image="words", caption="style")


def test_C11_T5_T18_only_builders_that_cannot_run_code_are_used(tmp_path, monkeypatch):
    class Builder:
        base_path = "hf://datasets/owner/name@0123456789abcdef"

        def download_and_prepare(self):
            (tmp_path / "marker").touch()

        def as_dataset(self, split):
            if split != "train":
                raise ValueError(f"Unknown split '{split}'. Should be one of ['train'].")
            return rows(40).rename_column("captions", "text")

    asked = []
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda path, revision: asked.append(revision) or Builder())
    for module, fine in (
        ("datasets.packaged_modules.pandas.pandas", False),
        ("x.parquet", True),
        ("evil.script", False),
    ):
        Builder.__module__ = module
        (tmp_path / "marker").unlink(missing_ok=True)
        if fine:
            source = data.hub("owner/name", revision="main")
            assert source.name == "hub owner/name@0123456789abcdef" and asked[-1] == "main"  # T18: looked up once
        else:
            with pytest.raises(DataError, match="MD-DATA-016.*parquet"):
                data.hub("owner/name")
            assert not (tmp_path / "marker").exists()
    Builder.__module__ = "x.parquet"
    with pytest.raises(DataError, match=r"MD-DATA-003.*\['train'\]"):
        data.hub("owner/name", split="tarin")


@pytest.mark.parametrize("path", ["pandas", "owner/name", "no such name!"])
def test_C13_a_dataset_that_cannot_be_had_is_said_with_what_to_do(path):
    with pytest.raises(DataError, match="MD-DATA-003|MD-DATA-016") as e:
        data.hub(path)
    assert "data=shapes" in str(e.value) or "parquet" in str(e.value)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch, no_network):
    """The cache of `datasets` as it is after owner/name was read from the hub, on a machine that is offline now."""
    from datasets.packaged_modules.parquet.parquet import Parquet

    rows(40).rename_column("captions", "text").to_parquet(tmp_path / "rows.parquet")
    options = {"cache_dir": str(tmp_path / "cache"), "dataset_name": "name", "hash": COMMIT}
    builder = Parquet(**options, data_files={"train": [str(tmp_path / "rows.parquet")]})
    builder.download_and_prepare()
    fetched = tmp_path / "cache" / "owner___name" / "default"  # where those of the hub lie
    fetched.parent.mkdir()
    Path(builder.cache_dir).parents[1].rename(fetched)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return no_network


@pytest.mark.parametrize("revision", [None, "main", COMMIT, COMMIT[:7]])
def test_D5_offline_a_dataset_in_the_cache_is_read_without_a_request(hub_cache, revision):
    assert datasets.config.HF_HUB_OFFLINE  # which conftest.py asks for, by HF_HUB_OFFLINE=1
    source = data.hub("owner/name", revision=revision)
    assert source.name == f"hub owner/name@{COMMIT}" and len(source.train) + len(source.validation) == 40
    said = [] if revision in (COMMIT, COMMIT[:7]) else [COMMIT]  # what was not pinned might have been another one
    assert [text[-40:] for text in source.remarks] == said and hub_cache == []


def test_D5_T18_offline_another_commit_than_the_pinned_one_is_refused(hub_cache):
    with pytest.raises(DataError, match=f"MD-DATA-018.*commit {COMMIT}, not at data.revision=fff0123") as e:
        data.hub("owner/name", revision="fff0123")
    assert e.value.exit_code == 3 and hub_cache == []


def test_D5_offline_a_dataset_that_is_not_in_the_cache_is_named_with_the_command_that_fetches_it(hub_cache):
    command = "python -m minidiff.doctor data=hub data.path=owner/other data.revision=v1"
    with pytest.raises(DataError, match="MD-DATA-003") as e:
        data.hub("owner/other", revision="v1")
    assert f"`{command}`" in str(e.value) and hub_cache == []


def test_C12_embeddings_belong_to_one_encoder_and_caption():
    """In memory, embeddings are kept by an encoder, for a caption; on the disk, see test_cache.py."""
    from minidiff.text import tiny

    encoder, other = tiny(), tiny(layer=-2)
    assert encoder.identity != other.identity
    assert not torch.equal(encoder(["a star"]).tokens, other(["a star"]).tokens)
