"""ComfyUI's settings of flow models in the registry: its levels, by its own formulas, are those that we sample at."""

import numpy as np
import pytest

from fewstep.checkpoints.explain import comfy
from fewstep.checkpoints.registry import checkpoints
from fewstep.checkpoints.sampling import sampler_of, schedule_of
from tests.checkpoints.test_sampling import base_of
from tests.export.comfy_sampling import run
from tests.sampling.conftest import toy

SHIFTED = {n: e for n, e in checkpoints().items() if e.flow and "shift" in e.comfy.get("model_sampling", "")}


@pytest.mark.parametrize("name", SHIFTED)
def test_the_levels_of_its_node_are_ours(name, noise, noises):
    entry, base = SHIFTED[name], base_of(SHIFTED[name])
    words = ("sampler", "scheduler", "cfg", "model_sampling")
    assert all(str(entry.comfy[word]).removesuffix(".0") in comfy(entry) for word in words)
    line = f"{entry.default_steps} steps, cfg 1, sampler {entry.comfy['sampler']}, "
    line += f"scheduler {entry.comfy['scheduler']}, {entry.comfy['model_sampling']}"
    _, levels = run(line, "sd3", toy, noise, noises)
    mine = sampler_of(entry, base).times(schedule_of(entry, base))
    np.testing.assert_allclose(levels, mine, rtol=0, atol=1e-6)
