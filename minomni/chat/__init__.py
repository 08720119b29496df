"""Conversations: streamed replies in text and speech, and sessions that prefill during input."""
