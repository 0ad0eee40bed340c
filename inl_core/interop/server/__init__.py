"""An OpenAI-compatible server of one model: `inl serve`."""
