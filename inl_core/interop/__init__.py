"""Other programs' files: reference/ brings in released weights. Only the command line imports this package."""
