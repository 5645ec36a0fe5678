"""The notebook runs from top to bottom and shows what it promises."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def executed(smollm2, tmp_path_factory):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    folder = tmp_path_factory.mktemp("notebook")
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook, folder


def outputs(notebook, text):
    """The outputs of the code cell that contains the text."""
    (cell,) = (cell for cell in notebook.cells if cell.cell_type == "code" and text in cell.source)
    return cell.outputs


def printed(notebook, text):
    return "".join(output.text for output in outputs(notebook, text) if output.get("name") == "stdout")


def test_it_learns_shows_pictures_and_generates(executed):
    notebook, folder = executed
    for call in ("plot_splines(records)", "plot_deviations(records)", "plot_course(load"):
        assert any("image/png" in output.get("data", {}) for output in outputs(notebook, call))
    assert "all items (micro)" in printed(notebook, "format_comparison(compare")
    assert printed(notebook, 'from_pretrained(base), "outputs').count("→ the correct answer is") == 4
    assert (folder / "outputs" / "quickstart" / "report.html").stat().st_size > 100_000


def test_it_is_stored_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(
        not cell.outputs and cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code"
    )
