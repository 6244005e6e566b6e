"""Are these captioned images what one thinks they are?"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from minidiff.config import build
from minidiff.data import Source
from minidiff.data.captions import texts
from minidiff.data.images import BadImage, read_image
from minidiff.data.source import undecoded
from minidiff.doctor import Finding
from minidiff.viz import grid

LIMIT = 5000  # rows that are read
SHEET = 40  # pictures on the contact sheet


def examine(values: Mapping, sheet: Path) -> Iterator[Finding]:
    """Yields what there is to say about the data of a training configuration; writes a contact sheet to `sheet`."""
    source: Source = build(values["data"])
    yield Finding(True, f"{source.name}: {source.size()} to train on, {len(source.validation)} to validate")
    yield from (Finding(False, remark) for remark in source.remarks)
    rows = source.head(LIMIT)
    whole = source.buffer_size is None and len(rows) == len(source)
    looked_at = "the training data" if whole else f"the first {len(rows)} rows to train on"
    bad, sizes, prints, captions, shown = [], Counter(), Counter(), [], []
    for i, row in enumerate(rows):
        try:
            picture, captioned = read_image(row[source.image], values["background"]), texts(row[source.caption])
        except (BadImage, UnicodeDecodeError) as error:
            bad.append(f"row {i}: {error}")
            continue
        sizes[picture.size] += 1
        prints[_print(picture)] += 1
        captions.append(captioned)
        if len(shown) < SHEET:
            shown.append((picture.resize((96, 96)), captioned[0]))
    yield _share("cannot be read", bad, len(rows), "they will be skipped, at most max_bad of them", limit=0.0)
    empty = [f"row {i}" for i, captioned in enumerate(captions) if captioned == [""]]
    yield _share("have no caption", empty, len(rows), "they train unconditionally")
    small = [f"{w}×{h}" for (w, h), n in sizes.items() for _ in range(n) if min(w, h) < values["image_size"]]
    yield _share(f"are smaller than image_size={values['image_size']}", small, len(rows), "they will be blurred")
    again = [f"{n} copies" for n in prints.values() for _ in range(n - 1)]
    yield _share("are copies of another one", again, len(rows), "models learn such pictures by heart; remove them")
    yield _repeated(Counter(text for captioned in captions for text in set(captioned) if text), len(rows))
    held = undecoded(source.validation, source.image)
    overlap = [f"row {i} of the validation" for i, row in enumerate(held) if _known(row[source.image], values, prints)]
    yield _share(f"of the validation are in {looked_at}", overlap, len(held), "validation would flatter", limit=0.0)
    if shown:
        sheet.parent.mkdir(parents=True, exist_ok=True)
        grid([picture for picture, _ in shown], [caption for _, caption in shown]).save(sheet)
        yield Finding(True, f"sizes {dict(sizes.most_common(3))}; look at the contact sheet: {sheet}")


def _repeated(counts: Counter, of: int) -> Finding:
    """Says which caption stands at most rows. No fault: a class has many pictures; but one that names nothing teaches
    nothing.
    """
    text, n = max(counts.items(), key=lambda item: item[1], default=("", 0))
    again = sum(n - 1 for n in counts.values())
    return Finding(True, f"captions repeat another row's {again} times" + (f"; {n} of {of}: {text!r}" if n > 1 else ""))


def _print(picture) -> str:
    return hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()


def _known(image: Mapping, values: Mapping, prints: Counter) -> bool:
    try:
        return _print(read_image(image, values["background"])) in prints
    except BadImage:
        return False


def _share(what: str, found: list[str], of: int, advice: str, limit: float = 0.01) -> Finding:
    good = len(found) <= limit * of
    example = f", such as {found[0]}" if found else ""
    return Finding(good, f"{len(found)} of {of} {what}{example}" + ("" if good else f"; {advice}"))
