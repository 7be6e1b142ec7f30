"""What to do with a run that has just finished, as command lines."""

from __future__ import annotations

from pathlib import Path

from fewstep.export.publish import check_form
from fewstep.recipe.chain import Chain
from fewstep.recipe.schema import Recipe, SampleConfig
from fewstep.runs.measured_on import evaluation_captions
from fewstep.students.card import load_card
from fewstep.students.lineage import student_folder

_SHOWN = 2  # prompts of a command line
_AMONG = 16  # captions of which the shortest are taken: whole paragraphs make no command line


def next_commands(recipe: Recipe | Chain, run: Path) -> list[list[object]]:
    """Sampling from the student of ``run`` by prompts of its own recipe, measuring and exporting it; words of each."""
    trained = recipe if isinstance(recipe, Recipe) else list(recipe.on_first_teacher().values())[-1]
    prompts = [word for prompt in own_prompts(trained) for word in ("-p", prompt)]
    found: list[list[object]] = [["sample", run, *prompts]]
    if trained.place is None or _captions(trained):
        found.append(["evaluate", run, "--steps", "1,2,4,8"])
    layout = _layout(run)
    return [*found, ["export", run, "--to", layout]] if layout else found


def own_prompts(recipe: Recipe) -> list[str]:
    """Two prompts of the recipe: those of its sample grid, or captions like those that it was trained on."""
    given = recipe.sample.prompts
    if recipe.place is None or recipe.data.stream or given != SampleConfig().prompts:
        return list(given[:_SHOWN])
    captions = list(dict.fromkeys(_captions(recipe)[:_AMONG]))
    shortest = sorted(captions, key=len)[:_SHOWN]
    return [caption for caption in captions if caption in shortest] or list(given[:_SHOWN])


def _captions(recipe: Recipe) -> list[str]:
    """What its student can be measured on; nothing of a stream, or of less than is needed."""
    try:
        return evaluation_captions(recipe)
    except ValueError:
        return []


def _layout(run: Path) -> str:
    """The smallest export that the student of ``run`` has: its LoRA, or the whole pipeline; empty if it has none."""
    folder = student_folder(run)
    for layout in ("lora", "diffusers"):
        try:
            if folder is not None:
                check_form(layout, load_card(folder), folder)
                return layout
        except ValueError:
            continue
    return ""
