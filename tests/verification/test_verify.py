"""`fewstep verify` itself: what it must pass, and what it must not."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from fewstep import GaussianMixture, Schedule, verify
from fewstep.methods.cm import CM
from fewstep.methods.ctm import CTM
from fewstep.methods.hyper import Hyper
from fewstep.methods.lcm import LCM
from fewstep.methods.pcm import PCM
from fewstep.methods.tcd import TCD
from fewstep.methods.turbo import Turbo
from fewstep.models.roles import Roles
from fewstep.verification import ctm, hyper, pcm, turbo
from fewstep.verification.bench import Bench
from fewstep.verification.contract import contract_rows
from fewstep.verification.distribution import sliced_w2
from fewstep.verification.report import Report, Row

OWN = Path(__file__).parent / "mine.py"
LINE = GaussianMixture([0.3, 0.7], [-1.2, 0.8], [0.25, 0.35])


@pytest.mark.slow
def test_lcm_learns_its_fixed_point():
    """The ring of eight modes, five hops, one step, within the bars for ten (`fewstep verify lcm` takes a minute)."""
    report = verify("lcm", seed=1, num_grid_steps=5, steps=1500)
    assert report.passed, report
    assert report["one step: median error"].measured < 0.015
    assert report["one step: 95th percentile"].measured < 0.05


@pytest.mark.slow
def test_tcd_learns_its_fixed_point():
    report = verify("tcd", LINE, seed=1, steps=900)
    assert report.passed, report
    assert sum("rms error" in row.quantity for row in report) == 5


@pytest.mark.slow
def test_pcm_learns_its_fixed_point():
    """Two modes on a line, four phases of three hops: every phase, and the four steps together, within 0.02."""
    report = verify("pcm", LINE, seed=1, steps=1000)
    assert report.passed, report  # among others, that a discriminator finds nothing against the exact student
    errors = [row.measured for row in report if "rms error" in row.quantity]
    assert len(errors) == 5 and max(errors) < 0.02


def test_lightning_needs_no_training_to_be_verified():
    """The contract of its students by mse, conditional and unconditional."""
    report = verify("lightning", seed=1, steps=0)
    assert report.passed, report
    assert {row.quantity.split(": ")[0] for row in report} >= {"conditional", "unconditional"}


@pytest.mark.slow
def test_lightning_learns_its_teachers_steps():
    """Eight modes on a ring, eight steps of the teacher in four."""
    report = verify("lightning", seed=1, steps=2000)
    assert report.passed, report
    assert sum("rms error" in row.quantity for row in report) == 5


SCHEDULES = {"vp": Schedule.scaled_linear(), "edm": Schedule.edm(), "flow": Schedule.flow(shift=3.0)}


@pytest.mark.parametrize("name", SCHEDULES)
def test_hypers_segments_and_fixed_points_hold_on_every_schedule(name):
    """No empty segment, no end at its start; no loss with s as an input, no gradient without it, for k = 8, 4, 2, 1."""
    schedule = SCHEDULES[name]
    method = Hyper(schedule, **Hyper.truth_settings, segments=4)
    rows = {row.quantity: row for row in hyper.fixed_rows(Bench(LINE, schedule), method)}
    assert all(row.passed for row in rows.values()), [row for row in rows.values() if not row.passed]
    for k in (8, 4, 2, 1):
        assert rows[f"k = {k}, conditioned on s: largest loss of the composed teacher"].measured < 1e-20
    assert any(name.startswith("later stages: ") for name in rows)


def test_hypers_fixed_points_hold_under_guidance():
    guided = GaussianMixture([0.5, 0.5], [-1.0, 1.0], [0.3, 0.4], class_weights=[[1.0, 0.0], [0.2, 0.8]])
    method = Hyper(SCHEDULES["vp"], **Hyper.truth_settings, segments=2, guidance_scale=2.5)
    assert all(row.passed for row in hyper.fixed_rows(Bench(guided, SCHEDULES["vp"], 0, 2.5), method))


def test_shorter_segments_leave_less_to_lose():
    """One prediction for every end of a segment: the loss left falls with k, to nothing at one solver step each.

    With sixteen samples of each end it varies by a third from seed to seed: hence the sum over four of them.
    """
    left = []
    for k in (1, 2, 4, 8):
        method = Hyper(SCHEDULES["vp"], **Hyper.truth_settings | {"mse_weight": 1.0}, segments=k)
        left.append(sum(hyper.loss_left(Bench(LINE, SCHEDULES["vp"], seed), method) for seed in range(4)))
    assert left[0] > 1.4 * left[1] > 1.4 * 3 * left[2] and left[3] < 1e-20


@pytest.mark.slow
@pytest.mark.parametrize(("segments", "jumps", "steps"), [(4, 8, 1200), (1, 2, 1500)])
def test_hyper_learns_its_fixed_point(segments, jumps, steps):
    report = verify("hyper", LINE, seed=1, steps=steps, segments=segments)
    assert report.passed, report
    assert sum("rms error" in row.quantity for row in report) == jumps + 1


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "steps"), [("cd", 800), ("ct", 600)])
def test_cm_learns_its_fixed_point(variant, steps):
    report = verify("cm", seed=1, steps=steps, variant=variant)
    assert report.passed and report.method == f"cm ({variant})", report
    row = report["one step: rms error"]
    assert row.limit == 0.02 and row.floor > 0.1  # the fixed point itself is that far off the flow map


@pytest.mark.parametrize("schedule", [Schedule.scaled_linear(), Schedule.edm(), Schedule.flow()])
@pytest.mark.parametrize("settings", [{"solver": "heun"}, {"variant": "ct", "timestep_sampling": "lognormal"}])
def test_cms_contract_and_fixed_points_hold_on_every_schedule(settings, schedule):
    report = verify("cm", schedule=schedule, steps=0, **settings)
    assert report.passed, report
    assert any("exact fixed point" in row.quantity for row in report)


def test_cm_is_verified_by_samples_where_its_fixed_point_is_not_known():
    names = [row.quantity for row in verify("cm", GaussianMixture.ring(4), steps=3, variant="ct")]
    assert "1 step: sliced W2 to the data; limit: the teacher's" in names
    assert not any("exact fixed point" in name or name.startswith("one step") for name in names)
    guided = GaussianMixture([0.5, 0.5], [-1.0, 1.0], [0.3, 0.4], class_weights=[[1.0, 0.0], [0.2, 0.8]])
    assert verify("cm", guided, steps=0, guidance_scale=2.5).passed


@pytest.mark.slow
def test_ctm_learns_its_table():
    """Two modes on a line, eight hops: every jump of the grid within 0.02 (rms), and the diagonal near the teacher."""
    report = verify("ctm", seed=1, steps=400)
    assert report.passed, report
    row = report["all jumps of the grid, carried to its end: rms error"]
    assert row.limit == 0.02 and report["one step: rms error"].floor > 0.1


@pytest.mark.parametrize("schedule", [Schedule.scaled_linear(), Schedule.edm(), Schedule.flow()])
@pytest.mark.parametrize("settings", [{"solver": "heun"}, {"solver": "ddim", "adversarial_weight": 0.5}])
def test_ctms_contract_and_table_hold_on_every_schedule(settings, schedule):
    bench, method = Bench(LINE, schedule), CTM(schedule, **CTM.truth_settings | settings)
    assert all(row.passed for row in contract_rows(bench, method))
    rows = {row.quantity: row for row in ctm.fixed_rows(bench, method)}
    assert all(row.passed for row in rows.values())
    assert rows["largest loss at the exact fixed point, over all h, t and s"].measured < 1e-20


def test_ctms_table_is_verified_under_guidance():
    guided = GaussianMixture([0.5, 0.5], [-1.0, 1.0], [0.3, 0.4], class_weights=[[1.0, 0.0], [0.2, 0.8]])
    assert verify("ctm", guided, steps=0, guidance_scale=2.5).passed


@pytest.mark.parametrize("schedule", [Schedule.scaled_linear(), Schedule.edm(), Schedule.flow()])
@pytest.mark.parametrize("method", ["turbo", "ladd"])
def test_add_and_ladd_hold_to_their_closed_forms_on_every_schedule(method, schedule):
    report = verify(method, LINE, schedule=schedule)
    assert report.passed, report
    names = [row.quantity for row in report]
    assert ("distillation beside an ideal discriminator: variance" in names) == (method == "turbo")
    assert not any("sliced W2" in name for name in names)  # nothing was trained
    guided = GaussianMixture([0.5, 0.5], [-1.0, 1.0], [0.3, 0.4], class_weights=[[1.0, 0.0], [0.2, 0.8]])
    assert method == "ladd" or verify(method, guided, guidance_scale=2.5).passed


def test_the_distillation_loss_converges_to_the_specified_variance():
    rows = {row.quantity: row for row in turbo.distillation_rows(Turbo)}
    assert rows["distillation beside an ideal discriminator: variance"].truth == pytest.approx(0.465, abs=5e-5)
    assert rows["distillation alone: spread left after sixty steps of descent"].measured < 1e-4


class AsksTheTeacherWithoutNoise(Turbo):
    """A planted defect: the student's image is not noised again."""

    def distillation(self, roles, cond, draws, shared):
        quiet = copy.copy(draws)
        quiet.teacher_noise = 0 * draws.teacher_noise
        return super().distillation(roles, cond, quiet, shared)


class WeighsBySigma(Turbo):
    """A planted defect: c(t) of the noise."""

    def weight(self, t):
        return self.schedule.alpha_sigma(t)[1]


@pytest.mark.parametrize(
    ("cls", "found"), [(AsksTheTeacherWithoutNoise, "sds in latents"), (WeighsBySigma, "distillation")]
)
def test_a_wrong_distillation_loss_is_found_without_training(cls, found):
    failed = [row.quantity for row in verify(cls, LINE, steps=0) if not row.passed]
    assert failed and all(name.startswith((found, "sds in latents")) for name in failed)


class EndsOneHopLower(CTM):
    """A planted defect: what is below jumps from where the teacher did not land."""

    def prepare(self, roles, batch, draws, due):
        lower = dataclasses.replace(draws, num_steps=draws.num_steps - 1 or 1)
        return dataclasses.replace(super().prepare(roles, batch, draws, due), target=super().prepare(
            roles, dataclasses.replace(batch, x0=batch.x0 + 0.1), lower, due).target)  # fmt: skip


def test_a_target_from_another_path_is_found_without_training():
    rows = ctm.fixed_rows(Bench(LINE, Schedule.edm()), EndsOneHopLower(Schedule.edm(), **CTM.truth_settings))
    assert not rows[0].passed and all(row.passed for row in rows[1:])


class TrainsOnTwoNoises(CM):
    """A planted defect: CT with noise of its own at the lower time."""

    def _solver_step(self, roles, batch, draws):
        other = self.schedule.add_noise(batch.x0, draws.noise.roll(1, 0), draws.u)
        return dataclasses.replace(super()._solver_step(roles, batch, draws), x_u=other)


def test_a_residual_that_follows_the_state_is_found_without_training():
    report = verify(TrainsOnTwoNoises, steps=0, variant="ct")
    assert [row.quantity for row in report if not row.passed] == [
        "residual at the exact fixed point, in standard errors: times the prediction"
    ]


@pytest.mark.parametrize("schedule", [Schedule.edm(), Schedule.flow()])
@pytest.mark.parametrize("method", ["lcm", "tcd"])
def test_contract_and_fixed_points_hold_on_other_schedules(method, schedule):
    settings = {"single_end": True} if method == "tcd" else {}
    report = verify(method, LINE, schedule=schedule, steps=0, **settings)
    assert report.passed, report
    assert report["loss at the exact fixed point"].measured < 1e-18


def test_guidance_is_verified_on_classes():
    mixture = GaussianMixture(
        [0.5, 0.5], [[-1.0, 0.0], [1.0, 0.3]], stds=[0.3, 0.4], class_weights=[[1.0, 0.0], [0.2, 0.8]]
    )
    report = verify("lcm", mixture, steps=0, guidance_scale=2.5)
    assert report.passed, report
    with pytest.raises(ValueError, match="Guidance needs a mixture with class_weights"):
        verify("lcm", LINE, steps=0, guidance_scale=2.5)
    with pytest.raises(ValueError, match="one guidance_scale, not a range"):
        verify("lcm", mixture, steps=0, guidance_scale=(1.0, 3.0))


@pytest.mark.slow
def test_a_users_own_method_is_held_to_its_contract_and_to_the_data():
    report = verify(f"{OWN}:Mine", LINE, steps=800)
    one = next(row for row in report if row.quantity.startswith("1 step:"))
    assert one.passed, report
    assert one.floor < one.measured < 0.2 * one.limit
    assert all(row.passed for row in report if "step" not in row.quantity.split(":")[0] or row is one), report


def test_a_wrong_claim_of_calls_fails():
    report = verify(f"{OWN}:Broken", LINE, steps=0)
    assert not report.passed
    assert [row.quantity for row in report if not row.passed] == ["network calls per step: teacher"]


class BlindToItsPhase(PCM):
    """A planted defect: the target jumps to the table's end, whatever the phase."""

    def prepare(self, roles, batch, draws, due):
        shared = super().prepare(roles, batch, draws, due)
        with torch.no_grad():
            shared.target = roles.target(shared.x_u, shared.u, batch.cond).at(self.edges[0])
        return shared


@pytest.mark.parametrize("schedule", [Schedule.scaled_linear(), Schedule.edm(), Schedule.flow()])
def test_pcms_contract_oracle_and_discriminator(schedule):
    bench = Bench(LINE, schedule)
    method = PCM(schedule, **PCM.truth_settings)
    quiet = {row.quantity: row for row in pcm.oracle_rows(bench, method)}
    assert all(row.passed for row in quiet.values()) and quiet["loss at the exact fixed point"].measured < 1e-25
    game = PCM(schedule, **PCM.truth_settings | {"adversarial_weight": 0.1})
    assert all(row.passed for row in contract_rows(bench, game))


def test_the_oracle_finds_a_target_that_is_blind_to_its_phase():
    method = BlindToItsPhase(Schedule.flow(), **PCM.truth_settings)
    assert not pcm.oracle_rows(Bench(LINE, Schedule.flow()), method)[0].passed


def test_a_constant_discriminator_has_hinge_loss_2_and_no_gradient():
    bench, schedule = Bench(LINE, Schedule.flow()), Schedule.flow()
    game = PCM(schedule, **PCM.truth_settings | {"adversarial_weight": 1.0, "huber_c": 1e-3})
    oracle = pcm.Oracle(bench, game)
    heads = Roles(bench.teacher).add_heads("discriminator", game.heads()[0].build).double()
    with torch.no_grad():
        for name, p in heads.named_parameters():
            if name.endswith("outlet.weight"):
                p.zero_()
    oracle.heads["discriminator"] = heads
    step = pcm.player_inputs(bench, game, oracle, 0, 64)
    assert game.discriminator(oracle, *step).total.item() == 2
    assert torch.autograd.grad(game.student(oracle, *step).total, oracle.shift)[0].abs().max() < 1e-15


class KeepsTheTargetsGraph(LCM):
    """A planted defect: LCM whose target is the student with its gradient."""

    def student(self, roles, batch, draws, shared):
        from fewstep.diffusion.consistency import consistency

        shared.target = consistency(roles.target(shared.x_u + 0.01, shared.u, batch.cond))
        return super().student(roles, batch, draws, shared)


class HopsFromTheWrongTime(TCD):
    """A planted defect: the target is asked one grid point too high."""

    def prepare(self, roles, batch, draws, due):
        shared = super().prepare(roles, batch, draws, due)
        with torch.no_grad():
            shared.target = roles.target(shared.x_u, shared.t, batch.cond).at(shared.s)
        return shared


@pytest.mark.parametrize(
    "defect, settings",
    [(KeepsTheTargetsGraph, {}), (HopsFromTheWrongTime, {"single_end": True})],
)
def test_planted_defects_are_found_without_training(defect, settings):
    assert not verify(defect, LINE, steps=0, **settings).passed


def test_a_mixture_may_come_from_a_file(tmp_path):
    path = tmp_path / "mixture.json"
    path.write_text(json.dumps({"weights": [0.5, 0.5], "means": [[0, 0, 1], [1, 1, 0]], "stds": [0.2, 0.3]}))
    assert verify("lcm", path, steps=0).passed
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"mixture\.json"):
        verify("lcm", path, steps=0)


def test_a_report_reads_like_a_table():
    report = Report("mine", "on a line", [Row("mean", 1.0, 1.04, 0.05), Row("std", 2.0, math.nan, 0.1, 0.01)])
    assert not report.passed
    assert not Report("empty").passed
    lines = str(report).splitlines()
    assert lines[0] == "mine: on a line"
    assert lines[2].split() == ["mean", "1", "1.04", "±", "0.05", "yes"]
    assert lines[3].split()[-1] == "NO"
    with pytest.raises(KeyError, match="No quantity 'mode'"):
        report["mode"]


def test_sliced_w2_of_a_shift():
    x = torch.randn(500, 1, dtype=torch.float64)
    assert sliced_w2(x, x + 0.7) == pytest.approx(0.7, abs=1e-12)
    y = torch.randn(500, 2, dtype=torch.float64)
    assert sliced_w2(y, y + torch.tensor([0.3, 0.4])) == pytest.approx(0.5 / math.sqrt(2), rel=0.25)
    with pytest.raises(ValueError, match="one shape"):
        sliced_w2(x, y)


def test_short_tables_can_be_verified():
    report = verify("lcm", schedule=Schedule.cosine(100), steps=0)
    assert report.passed and not any("500 steps" in row.quantity for row in report)
