"""What a caller meets: requests and their refusals, warnings, progress, settings."""
