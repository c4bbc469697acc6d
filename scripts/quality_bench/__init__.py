"""What scripts/bench_quality.py is made of: its peer, and how its records are shown."""
