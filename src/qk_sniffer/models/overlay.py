"""Modeling files of the user's own in the place of those in transformers, while a model is built."""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType

from qk_sniffer.errors import UserError, first_line


@contextmanager
def model_overlays(models_dir: str | None) -> Iterator[None]:
    """Let ``<models_dir>/<arch>/modeling_<arch>.py`` be the architecture's code, within a block.

    A model built inside keeps the classes of the overlay. Such a file may call
    ``get_active_sniffer().capture(...)`` in its attention; those layers are then captured by it alone.

    Raises:
        UserError: The directory is missing or has no such file, transformers has no such
            architecture, or a file can't be run.
    """
    with ExitStack() as stack:
        for file in _overlay_files(models_dir) if models_dir is not None else []:
            stack.enter_context(_overlaid(file))
        yield


def _overlay_files(models_dir: str) -> list[Path]:
    directory = Path(models_dir).expanduser()
    if not directory.is_dir():
        raise UserError(
            f"model.models_dir: {models_dir} is not a directory; name one that holds "
            "<arch>/modeling_<arch>.py, or set it to null"
        )
    files = [
        file for file in sorted(directory.glob("*/modeling_*.py")) if file.stem[9:] == file.parent.name
    ]
    if not files:
        raise UserError(
            f"model.models_dir: {models_dir} has no <arch>/modeling_<arch>.py, such as "
            "llama/modeling_llama.py; add one, or set models_dir to null"
        )
    return files


@contextmanager
def _overlaid(file: Path) -> Iterator[None]:
    package = _architecture_package(file)
    name = f"{package.__name__}.{file.stem}"
    original = sys.modules.get(name)
    attributes = dict(vars(package))
    try:
        overlay = _run(file, name)
        # Classes that were asked for before are kept as attributes of the lazy package.
        classes = {key: value for key, value in vars(overlay).items() if isinstance(value, type)}
        vars(package).update(
            {file.stem: overlay} | {k: v for k, v in classes.items() if v.__module__ == name}
        )
        yield
    finally:
        vars(package).clear()
        vars(package).update(attributes)
        if original is None:
            sys.modules.pop(name, None)
        else:
            sys.modules[name] = original


def _architecture_package(file: Path) -> ModuleType:
    arch = file.parent.name
    try:
        return importlib.import_module(f"transformers.models.{arch}")
    except ModuleNotFoundError as error:
        raise UserError(
            f"model.models_dir: {file} is for {arch}, which this transformers does not have; name the "
            "directory as in transformers/models, or remove it"
        ) from error


def _run(file: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    overlay = importlib.util.module_from_spec(spec)
    sys.modules[name] = overlay
    try:
        spec.loader.exec_module(overlay)
    except SyntaxError as error:
        raise UserError(
            f"model.models_dir: {error.filename}, line {error.lineno}: {error.msg}; mend the file"
        ) from error
    except Exception as error:
        raise UserError(
            f"model.models_dir: {file} can't be imported ({type(error).__name__}: "
            f"{first_line(error)}); mend the file"
        ) from error
    return overlay
