"""Training: losses, the loop, stages, recipes, runs, fine-tuning."""
