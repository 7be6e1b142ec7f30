"""What `make docs` does beyond MkDocs: the pages of benchmarks/, notebooks, diagrams, formulas.

The pages are plain Markdown that a code host shows as it is. Links between docs/ and benchmarks/ are rewritten for the
site; notebooks become pages; formulas become MathML, which browsers show without a script; a Mermaid diagram is
replaced by its drawing in docs/diagrams/, named by the hash of its text (`DRAW` makes it). So no page of the site loads
anything from another server.
"""

import base64
import hashlib
import html
import json
import posixpath
import re
import unicodedata
from functools import partial
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(?=\))")
DRAW = "npx @mermaid-js/mermaid-cli -t neutral -b white -i diagram.mmd -o docs/diagrams/{name}.svg"


def on_files(files, config):
    """Adds the pages of benchmarks/ and of the notebooks, and leaves the notebooks themselves to be downloaded."""
    for page in sorted((ROOT / "benchmarks").rglob("*.md")):
        place = f"benchmarks/{page.relative_to(ROOT / 'benchmarks').as_posix()}"
        files.append(File.generated(config, place, content=page.read_text(encoding="utf-8")))
    for notebook in sorted(DOCS.rglob("*.ipynb")):
        place = notebook.relative_to(DOCS).with_suffix(".md").as_posix()
        files.append(File.generated(config, place, content=notebook_page(notebook)))
    return files


def on_page_markdown(markdown, page, config, files):
    place = page.file.src_uri
    pieces = re.split(r"(^```\w+\n.*?^```)", markdown, flags=re.MULTILINE | re.DOTALL)
    for i, piece in enumerate(pieces):
        if piece.startswith("```mermaid"):
            pieces[i] = diagram(piece.removeprefix("```mermaid\n").removesuffix("```"), place)
        elif not piece.startswith("```"):
            pieces[i] = LINK.sub(lambda found: found[1] + link_to(found[2], found[3] or "", place), piece)
    return "".join(pieces)


def on_page_content(content, page, config, files):
    """Formulas, as arithmatex leaves them, in MathML."""
    from latex2mathml.converter import convert

    for delimiters, tag, display in ((r"\\\((.*?)\\\)", "span", "inline"), (r"\\\[(.*?)\\\]", "div", "block")):
        pattern = rf'<{tag} class="arithmatex">{delimiters}</{tag}>'
        formula = partial(_mathml, convert=convert, display=display)
        content = re.sub(pattern, formula, content, flags=re.DOTALL)
    return content


def _mathml(found, convert, display):
    return re.sub(r'<mi mathvariant="([\w-]+)">(\w)</mi>', _letter, convert(html.unescape(found[1]), display=display))


def _letter(found):
    """A script or double-struck letter as a character of its own: browsers do not follow mathvariant."""
    style, letter = found[1].upper(), found[2]
    names = [f"{prefix}{style} CAPITAL {letter}" for prefix in ("MATHEMATICAL ", "")]
    known = [name for name in names if letter.isupper() and _has(name)]
    return f"<mi>{unicodedata.lookup(known[0])}</mi>" if known else found[0]


def _has(name):
    try:
        return bool(unicodedata.lookup(name))
    except KeyError:
        return False


def link_to(target: str, anchor: str, place: str) -> str:
    """A link of the page ``place`` of the site, which may lead from docs/ to benchmarks/ or back, within the site."""
    folder = posixpath.dirname(place)
    home = ROOT if place.startswith("benchmarks/") else DOCS
    real = Path(posixpath.normpath((home / folder / target).as_posix()))
    if real.suffix == ".ipynb":
        real = real.with_suffix(".md")
    if real.is_dir():
        real /= "README.md"
    if real == ROOT / "README.md":
        real, anchor = DOCS / "index.md", ""  # the README's headings are its own
    within = real.relative_to(DOCS) if real.is_relative_to(DOCS) else real.relative_to(ROOT)
    return posixpath.relpath(within.as_posix(), folder or ".") + anchor


def diagram(text: str, place: str) -> str:
    """The drawing of a Mermaid diagram.

    Raises:
        ValueError: it was not drawn since its text changed.
    """
    name = hashlib.sha256(text.encode()).hexdigest()[:12]
    if not (DOCS / "diagrams" / f"{name}.svg").is_file():
        raise ValueError(f"{place}: the drawing of a diagram is missing: `{DRAW.format(name=name)}` makes it.")
    return f"![diagram]({posixpath.relpath(f'diagrams/{name}.svg', posixpath.dirname(place) or '.')})"


def notebook_page(notebook: Path) -> str:
    """A notebook with its outputs as Markdown: text, code, printed lines and images."""
    parts = []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif cell["cell_type"] == "code":
            parts.append(f"```python\n{source}\n```")
            parts += [shown(output) for output in cell["outputs"]]
    return "\n\n".join([*parts, f"The notebook itself: [{notebook.name}]({notebook.name}){{ download }}.\n"])


def shown(output: dict) -> str:
    data = output.get("data", {})
    for kind in ("image/png", "image/jpeg", "image/webp"):
        if kind in data:
            packed = "".join(data[kind]).replace("\n", "")
            assert base64.b64decode(packed)
            return f'<img alt="output of the cell above" src="data:{kind};base64,{packed}">'
    text = "".join(output.get("text", data.get("text/plain", "")))
    return f"```text\n{text.rstrip()}\n```"
