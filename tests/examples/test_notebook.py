"""The first-steps notebook runs from top to bottom on the small model."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "examples" / "first_steps.ipynb"
PASSKEY = "74213"


def read_notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def printed_by_section(notebook):
    """Section heading -> what its code cells wrote to stdout."""
    sections, heading = {}, ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and cell.source.startswith("#"):
            heading = cell.source.splitlines()[0].lstrip("# ")
        elif cell.cell_type == "code":
            text = "".join(output.get("text", "") for output in cell.outputs if output.get("name") == "stdout")
            sections[heading] = sections.get(heading, "") + text
    return sections


def test_is_stored_without_outputs():
    for cell in read_notebook().cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


@pytest.mark.model
@pytest.mark.parametrize("tokens", [400, pytest.param(600, marks=pytest.mark.slow)])
def test_runs_from_top_to_bottom(tokens):
    """Unchanged, or on less of the text that it asks about."""
    notebook = read_notebook()
    (cell,) = (cell for cell in notebook.cells if "[:600]" in cell.source)
    cell.source = cell.source.replace("[:600]", f"[:{tokens}]")
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()

    printed = printed_by_section(notebook)
    one_line = printed["The one-line change"].splitlines()
    assert len(one_line) == 2
    assert all(PASSKEY in line for line in one_line)  # the notebook itself asserts that both are equal
    budgets = printed["Budgets"].split("budget ")[1:]
    assert len(budgets) == 5
    assert PASSKEY in budgets[2]  # 256 tokens of about 680, or 480
    assert PASSKEY in budgets[4]  # all of them
    assert PASSKEY in printed["Streaming"]
    assert "Mars" in printed["`enable`: when you cannot pass a cache"]
    assert PASSKEY in printed["Several turns on one cache"]
