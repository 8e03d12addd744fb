"""minidiff: Stable Diffusion 3.5 from scratch, as a book and as a package."""
