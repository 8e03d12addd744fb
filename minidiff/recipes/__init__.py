"""What is trained: the recipe and its stages, and fine-tuning."""
