"""The job's model on the meta device, in the order of a training script.

``model_config`` reads config.json, ``model`` builds the bare model of it, ``loading`` places its weights,
``quantizers/`` packs them, ``adapters`` adds PEFT's. ``prequantized`` says what becomes of a checkpoint that is stored
quantised.
"""
