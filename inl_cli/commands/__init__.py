"""The commands: each a plain typed function that imports the core inside its body.

In the order in which one uses them: recipe.py, data.py, plan.py, train.py, evaluate.py, generate.py, inspect.py,
convergence.py, bench.py, import_reference.py.
"""
