"""What scripts/bench_memory.py is made of: random models of any shape, and the steps that are measured on them."""
