"""The Hub: config.json at a pinned commit, weights counted from headers, search."""
