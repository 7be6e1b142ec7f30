"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe, e.g. --set training.steps=500."),
]
RecipeName = Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped recipe.")]
RunOut = Annotated[Path | None, typer.Option(help="Run directory (default: runs/RECIPE).")]
Runs = Annotated[list[Path], typer.Argument(help="Finished run directories of one teacher.")]
Features = Annotated[
    str,
    typer.Option(
        help="Network of FD and KID: imagenet, or a DINOv2, CLIP or SigLIP model, by its folder or hub name (default: "
        "the recipe's; for scenes-64 its detector)."
    ),
]
PromptsFile = Annotated[
    Path | None, typer.Option(help="Text file of prompts, one a line, to measure on (default: the recipe's own).")
]
RecipeDevice = Annotated[
    str | None, typer.Option("--device", help="Device to compute on, e.g. cpu or cuda (default: the recipe's).")
]
Vram = Annotated[
    int | None,
    typer.Option(
        metavar="12|16|24|48|80",
        help="Memory of the GPU in GB: choose checkpointing, micro-batches, quantisation and offload so that the plan "
        "fits. What you set stays.",
    ),
]
RunDevice = Annotated[
    str | None,
    typer.Option("--device", help="Device to compute on, e.g. cpu or cuda (default: the one the run trained on)."),
]
