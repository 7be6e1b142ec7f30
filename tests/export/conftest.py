"""The round trip of an export without a second process."""

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

from fewstep.export import round_trip


@pytest.fixture
def in_this_process(monkeypatch):
    """The other process's work, done in this one: what it reads and compares is the same."""

    class Done:
        returncode, stderr = 0, ""

    def work(command, **_):
        request, latents = command[-2:]
        save_file(round_trip.sample_in_diffusers(json.loads(Path(request).read_text())), latents)
        return Done()

    monkeypatch.setattr(round_trip.subprocess, "run", work)
