"""The shapes that diagrams consist of, as SVG markup: boxes, arrows, squares, words.

All numbers are pixels. x and y are the upper left corner of a shape.
"""

from html import escape

from minomni.plot import COLORS, PALE

INK = "#222222"
EMPTY = "#f2f2f2"  # fill of a box that is not lit
SIDE = 30  # of a square, and the height of a box


def drawing(width: int, height: int, parts: list[str]):
    """A diagram. JupyterLab shows its text in its place until the reader has run the cell."""
    from IPython.display import SVG

    class Diagram(SVG):
        def __repr__(self):
            return "(a diagram: run this cell to see it)"

    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
    head += f'width="{width}" height="{height}" font-family="sans-serif" font-size="12">'
    tip = '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
    tip += f'orient="auto"><path d="M0 0 8 4 0 8z" fill="{INK}"/></marker>'
    page = f'<rect width="{width}" height="{height}" fill="white"/>'
    return Diagram("".join([head, f"<defs>{tip}</defs>", page, *parts, "</svg>"]))


def width_of(words: str) -> float:
    """Width of a box that holds these words."""
    return 16 + 6.8 * len(words)


def arrow(begin: tuple[float, float], end: tuple[float, float], dashed: bool = False) -> str:
    """An arrow from one point to another."""
    (x1, y1), (x2, y2) = begin, end
    line = f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{INK}" '
    line += 'stroke-dasharray="5 3" ' if dashed else ""
    return line + 'marker-end="url(#tip)"/>'


def box(x: float, y: float, width: float, words: str, lit: bool = False) -> str:
    """An operation; lit: in color."""
    fill = COLORS["audio"] if lit else EMPTY
    shape = f'<rect x="{x:g}" y="{y}" width="{width:g}" height="{SIDE}" rx="4" fill="{fill}" '
    return shape + f'stroke="{INK}"/>' + text(x + width / 2, y + 19, words)


def tensor(x: float, y: float, words: str) -> str:
    """An arrow as long as a box, with the name of a tensor above it."""
    width = width_of(words)
    line = arrow((x + 1, y + 15), (x + width - 1, y + 15))
    return line + text(x + width / 2, y + 7, words, size=11)


def square(x: float, y: float, words: str) -> str:
    """One number of a table."""
    shape = f'<rect x="{x:g}" y="{y:g}" width="{SIDE}" height="{SIDE}" fill="{EMPTY}" '
    return shape + f'stroke="{PALE}"/>' + text(x + 15, y + 19, words)


def frame(x: float, y: float, width: float, height: float) -> str:
    """A thick border around what is drawn inside."""
    corner = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" '
    return corner + f'fill="none" stroke="{INK}" stroke-width="2"/>'


def sheet(x: float, y: float, side: float, fill: str) -> str:
    """A square area with a thin border."""
    shape = f'<rect x="{x:g}" y="{y:g}" width="{side:g}" height="{side:g}" '
    return shape + f'fill="{fill}" stroke="{INK}" stroke-width="0.6"/>'


def circle(x: float, y: float, radius: float) -> str:
    """A white disc around a point."""
    return f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" fill="white" stroke="{INK}"/>'


def line(x1: float, y1: float, x2: float, y2: float, color: str = INK) -> str:
    """A line from one point to another."""
    ends = f'x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}"'
    return f'<line {ends} stroke="{color}"/>'


def text(x: float, y: float, words: str, size: int = 12) -> str:
    """Words whose middle is at x, on the base line y."""
    style = f'font-size="{size}" text-anchor="middle" fill="{INK}"'
    return f'<text x="{x:g}" y="{y}" {style}>{escape(words)}</text>'
