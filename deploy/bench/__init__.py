"""Benchmarks that users run: `glimmer bench ...`. Each prints numbers with where they came from."""
