"""Whose step is run: a plain loop, the trainers, generation; and what follows a training."""
