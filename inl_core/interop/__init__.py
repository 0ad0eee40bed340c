"""Other programs: released weights come in, models leave for transformers, lm-eval's tasks are run.

Only the command line imports this package.
"""
