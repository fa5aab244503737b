"""The page of a report: one HTML file that holds its pictures, for a light and a dark screen."""

import base64
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from string import Template

_PIXELS_PER_POINT = 0.6
"""Of the page for each of a wide picture, which is drawn for screens of high density."""


@dataclass(frozen=True)
class Picture:
    """One picture.

    Attributes:
        name: Of its file, without ending.
        caption: What it shows.
        light: PNG for a light page.
        dark: PNG for a dark page.
        is_wide: Whether it is scrolled on a narrow screen and not made smaller.
    """

    name: str
    caption: str
    light: bytes
    dark: bytes
    is_wide: bool = False

    def html(self) -> str:
        """A figure with the picture inside."""
        width, height = struct.unpack(">II", self.light[16:24])
        light, dark = (base64.b64encode(png).decode() for png in (self.light, self.dark))
        wide = f' class="wide" style="--height: {_PIXELS_PER_POINT * height:.0f}px"' * self.is_wide
        caption = escape(self.caption)
        return f"""\
<figure>
<div{wide}><picture>
<source media="(prefers-color-scheme: dark)" srcset="data:image/png;base64,{dark}">
<img src="data:image/png;base64,{light}" width="{width}" height="{height}" alt="{caption}">
</picture></div>
<figcaption>{caption}</figcaption>
</figure>"""


@dataclass
class Section:
    """A heading, what its pictures show, and the pictures."""

    title: str
    text: str
    pictures: list[Picture] = field(default_factory=list)

    def html(self) -> str:
        """The section; its text may have code between backticks."""
        pictures = "\n".join(picture.html() for picture in self.pictures)
        grid = "" if all(picture.is_wide for picture in self.pictures) else ' class="pictures"'
        return f"<h2>{escape(self.title)}</h2>\n{paragraph(self.text)}\n<div{grid}>\n{pictures}\n</div>"


def paragraph(text: str) -> str:
    """A paragraph, with code between backticks."""
    return f"<p>{_with_code(text)}</p>"


def bullets(markdown: str) -> str:
    """The list that lines of ``- text`` are, with code between backticks."""
    items = "".join(
        f"<li>{_with_code(line.removeprefix('- '))}</li>\n" for line in markdown.splitlines()
    )
    return f"<ul>\n{items}</ul>"


def render_page(title: str, summary: str, sections: Sequence[Section], footer: str) -> str:
    """The page.

    Args:
        title: Plain text.
        summary: HTML below the title.
        sections: In order.
        footer: Plain text.
    """
    template = Template((files(__package__) / "page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(title),
        summary=summary,
        sections="\n".join(section.html() for section in sections),
        footer=escape(footer),
    )


def _with_code(text: str) -> str:
    parts = escape(text).split("`")
    return "".join(f"<code>{p}</code>" if number % 2 else p for number, p in enumerate(parts))
