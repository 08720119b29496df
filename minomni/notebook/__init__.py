"""Figures, checks and a player for the notebooks."""

from minomni.notebook import viz
from minomni.notebook.check import grade, same, show

__all__ = ["grade", "same", "show", "viz"]
