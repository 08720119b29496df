"""Text, audio, images and video to hidden states and text (checkpoint prefix `thinker.`)."""
