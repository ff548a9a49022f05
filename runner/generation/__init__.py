"""Text from a model: settings, prompts, streaming, side by side, and the chat."""
