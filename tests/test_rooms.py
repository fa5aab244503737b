"""The rooms of the package import from those below them alone, as pyproject.toml lists them."""

import pytest
from importlinter.cli import lint_imports


def test_imports_go_down(capsys: pytest.CaptureFixture[str]) -> None:
    assert lint_imports(cache_dir=None) == 0, capsys.readouterr().out
