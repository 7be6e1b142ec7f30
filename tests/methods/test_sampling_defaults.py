"""How each method's students are sampled unless a recipe says otherwise, as papers and released code have it."""

import pytest

from fewstep.diffusion.schedule import Schedule
from fewstep.methods.registry import METHODS

# method: sampler, steps, share of fresh noise, whether other numbers of steps are off what was trained,
#         solver steps of the training grid from which LCM's and TCD's samplers pick, the teacher's guidance
TABLE = {
    "cm": ("lcm", 4, 0.0, False, 39, 1.0),  # multistep consistency sampling; 40 levels, as released for ImageNet-64
    "lcm": ("lcm", 4, 0.0, False, 50, 4.0),  # N = 50, as released; the scale is ours
    "ctm": ("ctm", 4, 0.0, False, 40, 1.0),  # gamma 0, without fresh noise
    "tcd": ("tcd", 4, 0.3, False, 50, 4.0),  # README: eta 0.3, 2 to 16 steps
    "pcm": ("phased", 4, 0.0, True, 40, 5.0),  # deterministic, as many steps as phases
    "dmd": ("ddim", 1, 0.0, True, None, 3.0),  # one step, which every jump agrees on
    "dmd2": ("renoise", 4, 0.0, True, None, 8.0),  # SDXL: 999, 749, 499, 249 and w = 8
    "turbo": ("euler-ancestral", 4, 1.0, False, None, 4.0),  # SDXL-Turbo: EulerAncestral, 1 to 4 steps
    "ladd": ("euler-ancestral", 4, 1.0, False, None, None),  # the same loop; its teacher is not guided in training
    "lightning": ("ddim", 4, 0.0, True, None, 1.0),  # Euler's jumps, bound to their number
    "hyper": ("phased", 8, 0.0, True, 40, 1.0),  # the first stage; one segment is TCD's (tests/inference/test_zero.py)
    "flowmap": ("ctm", 4, 0.0, False, None, 4.0),  # deterministic jumps, any number of them
    "reflow": ("euler", 4, 0.0, False, None, 4.0),  # an ordinary network
    "scm": ("renoise", 4, 0.0, False, None, 4.0),  # one jump to clean data, or several with new noise
    "pdd": ("ddim", 4, 0.0, True, 32, 4.0),  # blocks of 8 of 32 steps (Qwen-Image-2.1-Fun); other numbers if trained
    "feedback": ("tcd", 4, 0.3, False, 50, None),  # as the student that it continues
}


def test_every_method_is_here():
    assert METHODS.keys() == TABLE.keys()


@pytest.mark.parametrize("name", TABLE)
def test_students_are_sampled_as_their_papers_say(name):
    sampler, steps, eta, bound, grid, guidance = TABLE[name]
    cls = METHODS[name]
    settings = cls.Settings()
    wanted = cls.sampling(settings)
    assert cls(Schedule.scaled_linear(), settings).sampler == sampler
    assert (wanted.num_inference_steps, wanted.eta, wanted.no_other_steps) == (steps, eta, bound)
    assert wanted.guidance_scale == 1.0 and wanted.timesteps == ()  # the teacher's guidance is built in
    assert cls.original_inference_steps(settings) == grid
    found = cls.teacher_guidance(settings)
    assert (None if found is None else (found.low, found.high)) == (None if guidance is None else (guidance, guidance))
