"""kvpress on statistics of queries: ours, and those that it collects itself."""
