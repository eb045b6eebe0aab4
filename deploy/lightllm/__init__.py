"""Modules that are imported under LightLLM's names: the root package searches this folder, too."""
