"""Files and messages to token ids, mels and patches."""
