"""GPUs in a plan: sizes of memory and durations, by hand."""

import pytest

from fewstep.models.meta_pipeline import outline
from fewstep.planning import hardware
from fewstep.recipe.load import load_recipe
from fewstep.recipe.shipped import shipped_recipes
from fewstep.runs.plan import describe, plan


@pytest.mark.parametrize(
    ("peak", "size"), [(1, 12), (12.4e9, 12), (12.6e9, 16), (24.9e9, 24), (25.1e9, 48), (83e9, 80), (84e9, None)]
)
def test_sizes_of_memory(peak, size):
    """A card of 24 GB has 25.8e9 bytes, of which a driver keeps some."""
    assert hardware.smallest(peak) == size


def test_gpus_that_are_too_small_are_left_out():
    names = [gpu.name for gpu, _ in hardware.durations(1.0, 30e9, True)]
    assert "L40S" in names and not {"RTX 3060", "RTX 4090"} & set(names)
    assert not list(hardware.durations(1.0, 1e12, True))


def test_duration_is_operations_over_the_assumed_rate():
    """312 teraflops of an A100 in bf16, 19.5 in float32, a third of them."""
    (low,), (high,) = (
        [seconds for gpu, seconds in hardware.durations(312e15, 1, low) if gpu.name == "A100"] for low in (True, False)
    )
    assert low == pytest.approx(1000 / hardware.UTILISATION) and high == pytest.approx(low * 16)


def test_a_plan_for_a_gpu_names_gpus_and_one_for_a_cpu_none():
    recipe = load_recipe("scenes-64-tcd", ["training.device=cuda"])
    planned = plan(recipe, timed=False)
    lines = describe(planned)
    assert "fits into a GPU of 12 GB" in lines and sum("RTX 4090" in line for line in lines) == 1
    parts = planned.estimate.training
    assert parts["CUDA context (assumed)"] == hardware.CONTEXT
    step = parts["gradients"] + parts["activations"]
    assert parts["fragmentation (assumed)"] == int(hardware.FRAGMENTATION * step)
    on_cpu = plan(load_recipe("scenes-64-tcd"), timed=False)
    assert not any("GPU" in line for line in describe(on_cpu))
    assert not any("assumed" in part for part in on_cpu.estimate.training)


@pytest.mark.parametrize(("name", "parameters", "texts"), [
    ("stable-diffusion-v1-5/stable-diffusion-v1-5", 859_520_964, 1),
    ("stabilityai/stable-diffusion-xl-base-1.0", 2_567_463_684, 2),
    ("stabilityai/stable-diffusion-3-medium-diffusers", 2_028_328_000, 3),
    ("black-forest-labs/FLUX.1-dev", 11_901_408_320, 2),
    ("Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers", 1_604_462_752, 1),
    ("Qwen/Qwen-Image", 20_430_401_088, 1),
    ("Qwen/Qwen-Image-2.1", 7_115_124_736, 1),
    ("Tongyi-MAI/Z-Image", 6_154_908_736, 1),
    ("black-forest-labs/FLUX.2-klein-base-4B", 3_875_544_576, 1),
    ("black-forest-labs/FLUX.2-dev", 32_223_281_152, 1),
    ("krea/Krea-2-Raw", 12_820_073_036, 1),
    ("lodestones/Chroma1-HD", 8_899_983_424, 1),
])  # fmt: skip
@pytest.mark.slow
def test_models_of_the_shipped_recipes_are_planned_without_a_network(name, parameters, texts, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("asked the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    sketch = outline(name)
    assert sum(p.numel() for p in sketch.base.parameters()) == parameters
    kl4, kl16, deep = 83_653_863, 83_819_683, 312_250_275
    video, squares, rgba = 126_892_531, 84_046_115, 337_740_404
    assert sum(p.numel() for p in sketch.parts["vae"].parameters()) in (kl4, kl16, deep, video, squares, rgba)
    assert sum(part.startswith("text_encoder") for part in sketch.parts) == texts
    assert any(name in path.read_text(encoding="utf-8") for path in shipped_recipes().values())
