"""Live sources: folders, mail and feeds flow into trees while people work."""
