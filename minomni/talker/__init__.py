"""Hidden states and text to speech codes (checkpoint prefix `talker.`)."""
