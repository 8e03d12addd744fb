"""What chapters share: the journey, exercises, figures that come alive, the style."""
