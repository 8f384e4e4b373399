"""Long measurements, run apart from the tests: ``python -m benchmarks --help``."""
