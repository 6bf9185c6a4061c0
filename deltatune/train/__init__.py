"""Training: transformers' Trainer with the adapters' schedules, backbones, and texts as batches."""
