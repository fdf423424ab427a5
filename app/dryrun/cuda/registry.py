"""The registry of kernel rules: which function records what an operator allocates on a GPU."""

from __future__ import annotations

KERNELS: dict = {}


"""Operator overload to ``handler(tracker, func, args, kwargs, place) -> outputs``."""


def kernel(*overloads):
    def register(handler):
        for overload in overloads:
            KERNELS[overload] = handler
        return handler

    return register
