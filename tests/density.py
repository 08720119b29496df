"""AST nodes per code line of each file and of all: python tests/density.py [FILE ...]

Without files it counts the package. Blank lines, comments and docstrings are no code lines. Admired
code bases have 6 to 10 nodes per line.
"""

import ast
import io
import sys
import tokenize
from pathlib import Path

NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def docstring_lines(tree: ast.AST) -> set[int]:
    """The numbers of the lines that docstrings take."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)
        if documented and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            lines |= set(range(docstring.lineno, docstring.end_lineno + 1))
    return lines


def count(path: Path) -> tuple[int, int]:
    """AST nodes and code lines of a file."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    nodes = sum(1 for _ in ast.walk(tree))
    return nodes, len(lines - docstring_lines(tree))


def main(paths: list[str]) -> None:
    if not paths:
        package = Path(__file__).parents[1] / "minomni"
        paths = [str(path) for path in sorted(package.rglob("*.py"))]
    all_nodes = 0
    all_lines = 0
    for path in paths:
        nodes, lines = count(Path(path))
        print(f"{nodes / max(lines, 1):5.1f} {lines:6} {path}")
        all_nodes += nodes
        all_lines += lines
    print(f"{all_nodes / max(all_lines, 1):5.1f} {all_lines:6} all")


if __name__ == "__main__":
    main(sys.argv[1:])
