"""Byte budgets in scenarios: what the result and the report tell of them."""

from __future__ import annotations

import json

from prunecast.simulations.report import write_report


def test_result_and_report_tell_what_a_budget_came_to(tiny, tmp_path, finished_run):
    ours = {"kind": "prunecast", "preset": "fine"}
    limits = {"budget_round": "20 kB", "budget_run": "1 MB"}
    tiny["arms"] = {"free": ours, "bound": {**ours, "policy": limits}}
    folder = finished_run(tiny, tmp_path / "run")
    result = json.loads((folder / "result.json").read_text())
    assert result["arms"]["free"]["budget"] is None
    arm = result["arms"]["bound"]
    found, rows = arm["budget"], arm["rounds"]
    assert found["limits"] == {"round": 20_000, "run": 1_000_000}
    assert found["spent"]["run"] == arm["bytes_up"] + arm["bytes_down"]
    so_far = [row["bytes_up"] + row["bytes_down"] for row in rows]
    of_rounds = [after - before for before, after in zip([0, *so_far], so_far, strict=False)]
    assert found["spent"]["round"] == max(of_rounds)
    assert found["above"] == [
        {"limit": "round", "round": row["round"], "bytes": spent - 20_000}
        for row, spent in zip(rows, of_rounds, strict=True)
        if spent > 20_000
    ]
    assert [row["budget"]["spent"]["round"] for row in rows[1:]] == of_rounds[1:]
    assert found["up_coarser"] > 1
    write_report(folder, result)
    text = (folder / "report.md").read_text()
    assert "Byte budgets" in text
    assert "| each round | 20.0 kB |" in text
