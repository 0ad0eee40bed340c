"""Text -> tokens -> batches.

manifest = prepare(settings, directory)
dataset = TokenDataset.open(directory, "train")
batch = BatchLoader(dataset, sequence_length=128, batch_size=16, seed=0).batch(step)
"""
