"""`inl bench`: candidates measured by turns, each in a process of its own (docs/bench.md says how to read the figures).

In reading order: settings.py what is measured; choosing.py from the command line's words to candidates; comparison.py
the rounds and their figures; worker.py the process of one candidate; work.py, inl_work.py and llama_work.py what it
repeats; parts.py which part of the model the time went to; measuring.py medians, memory, the machine; ceiling.py the
matrix product that speeds are held against; loading.py the data loader; startup.py the time until the first step.
"""
