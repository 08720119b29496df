"""Model folders in the layout of the official release: reading, checking and writing."""
