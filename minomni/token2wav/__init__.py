"""4. Codes to mel, and mel to waveform (checkpoint prefix `token2wav.`)."""
