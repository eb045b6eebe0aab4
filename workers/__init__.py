"""One tensor-parallel rank: weights, KV bytes, the step. Start at `step.py`."""
