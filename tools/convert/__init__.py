"""Start from published weights: `python -m tools.convert mimi|pocket-tts|qwen3|llama IN --out RUN`."""
