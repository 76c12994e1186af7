"""Weights of published models to ours and back: one module per family, each a list of moves.

Every key and shape must match.  What the keys do not show, above all the row order of an attention's
matrices, follows from the source that the caller declares; it is never guessed, since a wrong order loads
without an error and paints nearly the same.
"""
