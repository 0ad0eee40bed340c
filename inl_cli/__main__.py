"""`python -m inl_cli` is `inl`, so `torchrun ... -m inl_cli train RECIPE` takes the same path as `inl train RECIPE`."""

from inl_cli.app import main

if __name__ == "__main__":
    main()
