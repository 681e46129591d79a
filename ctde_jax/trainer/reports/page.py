"""The frame of a report's page, and the elements of its sections.

Every text is escaped here, so class names cannot contain markup.
"""

from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from ctde_jax.trainer import picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""The page loads nothing, and runs no script."""


def document(heading: str, body: str) -> str:
    """Returns the whole page.

    Args:
        heading: Title of the page.
        body: Result of `fragment`.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{escape(heading)}</title>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def fragment(heading: str, summary: str, sections: Iterable[str]) -> str:
    """Returns the content of the page with its style, for the page and for notebooks.

    Args:
        heading: Heading of the report.
        summary: Line below the heading.
        sections: Results of `section`.
    """
    style = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    parts = [f"<style>\n{style}</style>", '<div class="ctde-report"><main>']
    parts.append(f"<header><h1>{escape(heading)}</h1>{paragraph(summary)}</header>")
    return "\n".join([*parts, *sections, "</main></div>"])


def section(heading: str, *parts: str) -> str:
    """Returns a section; parts are results of the functions below."""
    inside = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escape(heading)}</h2>\n{inside}\n</section>"


def paragraph(text: str) -> str:
    """Returns a paragraph in a quiet color."""
    return f"<p>{escape(text)}</p>"


def cards(values: Iterable[tuple[str, str, str]]) -> str:
    """Returns cards of large numbers: title, value, and a note below."""
    each = [
        f"<div><dt>{escape(title)}</dt><dd><strong>{escape(value)}</strong> "
        f"<small>{escape(note)}</small></dd></div>"
        for title, value, note in values
    ]
    return f'<dl class="cards">{"".join(each)}</dl>'


def table(
    caption: str, header: Sequence[str], rows: Iterable[Sequence[str]], kind: str = ""
) -> str:
    """Returns a table whose first column contains the names of the rows.

    Args:
        caption: Caption above the table.
        header: Names of the columns.
        rows: Cells of each row.
        kind: Class of the table in the style; "numbers" are aligned on the right.
    """
    body = [
        row_of([heading_cell(row[0], "row"), *(f"<td>{escape(cell)}</td>" for cell in row[1:])])
        for row in rows
    ]
    return framed(caption, [heading_cell(cell, "col") for cell in header], body, kind)


def heading_cell(text: str, scope: str) -> str:
    """Returns a cell that names its row (scope "row") or column ("col"); an empty one does not."""
    return f'<th scope="{scope}">{escape(text)}</th>' if text else "<td></td>"


def row_of(cells: Iterable[str]) -> str:
    """Returns a row of cells."""
    return f"<tr>{''.join(cells)}</tr>"


def framed(caption: str, header: Iterable[str], body: Iterable[str], kind: str = "") -> str:
    """Returns a table of cells and rows, which scrolls by itself if it is wider than the page."""
    rows = "\n".join(body)
    return (
        f'<div class="frame" role="region" aria-label="{escape(caption)}" tabindex="0">'
        f'<table class="{kind}"><caption>{escape(caption)}</caption>\n'
        f"<thead>{row_of(header)}</thead>\n<tbody>\n{rows}\n</tbody></table></div>"
    )


def folded(summary: str, content: str) -> str:
    """Returns content that is hidden until its summary is clicked."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def gallery(pictures: Iterable[tuple[str, str, Sequence[str]]]) -> str:
    """Returns pictures: the data URI, the title and the lines below it of each."""
    each = [
        f'<li><img src="{uri}" alt=""><strong>{escape(title)}</strong>'
        f"{''.join(f'<span>{escape(line)}</span>' for line in lines)}</li>"
        for uri, title, lines in pictures
    ]
    return f'<ul class="gallery">{"".join(each)}</ul>'


def figure(draw: Callable[[], "Figure"], name: str, label: str, caption: str = "") -> str:
    """Returns a figure.

    Args:
        draw: Returns the matplotlib figure.
        name: Name of the figure, unique in the page.
        label: Description for screen readers.
        caption: Text below the figure.
    """
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    drawing = f'<div role="img" aria-label="{escape(label)}">{picture.svg(draw, name)}</div>'
    return f"<figure>{drawing}{below}</figure>"


def figures(parts: Iterable[str]) -> str:
    """Returns figures next to each other, if there is room."""
    return f'<div class="figures">{"".join(parts)}</div>'
