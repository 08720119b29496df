"""Qwen2.5-Omni from scratch."""
