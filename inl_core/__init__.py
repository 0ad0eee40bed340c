"""INL-LLM: recipe -> corpus -> model -> training -> inference -> analysis; each imports what stands before it."""
