"""HTTP processes: OpenAI and LightLLM routes over the engine. Start at `app.py`."""
