"""The `inl` command line: the only part that prints, reads the environment for colours and terminals, or exits.

In reading order: app.py which commands there are; commands/ one module for each; options.py and loading.py what they
share; console.py, progress.py and streams.py how they speak, and memory.py what they say when memory runs out. The
modules that end in _view.py show the results of one command each, sizes_page.py those of `inl plan --all-sizes`.
"""
