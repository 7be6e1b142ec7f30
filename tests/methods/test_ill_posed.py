"""Methods on a table that ends far below the signal: where students start, are matched and learn how fast."""

import warnings

import numpy as np
import pytest
import torch

from fewstep.data.random import Rng
from fewstep.diffusion.mixture import GaussianMixture
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedule import Schedule
from fewstep.methods.dmd import DMD
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.parts.distances import bounded_gain, distance
from fewstep.methods.registry import find_method
from fewstep.models.denoiser import Denoiser
from fewstep.models.hub import Remark
from fewstep.training.players import PlayerState
from fewstep.training.remarks import first_time_remark
from fewstep.training.settings import TrainingSettings
from fewstep.training.trainer import Trainer
from fewstep.verification.bench import Bench

DDPM = Schedule.from_betas(np.linspace(1e-4, 0.02, 1000))  # 157 at 999, 15 between 730 and 731
STABLE_DIFFUSION = Schedule.scaled_linear()
TIMES = (730.0, 547.0, 365.0, 182.0)


def test_dmd2_starts_where_its_schedule_allows_and_its_card_says_so():
    method = DMD2(DDPM)
    assert tuple(method.rollout.timesteps.tolist()) == TIMES
    assert DMD2.sampling(method.settings).timesteps == method.default_times == TIMES
    assert DMD2(DDPM, num_inference_steps=1).default_times == TIMES[:1]
    given = DMD2(DDPM, timesteps=(999, 499))
    assert given.rollout.timesteps.tolist() == [999, 499] and given.default_times == ()


@pytest.mark.parametrize("kind", ["v_prediction", "sample", "flow"])
def test_students_that_do_not_predict_noise_are_left_as_they_were(kind):
    """A network that predicts v on DDPM's table, as of progressive distillation, is trained where its teacher was."""
    schedule = Denoiser(torch.nn.Identity(), DDPM, kind).schedule
    dmd2, dmd = DMD2(schedule), DMD(schedule)
    assert torch.equal(dmd2.rollout.timesteps, DDPM.timesteps(4).double()) and dmd.timestep == 999
    assert [player.rate for player in (*dmd2.players, *dmd.players)] == [1.0] * 4
    assert dmd2.sampling(dmd2.settings).timesteps == () == dmd.sampling(dmd.settings).timesteps
    assert dmd.scores.usable == 1000
    for method in (dmd2, dmd):
        assert first_time_remark(method, Denoiser(torch.nn.Identity(), DDPM, kind)) == ""


def test_random_times_keep_the_schedules_start():
    method = DMD2(DDPM, any_steps=4)
    assert method.settings.timesteps is None and method.default_times == ()
    assert method.rollout.draw_times(Rng(0, 0, 1))[0] == 999


def test_dmd_starts_there_too():
    method = DMD(DDPM)
    assert method.timestep == 730 and DMD.sampling(method.settings).timesteps == (730,)
    assert DMD(DDPM, timestep=999).timestep == 999


def test_on_other_schedules_nothing_changes():
    for schedule in (STABLE_DIFFUSION, STABLE_DIFFUSION.zero_terminal_snr(), Schedule.flow(), Schedule.edm()):
        dmd2, dmd = DMD2(schedule), DMD(schedule)
        assert dmd2.settings.timesteps is None and dmd.settings.timestep is None
        assert torch.equal(dmd2.rollout.timesteps, schedule.timesteps(4).double()) and dmd.timestep == schedule.start
        assert [player.rate for player in (*dmd2.players, *dmd.players)] == [1.0] * 4
        assert dmd.scores.usable == len(dmd.scores.levels) and dmd.scores.levels[-1] == schedule.start


@pytest.mark.parametrize("cls", [DMD, DMD2])
def test_scores_are_compared_up_to_the_first_time(cls):
    method = cls(DDPM)
    scores = method.scores if cls is DMD else method.matching.scores
    drawn = scores.draw_time(Rng(0, 0, 20_000), "matching_time", 0.02, 0.98)
    assert (drawn.min(), drawn.max()) == (20, 730)
    assert scores.draw_time(Rng(0, 0, 20_000), "fake_time").max() == 999
    high = scores.draw_time(Rng(0, 0, 2_000), "matching_time", 0.02, 0.98, above=749.0)  # of times that were given
    assert high.min() > 749 and high.max() == 980


def test_the_critic_learns_four_times_as_fast_where_nothing_else_is_asked_for():
    critic = DMD2(DDPM).players[1]
    rates = []
    for asked in (None, 3e-5):
        settings = TrainingSettings(learning_rate=1e-5, critic_learning_rate=asked)
        state = PlayerState(critic, [torch.nn.Parameter(torch.zeros(1))], settings)
        state.parameters[0].grad = torch.ones(1)
        state.update(0)
        rates.append((state.rate(0), state.optimizer.param_groups[0]["lr"]))
    assert np.allclose(rates, [(4e-5, 4e-5), (3e-5, 3e-5)])
    assert DMD(DDPM).players[1].rate == 4.0
    assert settings.rate(0) == 1e-5


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_the_gain_is_what_one_more_in_the_output_changes(kind):
    x, output = torch.randn(3, 2, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    t, s = np.array([999.0, 400.0, 3.0]), np.array([250.0, 400.0, 0.0])
    for a, sigma in ((1.0, 0.0), DDPM.alpha_sigma(s)):
        before, after = (Prediction(x, o, t, DDPM, kind).combine(a, sigma) for o in (output, output + 1))
        gain = Prediction(x, output, t, DDPM, kind).gain(a, sigma)
        assert np.allclose((after - before).abs()[:, 0].numpy(), gain, rtol=1e-9, atol=1e-12)
    assert Prediction(x, output, -1.0, DDPM, "sample").gain() == 0  # singular at clean data


@pytest.mark.parametrize("kind", ["l2", "huber", "sample-huber"])
def test_a_row_of_large_gain_moves_the_output_as_one_of_15(kind):
    gain, error = np.array([150.0, 15.0, 1.0]), torch.full((3, 4), 0.5, dtype=torch.float64)
    gradients = []
    for gains in (gain, np.minimum(gain, 15.0)):
        output = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
        scale = torch.from_numpy(gains)[:, None]
        distance(scale * output, scale * error, kind, 1e-6, bounded_gain(gains, kind)).backward()
        gradients.append(output.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=0)
    assert bounded_gain(np.array([14.61, 1.0]), kind) is None


def said(name, schedule, kind="epsilon", **settings):
    network = torch.nn.Identity()
    return first_time_remark(find_method(name)(schedule, **settings), Denoiser(network, schedule, kind))


def test_the_remark_names_time_weight_and_remedy():
    assert said("dmd2", DDPM) == (
        "Noise is 157 times the signal at this schedule's start, 999, too much to read clean data off one prediction, "
        "so the student starts at 730, where it is 15 times: sample it at timesteps 730, 547, 365, 182."
    )
    assert said("dmd2", DDPM, timesteps=(999, 499)) == (
        "At 999 an error of the epsilon prediction weighs 157 in clean data, so that training may diverge: leave "
        "method.timesteps out, or lower training.learning_rate."
    )
    assert "leave method.timestep out" in said("dmd", DDPM, timestep=999.0)
    assert "leave method.any_steps out" in said("dmd2", DDPM, any_steps=4)
    for name in ("lcm", "tcd", "flowmap", "reflow", "scm"):
        assert said(name, DDPM) == (
            "At 999 an error of the epsilon prediction weighs 157 in clean data, and is counted as 15 by the loss: if "
            "samples get worse, lower training.learning_rate or take pcm."
        )


def test_there_is_none_where_all_is_well():
    for name in ("dmd2", "dmd", "lcm", "tcd", "pcm", "flowmap", "reflow", "scm"):
        assert said(name, STABLE_DIFFUSION) == said(name, Schedule.flow(), "flow") == ""
        assert said(name, STABLE_DIFFUSION.zero_terminal_snr(), "v_prediction") == ""
    assert said("pcm", DDPM) == said("lcm", DDPM, "v_prediction") == said("dmd2", DDPM, timesteps=(399,)) == ""


def test_it_is_said_once_at_the_start_and_not_on_resume(tmp_path):
    mixture = GaussianMixture([0.5, 0.5], [[-1.0], [1.0]], [0.1, 0.1])
    bench, method = Bench(mixture, DDPM), DMD2(DDPM, guidance_scale=1.0, adversarial_weight=0.0)
    heard = []
    for steps in (1, 2):
        settings = TrainingSettings(steps=steps, batch_size=2)
        trainer = Trainer(method, bench.roles(method), bench.source, settings, run_dir=tmp_path)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.run(resume=steps > 1)
        heard.append([str(w.message) for w in caught if isinstance(w.message, Remark)])
    assert heard == [[said("dmd2", DDPM)], []]
