"""Facts about models and GPUs, as tables with their sources. No torch, no files, no network."""
