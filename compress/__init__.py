"""From a dense model to a sparse + low-rank one, in PyTorch: solvers, budgets, calibration, the checkpoint format."""
