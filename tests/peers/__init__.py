"""``sniff`` beside nnsight and TransformerLens; ``make peers`` runs it."""
