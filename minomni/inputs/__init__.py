"""1. Files and messages become token ids, mels and patches."""
