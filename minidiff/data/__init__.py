"""What is learned from: scenes and captions, own pictures, random numbers by sample."""
