"""The shipped teacher's own figures, and the statistics of real scenes that students are measured against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from fewstep.evaluation.compare import UNSEEN, Candidate, Comparison, compare, real_pictures
from fewstep.evaluation.measured import Reference
from fewstep.models.families import Teacher, load_teacher
from fewstep.sampling import DDIMSampler
from fewstep.scenes64.detector import load_detector
from fewstep.scenes64.scenes import Scenes

ASSET = Path(__file__).parent.parent / "assets" / "reference.safetensors"
SCENES = 2000
"""So many real scenes stand behind the shipped statistics; numbers 10,000 ... of the set that nothing is trained on."""

STEPS = (50, 8, 4)


def reference_of(teacher: Teacher) -> Reference | None:
    """The statistics that ship, for the model that ships; None for any other, whose decoder draws differently."""
    return Reference.load(ASSET) if teacher.name == "scenes-64" and ASSET.is_file() else None


def make_reference(teacher: Teacher, path: Path, count: int = SCENES) -> Reference:
    """Real scenes through ``teacher``'s autoencoder, as `Reference`; written to ``path``."""
    pictures = real_pictures(teacher, Scenes(UNSEEN, size=teacher.image_size), range(10_000, 10_000 + count))
    Reference.of(pictures, load_detector().features).save(path, {"scenes": str(count), "seed": str(UNSEEN)})
    return Reference.load(path)


def measure_teacher(
    name: str,
    count: int,
    guidance_scales: Sequence[float],
    seed: int = 0,
    path: Path | None = None,
    advance: Callable[[int], None] | None = None,
) -> Comparison:
    """The teacher at 50, 8 and 4 steps of DDIM and at every guidance scale, on the same prompts and noise.

    Args:
        path: where to write new statistics of real scenes, which then serve as the reference.
    """
    teacher = load_teacher(name)
    reference = reference_of(teacher) if path is None else make_reference(teacher, path)
    ways = [
        Candidate(f"guidance {scale:g}, {steps} steps", teacher.denoiser, DDIMSampler(num_inference_steps=steps), scale)
        for scale in guidance_scales
        for steps in STEPS
    ]
    return compare(teacher, ways, count, seed, advance=advance, reference=reference)


def recommended(comparison: Comparison) -> float:
    """Of the guidance scales within one point of the best accuracy at full steps, the one of lowest FD."""
    full = [o for o in comparison.outcomes if o.label.endswith(f", {STEPS[0]} steps")]
    best = max(o.figures["accuracy"] for o in full)
    good = [o for o in full if o.figures["accuracy"] >= best - 0.01]
    return float(min(good, key=lambda o: o.figures["FD"]).label.split(",")[0].removeprefix("guidance "))
