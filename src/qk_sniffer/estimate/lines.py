"""Lines of an estimate, and the units of its figures."""

Line = tuple[str, str]
"""A label, empty in the lines below its first, and a text."""


def as_size(n_bytes: float) -> str:
    """Bytes in a unit that a person reads, right-aligned."""
    units = ["B", "KB", "MB", "GB", "TB"]
    while n_bytes >= 1000 and len(units) > 1:
        n_bytes /= 1000
        del units[0]
    return f"{n_bytes:,.{0 if units[0] == 'B' else 1}f} {units[0]}".rjust(9)
