"""The model's output, parsed into reasoning, content and tool calls."""
