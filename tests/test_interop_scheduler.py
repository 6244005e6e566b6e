"""Tables, samplers and scheduler files against the library, step by step, with one toy network for both."""

import json
import math
import warnings

import pytest
import torch

from minidiff import grids, samplers
from minidiff.config import build
from minidiff.denoiser import Denoiser
from minidiff.errors import InputError
from minidiff.interop.scheduler import SETTINGS, Scheduler, load_scheduler, save_scheduler
from minidiff.objective import X0, Eps, FlowVelocity, Uniform, V
from minidiff.process import Linear, Table

diffusers = pytest.importorskip("diffusers")

STEPS = 20
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
GIVEN = {"trained_betas": torch.linspace(1e-3, 0.02, 200).tolist(), "num_train_timesteps": 200}
PLAIN = {"clip_sample": False}
DPM, UNIPC = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"
SDE = {"algorithm_type": "sde-dpmsolver++"}
KARRAS = ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"]
# class, its settings, and whether it takes the objective `sample`
SCHEDULERS = [
    ("DDIMScheduler", PLAIN, True),
    ("DDPMScheduler", PLAIN, True),
    ("EulerDiscreteScheduler", {}, True),
    ("EulerAncestralDiscreteScheduler", {}, False),
    ("HeunDiscreteScheduler", {}, True),
    (DPM, {}, True),
    (DPM, SDE, True),
    (UNIPC, {}, True),
]
every_scheduler = pytest.mark.parametrize(
    "name, settings, sample", SCHEDULERS, ids=lambda x: x.get("algorithm_type", "") if isinstance(x, dict) else str(x)
)


def network(x, timestep):
    """A smooth nonlinear function of x and the timestep, of about unit size."""
    return 0.8 * torch.tanh(1.2 * x + math.cos(float(timestep) / 300)) + 0.1 * x.roll(1, dims=-1)


class Net(torch.nn.Module):
    def forward(self, x, tau, cond):
        assert (tau == tau[0]).all()
        return network(x, tau[0])


def noise():
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def saved(tmp_path, name, **settings):
    scheduler = getattr(diffusers, name).from_config(settings)
    scheduler.save_pretrained(tmp_path)
    return scheduler


def theirs(scheduler, n=STEPS, eta=0.0):
    """Returns every state of the library's walk in our coordinates: x before each step, and the result."""
    scheduler.set_timesteps(n)
    generator = torch.Generator().manual_seed(1)
    extra = {} if type(scheduler).__name__ in (UNIPC, "HeunDiscreteScheduler") else {"generator": generator}
    extra |= {"eta": eta} if eta else {}
    karras = type(scheduler).__name__ in KARRAS
    x, states = noise() * scheduler.init_noise_sigma, []
    for i, t in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(x, t)
        if type(scheduler).__name__ != "HeunDiscreteScheduler" or i % 2 == 0 or i == len(scheduler.timesteps) - 1:
            states.append(seen)
        x = scheduler.step(network(seen, t), t, x, **extra).prev_sample
    last = scheduler.sigmas[-1] if karras else 0  # its x is x/alpha
    return [*states, x / (last**2 + 1) ** 0.5]


def ours(scheduler, n=STEPS, **options):
    denoiser = Denoiser(Net(), scheduler.process, scheduler.objective, Uniform())
    times = scheduler.grid(scheduler.process, n)
    x = scheduler.process.start_std(times[0]).float() * noise()
    generator = torch.Generator().manual_seed(1)
    fresh = lambda x: torch.randn(x.shape, generator=generator)  # noqa: E731
    walk = scheduler.sampler(lambda x, t: denoiser(x, t, None), x, times, scheduler.process, fresh, **options)
    return [state.xt for state in walk]


def difference(one, other):
    """Returns the greatest difference of two walks at any step, relative to the state there."""
    assert len(one) == len(other)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(one, other, strict=True))


# Tables.


@pytest.mark.parametrize("zero_snr", [False, True], ids=["plain", "zero_snr"])
@pytest.mark.parametrize("n", [1000, 37])
@pytest.mark.parametrize(
    "betas", ["linear", "scaled_linear", "squaredcos_cap_v2", [0.01, 0.02, 0.05, 0.3]], ids=lambda b: str(b)[:12]
)
def test_the_table_is_the_librarys_to_the_last_bit(betas, n, zero_snr):
    given = {"trained_betas": betas} if isinstance(betas, list) else {"beta_schedule": betas}
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=n, beta_start=0.001, beta_end=0.015, rescale_betas_zero_snr=zero_snr, **given
    )
    table = Table(betas, 0.001, 0.015, n, zero_terminal_snr=zero_snr)
    assert torch.equal(table.alphas_cumprod, scheduler.alphas_cumprod)
    t = table.t_of_tau(torch.arange(table.n).double())
    torch.testing.assert_close(table.alpha(t) ** 2, scheduler.alphas_cumprod.double(), rtol=1e-12, atol=0)
    torch.testing.assert_close(table.sigma(t) ** 2, 1 - scheduler.alphas_cumprod.double(), rtol=1e-12, atol=0)


@every_scheduler
@pytest.mark.parametrize("objective", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_every_step_is_the_librarys(tmp_path, name, settings, sample, objective, spacing):
    if objective == "sample" and not sample:
        pytest.skip("not in the library")
    more = {"prediction_type": objective, "timestep_spacing": spacing, "steps_offset": 1} | settings
    reference = saved(tmp_path, name, **SD, **more)
    walk, reference = ours(load_scheduler(tmp_path)), theirs(reference)
    assert len(walk) == STEPS + 1
    assert difference(walk, reference) < 1e-5  # measured: at most 1e-6


@pytest.mark.parametrize("n", [3, 14, 15, 30])
@pytest.mark.parametrize(
    "name, settings",
    [
        ("DDIMScheduler", PLAIN | {"set_alpha_to_one": False, "steps_offset": 1}),
        ("DDIMScheduler", PLAIN | {"set_alpha_to_one": False}),
        ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}),
        (DPM, {"final_sigmas_type": "sigma_min"}),
        (DPM, SDE | {"final_sigmas_type": "sigma_min"}),
        (UNIPC, {"final_sigmas_type": "sigma_min"}),
    ],
)
def test_a_result_may_keep_the_noise_of_the_first_entry(tmp_path, name, settings, n):
    reference = saved(tmp_path, name, **SD, **settings)
    scheduler = load_scheduler(tmp_path)
    assert scheduler.grid(scheduler.process, n)[-1] == 1 / 1000
    assert difference(ours(scheduler, n), theirs(reference, n)) < 1e-5


@pytest.mark.parametrize("name, settings, _", [x for x in SCHEDULERS if "Heun" not in x[0]])
def test_zero_terminal_snr_begins_in_pure_noise_as_the_library_does(tmp_path, name, settings, _):
    more = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    reference = saved(tmp_path, name, **SD, **more, **settings)
    scheduler = load_scheduler(tmp_path)
    alpha = scheduler.process.alpha(torch.ones((), dtype=torch.float64))
    assert alpha == (0 if name in ("DDIMScheduler", "DDPMScheduler") else pytest.approx(2**-12))
    # float32 holds the library's first sigma, 4096, and differences from it, to 2**-12 only
    assert difference(ours(scheduler), theirs(reference)) < 1e-4


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "HeunDiscreteScheduler", DPM, UNIPC])
@pytest.mark.parametrize("objective", ["epsilon", "v_prediction"])
def test_karras_sigmas(tmp_path, name, objective):
    reference = saved(tmp_path, name, **SD, use_karras_sigmas=True, prediction_type=objective)
    scheduler = load_scheduler(tmp_path)
    assert scheduler.grid is grids.karras
    times = scheduler.grid(scheduler.process, STEPS)
    reference.set_timesteps(STEPS)
    timesteps = torch.as_tensor(reference.timesteps).double()
    timesteps = torch.cat([timesteps[:1], timesteps[1::2]]) if name == "HeunDiscreteScheduler" else timesteps
    torch.testing.assert_close(scheduler.process.tau(times[:-1]), timesteps, rtol=0, atol=1e-3)
    assert difference(ours(scheduler), theirs(reference)) < 1e-5


@pytest.mark.parametrize("objective", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    "name, settings", [("DDPMScheduler", PLAIN), ("EulerDiscreteScheduler", {}), (DPM, {}), (UNIPC, {})]
)
def test_the_cosine_schedule_is_walked_from_its_last_entry(tmp_path, name, settings, objective):
    more = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": objective, "timestep_spacing": "trailing"}
    reference = saved(tmp_path, name, **more, **settings)
    scheduler = load_scheduler(tmp_path)
    assert scheduler.process.t_max == 0.999 and scheduler.process.draw(torch.zeros(1)) == pytest.approx(0.999)
    # Float32 shows where x0_hat comes from eps by a division by alpha, 5e-5 here, and that the library's Euler walks in
    # x/alpha, from 20000 down.
    rounding = objective == "epsilon" or "Euler" in name
    assert difference(ours(scheduler), theirs(reference)) < (1e-3 if rounding else 1e-5)


def test_a_table_travels_as_json():
    for betas in ("scaled_linear", [0.01, 0.02, 0.1]):
        node = {"_target_": "minidiff.process.Table", "betas": betas, "zero_terminal_snr": True}
        table = build(json.loads(json.dumps(node)))
        assert table == Table(betas, zero_terminal_snr=True) and hash(table) == hash(
            Table(betas, zero_terminal_snr=True)
        )
        assert table.t_max == 1 and table.n == (1000 if isinstance(betas, str) else 3)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ddim_swaps_in_the_librarys_noise(tmp_path, eta):
    reference = saved(tmp_path, "DDIMScheduler", **SD, **PLAIN)
    assert difference(ours(load_scheduler(tmp_path), eta=eta), theirs(reference, eta=eta)) < 1e-5


@pytest.mark.parametrize("n", [7, 30, 51])
@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
@every_scheduler
def test_spacings_that_do_not_divide_the_table(tmp_path, name, settings, sample, spacing, n):
    reference = saved(tmp_path, name, **SD, **settings, timestep_spacing=spacing)
    assert difference(ours(load_scheduler(tmp_path), n), theirs(reference, n)) < 1e-5


def test_a_leaping_ddim_refuses_steps_that_are_not_equal(tmp_path):
    saved(tmp_path, "DDIMScheduler", **SD, **PLAIN, timestep_spacing="trailing")
    scheduler = load_scheduler(tmp_path)
    with pytest.raises(InputError, match="MD-INTEROP-305"):
        ours(scheduler._replace(grid=grids.log_snr))
    assert len(ours(scheduler._replace(sampler=samplers.ddim, grid=grids.log_snr))) == STEPS + 1


# The process.


def test_between_entries_karras_sigma_is_a_line_or_its_logarithm_is():
    entries = Table(**{"betas": "linear"}).t_of_tau(torch.tensor([499.0, 499.25, 500.0]))
    for log_linear, scale in [(False, lambda x: x), (True, torch.log)]:
        low, between, high = scale(Table("linear", log_linear=log_linear).karras_sigma(entries))
        assert (between - low) / (high - low) == pytest.approx(0.25)


@pytest.mark.parametrize("log_linear", [False, True])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_a_table_keeps_what_a_process_promises(zero_snr, log_linear):
    table = Table("scaled_linear", 0.00085, 0.012, zero_terminal_snr=zero_snr, log_linear=log_linear)
    zero, t = torch.zeros(()), torch.linspace(0, 1, 2001, dtype=torch.float64)
    assert table.alpha(zero) == 1 and table.sigma(zero) == 0 and table.alpha(zero).dtype == torch.float32
    torch.testing.assert_close(table.alpha(t) ** 2 + table.sigma(t) ** 2, torch.ones_like(t))
    levels = table.log_snr(t[:-2])
    assert levels[0] == math.inf and (levels.diff() < 0).all()
    torch.testing.assert_close(table.t_of_log_snr(levels[2:]), t[2:-2], rtol=0, atol=1e-8)
    assert table.tau(t[:3]).tolist() == [0, 0, 0] and table.tau(t[-1]) == 999
    u = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = table.tau(table.draw(torch.cat([u, torch.tensor([0.0, 1 - 2**-53])])))
    torch.testing.assert_close(drawn, drawn.round(), rtol=0, atol=1e-9)
    assert drawn.max() == 999 and drawn.min() == 0


@pytest.mark.parametrize("betas", ["lienar", [0.1, 0.0], [0.1], [1.5, 0.1]])
def test_a_table_that_is_none_is_refused(betas):
    with pytest.raises(InputError, match="betas names one of linear, scaled_linear") as error:
        Table(betas)
    assert error.value.code == "MD-PROCESS-002"


def test_a_table_holds_no_more_steps_than_entries():
    for grid in (grids.leading, grids.linspace, grids.trailing):
        assert grid(Table(n=10), 10)[:-1].tolist() == pytest.approx([k / 10 for k in range(10, 0, -1)])
        with pytest.raises(InputError, match="MD-SAMPLE-004"):
            grid(Table(n=10), 11)


# Files.


def test_stable_diffusion_1_is_sampled_with_ddim_and_told_so(tmp_path):
    saved(tmp_path, "PNDMScheduler", **SD, steps_offset=1, skip_prk_steps=True)
    with pytest.warns(UserWarning, match="names PNDM, which minidiff does not have: it samples with ddim"):
        scheduler = load_scheduler(tmp_path)
    assert scheduler.sampler is samplers.ddim and isinstance(scheduler.objective, Eps) and not scheduler.clip
    timesteps = scheduler.process.tau(scheduler.grid(scheduler.process, 50))
    assert timesteps[:2].tolist() == [981, 961] and timesteps[-2:].tolist() == [1, 0]


def test_what_a_file_leaves_out_is_the_librarys_default(tmp_path):
    for name in SETTINGS:
        reference = saved(tmp_path, name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            full = load_scheduler(tmp_path)
            (tmp_path / "scheduler_config.json").write_text(json.dumps({"_class_name": name}))
            bare = load_scheduler(tmp_path)
        assert torch.equal(bare.process.alphas_cumprod, reference.alphas_cumprod)
        assert bare.process == full.process and bare[1:3] == full[1:3] and bare.clip == full.clip
        assert torch.equal(bare.grid(bare.process, 9), full.grid(full.process, 9))


@every_scheduler
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("betas", [SD, GIVEN], ids=["named", "given"])
def test_what_is_saved_is_loaded_by_both(tmp_path, name, settings, sample, spacing, betas):
    more = {"steps_offset": 1, "prediction_type": "v_prediction", "timestep_spacing": spacing} | betas | settings
    reference = saved(tmp_path / "theirs", name, **more)
    scheduler = load_scheduler(tmp_path / "theirs")
    save_scheduler(scheduler, tmp_path / "ours")
    again = getattr(diffusers, name).from_pretrained(tmp_path / "ours")
    assert torch.equal(again.alphas_cumprod, reference.alphas_cumprod)
    for a, b in zip(theirs(again), theirs(reference), strict=True):
        assert torch.equal(a, b)
    assert load_scheduler(tmp_path / "ours").process == scheduler.process


def test_what_no_class_expresses_is_not_saved(tmp_path):
    scheduler = Scheduler(Table("linear"), V(), samplers.dpmpp_2m, grids.trailing, False)
    save_scheduler(scheduler, tmp_path)
    for change in (
        {"process": Linear()},
        {"process": Table("linear", whole_tau=True)},
        {"objective": FlowVelocity()},
        {"grid": grids.uniform},
        {"grid": grids.linspace},  # DPM-Solver leaves out the cleanest entry
        {"sampler": samplers.euler_ancestral, "objective": X0()},
        {"clip": True},
    ):
        with pytest.raises(InputError, match="MD-INTEROP-304"):
            save_scheduler(scheduler._replace(**change), tmp_path)


def test_everything_unsupported_is_named_at_once(tmp_path):
    saved(tmp_path, DPM, solver_order=3, use_lu_lambdas=True, thresholding=True)
    with pytest.raises(InputError) as error:
        load_scheduler(tmp_path)
    assert error.value.code == "MD-INTEROP-303"
    for words in ("solver_order=3 (it takes 2)", "use_lu_lambdas=True", "thresholding=True"):
        assert words in str(error.value)


@pytest.mark.parametrize(
    "text, code",
    [("{", "MD-INTEROP-301"), ("[]", "MD-INTEROP-301"), ('{"_class_name": "LMSDiscreteScheduler"}', "MD-INTEROP-302")],
)
def test_files_that_describe_no_scheduler_of_ours(tmp_path, text, code):
    (tmp_path / "scheduler_config.json").write_text(text)
    with pytest.raises(InputError, match=code):
        load_scheduler(tmp_path)
    with pytest.raises(InputError, match="MD-INTEROP-301"):
        load_scheduler(tmp_path / "nowhere")
