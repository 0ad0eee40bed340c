"""The `inl` command line: the only part that prints, reads the environment for looks, or exits."""
