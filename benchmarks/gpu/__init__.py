"""The items of benchmarks/gpu_report.py: a module a part, and what they share. Nothing here is run by itself."""
