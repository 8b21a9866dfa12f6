"""`report`: one self-contained HTML page of one or several runs.

runs.py      a run directory → what is known of it, with a note for what is missing
series.py    rows → curves; several seeds of one recipe → their mean and spread
charts.py    curves → an SVG image inside the page (matplotlib)
text.py      text that a model wrote → text that a page can show
page.py      everything → template.html → HTML
"""

from qerl_compile.rl.report.charts import require_matplotlib
from qerl_compile.rl.report.page import render
from qerl_compile.rl.report.runs import ReportedRun, distinct_names, read_run

__all__ = ["ReportedRun", "distinct_names", "read_run", "render", "require_matplotlib"]
