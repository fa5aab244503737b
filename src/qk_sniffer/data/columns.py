"""Columns by name, and fields of the structs in them by a name with dots, such as doc.text."""

from collections.abc import Iterator, Mapping
from typing import Any

import datasets


def values_of(columns: Mapping[str, list[Any]], name: str) -> list[Any]:
    """The values of a column, or of a field inside a struct.

    A column that is called so comes before a field. A row has None where its struct is null or lacks
    the field, and every row where there is no such column.

    Args:
        columns: Values by column, as many in each.
        name: A column, or fields one inside another with dots between them.
    """
    column, field = _split(columns, name) or ("", name)
    values = columns[column] if column else [None] * len(next(iter(columns.values()), []))
    return [_inside(value, field) for value in values] if field else values


def value_of(row: Mapping[str, Any], name: str) -> Any:
    """The same of a single row."""
    return _inside(row, name)


def column_of(columns: Mapping[str, Any], name: str) -> str:
    """The column that has the values of a name, of those that there are."""
    return (_split(columns, name) or (name, ""))[0]


def has_values(columns: Mapping[str, Any], name: str) -> bool:
    """Whether a name has values, as far as that can be told.

    Args:
        columns: Features by column, or a row; a null struct may have any field.
        name: As ``values_of`` takes it.
    """
    found = _split(columns, name)
    if found is None:
        return False
    inner = columns[found[0]]
    if not found[1] or inner is None or isinstance(inner, datasets.Json):
        return True
    return isinstance(inner, Mapping) and has_values(inner, found[1])


def names_in(columns: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Every name that has values: columns, and of structs their fields."""
    for name, inner in columns.items():
        if isinstance(inner, Mapping) and inner:
            yield from names_in(inner, f"{prefix}{name}.")
        else:
            yield prefix + name


def _split(fields: Mapping[str, Any], name: str) -> tuple[str, str] | None:
    """The longest field that a name begins with, and the rest of the name."""
    parts = name.split(".")
    for size in range(len(parts), 0, -1):
        field = ".".join(parts[:size])
        if field in fields:
            return field, ".".join(parts[size:])
    return None


def _inside(value: Any, name: str) -> Any:
    found = _split(value, name) if isinstance(value, Mapping) else None
    if found is None:
        return None
    return _inside(value[found[0]], found[1]) if found[1] else value[found[0]]
