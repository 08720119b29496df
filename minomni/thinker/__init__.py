"""2. Hears, sees, reads and writes text (checkpoint prefix `thinker.`)."""
