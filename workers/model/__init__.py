"""The model, read top to bottom in `glm4_moe_lite.py`."""
