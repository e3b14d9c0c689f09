"""Speed: one sub-command per question, `python -m tools.bench vae|heads|sample|audiocalm`."""
