"""One file per compression method: each takes a weight, its calibration statistics and a budget."""
