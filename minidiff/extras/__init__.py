"""What people do on top of the chapters."""
