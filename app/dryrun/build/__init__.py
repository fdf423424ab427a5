"""The job's model on the meta device: class, dtype, quantised layout, adapters."""
