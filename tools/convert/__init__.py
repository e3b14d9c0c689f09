"""Published weights become runs: `python -m tools.convert mimi|pocket-tts|qwen3|llama IN ...`."""
