"""Pictures for people: contact sheets and film strips (Pillow), plots (the only door to matplotlib).

    grid, stack, film, dissolve                     →  PIL images
    schedule_plot, noise_levels, curves, settling   →  matplotlib Figures

A picture shows what was computed: −1 is black, 1 is white, what lies outside is clipped, and pixels are enlarged
without smoothing. Plots use the colours of Okabe and Ito (2008), which colour-blind readers can tell apart, and a
dash pattern each, for print in grey.
"""

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from minidiff.errors import InputError, MachineError
from minidiff.pipeline import Snapshot, to_pil
from minidiff.process import Process
from minidiff.seeds import generator

READABLE = 128  # pixels that a small picture is enlarged to, about
COLUMNS = 8  # of a contact sheet, and frames of a film strip, at most, unless asked otherwise
GAP = 10  # between pictures, and around them all
LONGEST = 300  # characters of a caption that are shown
TEXT, HEADING = 13, 16  # heights of letters, in pixels
PAPER, INK, FRAME = "#ffffff", "#1e1e1e", "#d55e00"

# ---------------------------------------------------------------------------------------------------- pictures


def grid(
    images: Float[Tensor, "n 3 h w"] | Sequence[Image.Image],
    captions: Sequence[str] | None = None,
    columns: int | None = None,
    scale: int | None = None,
    *,
    framed: Collection[int] = (),
) -> Image.Image:
    """Returns a contact sheet: pictures in [−1, 1] (or PIL images) in rows, each with its caption wrapped below it.

    `scale` enlarges (default: to about 128 pixels); pictures whose numbers are in `framed` get a thick frame. Raises
    InputError (MD-VIZ-001) if there is no picture, or not one caption for each.
    """
    if len(images) == 0 or (captions is not None and len(captions) != len(images)):
        raise InputError(
            "MD-VIZ-001",
            f"A grid of {len(images)} pictures and {len(captions or ())} captions cannot be drawn. Give it at least "
            "one picture, and one caption for each or captions=None.",
        )
    pictures = [_enlarge(x if isinstance(x, Image.Image) else to_pil(x), scale) for x in images]
    columns, font = columns or min(len(pictures), COLUMNS), _font(TEXT)
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    texts = [wrap(caption[:LONGEST], font, width) for caption in captions or [""] * len(pictures)]
    rows = [range(i, min(i + columns, len(pictures))) for i in range(0, len(pictures), columns)]
    heights = [height + _text_height(max(len(texts[i]) for i in row), font) + GAP for row in rows]
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, sum(heights) + GAP), PAPER)
    draw, y = ImageDraw.Draw(sheet), GAP
    for row, row_height in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            x = GAP + column * (width + GAP)
            if i in framed:
                draw.rectangle((x - 4, y - 4, x + pictures[i].width + 3, y + pictures[i].height + 3), fill=FRAME)
            sheet.paste(pictures[i], (x, y))
            _write(draw, (x, y + height), texts[i], font)
        y += row_height
    return sheet


def stack(sheets: Mapping[str, Image.Image]) -> Image.Image:
    """Returns sheets below one another, each under its heading."""
    font, top = _font(HEADING), _text_height(1, _font(HEADING))
    size = (max(sheet.width for sheet in sheets.values()), sum(top + sheet.height for sheet in sheets.values()))
    page = Image.new("RGB", size, PAPER)
    draw, y = ImageDraw.Draw(page), 0
    for heading, sheet in sheets.items():
        _write(draw, (GAP, y), [heading], font)
        page.paste(sheet, (0, y + top))
        y += top + sheet.height
    return page


def film(snapshots: Sequence[Snapshot], every: int | None = None) -> Image.Image:
    """Returns a film strip of `list(pipe.steps(prompt))`: columns are times, rows are xt, x0_hat and eps_hat.

    It shows every `every`-th state and the last (default: eight, evenly spread). In each column
    xt = alpha·x0_hat + sigma·eps_hat, up to what is clipped.
    """
    last = len(snapshots) - 1
    chosen = range(0, last, every) if every else [round(i * last / (COLUMNS - 1)) for i in range(COLUMNS)]
    shown = [snapshots[i] for i in sorted({*chosen, last})]
    tile = shown[0].image.width * _scale(shown[0].image)  # latents are smaller than their pictures

    def strip(pictures: list[Image.Image], captions: list[str] | None = None) -> Image.Image:
        return grid(pictures, captions, columns=len(shown), scale=tile // pictures[0].width)

    return stack(
        {
            "xt: the noisy picture": strip([to_pil(as_picture(s.xt, s.image.width)) for s in shown]),
            "x0_hat: the picture that the network sees in it": strip([s.image for s in shown]),
            "eps_hat: the noise that it sees in it": strip(
                [to_pil(as_picture(s.eps_hat, s.image.width)) for s in shown], [f"t = {s.t:.3g}" for s in shown]
            ),
        }
    )


def as_picture(x: Float[Tensor, "c h w"], width: int) -> Float[Tensor, "3 h2 w2"]:
    """Returns a state as a picture: patches of pixels put back in place; of a latent, its first three channels."""
    patch = width // x.shape[2]
    return F.pixel_shuffle(x, patch) if len(x) == 3 * patch**2 else x[:3]


def dissolve(image: Float[Tensor, "3 h w"], process: Process, ts: Sequence[float], seed: int = 0) -> Image.Image:
    """Returns a picture dissolving in one and the same noise: xt = alpha(t)·x0 + sigma(t)·eps at the times `ts`."""
    eps = torch.randn(image.shape, generator=generator(seed, "image"))
    t = torch.tensor(ts, dtype=torch.float64)
    alpha, sigma = (x.float().reshape(-1, 1, 1, 1) for x in (process.alpha(t), process.sigma(t)))
    captions = [f"t = {time:.3g}\nlog-SNR {ratio:.1f}" for time, ratio in zip(ts, process.log_snr(t), strict=True)]
    return grid(alpha * image + sigma * eps, captions, columns=len(ts))


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Returns the lines of a text set `width` pixels wide. Nothing is lost; a word that is too long is broken."""
    lines = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            if line and font.getlength(f"{line} {word}") > width:
                lines.append(line)
                line = ""
            line = f"{line} {word}" if line else word
            while font.getlength(line) > width and len(line) > 1:
                fits = max(1, sum(font.getlength(line[:i]) <= width for i in range(1, len(line))))
                lines.append(line[:fits])
                line = line[fits:]
        lines.append(line)
    return lines


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _line_height(font: ImageFont.FreeTypeFont) -> int:
    return sum(font.getmetrics()) + 1


def _text_height(lines: int, font: ImageFont.FreeTypeFont) -> int:
    return lines * _line_height(font) + 6 if lines else 0


def _write(draw: ImageDraw.ImageDraw, at: tuple[int, int], lines: Sequence[str], font: ImageFont.FreeTypeFont) -> None:
    for i, line in enumerate(lines):
        draw.text((at[0], at[1] + 4 + i * _line_height(font)), line, font=font, fill=INK)


def _scale(picture: Image.Image) -> int:
    return max(1, round(READABLE / max(picture.size)))


def _enlarge(picture: Image.Image, scale: int | None) -> Image.Image:
    scale = scale or _scale(picture)
    opaque = Image.new("RGBA", picture.size, PAPER)
    opaque.alpha_composite(picture.convert("RGBA"))
    return opaque.convert("RGB").resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


# ---------------------------------------------------------------------------------------------------- plots

COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"]
DASHES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1))]


@contextmanager
def _figure(columns: int, rows: int = 1) -> Iterator[tuple["matplotlib.figure.Figure", list]]:  # noqa: F821
    """Gives a figure in the common style, and its axes. It is closed at once, or notebooks would show it twice."""
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        raise MachineError(
            "MD-VIZ-002", "Plots need matplotlib, which is not installed. Run `pip install 'minidiff[notebooks]'`."
        ) from error
    style = {
        "font.size": 10,
        "axes.titlesize": 10,
        "axes.labelsize": 10,
        "legend.fontsize": 9,
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": plt.cycler(color=COLOURS) + plt.cycler(linestyle=DASHES),
        "lines.linewidth": 1.6,
        "figure.dpi": 120,
        "savefig.dpi": 200,
    }
    with plt.rc_context(style):
        figure, axes = plt.subplots(
            rows,
            columns,
            figsize=(3.4 * columns if columns > 1 else 6, 2.8 * rows),
            squeeze=False,
            layout="constrained",
        )
        plt.close(figure)
        yield figure, list(axes.flat)


def schedule_plot(processes: Mapping[str, Process]) -> "matplotlib.figure.Figure":  # noqa: F821
    """Plots alpha, sigma and log-SNR of each process over t."""
    t = torch.linspace(0, 1, 401, dtype=torch.float64)
    with _figure(3) as (figure, (alpha, sigma, log_snr)):
        for name, process in processes.items():
            alpha.plot(t, process.alpha(t), label=name)
            sigma.plot(t, process.sigma(t))
            values = process.log_snr(t)
            log_snr.plot(t[values.isfinite()], values[values.isfinite()])
        for axes, title in ((alpha, "alpha: data left"), (sigma, "sigma: noise"), (log_snr, "log-SNR")):
            axes.set(title=title, xlabel="t")
        alpha.set_ylim(-0.05, 1.05)
        if max(process.sigma(t).max() for process in processes.values()) > 2:
            sigma.set(yscale="log", ylim=(1e-2, None))  # variance exploding
        log_snr.set_ylim(-15, 15)
        alpha.legend()
    return figure


def curves(run: str | Path) -> "matplotlib.figure.Figure":  # noqa: F821
    """Plots a run's metrics.jsonl: training and validation losses, and the learning rate. Crosses mark NaN.

    Raises InputError (MD-VIZ-003) if the run has logged nothing.
    """
    rows = _metrics(run)
    names = {"loss": "training batch", "val_loss": "validation, raw", "val_loss_ema": "validation, EMA"}
    with _figure(1, rows=2) as (figure, (loss, rate)):
        for key, label in names.items():
            _line(loss, rows, key, label)
        _line(rate, rows, "lr", "lr")
        loss.set(title=f"{Path(run).name}: loss", yscale="log")
        rate.set(title="learning rate", xlabel="step", ylim=(0, None))
        rate.sharex(loss)
        loss.legend()
    return figure


def _line(axes: "matplotlib.axes.Axes", rows: Sequence[Mapping], key: str, label: str) -> None:  # noqa: F821
    points = [(row["step"], row[key]) for row in rows if key in row]
    if not points:
        return
    steps, values = zip(*points, strict=True)
    (line,) = axes.plot(steps, [v if math.isfinite(v) else math.nan for v in values], label=label)
    broken = [step for step, value in points if not math.isfinite(value)]
    low = [0.03] * len(broken)  # in parts of the axes' height, whatever the scale
    axes.plot(broken, low, "x", color=line.get_color(), transform=axes.get_xaxis_transform())


def noise_levels(run: str | Path, moments: int = 5) -> "matplotlib.figure.Figure":  # noqa: F821
    """Plots the validation loss per noise level at up to `moments` evenly spread steps of a run.

    Level 0 holds the least noise; each of the ten gets a tenth of the times that training draws. Raises InputError
    (MD-VIZ-003) if the run has logged none.
    """
    rows = [row for row in _metrics(run) if "loss_t0" in row]
    if not rows:
        raise _nothing_to_plot(run, "no loss per noise level, which needs a validation with at least 40 pictures")
    chosen = sorted({round(i * (len(rows) - 1) / max(1, moments - 1)) for i in range(moments)})
    with _figure(1) as (figure, (axes,)):
        for number, i in enumerate(chosen, start=1):
            levels = [k for k in range(10) if f"loss_t{k}" in rows[i]]
            shade = str(0.8 * (1 - number / len(chosen)))  # light grey at first, black at last
            values = [rows[i][f"loss_t{k}"] for k in levels]
            axes.plot(levels, values, "o-", color=shade, markersize=3, label=f"step {rows[i]['step']}")
        axes.set(title=f"{Path(run).name}: loss per noise level", xlabel="noise level (0: least)", yscale="log")
        axes.legend()
    return figure


def settling(films: Mapping[str, Sequence[Snapshot]]) -> "matplotlib.figure.Figure":  # noqa: F821
    """Plots how far x0_hat still is from the final picture at each t: in its layout (8×8 means) and in its details.

    Distances are root mean squares in units of [−1, 1]; each film is `list(pipe.steps(prompt, …))`.
    """
    with _figure(2) as (figure, both):
        for name, snapshots in films.items():
            x0 = torch.stack([as_picture(s.x0_hat, s.image.width) for s in snapshots])
            away = x0 - x0[-1:]
            layout = F.interpolate(F.adaptive_avg_pool2d(away, 8), away.shape[2:])
            for axes, part in zip(both, (layout, away - layout), strict=True):
                axes.plot([s.t for s in snapshots], part.square().mean((1, 2, 3)).sqrt(), label=name)
        for axes, title in zip(both, ("layout: distance from the final picture", "details"), strict=True):
            axes.set(title=title, xlabel="t (sampling runs from left to right)", ylim=(0, None))
            axes.invert_xaxis()
        both[0].legend()
    return figure


def _metrics(run: str | Path) -> list[dict]:
    """Returns the lines of a run's metrics.jsonl; a line cut short by a kill is no line."""
    file = Path(run) / "metrics.jsonl"
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    if not rows:
        raise _nothing_to_plot(run, "nothing in its metrics.jsonl")
    return rows


def _nothing_to_plot(run: str | Path, lack: str) -> InputError:
    return InputError("MD-VIZ-003", f"The run {run} cannot be plotted: there is {lack}. Name a run that has trained.")
