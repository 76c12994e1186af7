"""Weights of published models to ours and back: one file a family, each a list of moves.

Names and shapes are followed to the last key.  What no key shows, above all the order of the rows of an
attention, follows from the source that the caller declares; it is never guessed, for a wrong order loads
without complaint and paints nearly the same.
"""
