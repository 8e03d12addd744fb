"""What chapters share: the journey, exercises, interactive figures, the style."""
