"""Other programs: released weights, transformers, lm-eval's tasks, OpenAI's clients.

Only the command line imports this package.
"""
