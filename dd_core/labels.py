"""What data and stages must agree on about labels; imports nothing, since readers of data need it too."""

UNLABELLED = -1
"""The label of an image that has no class, or none that is known; no loss is taken on it."""
