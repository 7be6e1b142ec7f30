"""benchmarks/device in its tiny form on a CPU: every row runs and leaves one JSON, the first unfinished first."""

import json

import pytest

from benchmarks.device import rows


@pytest.mark.slow
def test_rows_run_in_their_order_and_leave_one_json_each(tmp_path, monkeypatch, capsys):
    for long in ("compile", "scenes-64"):  # a C++ compiler, and a whole demo: minutes on a CPU
        monkeypatch.setitem(rows.ROWS, long, lambda device, tiny: {})
    for name in rows.ROWS:
        rows.main(["--tiny", "--device", "cpu", "--out", str(tmp_path)])
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert found["row"] == name and found["tiny"] and found["seconds"] > 0
        if name.startswith("step-"):
            assert 0 < found["over_bare"] < 100 and found["planned"] > 0 and found["peak_over_plan"] is None
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(rows.ROWS)
    capsys.readouterr()
    rows.main(["--tiny", "--device", "cpu", "--out", str(tmp_path)])
    assert "Every row has its JSON" in capsys.readouterr().out


def test_a_row_without_a_json_is_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "ROWS", {name: lambda device, tiny: {"x": device} for name in ("one", "two")})
    (tmp_path / "one.json").write_text("{}")
    rows.main(["--device", "cpu", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "two.json").read_text())["x"] == "cpu"
    assert (tmp_path / "one.json").read_text() == "{}"
