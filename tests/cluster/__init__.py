"""A stand-in for a Slurm cluster of two nodes, and the job scripts that run on it."""
