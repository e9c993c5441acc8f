"""What runs found, as JSON, a Markdown table and a self-contained HTML page with plots; one run or several compared.

write_report(["runs/loku", "runs/gd"], "report", title="LoKU beside gradient difference")
rich.print(summary_table([Run.load("runs/loku")]))
"""

from loku.report.run import Run
from loku.report.tables import summary_table
from loku.report.writing import write_report

__all__ = ["Run", "summary_table", "write_report"]
