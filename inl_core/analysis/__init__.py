"""Numbers about a recipe, a data set, a run or a checkpoint: what it will cost, what it holds, how fast it is.

In reading order: planning/ `inl plan` and the figures a run starts with; inspection.py `inl inspect`; parameters.py
`inl inspect-params` (timescales.py, ranks.py, weight_changes.py); watching.py `inl watch`; convergence/ `inl
convergence-report`; bench/ `inl bench`.
"""
