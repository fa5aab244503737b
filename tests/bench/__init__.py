"""The benchmark, a part in each module; ``python -m bench`` runs it."""
