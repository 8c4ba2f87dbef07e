"""What a session sees, as a web page: live, or as a file of what has been. ``python -m megactx.apps.view``."""
