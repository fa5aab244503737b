"""The wheel and the source distribution, and the package as it is once installed."""

import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).parents[1]
IMPORT_EACH_AND_RUN = """
import importlib, sys
from importlib.metadata import entry_points
from pathlib import Path

import qk_sniffer

package = Path(qk_sniffer.__file__).parent
assert package.is_relative_to(sys.prefix), package
for file in sorted(package.rglob("*.py")):
    for name in [name for name in sys.modules if name.partition(".")[0] == "qk_sniffer"]:
        del sys.modules[name]  # so that none finds another there already
    parts = file.relative_to(package.parent).with_suffix("").parts
    importlib.import_module(".".join(parts).removesuffix(".__init__"))
(command,) = entry_points(group="console_scripts", name="qk-sniffer")
sys.exit(command.load()())
"""


class Built(NamedTuple):
    wheel: Path
    sdist: Path


class Installed(NamedTuple):
    python: Path
    command: Path
    package: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The wheel, made from the source distribution, and that."""
    directory = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", directory, REPOSITORY]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,), (sdist,) = directory.glob("*.whl"), directory.glob("*.tar.gz")
    return Built(wheel, sdist)


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel in an environment of its own, which borrows what the package depends on."""
    directory = tmp_path_factory.mktemp("venv")
    venv.create(directory, symlinks=True)
    python = directory / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", built.wheel], check=True)
    (package,) = directory.glob("lib/python*/site-packages/qk_sniffer")
    # A directory that a .pth file names adds its modules, but not the checkout that its own name.
    (package.parent / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return Installed(python, directory / "bin" / "qk-sniffer", package)


def test_the_wheel_has_the_package_and_its_licences(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as wheel:
        names = set(wheel.namelist())
    files = [path for path in (REPOSITORY / "src").rglob("*") if path.is_file()]
    sources = {str(path.relative_to(REPOSITORY / "src")) for path in files if path.suffix != ".pyc"}
    metadata = {name for name in names if ".dist-info/" in name}
    assert names - metadata == sources
    assert {"qk_sniffer/py.typed", "qk_sniffer/demo/model/model.safetensors"} <= names
    licences = {name.partition("/licenses/")[2] for name in metadata}
    assert {"LICENSE", "src/qk_sniffer/demo/NOTICE.md"} <= licences


def test_the_source_distribution_has_what_tests_and_documentation_need(built: Built) -> None:
    with tarfile.open(built.sdist) as sdist:
        names = [name.partition("/")[2] for name in sdist.getnames()]
    tops = {name.partition("/")[0] for name in names}
    directories = {"configs", "docs", "notebooks", "src", "tests"}
    texts = {"CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "README.md"}
    tools = {".gitignore", "Makefile", "PKG-INFO", "constraints.txt", "mkdocs.yml", "pyproject.toml"}
    assert tops == {name for name in directories if (REPOSITORY / name).exists()} | texts | tools
    assert {"tests/conftest.py", "docs/generate.py", "configs/demo.yaml"} <= set(names)
    assert not [name for name in names if re.search(r"__pycache__|/\.|\.parquet$", name)]


def test_the_installed_command_says_what_it_can_do(installed: Installed, tmp_path: Path) -> None:
    usage = subprocess.run(
        [installed.command, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert usage.stdout.startswith("usage: qk-sniffer")


def test_every_module_is_imported_by_itself_and_the_demo_captured(
    installed: Installed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo = installed.package / "demo"
    options = ["--model.name", demo / "model", "--data.path", demo / "text.jsonl"]
    config = ["--config", REPOSITORY / "configs" / "demo.yaml", *options, "--data.max_samples", "1"]
    done = subprocess.run(
        [installed.python, "-I", "-c", IMPORT_EACH_AND_RUN, "predict", *config],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    # What the first page of the documentation does with it.
    monkeypatch.chdir(tmp_path)
    page = (REPOSITORY / "docs" / "index.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, {})


@pytest.mark.parametrize("module", ["qk_sniffer", "qk_sniffer.cli"])
def test_importing_loads_nothing_heavy(module: str) -> None:
    heavy = {"datasets", "lightning", "numpy", "pyarrow", "torch", "transformers"}
    code = f"import sys, {module}; print(*({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
