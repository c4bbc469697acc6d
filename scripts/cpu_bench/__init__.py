"""What scripts/bench_cpu.py is made of: one layer in every engine, and one model in several, timed in turns."""
