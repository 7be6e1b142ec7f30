"""Runs the notebooks of docs/ again and keeps their outputs: `make notebook` (some minutes of a CPU).

Cells run in a temporary folder. What differs from run to run (times, cell numbers, progress) is left out of the file,
and images are stored as small PNGs: a notebook and its images stay below 200 kB.
"""

import base64
import io
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

DOCS = Path(__file__).resolve().parents[1]
LARGEST = 200_000  # bytes of a file


def run(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": folder}}).execute()
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", nbformat.NotebookNode()
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = [kept(output) for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata = nbformat.NotebookNode(kernelspec={"name": "python3", "display_name": "Python 3"})
    written = nbformat.writes(notebook)
    if len(written) > LARGEST:
        raise SystemExit(f"{path.name} would have {len(written)} bytes: make its images smaller.")
    path.write_text(written.rstrip() + "\n", encoding="utf-8")
    print(f"{path.name}: {len(written) // 1000} kB")


def kept(output):
    """An output without its number; an image in 128 colours."""
    if "execution_count" in output:
        output.execution_count = None
    if "image/png" in output.get("data", {}):
        image = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))).convert("RGB")
        packed = io.BytesIO()
        image.quantize(128).save(packed, "PNG", optimize=True)
        output.data = nbformat.NotebookNode({"image/png": base64.b64encode(packed.getvalue()).decode()})
    return output


if __name__ == "__main__":
    for notebook in sorted(DOCS.rglob("*.ipynb")):
        run(notebook)
