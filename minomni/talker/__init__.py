"""3. Turns thoughts into speech codes (checkpoint prefix `talker.`)."""
