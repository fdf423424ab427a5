"""The page and the HTTP API, and the processes that trace for them."""
