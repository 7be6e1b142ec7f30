"""Target times folded into weights: told and folded networks of every family at 1 to 8 steps, in float64.

Each student has a LoRA on the folded layer too. An error is the largest difference of the outputs at the times of the
run, as a part of the largest change that the target times make; weights and ranks are float32, as in a file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fewstep.data.files import replace_text
from tests.export.test_fold import FAMILIES, family_errors

RESULTS = Path(__file__).parent / "results" / "folding.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help="all by default")
    options = parser.parse_args()
    rows = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name in options.families or FAMILIES:
        found = family_errors(name, range(1, 9))
        rows[name] = {"error": [error for error, _ in found], "change": [change for _, change in found]}
        print(
            f"{name:12}  error up to {max(rows[name]['error']):.1e}, the target times change {found[3][1]:.2f} at 4",
            flush=True,
        )
        replace_text(RESULTS, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
