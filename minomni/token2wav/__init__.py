"""4. Turns speech codes into mel and mel into sound (checkpoint prefix `token2wav.`)."""
