"""One file for each training stage."""
