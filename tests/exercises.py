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
        if isinstance(node, ast.FunctionDef) and ast.unparse(node.body) == "..."
    ]


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
