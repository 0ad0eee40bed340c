"""The Python API that the three INL-LLM documents show, on this project's own model, losses and cycles.

In reading order: layer.py the integrator alone; regression.py a model around it; language_model.py, creation.py and
generation.py language models, how they are made and how they continue ids; losses.py, cycles.py and convergence.py
what trains and measures them; arguments.py and building.py what all constructors share.

- The package stands above model, training and inference, which know nothing of it.
- Everything here is importable from `inl_core` directly; docs/python-api.md is the guide, and docs/model.md, "The three
  documents", says what the documents are.
"""
