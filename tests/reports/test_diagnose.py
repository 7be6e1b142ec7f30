"""Every check on synthetic logs, on both sides of its limit; incomplete folders; the sentences and their order."""

import json
import math
import re

import numpy as np
import pytest

from fewstep.reports.checks import CHECKS
from fewstep.reports.diagnose import diagnose, examine
from fewstep.reports.history import ENOUGH, History, Series, columns, read_history

LINES = 30
SOUND = {  # one value for all lines, or a function of the share of the run that is done
    "student/loss": lambda done: 0.1 * 0.2**done,
    "student/x0_mean": 0.0,
    "student/x0_std": 0.9,
    "student/data_mean": 0.0,
    "student/data_std": 1.0,
    "student/x0_spread": 0.9,
    "student/data_spread": 1.0,
    "student/mean_shift": 0.01,
    "student/saturation": 0.001,
    "student/teacher_error": 0.4,
    "student/teacher_variance": 0.6,
    "student/teacher_saturation": 0.001,
    "student/grad_norm": 1.0,
    "student/clipped": 0.2,
    "learning_rate": 1e-3,
    "critic/grad_norm": 1.0,
    "critic/learning_rate": 1e-3,
}
ADVERSARY = {"critic/d_accuracy": 0.7}
FAKE = {"critic/fake_error": 0.5, "critic/teacher_fake_error": 0.6}
RECIPE = {"method": {"name": "x", "guidance_scale": 3.0}, "training": {"steps": 300, "ema_decay": 0.98}}


def records(lines=LINES, **changes):
    """A log of sound lines, ten steps apart, with some columns changed; None leaves a column out."""
    table = SOUND | {name.replace("__", "/"): value for name, value in changes.items()}
    return [
        {"step": 10 * (i + 1)}
        | {k: v((i + 1) / lines) if callable(v) else v for k, v in table.items() if v is not None}
        for i in range(lines)
    ]


def names(recipe=RECIPE, lines=LINES, **changes):
    return [f.name for f in examine(History(records(lines, **changes), recipe)).findings]


def from_line(first, value, otherwise):
    """A column that is ``value`` from that line (of LINES) on."""
    return lambda done: value if done * LINES > first + 0.5 else otherwise


def lines_at(rows, value, otherwise):
    return lambda done: value if round(done * LINES) - 1 in rows else otherwise


GAN = {"critic__d_accuracy": 0.7}
LATE = 20  # of 30 lines: the first of the last third
# check -> columns just beyond its limit, columns just within.
SIDES = [
    ("learning rate too high",
     {"student__x0_std": lines_at({0}, 10.3, 0.9), "student__grad_norm": lines_at({0}, 11.0, 1.0)},
     {"student__x0_std": lines_at({0}, 9.7, 0.9), "student__grad_norm": lines_at({0}, 11.0, 1.0)}),
    ("learning rate too high",
     {"student__mean_shift": lines_at({1}, 105.0, 0.01), "student__grad_norm": lines_at({1}, 10.2, 1.0)},
     {"student__mean_shift": lines_at({1}, 105.0, 0.01), "student__grad_norm": lines_at({1}, 9.8, 1.0)}),
    ("learning rate too high",
     {"student__mean_shift": lines_at({1}, 105.0, 0.01), "student__grad_norm": lines_at({1}, 50.0, 1.0)},
     {"student__mean_shift": lines_at({2}, 105.0, 0.01), "student__grad_norm": lines_at({1}, 50.0, 1.0)}),
    ("learning rate too high",
     {"student__mean_shift": None, "critic__grad_norm": lines_at({0}, 1030.0, 1.0)},
     {"student__mean_shift": None, "critic__grad_norm": lines_at({0}, 970.0, 1.0)}),
    ("not finite", {"student__loss": lines_at({17}, math.nan, 0.1)}, {"student__x0_std": lines_at({17}, 1.0, 0.9)}),
    ("teacher does not fit the data",
     {"student__teacher_error": 2.05, "student__teacher_variance": 1.0},
     {"student__teacher_error": 1.95, "student__teacher_variance": 0.9}),
    ("teacher does not fit the data",
     {"student__teacher_error": 2.05, "student__teacher_variance": 1.0},
     {"student__teacher_error": 2.05, "student__teacher_variance": 1.05}),
    ("teacher does not fit the data",
     {"student__teacher_variance": 0.43}, {"student__teacher_variance": 0.47}),
    ("data all alike", {"student__data_spread": 0.098}, {"student__data_spread": 0.102}),
    ("discriminator blind", {"critic__d_accuracy": 0.515}, {"critic__d_accuracy": 0.525}),
    ("discriminator blind",
     {"critic__d_accuracy": lines_at({3, 4, 5, 6}, 0.535, 0.51)},
     {"critic__d_accuracy": lines_at({3, 4, 5, 6}, 0.545, 0.51)}),
    ("discriminator blind",
     {"critic__d_accuracy": from_line(LATE, 0.44, 0.7)}, {"critic__d_accuracy": from_line(LATE, 0.46, 0.7)}),
    ("discriminator too strong", {"critic__d_accuracy": 0.953}, {"critic__d_accuracy": 0.947}),
    ("discriminator too strong",
     {"critic__d_accuracy": from_line(15, 0.952, 0.5)}, {"critic__d_accuracy": from_line(20, 0.96, 0.92)}),
    ("discriminator too strong",  # whose answers are out of sight is another matter
     {"critic__d_accuracy": 0.97, "student__saturation": 0.29},
     {"critic__d_accuracy": 0.97, "student__saturation": 0.31}),
    ("fake score lagging",
     {"critic__fake_error": 0.67, "critic__teacher_fake_error": 0.6},
     {"critic__fake_error": 0.65, "critic__teacher_fake_error": 0.6}),
    ("fake score lagging",  # at first, for long enough to have done harm
     {"critic__fake_error": from_line(12, 0.5, 2.0), "critic__teacher_fake_error": 0.6},
     {"critic__fake_error": from_line(11, 0.5, 2.0), "critic__teacher_fake_error": 0.6}),
    ("fake score lagging",
     {"critic__fake_error": lambda done: 0.6 * (1 - 0.0025 * done), "critic__teacher_fake_error": 0.6},
     {"critic__fake_error": lambda done: 0.6 * (1 - 0.0035 * done), "critic__teacher_fake_error": 0.6}),
    ("learning rate too low",
     {"learning_rate": 6.5e-6, "student__loss": 0.1}, {"learning_rate": 6.8e-6, "student__loss": 0.1}),
    ("learning rate too low",
     {"learning_rate": 5e-6, "student__loss": lambda done: 0.1 - 0.04 * done},
     {"learning_rate": 5e-6, "student__loss": lambda done: 0.1 - 0.05 * done}),
    ("saturation of the teacher", {"student__teacher_saturation": 0.0153}, {"student__teacher_saturation": 0.0147}),
    ("saturation",
     {"student__saturation": from_line(LATE, 0.041, 0.0)}, {"student__saturation": from_line(LATE, 0.039, 1.0)}),
    ("drift of the mean",
     {"student__mean_shift": from_line(LATE, 0.26, 0.0)}, {"student__mean_shift": from_line(LATE, 0.24, 0.0)}),
    ("drift of the mean",
     {"student__mean_shift": lambda done: 3.0 - 1.9 * done}, {"student__mean_shift": lambda done: 3.0 - 1.97 * done}),
    ("lost diversity",
     {"student__x0_spread": from_line(LATE, 0.49, 0.9)}, {"student__x0_spread": from_line(LATE, 0.51, 0.1)}),
    ("lost diversity",  # blurred, and not getting sharper
     {"student__x0_spread": 0.4}, {"student__x0_spread": lambda done: 0.6 * done**2}),
    ("diverging",
     {"student__loss": from_line(LATE, 0.31, 0.1)}, {"student__loss": from_line(LATE, 0.29, 0.1)}),
    ("diverging",
     {"critic__grad_norm": from_line(LATE, 31.0, 1.0)}, {"critic__grad_norm": from_line(LATE, 29.0, 1.0)}),
    ("diverging",  # what an adversary makes of the student says nothing
     {"student__loss": lambda done: 0.1 * 100**done}, {"student__loss": lambda done: 0.1 * 100**done} | GAN),
    ("vanishing gradients",
     {"student__grad_norm": from_line(LATE, 9e-4, 1.0)}, {"student__grad_norm": from_line(LATE, 1.1e-3, 1.0)}),
    ("vanishing gradients",  # no picture misses anything any more: then nothing should pull
     {"student__grad_norm": from_line(LATE, 0.0, 1.0), "student__taste_missing": from_line(LATE, 0.01, 0.5)},
     {"student__grad_norm": from_line(LATE, 0.0, 1.0), "student__taste_missing": from_line(LATE, 0.0, 0.5)}),
    ("reward hacking",
     {"student__held_out_mean": from_line(LATE - 1, -0.51, 0.0), "student__held_out_std": 2.0, "student__taste_missing":
      from_line(LATE - 1, 0.1, 0.5)},
     {"student__held_out_mean": from_line(LATE - 1, -0.49, 0.0), "student__held_out_std": 2.0, "student__taste_missing":
      from_line(LATE - 1, 0.1, 0.5)}),
    ("reward hacking",  # what falls for another reason
     {"student__held_out_mean": from_line(LATE - 1, -0.6, 0.0), "student__held_out_std": 2.0, "student__taste_missing":
      from_line(LATE - 1, 0.1, 0.5)},
     {"student__held_out_mean": from_line(LATE - 1, -0.6, 0.0), "student__held_out_std": 2.0, "student__taste_missing":
      0.5}),
    ("oscillation",
     {"student__x0_mean": lambda done: 0.43 * (-1) ** round(done * LINES)},
     {"student__x0_mean": lambda done: 0.39 * (-1) ** round(done * LINES)}),
    ("oscillation",  # a drift, or data that swing themselves, are another matter
     {"student__x0_mean": lambda done: 0.63 * math.sin(60 * done)},
     {"student__x0_mean": lambda done: 6.0 * done, "student__mean_shift": 0.1}),
    ("loss not falling", {"student__loss": lambda done: 0.1 - 0.0038 * done},
     {"student__loss": lambda done: 0.1 - 0.0045 * done}),
    ("loss not falling", {"student__loss": 0.1},
     {"student__loss": lambda done: 0.1 + 0.02 * (-1) ** round(done * LINES)}),  # too noisy to tell
    ("always clipped", {"student__clipped": 0.96}, {"student__clipped": 0.94}),
]  # fmt: skip


def test_sound_logs_are_sound():
    for extra in ({}, GAN, {k.replace("/", "__"): v for k, v in FAKE.items()}):
        found = examine(History(records(**extra), RECIPE))
        assert found.findings == () and found.healthy
    assert len(SIDES) >= 30 and {name for name, *_ in SIDES} | {"average far behind", "unfinished"} == {
        check.name for check in CHECKS
    }


KINDS = [row[0] for row in SIDES]


@pytest.mark.parametrize(
    ("name", "beyond", "within"), SIDES, ids=[f"{kind} {KINDS[:i].count(kind) + 1}" for i, kind in enumerate(KINDS)]
)
def test_a_check_finds_a_problem_beyond_its_limit_and_not_within(name, beyond, within):
    assert name in names(**beyond)
    assert name not in names(**within)


def test_checks_that_read_the_recipe():
    def training(**changes):
        return RECIPE | {"training": RECIPE["training"] | changes}

    assert names(training(ema_decay=0.9978)) == ["average far behind"]  # 0.9978^300 = 0.516
    assert names(training(ema_decay=0.9976)) == []
    assert names(training(ema_decay=0.999, steps=99)) == []  # of so few steps nobody expects an average
    assert names(training(steps=301)) == ["unfinished"]
    misfit = {"student__teacher_error": 1.15, "student__teacher_variance": 1.0}
    assert names(**misfit) == []  # guidance may do that
    assert names(RECIPE | {"method": {"guidance_scale": 1.0}}, **misfit) == ["teacher does not fit the data"]
    slow = {"learning_rate": 1e-6, "student__loss": 0.1}
    assert "learning rate too low" in names(**slow)
    assert "learning rate too low" not in names(RECIPE | {"student": {"weights": "full"}}, **slow)
    assert "learning rate too low" not in names(training(steps=3000), **slow)  # there is time yet


def test_a_run_that_died_names_the_cause():
    last = {"step": 40, "not_finite": "student", "first_bad_step": 33, "learning_rate": 1e-3}
    died = examine(History([*records(3), last], RECIPE))
    assert [f.name for f in died.findings] == ["not finite"]
    assert (died.findings[0].first, died.findings[0].last) == (33, 40) and "'student'" in died.findings[0].sentence
    at_once = examine(History([{"step": 10, "not_finite": "student", "first_bad_step": 0, "learning_rate": 1.0}]))
    assert [f.name for f in at_once.findings] == ["not finite"] and "before any update" in at_once.findings[0].sentence
    wild = examine(History([{"step": 10, "not_finite": "critic", "first_bad_step": 3, "learning_rate": 0.05}]))
    assert [f.name for f in wild.findings] == ["learning rate too high", "not finite"]


def test_causes_stand_before_what_follows_from_them():
    far = {"student__mean_shift": 200.0, "student__saturation": 0.9, "student__x0_spread": 0.01}
    start = {"student__grad_norm": lines_at({0}, 1e5, 1.0)}
    assert names(**far, **start)[0] == "learning rate too high"
    assert names(**far)[:3] == ["saturation", "drift of the mean", "lost diversity"]
    assert names(**far, **start, critic__d_accuracy=0.5)[0] == "discriminator blind"
    lagging = {"critic__fake_error": 5.0, "critic__teacher_fake_error": 0.6}
    assert names(**far, **start, **lagging)[0] == "learning rate too high"
    assert names(**far, **start, **lagging, critic__learning_rate=1e-6)[0] == "fake score lagging"
    assert names(**far, student__clipped=1.0)[-1] == "always clipped"


def test_what_is_only_worth_knowing_is_not_wrong():
    found = examine(History(records(student__clipped=1.0), RECIPE))
    assert found.healthy and [f.name for f in found.findings] == ["always clipped"]
    assert "Nothing stands out" in found.sentences()[0] and "worth knowing" in found.sentences()[1]


def test_statistics_that_were_not_logged_are_named():
    found = examine(History(records(student__saturation=None), RECIPE))
    assert found.unchecked["saturation"] == "not logged: saturation"
    assert found.unchecked["fake score lagging"] == "not logged: fake_error, teacher_fake_error"
    assert "drift of the mean" in found.checked
    text = str(found)
    assert "Could not be checked (not logged: d_accuracy): discriminator blind, discriminator too strong." in text
    few = examine(History(records(ENOUGH - 1), RECIPE))
    assert few.unchecked["drift of the mean"] == "fewer than 6 lines in the log" and few.healthy
    assert "drift of the mean" in examine(History(records(ENOUGH), RECIPE)).checked


def test_findings_name_figures_and_steps():
    found = examine(History(records(student__mean_shift=from_line(10, 4.0, 0.0)), RECIPE)).findings[0]
    assert (found.first, found.last) == (110, 300)
    assert "2 standard deviations" in found.sentence and "steps 110 to 300" in found.sentence
    drift = next(check for check in CHECKS if check.name == "drift of the mean")
    assert found.sentence.startswith(drift.problem) and drift.advice[1:] in found.sentence


def test_every_check_gives_its_reason():
    for check in CHECKS:
        assert len(check.reason) > 20 and len(check.advice) > 20 and check.needs
    assert len({check.name for check in CHECKS}) == len(CHECKS)


def test_sentences_name_keys_of_recipes_and_nothing_of_the_code():
    for check in CHECKS:
        named = re.findall(r"[a-z_]+\.[a-z_]+", f"{check.problem} {check.advice}")
        assert {name.split(".")[0] for name in named} <= {"training", "method", "data"}, named


# ---------------------------------------------------------------- folders


def write(folder, lines, recipe="training: {steps: 300}\n"):
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if recipe:
        (folder / "recipe.yaml").write_text(recipe)


def test_foreign_and_cut_off_lines_are_left_out(tmp_path):
    lines = records(student__loss=lambda done: "much" if done == 1 else 0.1 * 0.2**done)
    write(tmp_path, lines)
    foreign = ["[1]", "{}", "null", '{"step": "x"}', '{"step": -3}', '{"step": true}', '{"step": 1e3}', "\x00", '{"st']
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write("\n".join([*foreign[:-1], '{"step": 10, "student/loss": ' + "9" * 400 + "}", foreign[-1]]))
    history = read_history(tmp_path)
    assert [line["step"] for line in history.records] == [10 * (i + 1) for i in range(LINES)]
    assert len(history.series("student/loss")) == LINES - 2  # neither words nor numbers beyond all floats
    assert diagnose(tmp_path).healthy


def test_the_last_line_of_a_step_counts_and_lines_come_in_order(tmp_path):
    write(tmp_path, [{"step": 20, "a/b": 1}, {"step": 10, "a/b": 2}, {"step": 20, "a/b": 3}])
    assert read_history(tmp_path).series("a/b").values.tolist() == [2, 3]


@pytest.mark.parametrize("recipe", [None, "", "a: [", "- 1\n", "\udcff"])
def test_a_log_alone_is_enough(recipe, tmp_path):
    write(tmp_path, records(), None)
    if recipe is not None:
        (tmp_path / "recipe.yaml").write_bytes(recipe.encode("utf-8", "surrogateescape"))
    found = diagnose(tmp_path)
    assert found.healthy and "recipe.yaml is missing or cannot be read" in str(found)
    assert found.unchecked["unfinished"] == "not logged: training.steps"


def test_a_run_without_steps_says_so(tmp_path):
    (tmp_path / "recipe.yaml").write_text("training: {steps: 300}\n")
    found = diagnose(tmp_path)
    assert found.healthy and found.step == 0
    assert "no step was logged yet" in str(found)


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="There is no run directory"):
        diagnose(tmp_path / "none")
    with pytest.raises(ValueError, match="it has neither"):
        diagnose(tmp_path)


def test_samples_of_one_prompt_that_are_alike_are_noticed(tmp_path):
    write(tmp_path, records())
    (tmp_path / "samples").mkdir()
    statistics = tmp_path / "samples" / "statistics.jsonl"
    statistics.write_text('{"step": 100, "diversity": 0.4}\n{"step": 300, "diversity": 0.51}\n')
    assert diagnose(tmp_path).healthy
    statistics.write_text('{"step": 100, "diversity": 0.9}\n{"step": 300, "diversity": 0.49}\n')
    assert [f.name for f in diagnose(tmp_path).findings] == ["lost diversity"]


def test_json_holds_everything():
    found = examine(History(records(student__mean_shift=4.0), RECIPE), "runs/x")
    data = json.loads(found.as_json())
    assert data["healthy"] is False and data["run"] == "runs/x" and data["findings"][0]["name"] == "drift of the mean"


# ---------------------------------------------------------------- series


def test_a_final_stretch():
    series = Series("x", np.arange(5.0), np.arange(5.0))
    assert series.since(np.array([True, False, True, True, True])) == (2, 4)
    assert series.since(np.array([False, False, False, False, True])) == (4, 4)
    assert series.since(np.array([True, True, True, True, False])) == (0, 4)
    assert series.since(np.array([True] * 5)) == (0, 4)


def test_numbers_beyond_all_use_overflow_nothing():
    """Numpy's warnings are errors here; a log may hold anything that JSON can."""
    wild = [{"step": i + 1, "student/loss": 1e308, "learning_rate": -1e308} | {
        f"student/{name}": (-1.0) ** i * 1e308 for name in ("x0_mean", "x0_std", "data_mean", "mean_shift", "grad_norm")
    } | {"student/data_std": 0.0} for i in range(30)]  # fmt: skip
    with np.errstate(all="raise"):
        assert not examine(History(wild)).healthy


def test_thirds_and_columns():
    lines = [{"step": i, "a": i, "b": math.nan if i == 3 else -i} for i in range(10)]
    a, b = columns(lines, "a", "b")
    assert a.steps.tolist() == b.steps.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert a.head.values.tolist() == [0, 1, 2] and b.tail.values.tolist() == [-7, -8, -9]
