"""`inl report` and `inl compare`: what runs and their models say, as parts that a page, --json and a terminal share.

In reading order: parts.py what a report is made of; runs.py a run as its files tell it; training.py curves and equal
budgets of one or several runs; recipes.py what their recipes differ in; tasks.py scores on lm-eval's tasks;
history.py what a run learned over training; examination.py what its newest checkpoint does on a text: probe.py looks
at every token, and forces.py, tokens.py, paths.py and convergence.py make parts of that and of the convergence
report; charts.py the Vega-Lite specifications; page.py and page.html.jinja the one HTML file, with the libraries in
assets/ inside.
"""
