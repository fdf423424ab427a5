"""A training script of the user's own, run unmodified on a card that is not there.

:mod:`.run` starts a process (:mod:`.script_process`) in which ``cuda`` is the dry card: tensors there have shapes and
no storage, :mod:`.script_tracker` records what they take, and :mod:`.answer` says the same of it as an estimate does.
"""
