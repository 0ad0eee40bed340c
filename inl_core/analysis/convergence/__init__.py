"""`inl convergence-report`: what the dynamics of a trained model do on real text (docs/convergence-report.md).

In reading order: report.py measures a checkpoint and writes the files; collect.py follows the states of every layer, or
of a stream; layer_statistics.py what is counted of them, stream_statistics.py what else of a stream; stability.py the
laws of one step; sketch.py means and percentiles of numbers that arrive in parts; sample.py the tokens whose
trajectories are kept; iterations.py bits per byte by iterations, without single layers, steps and terms, and under
early stopping; verdict.py the word for a layer; markdown.py and figures.py what is written for people,
stream_markdown.py and stream_figures.py the same of a stream.
"""
