"""What the model writes, taken apart: reasoning, content and tool calls, from token ids."""
