import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from minidiff import viz
from minidiff.errors import InputError
from minidiff.pipeline import Snapshot, to_pil
from minidiff.process import EDM, Cosine, Flow, Linear, ZeroTerminalSNR
from minidiff.samplers import ddim, uniform
from minidiff.seeds import generator
from minidiff.space import Pixels


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def snapshots(n=12, size=16, patch=1, scale=0.2):
    """A sampled film whose denoiser always answers the same small picture, so that nothing is clipped."""
    process, space = Cosine(), Pixels(size, patch)
    answer = scale * space.encode(noise(1, 3, size, size, seed=1).clamp(-2, 2))

    def denoise(xt, t):
        return answer, (xt - process.alpha(t) * answer) / process.sigma(t)

    x = scale * noise(1, *space.shape, seed=2).clamp(-2, 2)
    states = ddim(denoise, x, uniform(process, n), process, torch.randn_like)
    return [
        Snapshot(float(s.t), s.xt[0].float(), s.x0_hat[0], s.eps_hat[0].float(), to_pil(space.decode(s.x0_hat)[0]))
        for s in states
    ]


def tiles(sheet, rows, columns, size, top=0, row_height=None):
    """Cuts the pictures out of a sheet, as numbers in [−1, 1]."""
    pixels = np.asarray(sheet).astype(float) / 127.5 - 1
    step, height = size + viz.GAP, row_height or size + viz.GAP
    return [
        [
            pixels[top + viz.GAP + r * height :, viz.GAP + c * step :][:size, :size]
            for c in range(columns)
        ]
        for r in range(rows)
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------- grid


def test_grid_shows_every_pixel_enlarged_by_a_whole_factor():
    images = noise(5, 3, 32, 32).clamp(-1, 1)
    sheet = viz.grid(images, columns=3)
    assert sheet.mode == "RGB" and sheet.size == (3 * (128 + viz.GAP) + viz.GAP, 2 * (128 + viz.GAP) + viz.GAP)
    cut = [tile for row in tiles(sheet, 2, 3, 128) for tile in row]
    for tile, image in zip(cut, images, strict=False):
        shown = torch.from_numpy(tile).permute(2, 0, 1)
        assert (shown[:, ::4, ::4] - image).abs().max() <= 1 / 127.5
        assert torch.equal(shown[:, ::4, ::4], shown[:, 3::4, 3::4])
    assert (cut[5] == 1).all()  # no sixth picture: paper


@pytest.mark.parametrize(("size", "expected"), [(16, 128), (28, 140), (64, 128), (96, 96), (256, 256)])
def test_grid_enlarges_to_a_readable_size_and_never_shrinks(size, expected):
    assert viz.grid(torch.zeros(1, 3, size, size)).size == (expected + 2 * viz.GAP, expected + 2 * viz.GAP)


def test_grid_takes_pil_images_and_puts_transparent_ones_on_paper():
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    sheet = np.asarray(viz.grid([clear, Image.new("L", (8, 8), 7)], scale=1))
    assert (sheet[viz.GAP : viz.GAP + 8, viz.GAP : viz.GAP + 8] == 255).all()
    assert (sheet[viz.GAP : viz.GAP + 8, 2 * viz.GAP + 8 : 2 * viz.GAP + 16] == 7).all()


def test_captions_lie_below_their_pictures_and_inside_their_columns():
    captions = ["a small checkered circle in the top left corner of a navy background", "a star"]
    plain = viz.grid(torch.zeros(2, 3, 32, 32))
    sheet = viz.grid(torch.zeros(2, 3, 32, 32), captions)
    assert sheet.width == plain.width and sheet.height > plain.height + 40
    ink = (np.asarray(sheet.convert("L"))[viz.GAP + 128 :] < 200).any(axis=0)
    columns = np.flatnonzero(ink)
    assert columns.min() >= viz.GAP and columns.max() < sheet.width - viz.GAP
    assert not ink[viz.GAP + 128 : 2 * viz.GAP + 128].any()  # the gap between the columns stays white


def test_only_framed_pictures_have_a_frame():
    sheet = np.asarray(viz.grid(torch.zeros(2, 3, 32, 32), framed=[1]))
    beside = sheet[viz.GAP + 64, [viz.GAP - 2, 2 * viz.GAP + 128 - 2]]
    assert (beside[0] == 255).all() and tuple(beside[1]) == (0xD5, 0x5E, 0x00)


@pytest.mark.parametrize(("n", "captions"), [(0, None), (2, ["one"]), (1, [])])
def test_grid_refuses_what_it_cannot_lay_out(n, captions):
    with pytest.raises(InputError, match="MD-VIZ-001"):
        viz.grid(torch.zeros(n, 3, 8, 8), captions)


@pytest.mark.parametrize("text", ["a red circle next to a blue square", "x" * 200, "a " + "y" * 90 + " b\nc", "", "W"])
@pytest.mark.parametrize("width", [5, 40, 128])
def test_wrapped_lines_fit_and_lose_nothing(text, width):
    font = viz._font(viz.TEXT)
    lines = viz.wrap(text, font, width)
    assert all(font.getlength(line) <= width or len(line) == 1 for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())


def test_stack_keeps_its_sheets_and_adds_headings():
    top, bottom = Image.new("RGB", (60, 20), "#102030"), Image.new("RGB", (90, 30), "#405060")
    page = np.asarray(viz.stack({"first": top, "second": bottom}))
    assert page.shape[1] == 90
    assert (page == (0x10, 0x20, 0x30)).all(-1).sum() == 60 * 20
    assert (page[-30:] == (0x40, 0x50, 0x60)).all()


# ---------------------------------------------------------------------------------------------------- film


@pytest.mark.parametrize("patch", [1, 2])
def test_what_a_film_draws_obeys_the_forward_process(patch):
    """The panels are cut out of the drawn strip: xt = alpha·x0_hat + sigma·eps_hat must hold between them."""
    states = snapshots(patch=patch)
    strip = viz.film(states, every=4)
    shown, process = states[::4], Cosine()
    heading = viz._text_height(1, viz._font(viz.HEADING))
    xt, x0, eps = (
        tiles(strip, 1, len(shown), 128, top=r * (128 + 2 * viz.GAP) + (r + 1) * heading)[0] for r in range(3)
    )
    for state, *panels in zip(shown, xt, x0, eps, strict=True):
        t = torch.tensor(state.t, dtype=torch.float64)
        alpha, sigma = process.alpha(t).item(), process.sigma(t).item()
        seen, picture, its_noise = (panel[::8, ::8] for panel in panels)
        inside = (np.abs(panels) < 0.99).all(0)[::8, ::8]
        assert inside.mean() > 0.6
        gap = np.abs(seen - (alpha * picture + sigma * its_noise))[inside]
        assert gap.max() <= 1.5 / 127.5  # half a grey level in each of the three
        assert np.abs(picture - np.asarray(state.image) / 127.5 + 1).max() < 1e-6


def test_film_shows_the_first_and_the_last_state_whatever_the_step():
    for every, frames in ((None, 8), (5, 4), (12, 2), (100, 2), (1, 13)):
        assert viz.film(snapshots(12), every).width == frames * (128 + viz.GAP) + viz.GAP
    assert viz.film(snapshots(2)).width == 3 * (128 + viz.GAP) + viz.GAP


def test_film_of_latents_lines_up_with_the_decoded_pictures():
    latent = noise(4, 4, 4)
    state = Snapshot(0.5, latent, latent, latent, Image.new("RGB", (32, 32)))
    assert viz.as_picture(latent, 32).shape == (3, 4, 4)
    assert viz.film([state, state]).width == 2 * (128 + viz.GAP) + viz.GAP


def test_dissolve_draws_the_forward_process_in_one_noise():
    image, process, ts = noise(3, 16, 16).clamp(-0.5, 0.5), Flow(), [0.0, 0.25, 1.0]
    shown = tiles(viz.dissolve(image, process, ts, seed=3), 1, 3, 128)[0]
    eps = torch.randn(image.shape, generator=generator(3, "image"))
    for t, tile in zip(ts, shown, strict=True):
        expected = ((1 - t) * image + t * eps).clamp(-1, 1)
        assert (torch.from_numpy(tile[::8, ::8]).permute(2, 0, 1) - expected).abs().max() <= 0.51 / 127.5


# ---------------------------------------------------------------------------------------------------- plots


def lines_of(axes):
    return {line.get_label(): line for line in axes.get_lines()}


def draw(figure):
    figure.canvas.draw()  # what cannot be drawn raises here
    return figure.axes


@pytest.fixture
def run(tmp_path):
    def write(rows, tail=""):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "metrics.jsonl").write_text(text + tail, encoding="utf-8")
        return tmp_path

    return write


def test_schedule_plot_draws_what_the_processes_say():
    pytest.importorskip("matplotlib")
    processes = {"linear": Linear(), "zero SNR": ZeroTerminalSNR(Linear()), "flow": Flow(), "edm": EDM()}
    alpha, sigma, log_snr = draw(viz.schedule_plot(processes))
    x, y = lines_of(alpha)["flow"].get_data()
    assert np.allclose(y, 1 - x)
    assert [text.get_text() for text in alpha.get_legend().get_texts()] == list(processes)
    assert sigma.get_yscale() == "log"  # EDM's sigma goes up to 80
    assert all(np.isfinite(line.get_ydata()).all() for line in log_snr.get_lines())
    colours = [line.get_color() for line in alpha.get_lines()]
    dashes = [line.get_linestyle() for line in alpha.get_lines()]
    assert len(set(colours)) == len(set(dashes)) == len(processes)


def crosses(axes) -> list[list[float]]:
    """Returns where each line of crosses has them."""
    lines = [line for line in axes.get_lines() if line.get_marker() == "x" and len(line.get_xdata())]
    return [list(line.get_xdata()) for line in lines]


def test_curves_show_losses_and_mark_where_they_are_nan(run):
    pytest.importorskip("matplotlib")
    rows = [{"step": s, "loss": 1 / s, "lr": 1e-3} for s in range(1, 11)]
    rows[3]["loss"], rows[6]["loss"] = math.nan, math.inf
    rows[9] |= {"val_loss": 0.5, "val_loss_ema": 0.6}
    loss, rate = draw(viz.curves(run(rows, tail='{"step": 11, "lo')))
    lines = lines_of(loss)
    assert {"training batch", "validation, raw", "validation, EMA"} <= set(lines)
    assert np.isnan(lines["training batch"].get_ydata()).sum() == 2
    assert crosses(loss) == [[4, 7]]
    assert list(lines_of(rate)["lr"].get_ydata()) == [1e-3] * 10


def test_curves_of_a_run_that_was_never_finite_are_still_drawn(run):
    pytest.importorskip("matplotlib")
    loss, *_ = draw(viz.curves(run([{"step": s, "loss": math.nan} for s in range(3)])))
    assert crosses(loss) == [[0, 1, 2]]


def test_noise_levels_spread_over_the_run(run):
    pytest.importorskip("matplotlib")
    rows = [{"step": 10 * s, "loss": 1.0} | {f"loss_t{k}": 1.0 + s + k for k in range(10)} for s in range(1, 21)]
    (axes,) = draw(viz.noise_levels(run(rows), moments=4))
    steps = [line.get_label() for line in axes.get_lines()]
    assert len(steps) == 4 and steps[0] == "step 10" and steps[-1] == "step 200"
    assert list(axes.get_lines()[-1].get_ydata()) == [21.0 + k for k in range(10)]


def test_plots_say_what_they_lack(run, tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(InputError, match="MD-VIZ-003.*metrics.jsonl"):
        viz.curves(tmp_path / "nowhere")
    with pytest.raises(InputError, match="MD-VIZ-003.*noise level"):
        viz.noise_levels(run([{"step": 1, "loss": 1.0}]))


def test_settling_splits_the_distance_to_the_end_into_layout_and_details():
    pytest.importorskip("matplotlib")
    end, coarse, fine = torch.zeros(3, 16, 16), torch.full((3, 16, 16), 0.5), torch.ones(3, 16, 16)
    fine[:, ::2] = -1  # its 2×2 means are 0
    states = [Snapshot(1 - i / 2, x, x, x, to_pil(x)) for i, x in enumerate((fine, coarse, end))]
    layout, details = draw(viz.settling({"w = 3": states}))
    assert list(lines_of(layout)["w = 3"].get_ydata()) == [0, 0.5, 0]
    assert list(lines_of(details)["w = 3"].get_ydata()) == [1, 0, 0]
    assert layout.xaxis_inverted()


def test_figures_are_closed_so_that_notebooks_show_them_once():
    plt = pytest.importorskip("matplotlib.pyplot")
    before = plt.rcParams["font.size"], plt.get_fignums()
    viz.schedule_plot({"flow": Flow()})
    assert (plt.rcParams["font.size"], plt.get_fignums()) == before
