"""Which of the steps by hand `make test` takes: every case with all weights, and with a LoRA those of `WITH_LORA`."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent
WITH_LORA = {("vp", "epsilon"), ("edm", "v_prediction"), ("flow", "flow")}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """The others are slow: how a LoRA enters a network depends on no schedule and no prediction type."""
    for item in items:
        given = item.callspec.params if item.path.parent == HERE and hasattr(item, "callspec") else {}
        case = given.get("schedule", given.get("name")), given.get("kind")
        by_hand = item.name.partition("[")[0].endswith("_the_papers")
        if by_hand and given.get("weights") == "lora" and case not in WITH_LORA:
            item.add_marker(pytest.mark.slow)
