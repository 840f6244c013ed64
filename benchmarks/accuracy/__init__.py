"""Accuracy on real data: experiments, their runs and result files, and the tables of these."""
