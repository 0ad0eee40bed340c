"""`inl convergence-report`: what the integrators of a trained model do on real text (docs/convergence-report.md).

In reading order: report.py measures a checkpoint and writes the files; collect.py follows every layer's states;
layer_statistics.py what is counted of them; stability.py the laws of one step; sketch.py means and percentiles of a
stream; sample.py the tokens whose trajectories are kept; iterations.py bits per byte by iterations, without single
layers and under early stopping; verdict.py the word for a layer; markdown.py and figures.py what is written for people.
"""
