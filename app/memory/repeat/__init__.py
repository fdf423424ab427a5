"""The log of a deep model from the log of a shallow one: each kind of layer is run once, and its events are repeated.

A stack of layers is a sequence of types. What a layer allocates and frees depends on its own type and its neighbours'
(nothing stands beyond the first and the last layer). So a short run that shows every layer type between every pair of
neighbours shows what each layer of the whole model does. :func:`expand` writes the log of the whole. Whether the model
really does that is for the caller to test: it compares the result, event for event, with a second run of another depth.

The steps, one module each:

- ``stacks``: which layers to run (:func:`shorten`), and which of them stands for which layer of the whole.
- ``ownership``: the events of a phase as chunks, each of one layer or of none.
- ``walks``: chunks as pieces: what stands as it is, and walks up or down a stack.
- ``layer_map``: the layer of the whole that is meant where the short run means one of its own, and its name.
- ``blocks``: the events of the whole, written for many layers at once.
- ``checks``: what must hold of any expanded run.
- ``expansion``: all of this in turn (:func:`expand`), and the comparison with a deeper run (:func:`growth_of`).
- ``as_log``: the result as entries or as arrays.
"""

from .expansion import Expansion, expand, growth_of, same
from .stacks import NotRepeatable, Stack, combination, inner_windows, shorten

__all__ = [
    "Expansion",
    "NotRepeatable",
    "Stack",
    "combination",
    "expand",
    "growth_of",
    "inner_windows",
    "same",
    "shorten",
]
