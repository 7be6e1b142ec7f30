"""The README as PyPI can show it, and the project's links: both follow from one line of pyproject.toml.

PyPI has no files of the repository, so relative links are dead there. With ``repository`` given in [tool.fewstep] they
lead to the files of this release; without it they become plain text, and images are left out. Everything else about the
package stands in pyproject.toml.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from setuptools import setup

_HERE = Path(__file__).parent
_PARTS = re.compile(
    r"""
    ^[ ]{0,3}(?P<fence>```+|~~~+).*?^[ ]{0,3}(?P=fence)[`~]*[ ]*$                    # a block of code stays as it is
    | (?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`)                                     # and so does code in a line
    | (?P<bang>!?)\[(?P<text>(?:[^][`]|`[^`]*`|!?\[[^][]*\](?:\([^()]*\))?)*)\]      # [text] or ![text], code within,
      \((?P<target>[^()\s]+)(?P<title>\s+"[^"]*")?\)                                 #   perhaps an image within
    | <(?P<tag>img|source)\b[^>]*?\b(?:src|srcset)="(?P<source>[^"]*)"[^>]*>
    | <a\b[^>]*?\bhref="(?P<href>[^"]*)"[^>]*>(?P<inner>.*?)</a>
    """,
    re.MULTILINE | re.DOTALL | re.VERBOSE,
)


def page(text: str, repository: str, version: str) -> str:
    """Markdown whose links hold anywhere: whole addresses where the repository has one, otherwise plain text."""

    def whole(target: str, kind: str) -> str | None:
        if re.match(r"[a-z][a-z+.-]*:|//", target, re.IGNORECASE):
            return target
        path = target.removeprefix("./") if not target.startswith("#") else f"README.md{target}"
        return f"{repository}/{kind}/v{version}/{path}" if repository else None

    def part(found: re.Match[str]) -> str:
        if found["target"] is not None:
            image = bool(found["bang"])
            inner = found["text"] if image else page(found["text"], repository, version)
            target = whole(found["target"], "raw" if image else "blob")
            if target is None or not (image or inner):
                return "" if image else inner
            return f"{found['bang']}[{inner}]({target}{found['title'] or ''})"
        if found["source"] is not None:
            target = whole(found["source"], "raw")
            return found[0].replace(found["source"], target) if target else ""
        if found["href"] is not None:
            inner, target = page(found["inner"], repository, version), whole(found["href"], "blob")
            return f'<a href="{target}">{inner}</a>' if target else inner
        return found[0]

    return re.sub(r"\n{3,}", "\n\n", _PARTS.sub(part, text))


def links(repository: str, version: str) -> dict[str, str]:
    """The links beside the project's page, if the repository has an address."""
    if not repository:
        return {}
    return {
        "Repository": repository,
        "Documentation": f"{repository}/tree/v{version}/docs",
        "Changelog": f"{repository}/blob/v{version}/CHANGELOG.md",
        "Issues": f"{repository}/issues",
    }


if __name__ == "__main__":
    _known = tomllib.loads((_HERE / "pyproject.toml").read_text(encoding="utf-8"))
    _repository, _version = _known["tool"]["fewstep"]["repository"].rstrip("/"), _known["project"]["version"]
    setup(
        long_description=page((_HERE / "README.md").read_text(encoding="utf-8"), _repository, _version),
        long_description_content_type="text/markdown",
        project_urls=links(_repository, _version),
    )
