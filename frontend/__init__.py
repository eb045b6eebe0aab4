"""HTTP processes: OpenAI, Anthropic and LightLLM routes over the engine. Start at `app.py`."""
