"""Decoding a text that is known, in the very steps that the model would take, without the model's passes.

What a drafter proposes depends on the accepted text before it, on how many candidates it is asked for, and on
nothing else. So a model runs once over a known text, with slots behind every token of the answer (`States`); the
drafter's own code drafts from these states behind each token, once (`Proposals`); and `KnownText` takes the model's
place in the decode loop, where everything else runs as ever: a row picks the token of the text behind its position.
Drafts off the path of the text have no states, and need none, because they are rejected.

The text must be the model's own greedy answer. Steps are then those of decoding, up to rounding: a pass over other
rows may change which of two almost equal candidates comes first.

Legend: T tokens of a text, A of them the answer's, D hidden size, n tapped layers, k slots, R rows, V vocabulary.
"""
