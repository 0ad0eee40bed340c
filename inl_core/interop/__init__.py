"""Other programs' files: reference/ brings in released weights, huggingface/ makes our models known to transformers.

Only the command line imports this package.
"""
