"""Rows that are read where they lie: every row once a pass, shared out, resumed approximately, patiently."""

import datasets
import pytest
import torch
from conftest import train
from test_data import broken, rows, take

from minidiff import checkpoint, data
from minidiff.data import patience, streaming
from minidiff.errors import DataError, MachineError


def files(folder, n: int = 40, parts: int = 4, table=rows) -> str:
    """Writes rows 0 … n−1 into some parquet files; returns the glob that names them."""
    whole = table(n)
    for k in range(parts):
        whole.shard(parts, k, contiguous=True).to_parquet(folder / f"{k}.parquet")
    return str(folder / "*.parquet")


def read(source: data.Source, count: int, *, workers: int = 0, size: int = 4, start: int = 0, saved=None, **place):
    """Returns `count` batches of one process, and the positions behind them."""
    place = {"rank": 0, "ranks": 1} | place
    readers = data.stream_readers(source, **place, workers=workers)
    positions, _ = data.resume_at(saved, **place, readers=readers, buffer_size=source.buffer_size)
    reader = data.RowReader(source.image, source.caption, 8)
    samples = data.StreamedImages(source, reader, size, start=start, positions=positions, **place)
    batches = data.Ahead(data.read_batches(samples, readers if workers else 0), 1, positions)
    found = take(batches, count)
    batches.close()
    return found, batches.positions


def levels(batches) -> list[int]:
    """Returns the numbers of the rows that batches hold: row i of `rows` is grey of level i."""
    return [int(image[0, 0, 0]) for batch in batches for image in batch.images]


def test_a_worker_that_begins_its_next_pass_leaves_the_others_in_theirs(tmp_path):
    source = data.parquet(files(tmp_path), streaming=True, buffer_size=8)
    reader = data.RowReader(source.image, source.caption, 8)
    samples = data.StreamedImages(source, reader, 2, start=0, rank=0, ranks=1, positions=[{"epoch": 0}])
    ahead, behind = iter(samples), iter(samples)
    alone = take(iter(samples), 3)
    first = next(behind)
    passed = take(ahead, 30)  # of 2 rows; a pass has 38
    assert passed[-1].position[1]["epoch"] == 1
    together = [first, *take(behind, 2)]
    assert [batch.position[1]["epoch"] for batch in together] == [0, 0, 0]
    assert [b.position for b in together] == [b.position for b in alone] and levels(together) == levels(alone)


@pytest.mark.parametrize("parts, workers", [(1, 0), (4, 0), (4, 2), (1, 2)])
def test_R3_a_stream_gives_every_row_once_a_pass_in_a_new_order(tmp_path, parts, workers):
    source = data.parquet(files(tmp_path, parts=parts), streaming=True, buffer_size=8)
    held = {int(c[0].split()[0]) for c in source.validation["captions"]}
    assert len(held) == 2
    batches, _ = read(source, 38, workers=workers, size=2)
    first, second = levels(batches)[:38], levels(batches)[38:]
    assert first != second and first != sorted(first) and set(first + second) == set(range(40)) - held
    if workers < 2 or parts == 1:  # several readers go round their own files, which are not equally long
        assert sorted(first) == sorted(second) == sorted(set(first))
    assert max((first + second).count(i) for i in first) <= 3
    assert [i for batch in batches for i in batch.index] == list(range(76))
    assert all(
        c.startswith(f"{level} ")
        for c, level in zip([c for b in batches for c in b.captions], first + second, strict=True)
    )
    assert levels(read(source, 19, workers=workers, size=2)[0]) == first  # the same seed, the same order


@pytest.mark.parametrize("parts", [1, 4])
def test_processes_share_the_rows_and_the_sample_numbers_of_a_stream(tmp_path, parts):
    source = data.parquet(files(tmp_path, n=42, parts=parts), streaming=True, buffer_size=8)
    one, two = (read(source, 4, rank=r, ranks=2)[0] for r in (0, 1))
    assert len(set(levels(one) + levels(two))) == len(levels(one) + levels(two)) == 32
    assert sorted(i for batch in one + two for i in batch.index) == list(range(32))
    assert one[1].index == [8, 9, 10, 11] and two[1].index == [12, 13, 14, 15]


@pytest.mark.parametrize("workers", [0, 2])
def test_D7_a_resumed_stream_loses_at_most_its_buffer_and_says_so(tmp_path, workers):
    source = data.parquet(files(tmp_path, n=250), streaming=True, buffer_size=16)
    before, positions = read(source, 20, workers=workers)
    readers = max(1, workers)
    _, cost = data.resume_at([positions], 0, 1, readers, 16)
    assert "approximate" in cost and f"up to {16 * readers} rows" in cost
    after, _ = read(source, 40, workers=workers, start=80, saved=[positions])
    assert [i for b in after for i in b.index] == list(range(80, 240))
    # 238 rows to train on, 80 of them before: as many new ones follow as the pass still has, less the buffers
    # (and what one of two readers begins anew before the other, whose files hold some rows more)
    rest = levels(after)[: 238 - 80 - 16 * readers - 12 * (readers - 1)]
    assert len({*levels(before), *rest}) == 80 + len(rest)


def test_D7_with_other_processes_or_workers_a_new_pass_begins(tmp_path):
    source = data.parquet(files(tmp_path), streaming=True, buffer_size=8)
    _, positions = read(source, 3)
    for ranks, readers in ((2, 1), (1, 2)):
        begins, cost = data.resume_at([positions], 0, ranks, readers, 8)
        assert begins == [{"epoch": 1}] * readers and "new pass" in cost
    assert data.resume_at(None, 0, 1, 2, 8) == ([{"epoch": 0}] * 2, "")


def test_validation_rows_of_a_stream_are_few_fixed_and_never_trained_on(tmp_path):
    glob = files(tmp_path, n=40)
    a, b = (data.parquet(glob, streaming=True, buffer_size=size) for size in (3, 30))
    assert a.validation["captions"] == b.validation["captions"] and len(a.validation) == 2
    assert a.fingerprint() == b.fingerprint() != data.parquet(glob).fingerprint()
    assert not {str(c) for c in a.validation["captions"]} & {str(row["captions"]) for row in a.train}
    rows(20, style=["x"] * 10 + ["y"] * 10).to_parquet(tmp_path / "split.rows")
    column = {"split_column": "style", "train_split": "y", "validation_split": "x", "streaming": True}
    source = data.parquet(str(tmp_path / "split.rows"), **column)
    assert len(source.validation) == 10 and sorted(levels(read(source, 5, size=2)[0])) == list(range(10, 20))
    with pytest.raises(DataError, match="MD-DATA-005.*style='z'"):
        data.parquet(str(tmp_path / "split.rows"), **column | {"validation_split": "z"})
    with pytest.raises(DataError, match="MD-DATA-004.*Did you mean 'style'"):
        data.parquet(str(tmp_path / "split.rows"), **column | {"split_column": "stile"})


def test_B1_B3_bad_rows_of_a_stream_are_skipped_named_by_content_and_counted_once(tmp_path):
    source = data.parquet(files(tmp_path, table=lambda n: broken(n, {3, 30})), streaming=True, buffer_size=8)
    batches, _ = read(source, 40)
    told = {text for batch in batches for text in batch.skipped}
    assert {text.split(": ")[1].split(" in ")[0] for text in told} == {"not a picture"}
    assert len({text.split(" (")[0] for text in told}) == 2 and any("(p3.png)" in text for text in told)
    bad = data.BadRows(None, 0.01)
    for k, batch in enumerate(batches):
        bad.note(batch.skipped, read=4 * k)
    assert len(bad) == 2
    bad.note([f"row {i}: truncated" for i in range(8)], read=160)  # ten of the thousand that there are at least
    with pytest.raises(DataError, match="MD-DATA-011.*11 of 1000"):
        bad.note(["row 9: truncated"], read=160)
    data.BadRows(None, 0.01).note([f"row {i}: truncated" for i in range(20)], read=2000)


def test_B3_a_stream_without_a_picture_ends_in_words(tmp_path):
    source = data.parquet(files(tmp_path, 150, table=lambda n: broken(n, set(range(n)))), streaming=True)
    with pytest.raises(DataError, match="MD-DATA-007.*None of 100 rows"):
        read(source, 1)


def test_C1_C8_a_stream_of_something_else_ends_in_words(tmp_path):
    glob = files(tmp_path, 40)
    with pytest.raises(DataError, match="MD-DATA-013|MD-DATA-023"):
        data.parquet(glob, image="captions", caption="captions", streaming=True)
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:-2000] + bytes(2000))
    with pytest.raises(DataError, match="MD-DATA-009|MD-DATA-023"):
        data.parquet(glob, streaming=True)


def flaky(monkeypatch, fails: set[int], error=ConnectionError) -> list[int]:
    """Makes these attempts to read a row fail, counted from 0; returns the list that collects what was waited."""
    waited, reads, original = [], [], streaming.part_of

    class Failing:
        def __init__(self, rows):
            self.rows = rows

        def __getattr__(self, name):
            return getattr(self.rows, name)

        def __iter__(self):
            it = iter(self.rows)
            while True:
                reads.append(1)
                if len(reads) - 1 in fails:
                    raise error("429 Too Many Requests\nand more")
                try:
                    yield next(it)
                except StopIteration:
                    return

    monkeypatch.setattr(streaming, "part_of", lambda *where: Failing(original(*where)))
    monkeypatch.setattr(patience.time, "sleep", waited.append)
    return waited


def test_D4_a_stream_that_drops_is_taken_up_again_with_growing_waits_and_a_line_each(tmp_path, monkeypatch, capsys):
    source = data.parquet(files(tmp_path), streaming=True, buffer_size=30)
    undisturbed = levels(read(source, 19, size=2)[0])
    waited = flaky(monkeypatch, {5, 6, 7, 20})
    assert levels(read(source, 19, size=2)[0]) == undisturbed and waited == [1, 2, 4, 1]
    shown = [line for line in capsys.readouterr().err.splitlines() if line.startswith("the data stream dropped")]
    assert len(shown) == 4 and "ConnectionError: 429 Too Many Requests); attempt 3 of 8 in 4 s" in shown[2]


def test_D4_a_stream_that_stays_away_ends_in_words_after_minutes_and_not_after_one_error(tmp_path, monkeypatch):
    source = data.parquet(files(tmp_path), streaming=True)
    waited = flaky(monkeypatch, set(range(5, 10**4)))
    with pytest.raises(MachineError, match="MD-DATA-021.*8 new attempts.*429") as e:
        read(source, 9)
    assert e.value.exit_code == 6 and 60 < sum(waited) < 600
    flaky(monkeypatch, {3}, error=FileNotFoundError)
    with pytest.raises(DataError, match="MD-DATA-019.*FileNotFoundError"):
        read(source, 9)


SMALL = ["batch_size=8", "image_size=16", "net.channels=[16]", "net.attend=[true]", "net.groups=4", "device=cpu"]
SMALL += ["precision=fp32", "sampling_steps=2", "data=parquet", "workers=0", "data.streaming=true", "steps=9"]
SMALL += ["data.buffer_size=4", "every.save=100", "every.preview=100", "every.validate=100", "every.log=1"]


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_D4_D7_a_run_whose_stream_is_gone_saves_exits_6_and_goes_on(accumulate, tmp_path, monkeypatch, capsys):
    base = [*SMALL, f"data.path={files(tmp_path)}", f"accumulate={accumulate}", "max_bad=0.5"]
    with monkeypatch.context() as patch, pytest.raises(MachineError, match="MD-DATA-021") as e:
        flaky(patch, set(range(50, 10**4)))
        train(tmp_path, base=base)
    assert e.value.exit_code == 6
    saved = checkpoint.load(checkpoint.latest(tmp_path / "runs" / "shapes" / "checkpoints"), [])
    assert 0 < saved.step < 9 and saved.state["samples_seen"] == 8 * saved.step
    assert "from 0 to" not in (shown := capsys.readouterr().out) and "a stream of images" in shown
    run = train(tmp_path, base=base)
    shown = capsys.readouterr().out
    assert "approximate: up to 4 rows may be lost or repeated" in shown
    saved = checkpoint.load(checkpoint.latest(run / "checkpoints"), []).state
    assert saved["samples_seen"] == 72
    words = set(saved["contract"]["vocabulary"])  # of every row that was read, before the interruption as well
    assert {"a", "b"} < words and len(words) >= 38


@pytest.fixture
def streamed(tmp_path):
    """Returns a function that makes a stream of 40 rows with these captions."""

    def make(captions: list) -> data.Source:
        glob = files(tmp_path, table=lambda n: rows(n, captions=captions))
        return data.parquet(glob, streaming=True, buffer_size=8)

    return make


def test_C2_rows_of_a_stream_without_words_are_trained_left_out_or_refused_as_they_come(streamed):
    source = streamed([None, [" "], ["a"], ["b"]] * 10)
    assert data.treat_empty_captions(source, "unconditional") is source
    assert {i % 4 for i in levels(read(source, 19, size=2)[0])} == {0, 1, 2, 3}
    dropped = data.treat_empty_captions(source, "drop")
    batches, _ = read(dropped, 30, size=2)
    assert {i % 4 for i in levels(batches)} == {2, 3} and len(set(levels(batches))) >= 18
    assert [i for batch in batches for i in batch.index] == list(range(60))
    refused = data.treat_empty_captions(source, "raise")
    with pytest.raises(DataError, match="MD-DATA-017.*A row of parquet.*'captions'.*empty_caption=raise") as e:
        read(refused, 19)
    assert e.value.exit_code == 3


def test_C2_a_stream_that_is_left_without_a_row_is_said_and_one_with_words_is_left_alone(streamed):
    nothing = data.treat_empty_captions(streamed([[""]] * 40), "drop")
    with pytest.raises(DataError, match="MD-DATA-022.*empty_caption=drop"):
        read(nothing, 1)
    whole = streamed([[str(i)] for i in range(40)])
    for policy in ("drop", "raise"):
        assert levels(read(data.treat_empty_captions(whole, policy), 9)[0]) == levels(read(whole, 9)[0])


def test_hub_streams_without_keeping_anything(tmp_path, monkeypatch):
    class Builder:
        base_path = "hf://datasets/owner/name@0123456789abcdef"
        __module__ = "x.parquet"

        def as_streaming_dataset(self, split):
            return rows(40).rename_column("captions", "text").to_iterable_dataset(num_shards=4)

    monkeypatch.setattr(datasets, "load_dataset_builder", lambda path, revision: Builder())
    source = data.hub("owner/name", streaming=True, buffer_size=8)
    assert source.name == "hub owner/name@0123456789abcdef" and len(set(levels(read(source, 9)[0]))) == 36
    with pytest.raises(TypeError):
        len(source)


def test_the_batches_in_hand_come_before_the_error():
    def failing():
        for i in range(3):
            yield data.Batch(torch.zeros(1, 3, 1, 1, dtype=torch.uint8), [""], [i], [])
        raise DataError("MD-DATA-007", "no more")

    ahead = data.Ahead(failing(), 2)
    assert next(ahead).index == [0] and ahead.error is None
    assert next(ahead).index == [1] and ahead.error is not None and next(ahead).index == [2]
    with pytest.raises(DataError, match="no more"):
        next(ahead)


def test_D3_a_stream_can_be_sent_to_a_fresh_process(tmp_path):
    from multiprocessing.reduction import ForkingPickler

    source = data.parquet(files(tmp_path), streaming=True, buffer_size=4)
    reader = data.RowReader("image", "captions", 8)
    samples = data.StreamedImages(source, reader, 4, start=0, rank=0, ranks=1, positions=[{"epoch": 0}])
    sent = ForkingPickler.loads(ForkingPickler.dumps(samples))
    assert next(iter(sent)).captions == next(iter(samples)).captions
