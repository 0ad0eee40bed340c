"""Other formats and tools: the released reference weights."""
