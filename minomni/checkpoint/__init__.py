"""Model folders in the release's layout: read, check, write."""
