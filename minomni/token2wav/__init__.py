"""Speech codes to mel to waveform (checkpoint prefix `token2wav.`)."""
