"""How near drawn pictures come to real ones, in a world where nobody can decide it: estimated in the eyes of OpenCLIP.

    CLIP score     100 · the cosine of a picture with its caption, 0 if negative           (Hessel et al. 2021)
    R-precision    how often its own caption fits a picture better than 99 others do       (Xu et al. 2018)
    CMMD           distance between drawn and real pictures as two sets                    (Jayasumana et al. 2024)

A picture is drawn for the caption of every real one that is taken, and each number stands beside what the real pictures
get. If even their own captions fit them no better than others, the eyes are blind for this world, and that is said.

The Fréchet distance (FID) is not among them: it wants thousands of pictures, and sees them by the classes of ImageNet.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from minidiff.config import build
from minidiff.data import CaptionedImages
from minidiff.errors import DataError
from minidiff.evaluate import Draw, Judgement
from minidiff.pipeline import to_pil
from minidiff.seeds import generator
from minidiff.text import Agreement
from minidiff.viz import COLUMNS, grid, stack

CHOICES = 100  # captions that R-precision chooses from, the picture's own among them
SIGMA, SCALE = 10.0, 1000.0  # of CMMD: the kernel's width, and a factor that makes its values readable
AT_ONCE = 64  # pictures, or captions, that OpenCLIP looks at
ROWS = 3  # of pairs on the sheet
FEWEST = 4  # pictures, so that a half of them has a distance


class Real(NamedTuple):
    """Real pictures in [−1, 1] and their captions, "" where there is none."""

    images: Float[Tensor, "n 3 h w"]
    captions: list[str]
    source: str  # where they came from, in words


def real_pictures(values: Mapping, split: str, n: int, image_size: int) -> Real:
    """Returns at most `n` pictures, with the first caption of each, that a training configuration holds out
    (`heldout`) or trains on (`train`).

    Raises DataError (MD-EVAL-004) if there are fewer than four.
    """
    source = build(values["data"])
    rows = source.validation if split == "heldout" else source.head(n)
    shown = {"image_size": image_size, "background": values["background"]}
    samples = CaptionedImages(rows, source.image, source.caption, **shown, shuffle=False)
    taken = (samples[i] for i in range(min(n, len(samples))))
    real = list({sample.row: sample for sample in taken}.values())  # a row that cannot be read gives way to the next
    if len(real) < FEWEST:
        raise DataError(
            "MD-EVAL-004",
            f"Of {source.name}, split={split}, {len(real)} picture(s) can be compared with drawn ones, and it takes "
            f"{FEWEST}. Raise n=, take split=train, or name other data (data=… data.path=…).",
        )
    images = torch.stack([sample.image for sample in real]).float() / 127.5 - 1
    return Real(images, [sample.caption for sample in real], f"{source.name}, {split}")


def judge_pictures(draw: Draw, real: Real, eyes: Agreement, seed: int = 0) -> Judgement:
    """Draws a picture for every caption, with seeds from `seed` on, and compares drawn ones with real ones."""
    drawn = draw(real.captions, range(seed, seed + len(real.captions)))
    told = [i for i, caption in enumerate(real.captions) if caption]
    captions = [real.captions[i] for i in told]
    report = {"n": len(drawn), "captioned": len(told), "choices": min(CHOICES, len(set(captions)))}
    report |= {"eyes": eyes.name, "data": real.source}
    vectors = {"drawn": look(eyes, drawn), "real": look(eyes, real.images)}
    for name, seen in vectors.items():
        score, precision = prompt_scores(eyes, seen[told], captions, seed) if told else (None, None)
        report |= {f"clip_score_{name}": score, f"r_precision_{name}": precision}
    some, others = torch.randperm(len(drawn), generator=generator(seed, "halves")).chunk(2)
    report["cmmd_drawn"] = cmmd(vectors["drawn"], vectors["real"])
    report["cmmd_real"] = cmmd(vectors["real"][some], vectors["real"][others])
    pictures = {"drawn": [to_pil(x) for x in drawn], "real": [to_pil(x) for x in real.images]}
    return Judgement(report, table(report), sheet(pictures, real.captions), pictures)


def look(eyes: Agreement, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n e"]:
    """Returns the unit vectors of pictures, as they are when saved: in 8 bits."""
    eight_bits = ((images.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    return torch.cat([eyes.pictures(part) for part in eight_bits.split(AT_ONCE)])


def prompt_scores(
    eyes: Agreement, pictures: Float[Tensor, "n e"], captions: Sequence[str], seed: int
) -> tuple[float, float]:
    """Returns the CLIP score and the R-precision of pictures (their unit vectors), each with its caption.

    Captions that read the same are one choice. Of a single caption, R-precision is 1.
    """
    distinct = list(dict.fromkeys(captions))
    words = torch.cat([eyes.captions(distinct[i : i + AT_ONCE]) for i in range(0, len(distinct), AT_ONCE)])
    own = torch.tensor([distinct.index(caption) for caption in captions])
    fits, found, shuffled = (pictures * words[own]).sum(dim=1), [], generator(seed, "others")
    for picture, place, fit in zip(pictures, own, fits, strict=True):
        others = torch.randperm(len(distinct), generator=shuffled)
        others = others[others != place][: CHOICES - 1]
        found.append(bool((words[others] @ picture < fit).all()))
    return float(100 * fits.clamp(min=0).mean()), sum(found) / len(found)


def cmmd(a: Float[Tensor, "n e"], b: Float[Tensor, "m e"]) -> float:
    """Returns the squared maximum mean discrepancy of two sets of at least two unit vectors, times 1000.

    The estimate is unbiased (eq. 4): about 0 between halves of one set, however few there are, so it may be below 0.
    The paper's own program counts pairs of a picture with itself as well, which adds about 0.02 for 500 pictures.
    """
    a, b, n, m = a.double(), b.double(), len(a), len(b)
    among = (kernel_sum(a, a) - n) / (n * (n - 1)) + (kernel_sum(b, b) - m) / (m * (m - 1))
    return SCALE * (among - 2 * kernel_sum(a, b) / (n * m))


def kernel_sum(a: Float[Tensor, "n e"], b: Float[Tensor, "m e"]) -> float:
    """Returns the sum of CMMD's Gaussian kernel over all pairs, in parts, since there may be billions of them."""
    return sum(float(torch.exp(-torch.cdist(part, b).square() / (2 * SIGMA**2)).sum()) for part in a.split(1000))


def table(report: Mapping) -> list[str]:
    """Returns the numbers of the drawn pictures beside those of the real ones, and what to make of them, as lines."""
    choices, lines = report["choices"], [f"{report['data']}: {report['n']} pictures, seen by {report['eyes']}", ""]
    rows = {
        "CLIP score": ("clip_score", 2, "100 · cosine with the own caption"),
        "R-precision": (
            "r_precision",
            3,
            f"the own caption fits best of {choices}; {1 / max(choices, 1):.2f} by chance",
        ),
        "CMMD": ("cmmd", 3, "distance to the real pictures; of the real ones, between their halves"),
    }
    lines += [f"{'':<12} {'drawn':>8} {'real':>8}"]
    for name, (key, digits, meaning) in rows.items():
        drawn, real = (report[f"{key}_{whose}"] for whose in ("drawn", "real"))
        if drawn is not None:
            lines.append(f"{name:<12} {drawn:8.{digits}f} {real:8.{digits}f}   {meaning}")
    if report["captioned"] and not tells_apart(report["r_precision_real"], choices, report["captioned"]):
        lines += ["", "These eyes cannot tell the captions of the real pictures apart, so what they say of drawn ones"]
        lines += ["means little. Choose others by eyes=MODEL/WEIGHTS of OpenCLIP, such as eyes=ViT-L-14/openai."]
    return lines


def tells_apart(precision: float, choices: int, n: int) -> bool:
    """Whether `n` pictures found their captions more often than by chance, by three standard deviations."""
    chance = 1 / choices
    return precision > chance + 3 * math.sqrt(chance * (1 - chance) / n)


def sheet(pictures: Mapping[str, "Sequence[Image.Image]"], captions: Sequence[str]) -> "Image.Image":  # noqa: F821
    """Returns the first pictures in pairs: a row of real ones, below it what was drawn for their captions."""
    columns, shown, texts = min(COLUMNS, len(captions)), [], []
    for start in range(0, min(ROWS * columns, len(captions) - columns + 1), columns):
        row = slice(start, start + columns)
        shown += [*pictures["real"][row], *pictures["drawn"][row]]
        texts += [*[""] * columns, *captions[row]]
    return stack(
        {"a row of real pictures, and below it what was drawn for their captions": grid(shown, texts, columns)}
    )
