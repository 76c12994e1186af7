"""What the data and the stages must agree on about labels; light, since readers of data import it too."""

UNLABELLED = -1
"""The label of an image that has no class, or none that is known; no loss is taken on it."""
