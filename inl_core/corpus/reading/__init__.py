"""From what the user named to documents. The files, in the order in which text goes through them:

- `sources.py`: the names of files, directories, globs, stdin and built-in corpora -> the list of files to read.
- `paths.py`: home directories, globs, links, and file names that are not UTF-8.
- `formats.py`: which format a file has, told from its name or from its first bytes.
- `compression.py`: a file, packed by gzip or zstd perhaps -> its bytes.
- `text.py`, `jsonl.py`, `parquet.py`, `builtin.py`: a reader for each format.
- `rows.py`: what a document is and what a bad row is, and how a row of JSON Lines or Parquet becomes one of them.
- `pieces.py`: a long text is split into several documents.
- `whole_sources.py`: sources read into memory at once, for commands that measure or continue a text.
"""
