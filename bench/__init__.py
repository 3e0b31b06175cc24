"""r1.bench: one file a kernel family, and end to end; results are kept as JSON in bench/results."""
