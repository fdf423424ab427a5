"""The books: integers in, integers out. No torch, no files, no network, no clock."""
