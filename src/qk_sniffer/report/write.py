"""``qk-sniffer report``: measures a data root, draws it, and writes the page and the pictures."""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from qk_sniffer.errors import UserError
from qk_sniffer.hub import Publication
from qk_sniffer.reading import Captures, Head, softmax_means
from qk_sniffer.report.attention import attention_section, means_section
from qk_sniffer.report.chosen import chosen_heads, head_of
from qk_sniffer.report.closeups import chosen_norms_section, components_section, predictions_section
from qk_sniffer.report.maps import norms_section, r2_section, rows_section, softmax_section
from qk_sniffer.report.measures import Progress, measure, measured_texts
from qk_sniffer.report.moments import measure_moments, moments_sections
from qk_sniffer.report.page import Section, bullets, paragraph, render_page
from qk_sniffer.storage import (
    REPORT_DIRECTORY,
    captured_names,
    count_rows,
    describe_kinds,
    describe_run,
    explained_writing,
    has_softmax,
    parse_head_name,
    remove_report,
    shown_names,
    write_card,
)


def write_report(
    data_root: Path,
    progress: Progress,
    *,
    heads: Sequence[str] = (),
    example: str | None = None,
) -> Path:
    """Write ``report/`` into a finished data root, and let its card show the main pictures.

    Args:
        data_root: The data root.
        progress: Wraps the iteration over the heads that are measured, given their number.
        heads: Names of heads to look at closely, such as l02h05q; without any, three are chosen by
            their positional R².
        example: Source id of the text whose attention is shown; None takes the one with most rows.

    Returns:
        The page.

    Raises:
        UserError: No run has finished there, it has no rows, a head or example is not in it, or the
            disk refuses.
    """
    captures = Captures(data_root)
    has_rows = count_rows(captures.manifest) > 0
    if not has_rows and not captures.manifest.get("moments"):
        raise UserError(f"{data_root}: no row was kept, so there is nothing to show")
    wanted = [head_of(captures, name) for name in heads]
    shown = None if example is None else captures.example_id(example)
    directory = data_root / REPORT_DIRECTORY
    with explained_writing(directory, "make room, or make it writable, then run report again"):
        # Before the heads are measured, which may take minutes.
        directory.mkdir(exist_ok=True)
    sections = _sections_of_rows(captures, progress, wanted, shown) if has_rows else []
    sections += moments_sections(measure_moments(captures, progress))
    publication = Publication.read(data_root)
    place = None if publication is None else publication.place
    source = [data_root.name if data_root.is_absolute() else str(data_root)]
    if place is not None:
        source = [place.repo_id, place.branch]
    page = _page(captures, source, sections)
    with explained_writing(directory, "make room, or make it writable, then run report again"):
        remove_report(data_root)
        directory.mkdir(exist_ok=True)
        for section in sections:
            for picture in section.pictures:
                (directory / f"{picture.name}.png").write_bytes(picture.light)
        (directory / "index.html").write_text(page, encoding="utf-8")
        write_card(data_root, captures.manifest, place)
    return directory / "index.html"


def _sections_of_rows(
    captures: Captures, progress: Progress, wanted: Sequence[Head], example: int | None
) -> list[Section]:
    """What is drawn from rows.

    Args:
        captures: The capture.
        progress: As for ``write_report``.
        wanted: Heads to look at closely.
        example: The text whose attention is shown.
    """
    texts = measured_texts(captures)
    measures = measure(captures, texts, progress)
    chosen = chosen_heads(captures, measures, texts, wanted)
    has_statistics = has_softmax(captures.manifest)
    return [
        rows_section(measures),
        r2_section(measures),
        norms_section(measures),
        *([softmax_section(measures, softmax_means(captures.manifest))] if has_statistics else []),
        components_section(chosen),
        predictions_section(chosen),
        chosen_norms_section(chosen),
        attention_section(captures, chosen, texts, example),
        means_section(captures, chosen, texts),
    ]


def _page(captures: Captures, source: list[str], sections: Sequence[Section]) -> str:
    """The page.

    Args:
        captures: The capture.
        source: What ``Captures`` takes to open it.
        sections: In order.
    """
    model, text = shown_names(captures.settings)
    notes = captures.manifest["notes"]
    summary = bullets(describe_run(captures.manifest))
    if not captures.manifest["complete"]:
        summary += '<p class="warning">Not every text was read.</p>'
    if notes:
        summary += paragraph("Of this architecture:") + bullets("\n".join(notes))
    first = parse_head_name(captured_names(captures.manifest)[0])
    assert first is not None
    arguments = ", revision=".join(json.dumps(name, ensure_ascii=False) for name in source)
    head = f'{first[0]}, {first[1]}, "{first[2]}"'
    what = "head" if captures.heads else "moments"
    load = f"from qk_sniffer import Captures\n\n{what} = Captures({arguments}).{what}({head})"
    summary += f"<pre>{escape(load)}</pre>"
    versions = captures.manifest["versions"]
    footer = ", ".join(f"{name} {versions.get(name)}" for name in ("qk-sniffer", "transformers"))
    title = f"{describe_kinds(captures.manifest).capitalize()} of {model} on {text}"
    return render_page(title, summary, sections, footer)
