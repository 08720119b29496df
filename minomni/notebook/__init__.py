"""Pictures, checks and a player for the notebooks."""
