"""Tables, plots and the stand-alone page of a run."""

from prunecast.simulations.report.figure import accuracy_figure
from prunecast.simulations.report.page import FIGURE, PAGE, render_page, write_report
from prunecast.simulations.report.text import arm_rows, release_rows, score_text

__all__ = [
    "FIGURE",
    "PAGE",
    "accuracy_figure",
    "arm_rows",
    "release_rows",
    "render_page",
    "score_text",
    "write_report",
]
