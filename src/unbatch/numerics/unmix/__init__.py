"""Unmixing: single examples out of the gradient of one dense layer, which mixes all examples of a batch.

The words of this folder. A *mixture* is that gradient in few coordinates; an example is a vector z [n] of them. Its *delta*
is the loss's derivative in its preactivations. Its *dual vector* q combines the gradient's columns to its delta alone: q
isolates the example. A *guess* is a rough z, a *start* makes guesses. To *polish* is to improve a guess on the one equation
that each example obeys, to *accept* is to tell which guesses became examples, and to *peel* is to subtract those and begin
again with a smaller mixture. A *pattern* says which neurons an example switches on.
"""
