"""The exercises of the notebooks: which cells hold one, and how such a cell looks when it is
solved.
"""

import ast
from pathlib import Path

SOLUTIONS = Path(__file__).parents[1] / "notebooks" / "solutions"


def stubs(source: str) -> list[str]:
    """Names of the functions that a cell leaves to its reader."""
    return [
        node.name
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and is_stub(node)
    ]


def is_stub(function: ast.FunctionDef) -> bool:
    """Whether the body is nothing but `...`, with or without a docstring."""
    body = function.body
    if ast.get_docstring(function) is not None:
        body = body[1:]
    return [ast.unparse(line) for line in body] == ["..."]


def solved(source: str, number: str) -> str:
    """The source of a cell of notebook `number` with its stubs written over, as a reader would."""
    cell, answers = (
        ast.parse(source),
        ast.parse((SOLUTIONS / f"{number}.py").read_text(encoding="utf-8")),
    )
    found = {node.name: node for node in answers.body if isinstance(node, ast.FunctionDef)}
    left = stubs(source)
    cell.body = [
        found[node.name] if getattr(node, "name", "") in left else node for node in cell.body
    ]
    return ast.unparse(cell)
