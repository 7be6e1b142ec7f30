"""`fewstep app`: a page on this machine that generates images with any model, beside those of its teacher.

It listens on the loopback address alone, is not shared, collects nothing, and its page may contact no other server.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from fewstep.checkpoints.registry import checkpoints
from fewstep.evaluation.grids import enlargement, image_grid
from fewstep.evaluation.result import in_steps
from fewstep.inference.load import load_model
from fewstep.inference.model import Model
from fewstep.models.hub import check_device
from fewstep.students.lineage import student_folder

HERE = "127.0.0.1"
_ONLY_HERE = "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' "
_ONLY_HERE += "'unsafe-inline'"
_MOST = 16  # prompts at once


def models(folder: Path = Path("runs")) -> list[str]:
    """Models to choose from: finished runs, the newest first, the shipped model, published checkpoints."""
    runs = [path for path in folder.glob("*") if path.is_dir() and student_folder(path) is not None]
    runs.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    return [*map(str, runs), "scenes-64", *checkpoints()]


@lru_cache(maxsize=2)
def _opened(name: str, base: str, device: str) -> Model:
    return load_model(name, base or None, device=device)


def generate(
    name: str, base: str, text: str, steps: int, seed: int, teacher_steps: int, device: str = "cpu"
) -> tuple[Image.Image, str]:
    """One row of images, below it the teacher's from the same noise, and a description of how they were made.

    Args:
        text: prompts, one a line. steps: 0 takes the model's own number. teacher_steps: 0 leaves the teacher out.

    Raises:
        ValueError: as `fewstep.load` and `Model.sample`; no prompt, or too many.
    """
    prompts = [line.strip() for line in text.split("\n") if line.strip()]
    if not 0 < len(prompts) <= _MOST:
        raise ValueError(f"Write one prompt a line, {_MOST} at most.")
    model = _opened(name.strip(), base.strip(), device)
    found = model.generate(prompts, steps or None, seed=seed)
    rows, labels, lines = [found.images], [Path(name).name], [f"**{name}**: {found.description}"]
    if teacher_steps and model.base:
        teacher = _opened(model.base, "", device)
        beside = teacher.generate(prompts, teacher_steps, seed=seed)
        if beside.images.shape == found.images.shape:
            rows, labels = [*rows, beside.images], [*labels, f"teacher, {in_steps(teacher_steps)}"]
        lines.append(f"**teacher, {model.base}**: {beside.description}")
    lines += [*model.warnings(steps or None), *([model.licence] if model.licence else [])]
    grid = image_grid(rows, labels, prompts, scale=enlargement(found.images))
    return grid, "\n\n".join(lines)


def page(model: str = "", device: str = "cpu") -> Any:
    """The page, as gradio's Blocks.

    Raises:
        ValueError: gradio is not installed, or there is no such device.
    """
    check_device(device, "--device")
    gradio = _gradio()
    known = models()

    def clicked(name: str, base: str, text: str, steps: float, seed: float, teacher_steps: float) -> tuple[Any, str]:
        try:
            few, first, many = (int(number or 0) for number in (steps, seed, teacher_steps))  # a field may be empty
            return generate(name or "", base or "", text or "", few, first, many, device)
        except (ValueError, OSError, ArithmeticError) as error:
            return None, f"**Nothing was generated.** {' '.join(str(error).split())}"

    with gradio.Blocks(title="fewstep", analytics_enabled=False) as blocks:
        gradio.Markdown("# fewstep")
        with gradio.Row():
            with gradio.Column(scale=1):
                name = gradio.Dropdown(
                    known, value=model or known[0], label="Model", allow_custom_value=True,
                    info="a run, an exported folder or LoRA file, a published checkpoint, a teacher",
                )  # fmt: skip
                base = gradio.Textbox(label="Base", info="the model that a LoRA is put on; empty: its own")
                text = gradio.Textbox(
                    "a red star\ntwo shapes", lines=3, label="Prompts", info="one a line", elem_id="prompts"
                )
                steps = gradio.Slider(0, 16, 0, step=1, label="Steps", info="0: the model's own number")
                seed = gradio.Number(0, precision=0, minimum=0, label="Seed")
                beside = gradio.Slider(0, 100, 50, step=1, label="Teacher's steps", info="0: leave the teacher out")
                button = gradio.Button("Generate", variant="primary", elem_id="generate")
            with gradio.Column(scale=2):
                image = gradio.Image(
                    type="pil", format="png", interactive=False, show_label=False, elem_id="image",
                    buttons=["download", "fullscreen"],
                )  # fmt: skip
                words = gradio.Markdown(elem_id="words")
        button.click(clicked, [name, base, text, steps, seed, beside], [image, words], api_visibility="private")
    return blocks


def serve(model: str = "", port: int = 7860, device: str = "cpu") -> tuple[Any, str]:
    """Serve the page on the loopback address, in the background; returns gradio's Blocks and the address.

    Raises:
        ValueError: gradio is not installed, or the port is taken.
    """
    blocks = page(model, device)
    # gradio's own fonts are loaded from another server.
    theme = _gradio().themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    try:
        _, address, _ = blocks.queue(default_concurrency_limit=1, max_size=8).launch(
            server_name=HERE, server_port=port, share=False, quiet=True, prevent_thread_lock=True, theme=theme,
            footer_links=[], ssr_mode=False, enable_monitoring=False, mcp_server=False, pwa=False,
            app_kwargs={"middleware": _guards()},
        )  # fmt: skip
    except OSError as error:
        raise ValueError(f"Port {port} cannot be used ({error}): choose another --port.") from None
    return blocks, address


def _guards() -> Sequence[Any]:
    """Requests to this machine's own names alone are served, and the page may contact no other server."""
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    return [Middleware(_Policy), Middleware(TrustedHostMiddleware, allowed_hosts=[HERE, "localhost"])]


class _Policy:
    """Adds the policy to every response."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", _ONLY_HERE.encode())]
            await send(message)

        await self.app(scope, receive, with_policy if scope["type"] == "http" else send)


def _gradio() -> Any:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError:
        raise ValueError("fewstep app needs gradio: pip install 'fewstep[app]'.") from None
    return gradio
