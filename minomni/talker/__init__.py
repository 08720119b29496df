"""3. Generates speech codes from hidden states and text (checkpoint prefix `talker.`)."""
