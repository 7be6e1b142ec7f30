"""The edges of the command line: devices, files, numbers that are none; full disks, deleted folders, closed pipes."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest
import torch
from PIL import Image

import fewstep
from fewstep.cli import main
from fewstep.data.files import replacing
from fewstep.models.hub import check_device
from fewstep.training.console import in_words
from tests.command_line import inside

MAIN = [sys.executable, "-m", "fewstep"]
NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Runs a command line that must end in exit code 2 and one sentence; returns the sentence."""

    def run(*arguments):
        before = sorted(path.name for path in tmp_path.iterdir())
        code, output, errors = inside(monkeypatch, capsys, tmp_path, *arguments)
        lines = [line for line in errors.splitlines() if line.strip()]
        assert code == 2 and len(lines) == 1 and lines[0].startswith("Error: "), (code, output, errors)
        assert sorted(path.name for path in tmp_path.iterdir()) == before, "a refused command leaves nothing behind"
        return lines[0].removeprefix("Error: ")

    return run


@pytest.mark.parametrize(("command", "device"), [
    pytest.param(["sample", "TINY", "-p", "a"], "cuda", marks=NO_CUDA),
    *((["sample", "TINY", "-p", "a"], device) for device in ("cuda:99", "meta", "hpu", "foo", "", "cpu;x")),
    (["export", "nothing"], "meta"), (["teacher", "train"], "meta"), (["teacher", "detector"], "foo"),
    (["app", "scenes-64"], "foo"),
])  # fmt: skip
def test_a_device_that_is_not_there_is_said_first(command, device, tiny, refused):
    command = [str(tiny) if word == "TINY" else word for word in command]
    assert f"there is no device '{device}' here: use cpu" in refused(*command, "--device", device)


def test_devices_of_the_library_too(tiny):
    check_device("cpu")
    with pytest.raises(ValueError, match="there is no device 'meta' here"):
        fewstep.load(str(tiny), device="meta")
    with pytest.raises(ValueError, match="there is no device 'None' here"):
        check_device(["cpu"] and "None")


@pytest.mark.parametrize(("arguments", "says"), [
    (["-p", "a \udcff cat"], "prompts: '\\udcff' at position 3 is no character by itself"),
    (["-p", "a", "--guidance-scale", "2", "--negative-prompt", "\ud800"], "negative_prompt: '\\ud800' at position 1"),
    (["--steps", 10**9], "num_inference_steps must be a whole number from 1 to 10000, not 1000000000."),
    (["--steps", 10**19], "not 10000000000000000000."), (["--steps", 0], "not 0."),
    (["--seed", -1], "seed must be a whole number from 0 to 18446744073709551615, not -1."),
    (["--seed", 2**64], "not 18446744073709551616."),
    (["--eta", "nan"], "eta must be between 0 and 1, not nan."), (["--eta", "-inf"], "not -inf."),
    (["--guidance-scale", "nan"], "guidance_scale must be at least 0 and finite"),
    (["--guidance-scale", "1e400"], "not inf."),
    (["--image", "in.png", "--strength", "nan"], "strength must be above 0"),
    (["--timesteps", "nan"], "Time nan is outside"), (["--timesteps", ","], "at least one number"),
    (["--lora", "x.safetensors:nan"], "x.safetensors"),
    (["--out", "folder.png"], "--out folder.png is a folder: choose another name."),
    (["--out", "pipe.png"], "--out pipe.png is no ordinary file: choose another name."),
    (["--out", "in.png/a.png"], "in.png is no folder."), (["--out", "a.bmp"], "must be a .png, .jpg or .webp file"),
    (["--out", "x" * 5000 + ".png"], "File name too long: xxx"),
])  # fmt: skip
def test_what_cannot_be_sampled_is_one_sentence(arguments, says, tiny, tmp_path, refused):
    Image.new("RGB", (8, 8)).save(tmp_path / "in.png")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    message = refused("sample", tiny, *arguments)
    assert says in message and len(message) < 400


def test_where_an_image_goes_is_checked_before_the_model_is_loaded(refused):
    assert "must be a .png" in refused("sample", "no-such-model", "--out", "a.bmp")


@pytest.mark.parametrize(("arguments", "says"), [
    (["benchmark", "scenes-64-tcd", "--list", "--budget", "inf"], "--budget must be a finite number, not inf."),
    (["benchmark", "scenes-64-tcd", "--list", "--slice", "inf"], "--slice must be a finite number, not inf."),
    (["teacher", "train", "--vae-minutes", "inf"], "--vae-minutes must be a finite number, not inf."),
    (["teacher", "train", "--unet-minutes", "inf"], "--unet-minutes must be a finite number, not inf."),
    (["teacher", "detector", "--minutes", "inf"], "--minutes must be a finite number, not inf."),
    (["teacher", "measure", "--guidance", "nan"], "--guidance needs numbers of at least 0"),
    (["teacher", "measure", "--guidance", ""], "--guidance needs numbers of at least 0"),
    (["distill", "scenes-64-tcd", "--dry-run", "--set", f"seed={'[' * 2000}{']' * 2000}"], "--set seed"),
    (["distill", "scenes-64-tcd", "--dry-run", "--set", f"{'.'.join(['a'] * 5000)}=1"], ""),
    (["sample", "x" * 5000], "File name too long"), (["recipes", "copy", "scenes-64-tcd", "/proc/x"], "/proc/x"),
    (["verify", "lcm", "--steps", 0, "--mixture", "pipe"], "Mixture file pipe: it is a pipe or a device, no file."),
    (["benchmark", "pipe.yaml", "--list"], "pipe.yaml cannot be read"),
    (["distill", "pipe.yaml"], "There is no recipe 'pipe.yaml'"),
])  # fmt: skip
def test_other_commands_refuse_in_one_sentence(arguments, says, tmp_path, refused):
    for name in ("pipe", "pipe.yaml"):
        os.mkfifo(tmp_path / name)
    message = refused(*arguments)
    assert says in message and len(message) < 800


@pytest.mark.parametrize("option", ["--budget", "--slice"])
def test_nan_is_no_number_of_an_option(option, tmp_path, monkeypatch, capsys):
    code, _, errors = inside(monkeypatch, capsys, tmp_path, "benchmark", "scenes-64-tcd", "--list", option, "nan")
    assert code == 2 and f"'{option}'" in errors and "Traceback" not in errors


# ---------------------------------------------------------------- disks, folders, pipes


@pytest.fixture
def full_disk():
    """Within this test no file grows beyond 100 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_keeps_the_earlier_image(tiny, tmp_path, refused, request):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    request.getfixturevalue("full_disk")
    assert refused("sample", tiny, "-p", "a", "--steps", 1, "--out", "a.png") == "File too large: a.png."
    assert (tmp_path / "a.png").read_bytes() == before
    assert refused("recipes", "copy", "scenes-64-tcd", "mine.yaml") == "File too large: mine.yaml."


@pytest.mark.slow
def test_a_full_disk_while_training_is_one_sentence_and_the_run_goes_on(short, tmp_path, monkeypatch, capsys, request):
    sets = [part for item in short for part in ("--set", item)]
    arguments = ["distill", "scenes-64-tcd", "--out", "run", *sets, "-q"]
    request.getfixturevalue("full_disk")
    code, _, errors = inside(monkeypatch, capsys, tmp_path, *arguments)
    assert code == 2 and errors.splitlines()[-1] == "Error: File too large: run/recipe.yaml."
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_a_block_that_fails_leaves_the_old_file(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(OSError) as error, replacing(tmp_path / "a") as part:
        part.write_text("half")
        raise OSError(28, "No space left on device")
    assert in_words(error.value).startswith(f"The disk is full ({tmp_path / 'a'} could not be written): make room")
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "a") as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("arguments", [
    ["sample", "TINY", "-p", "a", "--steps", 1], ["recipes", "copy", "scenes-64-tcd"], ["report", "run"],
    ["scenes", "made"],
])  # fmt: skip
def test_a_deleted_working_folder_is_named(arguments, tiny, tmp_path, monkeypatch, capsys):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    monkeypatch.setattr(sys, "argv", ["fewstep", *(str(word).replace("TINY", str(tiny)) for word in arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == "Error: The working folder does not exist any more: change to another one, and try again."
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("redirect", "code", "says"), [
    ("| head -n 1", 1, ""), (">&-", 0, ""), ("> /dev/full", 2, "Error: The disk is full"), ("2>&-", 0, ""),
])  # fmt: skip
def test_closed_and_full_outputs_end_quietly(redirect, code, says, tmp_path):
    line = f'set -o pipefail; "{sys.executable}" -m fewstep checkpoints {redirect}'
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=tmp_path)
    codes = (0, 1) if "head" in redirect else (code,)  # whether the pipe is closed before all is written is chance
    assert done.returncode in codes and "Traceback" not in done.stderr and done.stderr.startswith(says)
    assert bool(done.stderr) == bool(says)


@pytest.mark.slow
def test_a_name_in_no_encoding_is_printed_all_the_same(tmp_path):
    """File names are bytes; what has been written is said, not lost in an error of the terminal's encoding."""
    names = [b"\xff.yaml", "ü.yaml".encode()]
    for name in names:
        done = subprocess.run(
            [*map(os.fsencode, MAIN), b"recipes", b"copy", b"scenes-64-tcd", name], capture_output=True, cwd=tmp_path,
            env=os.environ | {"PYTHONIOENCODING": "latin-1"},
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, b"") and done.stdout.startswith(b"Wrote ")
    assert sorted(os.listdir(os.fsencode(tmp_path))) == sorted(names)
