"""A conversation: prompt -> text and speech, streamed; listening while it is spoken to."""
