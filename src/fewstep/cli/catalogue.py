"""Commands that look things up: `fewstep doctor`, `recipes`, `methods`, `checkpoints`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.options import RecipeDevice, RecipeName, Sets, Vram
from fewstep.training.console import command, listed, long, say

recipes_app = typer.Typer(invoke_without_command=True)


@long
def doctor(
    plan: Annotated[
        str | None, typer.Option("--plan", metavar="RECIPE", help="Print what this recipe needs instead, and stop.")
    ] = None,
    overrides: Sets = None,
    device: RecipeDevice = None,
    vram: Vram = None,
) -> None:
    """Check this machine: its hardware, its packages, whether its numbers are right.

    - `fewstep doctor`

    - `fewstep doctor --plan sdxl-lcm`, the memory and time of a recipe on this machine

    - `fewstep doctor --plan flux-tcd --vram 24`, the settings with which it fits into a GPU of 24 GB

    Exit code 1 where something is wrong, or the recipe does not fit.
    """
    if plan is not None:
        from fewstep.recipe.chain import Chain, load
        from fewstep.runs.plan import advise, describe, fits
        from fewstep.runs.plan import plan as make

        if vram is not None:
            from fewstep.runs.vram import fitted

            found = fitted(plan, overrides or (), device, vram)
            overrides = [*(overrides or ()), *found.overrides]
            say("\n".join(found.lines))
        recipe = load(plan, overrides or ()).on_device(device)
        if isinstance(recipe, Chain):
            raise ValueError(f"{plan} has stages: {command('distill', plan, '--dry-run')} prints what each needs.")
        planned = make(recipe)
        say("\n".join([*describe(planned), *advise(planned)]))
        raise typer.Exit(0 if vram is not None or fits(planned) else 1)
    from fewstep.planning.doctor import PROBLEM, examine
    from fewstep.training.progress import each

    problems = 0
    for finding in each(examine(), "examining this machine"):
        say(str(finding))
        problems += finding.level == PROBLEM
    raise typer.Exit(1 if problems else 0)


@long
def methods() -> None:
    """List the methods, each with its purpose and the network calls of a step.

    - `fewstep methods`
    """
    from fewstep.diffusion.schedule import Schedule
    from fewstep.methods.registry import METHODS

    for name, cls in METHODS.items():
        calls = cls(Schedule.scaled_linear()).calls_per_step()
        say(listed(name, cls.summary, 9))
        say(listed("", f"network calls per step: {', '.join(f'{k} {v:g}' for k, v in calls.items())}", 9))


@long
def checkpoints(
    name: Annotated[str | None, typer.Argument(help="Name of a published file (default: list all).")] = None,
    code: Annotated[bool, typer.Option("--code", help="Print only the code for diffusers.")] = False,
) -> None:
    """List published few-step files; for one of them, print its settings, code for diffusers, settings for ComfyUI.

    - `fewstep checkpoints`

    - `fewstep checkpoints sdxl-lightning-4step-lora`

    `fewstep sample --checkpoint NAME` samples from any of them, and each may be the `init` of a recipe.
    """
    from fewstep.checkpoints import explain
    from fewstep.checkpoints.registry import find_checkpoint

    if name is None:
        say(explain.table())
        return
    entry = find_checkpoint(name)
    say(explain.code(entry) if code else f"{explain.explain(entry)}\n\n{explain.code(entry)}")


@recipes_app.callback()
def recipes(context: typer.Context) -> None:
    """List the shipped recipes, print one, or copy one to a file of your own.

    - `fewstep recipes`

    - `fewstep recipes copy sdxl-lcm mine.yaml`
    """
    if context.invoked_subcommand is None:
        recipes_list()


@recipes_app.command("list")
def recipes_list() -> None:
    """List name and purpose of every shipped recipe."""
    from fewstep.recipe.shipped import purpose, shipped_recipes

    named = shipped_recipes()
    for name, path in named.items():
        say(listed(name, purpose(path), 2 + max(map(len, named))))


@recipes_app.command("show")
def recipes_show(name: RecipeName) -> None:
    """Print a recipe; `fewstep distill NAME --dry-run` adds every default and what it needs.

    - `fewstep recipes show sdxl-lcm`
    """
    from fewstep.recipe.shipped import find_recipe

    say(find_recipe(name).read_text(encoding="utf-8").rstrip())


@recipes_app.command("copy")
def recipes_copy(
    name: Annotated[str, typer.Argument(help="The name of a shipped recipe.")],
    to: Annotated[Path | None, typer.Argument(help="File to write (default: NAME.yaml here).")] = None,
) -> None:
    """Write a shipped recipe to a file of your own.

    - `fewstep recipes copy sdxl-lcm mine.yaml`
    """
    from fewstep.data.files import replace_text
    from fewstep.recipe.shipped import find_recipe

    text, target = find_recipe(name).read_text(encoding="utf-8"), to or Path(f"{Path(name).stem}.yaml")
    if target.exists():
        raise ValueError(f"{target} exists already: choose another file.")
    if not target.parent.is_dir():
        raise ValueError(f"There is no folder {target.parent} to write {target.name} to: make it first.")
    replace_text(target, text)
    say(f"Wrote {target}. Change it, then: {command('distill', target)}")
