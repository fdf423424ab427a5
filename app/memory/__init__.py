"""A training step as a list of allocations and frees, and all that is read off it.

Integers in, integers out: no torch, no files, no network, no clock. Every size is an int of bytes.
"""
