"""The notebooks, from top to bottom in kernels of their own, in a directory like a checkout."""

import asyncio
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

REPOSITORY = Path(__file__).parents[1]
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
EACH = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)

Outcomes = dict[Path, nbformat.NotebookNode | BaseException]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Each notebook as its kernel left it, or the error that ended it.

    The kernels start where Jupyter starts them, and side by side: most of their time is imports.
    """
    checkout = tmp_path_factory.mktemp("checkout")
    for name in ("src", "configs"):
        (checkout / name).symlink_to(REPOSITORY / name)
    directory = checkout / "notebooks"
    directory.mkdir()

    async def execute(notebook: Path) -> nbformat.NotebookNode:
        contents = nbformat.read(notebook, as_version=4)
        resources = {"metadata": {"path": str(directory)}}
        return await NotebookClient(contents, timeout=300, resources=resources).async_execute()

    async def execute_all() -> list[nbformat.NotebookNode | BaseException]:
        return await asyncio.gather(*map(execute, NOTEBOOKS), return_exceptions=True)

    with pytest.MonkeyPatch.context() as patch:
        # Threads that wait for each other stall where processes share their cores.
        patch.setenv("OMP_NUM_THREADS", "1")
        for name in ("HF_HOME", "IPYTHONDIR"):
            patch.setenv(name, str(checkout / name))
        return dict(zip(NOTEBOOKS, asyncio.run(execute_all()), strict=True))


def test_there_are_six() -> None:
    assert len(NOTEBOOKS) == 6


@EACH
def test_it_runs_from_top_to_bottom(notebook: Path, outcomes: Outcomes) -> None:
    """Without a network, and with all its pictures."""
    outcome = outcomes[notebook]
    if isinstance(outcome, BaseException):
        raise outcome
    cells = [cell for cell in outcome.cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    n_pictures = sum("image/png" in output.get("data", ()) for output in outputs)
    drawing = re.compile(r"plt\.subplots\(|\.plot\(\)|\.plot_(?:attention|softmax)\((?!.*axes=)")
    assert n_pictures == sum(len(drawing.findall(cell.source)) for cell in cells) > 0


@EACH
def test_it_is_stored_without_outputs(notebook: Path) -> None:
    """Its bytes are those that nbstripout leaves."""
    stored = notebook.read_bytes()
    stripped = subprocess.run(
        [sys.executable, "-m", "nbstripout"], input=stored, capture_output=True, check=True
    )
    assert stripped.stdout == stored
