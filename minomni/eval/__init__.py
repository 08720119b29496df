"""Reports, ablations and benchmarks."""
