"""What is drawn besides text to image: image to image, guidance, previews."""
