"""Text -> tokens -> batches. The files, in the order in which data goes through them:

- `reading/`: sources (files, directories, stdin) -> documents. Long texts are split into several in `pieces.py`.
- `preparation/`: documents -> a data set on the disk. `prepare` in `stages.py` shows all steps on one page;
  `validation_split.py` decides which documents are for training and which for validation.
- `tokenizer.py`, with `special_text.py` (text never becomes special tokens) and `token_bytes.py` (bytes of each token).
- `encoding.py`: a document -> its tokens.
- `manifest.py`, `shard_check.py`: what a prepared data set holds, and whether that is still so.
- `dataset.py`: a data set -> one long stream of tokens.
- `loader.py`: the stream -> batches.

Use:
    manifest = prepare(settings, directory)
    dataset = TokenDataset.open(directory, "train")
    batch = BatchLoader(dataset, sequence_length=128, batch_size=16, seed=0).batch(step)
"""
