"""What lies on disk: models, configurations, weights, tokenizers, the hub, pictures."""
