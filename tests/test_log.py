import csv
import io
import json
import math
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from minidiff import log
from minidiff.log import Progress, RunLog, redact

OFFLINE = {"project": "minidiff", "mode": "offline"}


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def table(folder: Path) -> list[dict]:
    with open(folder / "metrics.csv", newline="") as f:
        return list(csv.DictReader(f))


def test_metrics_are_one_object_a_line_and_a_row_of_the_table(tmp_path):
    with RunLog(tmp_path / "run") as run:
        run.metrics(1, {"loss": 0.1 + 0.2, "epoch": 0})
        run.metrics(2, {"loss": torch.tensor(0.5), "epoch": 1})
    assert lines(tmp_path / "run") == [{"step": 1, "loss": 0.1 + 0.2, "epoch": 0}, {"step": 2, "loss": 0.5, "epoch": 1}]
    assert table(tmp_path / "run") == [
        {"step": "1", "loss": "0.30000000000000004", "epoch": "0"},
        {"step": "2", "loss": "0.5", "epoch": "1"},
    ]


def test_F3_nan_and_infinity_stay_visible_everywhere(tmp_path, capsys):
    with RunLog(tmp_path) as run:
        run.metrics(1, {"loss": math.nan, "grad_norm": math.inf})
    (line,) = lines(tmp_path)
    assert math.isnan(line["loss"]) and line["grad_norm"] == math.inf
    (row,) = table(tmp_path)
    assert row["loss"] == "NaN" and math.isnan(float(row["loss"])) and float(row["grad_norm"]) == math.inf
    assert "loss NaN" in capsys.readouterr().out and "loss NaN" in (tmp_path / "log.txt").read_text()


def test_the_table_grows_columns_and_keeps_its_rows(tmp_path):
    with RunLog(tmp_path) as run:
        run.metrics(1, {"loss": 1.0})
        run.metrics(2, {"loss": 2.0, "loss_t0": 3.0, 'odd,"name"': 4.0})
        run.metrics(2, {"val_loss": 5.0})
        run.metrics(3, {"loss": 6.0})
    rows = table(tmp_path)
    assert list(rows[0]) == ["step", "loss", "loss_t0", 'odd,"name"', "val_loss"]
    assert [list(row.values()) for row in rows] == [
        ["1", "1.0", "", "", ""],
        ["2", "2.0", "3.0", "4.0", ""],
        ["2", "", "", "", "5.0"],
        ["3", "6.0", "", "", ""],
    ]


def test_resuming_drops_what_came_after_so_that_no_curve_runs_twice(tmp_path):
    with RunLog(tmp_path) as run:
        for step in range(6):
            run.metrics(step, {"loss": 1 / (step + 1)})
        run.metrics(6, {"late": 1.0})
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 7, "lo')  # the kill came here
    with RunLog(tmp_path, resume_step=3) as run:
        run.metrics(4, {"loss": -4.0})
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 3, 4]
    assert lines(tmp_path)[2]["loss"] == 1 / 3 and lines(tmp_path)[4]["loss"] == -4
    assert [row["step"] for row in table(tmp_path)] == ["0", "1", "2", "3", "4"] and "late" not in table(tmp_path)[0]
    with RunLog(tmp_path):
        pass
    assert lines(tmp_path) == [] and table(tmp_path) == []


def test_resuming_without_earlier_files_works(tmp_path):
    with RunLog(tmp_path / "new", resume_step=500) as run:
        run.metrics(501, {"loss": 1.0})
    assert lines(tmp_path / "new") == [{"step": 501, "loss": 1.0}]


def test_each_line_is_on_disk_at_once(tmp_path):
    run = RunLog(tmp_path)
    run.metrics(1, {"loss": 1.0})
    run.say("a message")
    assert len(lines(tmp_path)) == len(table(tmp_path)) == 1
    assert "a message" in (tmp_path / "log.txt").read_text()
    run.close()
    run.close()


def test_progress_line_says_step_loss_pace_and_time_left(monkeypatch, tmp_path, capsys):
    clock = iter([100.0, 110.0])
    monkeypatch.setattr(log.time, "monotonic", lambda: next(clock))
    with RunLog(tmp_path, steps=2000) as run:
        run.metrics(20, {"loss": 0.5})
        run.metrics(120, {"loss": 0.08312, "images_per_s": 94.2, "lr": 1e-4})
    printed = capsys.readouterr().out.splitlines()
    assert printed == ["step 20/2000  loss 0.5", "step 120/2000  loss 0.08312  94 images/s  ETA 3 min"]
    assert printed[1] in (tmp_path / "log.txt").read_text()


def test_time_left_follows_the_recent_pace(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    progress = Progress(1000)
    for step in range(1, 101):
        now[0] += 60 if step < 10 else 1  # compiling made the first steps slow
        line = progress.line(step, {})
    assert line == "step 100/1000  ETA 15 min"


@pytest.mark.parametrize(
    "seconds, words", [(0.0, "0 s"), (45.4, "45 s"), (180.0, "3 min"), (5300.0, "88 min"), (7500.0, "2 h 05 min")]
)
def test_durations(seconds, words):
    assert log._duration(seconds) == words


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_on_a_terminal_messages_stand_above_the_live_line(monkeypatch, tmp_path):
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with RunLog(tmp_path, steps=10) as run:
        run.metrics(1, {"loss": 0.25})
        run.say("[bold]not markup[/bold]")
        run.metrics(10, {"loss": 0.125})
    assert sys.stdout is screen
    shown = screen.getvalue()
    assert "[bold]not markup[/bold]" in shown and "step 10/10  loss 0.125" in shown


def test_a_screen_without_unicode_or_gone_does_not_stop_the_run(monkeypatch, tmp_path):
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    with RunLog(tmp_path) as run:
        run.say("größer")
        screen.seek(0)
        assert screen.read() == "gr\\xf6\\xdfer\n"
        screen.close()
        run.say("later")
    assert "größer" in (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert "later" in (tmp_path / "log.txt").read_text(encoding="utf-8")


HEX = "0123456789abcdef0123456789abcdef01234567"
SECRETS = {
    "hf_AbCdEfGhIjKlMnOpQrStUvWxYz01234567": "using hf_AbCdEfGhIjKlMnOpQrStUvWxYz01234567 now",
    HEX: f"WANDB_API_KEY={HEX}",
    "fedcba98" * 5: '{"api_key": "' + "fedcba98" * 5 + '"}',
    "89abcdef" * 5: "your key is " + "89abcdef" * 5,
    "me:s3cret": "https://me:s3cret@huggingface.co/x",
    "tok3n": "git clone https://tok3n@host.org/y",
    "eyJhbGciOi.J9-x_y": "Authorization: Bearer eyJhbGciOi.J9-x_y",
    "abcdefghijk0123456": "authorization: bearer abcdefghijk0123456",
    "ghp_0123456789abcdefghij0123456789abcdef": "ghp_0123456789abcdefghij0123456789abcdef",
}


@pytest.mark.parametrize("secret, text", SECRETS.items())
def test_T10_tokens_reach_no_sink(secret, text, tmp_path, capsys, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with RunLog(tmp_path, OFFLINE) as run:
        run.say(text)
        run.metrics(1, {text: 1.0, "loss": 2.0})
        run.image(text, "grid.png")
        run.image("samples", f"/data/{text}")
        run._attempt(text, lambda: 1 / 0)
    written = "".join(x.read_text() for x in tmp_path.iterdir())
    shown = capsys.readouterr()
    for sink in (written, shown.out, shown.err, str([list(x) for x, _ in fake.lines])):
        assert secret not in sink
    assert "***" in written and "***" in shown.out


@pytest.mark.parametrize(
    "text",
    [
        f"dataset revision {HEX}",
        "https://host.org/a/b?x=1",
        "a flag bearer standing on a hill",
        "HF_TRANSFER hf_transfer hf_hub_download",
        "mail me@host.org",
    ],
)
def test_what_is_no_secret_stays(text):
    assert redact(text) == text


class FakeWandb(types.ModuleType):
    """As much of wandb as RunLog uses; the calls named in `broken` raise."""

    def __init__(self, broken: str = "", key: bool = True) -> None:
        super().__init__("wandb")
        self.broken, self.key, self.lines, self.settings, self.finished = broken, key, [], {}, 0

    def _raise_if(self, name: str) -> None:
        if name == self.broken:
            raise ConnectionError(f"{name}: no network, https://me:s3cret@api.wandb.ai")

    def Settings(self, **settings):
        return settings

    def login(self, **_):
        return self.key

    def Image(self, path):
        self._raise_if("Image")
        return path

    def init(self, **arguments):
        self._raise_if("init")
        self.settings = arguments
        return self

    def log(self, values, step):
        self._raise_if("log")
        self.lines.append((values, step))

    def finish(self):
        self._raise_if("finish")
        self.finished += 1


def test_wandb_mirrors_metrics_and_images_and_takes_no_code(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with RunLog(tmp_path / "shapes", OFFLINE) as run:
        run.metrics(5, {"loss": 0.5})
        run.image("samples", "a.png")
    assert fake.lines == [({"loss": 0.5}, 5), ({"samples": "a.png"}, 5)] and fake.finished == 1
    private = fake.settings["settings"]
    assert fake.settings["mode"] == "offline" and fake.settings["name"] == "shapes"
    assert private["save_code"] is False and private["disable_git"] and private["console"] == "off"


def broken_modules() -> dict[str, types.ModuleType | None]:
    names = ("init", "log", "Image", "finish")
    return {"missing": None, "empty": types.ModuleType("wandb")} | {name: FakeWandb(name) for name in names}


@pytest.mark.parametrize("name, module", broken_modules().items())
def test_G4_R9_wandb_failing_is_one_warning_and_the_local_log_is_whole(name, module, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", module)
    with RunLog(tmp_path, OFFLINE) as run:
        for step in (1, 2, 3):
            run.metrics(step, {"loss": step})
            run.image("samples", "a.png")
    assert [line["step"] for line in lines(tmp_path)] == [int(row["step"]) for row in table(tmp_path)] == [1, 2, 3]
    shown = capsys.readouterr().out
    assert shown.count("warning: W&B") == 1 and "s3cret" not in shown


def test_G4_no_key_is_a_warning_and_no_prompt(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(key=False))
    with RunLog(tmp_path, {"project": "minidiff", "mode": "online"}) as run:
        run.metrics(1, {"loss": 1.0})
    assert "wandb login" in capsys.readouterr().out and len(lines(tmp_path)) == 1


def test_G4_the_real_wandb_works_offline(tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with RunLog(tmp_path, OFFLINE) as run:
        run.metrics(1, {"loss": math.nan})
    assert "warning" not in capsys.readouterr().out
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_R9_a_disk_that_refuses_is_one_warning_and_leaves_no_half_line(tmp_path, monkeypatch, capsys):
    run = RunLog(tmp_path)
    run.metrics(1, {"loss": 1.0})
    whole = (tmp_path / "metrics.jsonl").read_text()

    class Full(io.FileIO):
        def write(self, data):
            return super().write(bytes(data)[:5])

    monkeypatch.setattr(log, "open", lambda file, mode, buffering: Full(file, "ab"), raising=False)
    run.metrics(2, {"loss": 2.0})
    run.metrics(3, {"loss": 3.0})
    assert (tmp_path / "metrics.jsonl").read_text() == whole
    assert capsys.readouterr().out.count("warning: cannot write the metrics") == 1
    monkeypatch.undo()
    run.metrics(4, {"loss": 4.0})
    assert [line["step"] for line in lines(tmp_path)] == [1, 4]


def test_R9_a_folder_that_cannot_be_made_and_a_value_that_is_no_number_do_not_raise(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with RunLog(tmp_path / "file" / "run") as run:
        run.metrics(1, {"loss": torch.zeros(2)})
        run.say("still here")
    shown = capsys.readouterr().out
    assert "cannot write to the run folder" in shown and "as numbers" in shown and "still here" in shown


def test_importing_the_room_imports_neither_rich_nor_wandb():
    code = "import sys, minidiff.log; assert not {'rich', 'wandb', 'torch'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["none", "wandb"])
def test_config_group(name, tmp_path):
    from omegaconf import OmegaConf

    settings = OmegaConf.load(Path(__file__).parents[1] / "conf" / "log" / f"{name}.yaml")
    assert list(settings) == ["wandb"]
    assert settings.wandb == (None if name == "none" else OFFLINE)
    RunLog(tmp_path, None if name == "none" else settings.wandb).close()
