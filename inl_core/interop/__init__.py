"""Other formats and tools: released reference weights, Hugging Face, lm-eval. Nothing is here yet."""
