"""The commands of `python -m minomni`, one module per group."""
